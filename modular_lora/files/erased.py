"""What concept erasers publish besides LoRA files, told by the names of the tensors.

A name says less than one would like: several methods write the same layout, and then all of them are named. The loader
refuses these files with their names (names.py); `lora convert-safety` turns them into safety LoRAs (training/convert).
Sources of the layouts: the published code of each method (ESD, UCE, OCE, SPEED, Concept Ablation, RECE, TRCE, MACE,
SafetyDPO, ResAlign, AdvUnlearn, Safe-CLIP, GLoCE), as it saves its results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

COMMAND = "python3 run.py lora convert-safety"
_UNET = re.compile(
    r"((down_blocks|up_blocks)\.\d+\.(resnets|attentions|downsamplers|upsamplers)|mid_block\.(resnets|attentions)"
    r"|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|class_embedding)\..*(weight|bias)"
)
_COMPVIS = re.compile(r"(?:model\.)?(?:diffusion_model\.)?(input_blocks|middle_block|output_blocks|time_embed)\..*")
_ATTENTION = re.compile(r".*\.(attn[12])\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)")
_FLUX_TEXT = re.compile(r"(context_embedder|time_text_embed\.text_embedder\.linear_[12])\.(weight|bias)")
_FLUX = re.compile(r"(single_)?transformer_blocks\.\d+\..*\.(weight|bias)")
_CLIP = re.compile(r"(text_model|text_projection|transformer\.text_model|transformer\.resblocks)\..*")
_NESTED = re.compile(r"(unet|text_encoder)\..+")
_GLOCE = "lora_gloce"


@dataclass(frozen=True)
class Found:
    """The names of a file's tensors, and what else is known of it.

    Attributes:
        names: of all tensors.
        pickled: whether PyTorch's own format holds them; None where that is not known.
        dtypes: safetensors' or PyTorch's names of their types in capitals: "BF16", "F32", ...
    """

    names: Collection[str]
    pickled: bool | None = None
    dtypes: Collection[str] = ()
    attention: frozenset[tuple[str, str]] = field(init=False)  # ("attn2", "to_k") of every attention tensor
    all_attention: bool = field(init=False)

    def __post_init__(self) -> None:
        places = [_ATTENTION.fullmatch(name) for name in self.names]
        object.__setattr__(self, "attention", frozenset((one[1], one[2]) for one in places if one))
        object.__setattr__(self, "all_attention", bool(places) and all(places))

    def only(self, *attention: tuple[str, str]) -> bool:
        """Whether the tensors are those of these attention layers and no others, each of them there."""
        return self.all_attention and self.attention == frozenset(attention)

    def all(self, pattern: re.Pattern[str]) -> bool:
        return bool(self.names) and all(pattern.fullmatch(name) for name in self.names)

    def any(self, pattern: re.Pattern[str]) -> bool:
        return any(pattern.fullmatch(name) for name in self.names)


@dataclass(frozen=True)
class Layout:
    """A way in which erased weights are published.

    Attributes:
        what: what the file is, in words.
        methods: which methods write it; all of them where they cannot be told apart.
        whole: whether it is a whole model, which may as well be one that nobody erased anything from.
        fits: whether a file has it.
    """

    what: str
    methods: tuple[str, ...]
    fits: Callable[[Found], bool] = field(repr=False)
    whole: bool = False
    convertible: bool = True

    @property
    def named(self) -> str:
        *most, last = self.methods
        return f"{', '.join(most)} or {last}" if most else last


_KEYS, _VALUES = ("attn2", "to_k"), ("attn2", "to_v")
LAYOUTS = (  # the first that fits
    Layout(
        "gates of an eraser that acts by a learned gate on its own forward",
        ("GLoCE",),
        lambda f: any(name.startswith(_GLOCE) for name in f.names),
        convertible=False,
    ),
    Layout(
        "changed weights of a U-Net and its text encoder in one file",
        ("Concept Ablation",),
        lambda f: f.all(_NESTED) and any(name.startswith("unet.") for name in f.names),
    ),
    Layout("cross-attention values of a U-Net", ("SPEED",), lambda f: f.pickled is True and f.only(_VALUES)),
    Layout("cross-attention values of a U-Net", ("OCE", "SPEED"), lambda f: f.only(_VALUES)),
    Layout(
        "cross-attention keys and values of a U-Net in bf16",
        ("ESD-x-strict",),
        lambda f: f.only(_KEYS, _VALUES) and set(f.dtypes) == {"BF16"},
    ),
    Layout("cross-attention keys and values of a U-Net", ("UCE", "ESD-x-strict"), lambda f: f.only(_KEYS, _VALUES)),
    Layout(
        "cross-attention layers of a U-Net",
        ("ESD-x",),
        lambda f: f.all_attention and {kind for kind, _ in f.attention} == {"attn2"},
    ),
    Layout(
        "self-attention layers of a U-Net",
        ("ESD-selfattn",),
        lambda f: f.all_attention and not f.only() and {kind for kind, _ in f.attention} == {"attn1"},
    ),
    Layout(
        "layers of a U-Net without its cross-attention",
        ("ESD-u",),
        lambda f: f.all(_UNET) and "attn2" not in {kind for kind, _ in f.attention},
    ),
    Layout("text embedders of a Flux transformer", ("UCE", "OCE"), lambda f: f.all(_FLUX_TEXT)),
    Layout(
        "layers of a Flux transformer",
        ("ESD",),
        lambda f: f.all(_FLUX),
    ),
    Layout(
        "a whole U-Net as diffusers names it",
        ("RECE", "ACE", "ResAlign", "AdvUnlearn's baselines", "STEREO"),
        lambda f: f.pickled is True and f.all(_UNET),
        whole=True,
    ),
    Layout(
        "a whole U-Net as diffusers names it",
        ("TRCE", "SafetyDPO", "MACE", "ESD", "RECE"),
        lambda f: f.all(_UNET) and f.any(re.compile(r"conv_in\..*")),
        whole=True,
    ),
    Layout("layers of a U-Net", ("ESD",), lambda f: f.all(_UNET)),
    Layout(
        "a whole model as CompVis names it",
        ("ESD's first code", "SalUn", "Receler", "ANT"),
        lambda f: f.any(_COMPVIS),
        whole=True,
    ),
    Layout("a whole CLIP text encoder", ("AdvUnlearn", "Safe-CLIP"), lambda f: f.any(_CLIP), whole=True),
)
PIPELINE = Layout(
    "a diffusers pipeline folder", ("TRCE", "SafetyDPO", "MACE", "WhenAreConceptsErased"), lambda f: False, whole=True
)


def recognise(names: Iterable[str], pickled: bool | None = None, dtypes: Collection[str] = ()) -> Layout | None:
    """The layout of a file by the names of its tensors, None where it is none of them."""
    found = Found(tuple(names), pickled, dtypes)
    return next((layout for layout in LAYOUTS if layout.fits(found)), None)


def remedy(layout: Layout, name: str) -> str:
    """What somebody does with a file of this layout who wants a safety LoRA."""
    if not layout.convertible:
        return "no LoRA can do that: use another eraser's file, or train a safety LoRA (lora train-safety)"
    return f'make a safety LoRA of it: {COMMAND} "{name}" --base W0 --output safety.safetensors'
