"""ComfyUI's loaded MODEL and CLIP as the text model of Make Safety LoRA (training/safety/closed/make.py).

A bare clone of the MODEL is evaluated on small latents, as for the functional strength: nothing that a node put on it
can choose which layers are found. Everything runs in inference mode; no weight is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ..modular_lora.errors import GuardError
from ..training.model import Prediction
from ..training.safety.closed import layers
from ..training.safety.closed.layers import Ask, TextInput, TextLayers
from ..training.safety.closed.words import EMPTY, Encoded, span
from . import image_values, introspection, noising, trainer_model
from .functional import BROKEN, _bare, _bare_clip
from .run import forget
from .tokens import streams

LEVELS = (0.5, 0.2)  # shares of the schedule in two evaluations
SIDES = ((16, 8), (32, 16), (64, 32))  # of their latents; larger ones where a model does not take small ones
FRAMES = 1
SEED = 0x5AFE
PROBE = "a red car in front of a house"  # with what layers are looked for; its words do not matter
NODE = "Make Safety LoRA"
KOHYA = "lora_unet_"  # prefix of the names for the families that sd-scripts trains
Conditioning = list  # ComfyUI's: [[cross-attention rows, what goes with them], ...]
Shapes = tuple[Sequence[int], Sequence[int]]


class ComfyTextModel:
    """See training.safety.closed.make.TextModel; made by `opened`."""

    def __init__(self, model, clip):
        self._model, self._clip = _bare(model), _bare_clip(clip)
        self.family, self.base_sha256 = introspection.family(model), introspection.model_sha256(model)
        self.info = introspection.model_info(model)
        self.prediction: Prediction = noising.schedule_of(model.model.model_sampling).prediction
        self._names = _names(self.info, self.family)
        self._empty = self._tokens(EMPTY)
        words = [span(*streams) for streams in zip(self._tokens(PROBE), self._empty, strict=True)]
        self._places = [found[0] if found else 0 for found in words]  # where a prompt's words begin, in every stream
        self.found, self._shapes = find(self._model, self._conditioning(PROBE), self._names)
        self.noise = tuple(self._shapes[0][1:]), SEED

    def encode(self, prompts: Sequence[str], inputs: Sequence[TextInput]) -> list[list[Encoded]]:
        """See TextModel; all texts first, so that text encoder and network need not be loaded in turn."""
        conds, found = [self._conditioning(prompt) for prompt in prompts], []
        with evaluating(self._model, conds[0], self._shapes) as run:
            for prompt, cond in zip(prompts, conds, strict=True):
                comfy.model_management.throw_exception_if_processing_interrupted()
                tokens = self._tokens(prompt)
                rows = layers.read(self._model.model, inputs, partial(run, "text", cond))
                found.append([Encoded(one, _spans(len(one), tokens, self._empty, self._places)) for one in rows])
        return found

    def weight(self, path: str) -> Tensor:
        """See TextModel."""
        return introspection.original_weight(self._model, f"{path}.weight")

    def bias(self, path: str) -> Tensor | None:
        """See TextModel."""
        own = self._model.model.get_submodule(path).bias
        return None if own is None else introspection.original_weight(self._model, f"{path}.bias")

    def name(self, path: str) -> str:
        """See TextModel."""
        return self._names[path]

    def too_long(self, prompt: str) -> bool:
        """See TextModel."""
        return any(len(chunks) > 1 for chunks in streams(self._clip.tokenize(prompt)).values())

    def _tokens(self, prompt: str) -> list[list[object]]:
        """The tokens of every stream, each stream in one piece."""
        found = streams(self._clip.tokenize(prompt)).values()
        return [[t[0] if isinstance(t[0], int) else id(t[0]) for chunk in chunks for t in chunk] for chunks in found]

    def _conditioning(self, prompt: str) -> Conditioning:
        """As CLIPTextEncode makes it."""
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([self._clip.patcher])
            return self._clip.encode_from_tokens_scheduled(self._clip.tokenize(prompt))


def opened(model, clip, node: str = NODE) -> ComfyTextModel:
    """The text model of what ComfyUI has loaded; GuardError, in ``node``'s name, for what it cannot be made of."""
    trainer_model._check(model, clip, node, accept_merged=False)
    return ComfyTextModel(model, clip)


