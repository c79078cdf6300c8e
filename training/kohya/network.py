"""sd-scripts' ``--network_module``: its own LoRA network, with safety LoRAs beside it and never in it.

sd-scripts imports this module in its own process and calls `create_network`. What comes back is the network of the
checkout's ``networks.lora`` (or ``lora_flux``, ``lora_sd3``, ...), with what the guard adds: the safety LoRAs'
tensors in a plain object that no optimizer, state dict or forward ever sees, the projection after every optimizer
step, an initialisation of its own, refusals, and metadata. ``--network_args`` of this module are the fields of
kohya_checks.Settings; all others go to the wrapped network.

A safety LoRA is read by modular_lora.files, never by ``networks.lora``: loading a file there extends a list of the
class, and every network made after it in the same process gets convolutions that nobody asked for.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...modular_lora.errors import GuardError
from ...modular_lora.files.reader import LoraFile, LoraLayer, read_lora
from ...modular_lora.files.scales import check_scale
from ...modular_lora.util import atomic
from ..contamination import check_base, known_bases
from ..projection import bases, project, residual
from ..seeds import role_seed
from . import checks
from .checks import STATE, Settings
from .preview import Branch, attached, find_modules

_TARGETS = {"cross-attention": re.compile(r"_attn2_"), "attention": re.compile(r"_attn[12]_")}
STEPS = "train_state.json"  # in a state of sd-scripts
_NETWORKS: weakref.WeakSet[_Guarded] = weakref.WeakSet()  # of this process; the launcher's previews ask for them


@dataclass(frozen=True)
class Architecture:
    """Which of the checkout's network modules trains a denoiser, and what it calls its text encoders."""

    module: str
    text: tuple[str, ...]  # prefixes, in the order of the script's list
    alone: str = "lora_te"  # prefix where there is one text encoder
    renamed: tuple[tuple[str, str], ...] = ()  # parts of its layers' names, and what ComfyUI calls them

    def name(self, name: str) -> str:
        """A layer's name as ComfyUI loads it."""
        for theirs, other in self.renamed:
            name = name.replace(theirs, other)
        return name


_MLP = ((1, 0), (2, 2))  # the layers of Hunyuan Image's MLPs, and their places in ComfyUI's
ARCHITECTURES: dict[str, Architecture] = {  # class of the denoiser in the checkout
    "UNet2DConditionModel": Architecture("networks.lora", ("lora_te1", "lora_te2")),
    "SdxlUNet2DConditionModel": Architecture("networks.lora", ("lora_te1", "lora_te2")),
    "Flux": Architecture("networks.lora_flux", ("lora_te1", "lora_te3"), "lora_te1"),
    "MMDiT": Architecture("networks.lora_sd3", ("lora_te1", "lora_te2", "lora_te3"), "lora_te1"),
    "NextDiT": Architecture("networks.lora_lumina", ("lora_te",)),
    "Anima": Architecture("networks.lora_anima", ("lora_te",)),
    "HYImageDiffusionTransformer": Architecture(
        "networks.lora_hunyuan_image",
        ("lora_te1", "lora_te2"),  # neither is ever trained
        renamed=(
            *((f"_{part}_mlp_fc{layer}", f"_{part}_mlp_{place}") for part in ("img", "txt") for layer, place in _MLP),
            ("_mod_linear", "_mod_lin"),
            ("_modulation_linear", "_modulation_lin"),
        ),
    ),
}


@dataclass(eq=False)
class Held:
    """What a network carries beside its own weights."""

    settings: Settings
    module: str  # the wrapped network module
    safety: tuple[LoraFile, ...]
    branches: list[Branch]  # the safety LoRAs, for previews
    contaminated: str  # what the base carries, where that was overridden
    bases: dict[str, Tensor] = field(default_factory=dict)  # layer -> Q (in·k·k, q), float32
    initialisation: str = ""  # role:seed
    record: dict[str, str] = field(default_factory=dict)  # what a saved training state must agree with
    state: Path = Path()  # folder and name that states are called after


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The wrapped network with the guard's part (sd-scripts' contract); GuardError where something does not fit."""
    settings, rest = Settings.take(kwargs)
    architecture = find_architecture(unet)
    held = _hold(settings, architecture, unet, text_encoder)
    network = importlib.import_module(architecture.module).create_network(
        multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=neuron_dropout, **rest
    )
    if network is None:
        raise GuardError(f"{architecture.module} made no network of {rest}: correct --network_args.")
    _narrow(network, settings.target)
    for lora in _loras(network):  # before they are put in: a file then has these names, in both directions
        lora.lora_name = architecture.name(lora.lora_name)
    network.__class__ = type(f"Guarded{type(network).__name__}", (_Guarded, type(network)), {})
    object.__setattr__(network, "held", held)
    _NETWORKS.add(network)
    return network


def create_network_from_weights(*args: Any, **kwargs: Any) -> None:
    """Refused: sd-scripts calls it for ``--base_weights``, before it merges them, and for ``--dim_from_weights``."""
    raise GuardError(
        "--base_weights merges LoRAs into W0, and a LoRA trained on that is no longer detached; --dim_from_weights "
        "makes the network from a file: leave both out and give --network_dim.",
        code="kohya.merges",
    )


def find_architecture(unet: nn.Module) -> Architecture:
    """By the denoiser's class in the checkout; GuardError for one that this module does not know."""
    for cls in type(unet).__mro__:
        if cls.__name__ in ARCHITECTURES:
            return ARCHITECTURES[cls.__name__]
    raise GuardError(
        f"{type(unet).__name__}: this network module knows {', '.join(ARCHITECTURES)}: train this family with "
        "sd-scripts' own network module, without a guard.",
        code="kohya.family",
    )


@contextmanager
def previewing() -> Iterator[None]:
    """The safety LoRAs of every network of this process on its layers, taken off again in reverse order."""
    with ExitStack() as stack:
        for network in list(_NETWORKS):
            stack.enter_context(attached(network.held.branches))
        yield


def record_state(folder: str | Path) -> None:
    """Beside a training state that sd-scripts saved: what it was trained on, asked for when it is resumed."""
    for network in list(_NETWORKS):
        atomic.write(Path(folder) / STATE, json.dumps(network.held.record, indent=1) + "\n")


def before_step() -> None:
    """Called before every forward; the launcher puts its own here."""


def keep_state(save: Callable[[str], object]) -> None:
    """A training state between two steps, named as sd-scripts names one, written beside and renamed.

    sd-scripts writes the number of the step that it is in plus one, as its own states are saved at the end of one;
    before a step that is one too many.
    """
    for network in list(_NETWORKS):
        target = network.held.state
        part = target.with_name(f".{target.name}.part-state")
        shutil.rmtree(part, ignore_errors=True)
        save(str(part))
        counted = part / STEPS
        if not counted.is_file():  # an sd-scripts that could not tell either where to go on
            shutil.rmtree(part, ignore_errors=True)
            return
        steps = json.loads(counted.read_text(encoding="utf-8"))
        steps["current_step"] -= 1
        counted.write_text(json.dumps(steps), encoding="utf-8")
        place = target.with_name(f"{target.name}-step{steps['current_step']:08d}-state")
        atomic.replace_folder(part, place)


if TYPE_CHECKING:

    class _Lora(nn.Module):
        """A LoRA module of sd-scripts, as far as we know it."""

        lora_name: str
        lora_dim: int
        lora_down: nn.Module
        lora_up: nn.Module
        scale: float

    class _Network(nn.Module):
        """The network of one of its modules, likewise."""

        text_encoder_loras: list[_Lora] | None
        unet_loras: list[_Lora] | None

        def apply_to(self, text_encoder: Any, unet: nn.Module, *args: Any, **kwargs: Any) -> None: ...
        def load_weights(self, file: str) -> Any: ...
        def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None: ...

else:
    _Network = object  # the wrapped class comes after ours (`create_network`)