def find(
    model, cond: Conditioning, paths: Mapping[str, str], shapes: Sequence[Shapes] = ()
) -> tuple[TextLayers, Shapes]:
    """The layers of a ModelPatcher that the text alone feeds, and the latents' shapes that they were found with.

    Raises GuardError where there is no such layer, or the model cannot be evaluated.
    """
    tried = shapes or [(_shape(model, one), _shape(model, other)) for one, other in SIDES]
    said = ""
    for pair in tried:
        try:
            with evaluating(model, cond, pair) as run:
                return layers.find(model.model, list(paths), run), pair
        except (GuardError, comfy.model_management.OOM_EXCEPTION):
            raise
        except (*BROKEN, ZeroDivisionError) as error:
            said = said or " ".join(str(error).split())[:120] or type(error).__name__
    raise GuardError(
        f"This {introspection.family(model)} cannot be evaluated on a text and a small latent ({said}), so it is not "
        "known which layers the text feeds: train a safety LoRA for it instead.",
        code="make.no-prediction",
    )


@contextmanager
def evaluating(model, cond: Conditioning, shapes: Shapes) -> Iterator[Callable[..., Tensor]]:
    """One evaluation of a bare ModelPatcher with a conditioning, as CFGGuider does for one step without guidance.

    ``shapes``: of the latents (1 c ...) in the evaluation "text" and in that with other noise.
    """
    network, _, _ = comfy.sampler_helpers.prepare_sampling(
        model, shapes[0], {"positive": comfy.sampler_helpers.convert_cond(cond)}, {"transformer_options": {}}
    )
    model.pre_run()

    def run(ask: Ask, own: Conditioning | None = None) -> Tensor:
        other = ask == "other noise"
        asked = _changed(cond) if ask == "other text" else own or cond
        entries = {"positive": comfy.sampler_helpers.convert_cond(asked)}
        noise = torch.randn(shapes[other], generator=torch.Generator().manual_seed(SEED + other)).to(model.load_device)
        sampling, empty = network.model_sampling, torch.zeros_like(noise)
        sigma = torch.tensor([float(sampling.percent_to_sigma(LEVELS[other]))], device=noise.device)
        options = {"transformer_options": {"sample_sigmas": torch.cat([sigma, torch.zeros_like(sigma)])}}
        forget(network)
        known = {"latent_image": empty, "seed": SEED, "latent_shapes": [noise.shape]}
        made = comfy.samplers.process_conds(network, noise, entries, model.load_device, **known)["positive"]
        x = sampling.noise_scaling(sigma, noise, empty)
        return comfy.samplers.calc_cond_batch(network, [made], x, sigma, options)[0]

    try:
        with torch.inference_mode():
            yield run
    finally:
        forget(network)
        model.cleanup()


def _shape(model, side: int) -> list[int]:
    form = model.model.latent_format
    dimensions = getattr(form, "latent_dimensions", 2)
    return [1, form.latent_channels, *{1: (side,), 2: (side, side), 3: (FRAMES, side, side)}[dimensions]]


def _changed(cond: Conditioning) -> Conditioning:
    """Other text of as many tokens: what encoders made, its rows in reverse and of another size."""
    changed = []
    for cross, further in cond:
        more = {
            key: _other(value) if key in image_values.ENCODED and _floating(value) else value
            for key, value in further.items()
        }
        changed.append([_other(cross), more])
    return changed


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _other(rows: Tensor) -> Tensor:
    return rows.flip(-2, -1) if rows.dim() > 2 else rows.flip(-1)


def _names(info, family: str) -> dict[str, str]:
    """Path of every linear layer that takes a branch -> its name in files, kohya's where there is one."""
    linear = {
        spec.path: key for key, spec in info.specs.items() if not spec.problem and len(spec.weight_shape) == 2
        and spec.path.startswith("diffusion_model.") and not spec.norm
    }  # fmt: skip
    kohya = {f"diffusion_model.{path}": name for path, name in trainer_model.unet_names(info, family).items()}
    return {path: kohya.get(path, path) for path in linear}


def _spans(
    rows: int, tokens: Sequence[Sequence[object]], empty: Sequence[Sequence[object]], beginnings: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Where the words are among an input's rows; () where the encoders' tokens are not its rows one by one.

    A stream of as many tokens as rows is taken as it is; one that is longer lost its template in front; two streams
    that have as many together stand one behind the other (SD3).
    """
    lengths = [len(stream) for stream in tokens]

    def places(number: int, shift: int) -> tuple[int, int] | None:
        first, behind = span(tokens[number], empty[number]) or (beginnings[number], beginnings[number])
        first, behind = first + shift, behind + shift
        return (first, behind) if 0 <= first <= behind <= rows else None

    if rows in lengths:
        found = [places(lengths.index(rows), 0)]
    elif len(tokens) == 1 and lengths[0] > rows:
        found = [places(0, rows - lengths[0])]
    elif len(tokens) > 1 and rows == lengths[0] + lengths[-1]:
        found = [places(0, 0), places(len(tokens) - 1, lengths[0])]
    else:
        return ()
    return tuple(one for one in found if one is not None) if None not in found else ()