class _Guarded(_Network):
    """Goes before the wrapped network's class."""

    held: Held

    def prepare_network(self, args: Any) -> None:
        """Refusals that need sd-scripts' arguments, and the initialisation from ``--seed``."""
        checks.check_arguments(args)
        self.held.record = checks.state_of(args, self.held.settings, self.held.safety)
        if getattr(args, "resume", None):
            checks.check_state(args.resume, self.held.record)
        self.held.state = Path(args.output_dir) / args.output_name
        if inherited := getattr(super(), "prepare_network", None):
            inherited(args)
        if not self.held.settings.init_seed:
            _initialise(self, int(args.seed))

    def apply_to(self, text_encoder: Any, unet: nn.Module, *args: Any, **kwargs: Any) -> None:
        if self.held.settings.init_seed:  # train_leco.py calls no prepare_network
            _initialise(self, int(self.held.settings.init_seed))
        super().apply_to(text_encoder, unet, *args, **kwargs)
        if self.held.settings.project == "weight":
            self.held.bases = bases({lora.lora_name: _layer(lora) for lora in _loras(self)}, self.held.safety)

    def load_weights(self, file: str) -> Any:
        """``--network_weights``: every layer of the network and no other, at the same rank and alpha."""
        lora = read_lora(Path(file))
        checks.check_weights(lora, self.held.settings, self.held.safety)
        mine = {module.lora_name: module for module in _loras(self)}
        if odd := sorted(mine.keys() ^ lora.layers.keys()):
            raise GuardError(
                f"{lora.name}: {len(odd)} layers differ from those to be trained (first {odd[0]}): choose the target "
                "and text-encoder setting that it was trained with.",
                code="train.other-layers",
            )
        for name, layer in lora.plain.items():
            module = mine[name]
            if layer.rank != module.lora_dim or not math.isclose(layer.scale, float(module.scale), rel_tol=1e-3):
                raise GuardError(
                    f"{lora.name}: layer {name} has rank {layer.rank} and alpha {layer.alpha}, the network rank "
                    f"{module.lora_dim} and alpha {module.scale * module.lora_dim:g}: set them to the file's.",
                    code="train.other-rank",
                )
        return super().load_weights(file)

    def on_step_start(self, *args: Any, **kwargs: Any) -> None:
        """Before a forward, so after the last optimizer step: A ← A − (A Q) Qᵀ."""
        if inherited := getattr(super(), "on_step_start", None):
            inherited(*args, **kwargs)
        _project(self)
        before_step()

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Projected once more in float32, written beside and renamed: a killed process leaves no half file."""
        _project(self)
        held = self.held
        found = (held.safety, held.contaminated, held.initialisation, _residual(self, dtype), len(_loras(self)))
        own = checks.own_metadata(*found)
        with atomic.replacing(file, ending=f"-{Path(file).name}") as part:  # it takes the format from the ending
            super().save_weights(str(part), dtype, checks.metadata_of(held.settings, held.module, metadata or {}, own))


def _hold(settings: Settings, architecture: Architecture, unet: nn.Module, text_encoder: Any) -> Held:
    """The safety LoRAs, matched whole to the model that sd-scripts loaded, and a look for them in its weights."""
    modules = find_modules(unet, _text_encoders(text_encoder, architecture), architecture.name)
    given = zip(settings.safety_files, settings.scales, strict=True)
    safety = tuple(read_lora(path, scale=scale) for path, scale in given)
    for lora in safety:
        check_scale(lora.name, lora.stated, lora.layers, lora.scale)
    branches = [
        branch
        for lora, strength in zip(safety, settings.strengths, strict=False)
        for branch in modules.branches(lora, strength)
    ]
    contaminated = check_base(
        settings.base_name,
        settings.base_sha256,
        {name: module.weight for name, module in modules.named.items()},
        safety,
        known=known_bases(*filter(None, settings.known_bases.split(os.pathsep))),
        allow=settings.allow_contaminated_base == "yes",
    )
    return Held(settings, architecture.module, safety, branches, contaminated)


def _loras(network: _Network) -> list[_Lora]:
    """The LoRA modules that are trained."""
    return [*(network.text_encoder_loras or ()), *(network.unet_loras or ())]


def _downs(lora: _Lora) -> list[nn.Parameter]:
    """The down matrices of one LoRA module; a split qkv layer has several."""
    return _weights(lora.lora_down)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    layers = list(module) if isinstance(module, nn.ModuleList) else [module]
    return [layer.get_parameter("weight") for layer in layers]


def _layer(lora: _Lora) -> LoraLayer:
    """As far as pairing by name looks at it: the name, the input size and the output size."""
    return LoraLayer(lora.lora_name, _downs(lora)[0], torch.cat(tuple(_weights(lora.lora_up))), None)


def _text_encoders(text_encoder: Any, architecture: Architecture) -> dict[str, nn.Module | None]:
    """Text encoders by prefix; None for those that the script has let go of, their outputs being cached."""
    if not isinstance(text_encoder, list | tuple):
        text_encoder = [text_encoder]
    prefixes = (architecture.alone,) if len(text_encoder) == 1 else architecture.text
    if not any(te is not None for te in text_encoder):
        return dict.fromkeys((architecture.alone, *architecture.text))
    return dict(zip(prefixes, text_encoder, strict=False))


def _narrow(network: _Network, target: str) -> None:
    """Leave out the denoiser's layers that are not in ``target``, before sd-scripts applies the network."""
    if target not in _TARGETS:
        return
    kept = [lora for lora in network.unet_loras or () if _TARGETS[target].search(lora.lora_name)]
    if not kept:
        raise GuardError(f"target {target}: this model names no layer attn1 or attn2: choose target linear.")
    network.unet_loras = kept


@torch.no_grad()
def _initialise(network: _Guarded, seed: int) -> None:
    """A uniform as sd-scripts draws it (Kaiming, a = √5), from a generator of seed and role; up stays zero."""
    held = network.held
    held.initialisation = f"{held.settings.role}:{seed}"
    generator = torch.Generator().manual_seed(role_seed(seed, held.settings.role))
    for lora in _loras(network):
        for down in _downs(lora):
            drawn = torch.empty(down.shape, dtype=torch.float32)
            bound = 1 / math.sqrt(drawn[0].numel())
            down.copy_(drawn.uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def _project(network: _Guarded) -> None:
    for lora, Q in _paired(network):
        for down in _downs(lora):
            down.copy_(project(down, Q))


def _paired(network: _Guarded) -> Iterator[tuple[_Lora, Tensor]]:
    """LoRA modules that a safety LoRA has a layer beside, with Q on their device."""
    found = network.held.bases
    for lora in _loras(network):
        if (Q := found.get(lora.lora_name)) is not None:
            found[lora.lora_name] = Q = Q.to(_downs(lora)[0].device)
            yield lora, Q


def _residual(network: _Guarded, dtype: torch.dtype | None) -> float | None:
    """The largest ‖A Q‖ / ‖A‖ of a layer in the type that is saved; None without projection."""
    if not network.held.bases:
        return None
    return max(residual(down.to(dtype or down.dtype), Q) for lora, Q in _paired(network) for down in _downs(lora))
