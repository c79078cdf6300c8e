"""Adapters on a model by PEFT: put in for a training, taken out again, the model bitwise what it was.

`forms` says what they are: LoRA, DoRA, LoHa, LoKr or OFT. All begin with the base's own answers; what is drawn is drawn
from the seed of the LoRA's role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..modular_lora.errors import GuardError
from ..modular_lora.files.reader import LoraFile
from .forms import DOWN, LORA, UP, Form, Size, Tensors
from .seeds import role_seed

Layers = dict[str, Tensors]  # layer name in the file -> end of a tensor's name -> tensor


@dataclass(frozen=True)
class Spec:
    """Where adapters go: ``unet`` and ``text`` map module paths to layer names in files."""

    unet: Mapping[str, str]
    text: Mapping[str, str]
    rank: int
    alpha: float
    dropout: float
    seed: int
    role: str  # "task" or "safety"
    form: Form = LORA
    sizes: Mapping[str, Size] = field(default_factory=dict)  # layer name -> where it is not rank and alpha

    def size(self, name: str) -> Size:
        """Of the layer that is called so in files."""
        return self.sizes.get(name, Size(self.rank, self.alpha))


class Adapters:
    """The adapters of one training; made by `adapted`."""

    def __init__(self, layers: dict[str, Any], spec: Spec):
        self.layers, self.spec, self.form = layers, spec, spec.form  # layer name -> PEFT's wrapper of that layer

    def parameters(self, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """What is trained of every layer, or of those of these names."""
        wanted = None if names is None else frozenset(names)
        chosen = (layer for name, layer in self.layers.items() if wanted is None or name in wanted)
        return [weight for layer in chosen for weight in self.form.weights(layer).values()]

    def downs(self) -> dict[str, nn.Parameter]:
        """LoRA's A (rank in[ k k]) by layer name."""
        return {name: self.form.weights(layer)[DOWN] for name, layer in self.layers.items()}

    def pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """LoRA's A and B of the layer of this name."""
        weights = self.form.weights(self.layers[name])
        return weights[DOWN], weights[UP]

    def scale(self, name: str) -> float:
        """alpha / rank of the layer of this name."""
        return self.spec.size(name).scale

    def tensors(self, value_of: Callable[[nn.Parameter], Tensor] = lambda weight: weight) -> Layers:
        """What a file holds of all layers, on the CPU; ``value_of`` gives what stands behind a weight."""
        found: Layers = {}
        for name, layer in self.layers.items():
            values = {end: _copy(value_of(weight)) for end, weight in self.form.weights(layer).items()}
            found[name] = self.form.tensors(layer, values, self.spec.size(name))
        return found

    @torch.no_grad()
    def load(self, lora: LoraFile) -> None:
        """Go on from a LoRA file; GuardError unless it has the same layers, of the same form, shapes and alpha."""
        if missing := sorted(set(self.layers) ^ set(lora.layers)):
            raise GuardError(
                f"{lora.name}: {len(missing)} layers differ from those to be trained (first: {missing[0]}): "
                "choose the target and text-encoder setting it was trained with.",
                code="train.other-layers",
            )
        for name, layer in self.layers.items():
            saved, size, weights = lora.layers[name], self.spec.size(name), self.form.weights(layer)
            values = self.form.values(layer, saved, size)
            fits = values is not None and {end: value.shape for end, value in values.items()} == {
                end: weight.shape for end, weight in weights.items()
            }
            if not fits:
                raise GuardError(
                    f"{lora.name}: layer {name} is {saved.kind} of rank {saved.rank} and alpha "
                    f"{getattr(saved.inner, 'alpha', None)}, the training {self.form.kind} of {size.rank} and "
                    f"{size.alpha:g}: set algo, network_dim, network_alpha and what goes with them to the file's.",
                    code="train.other-rank",
                )
            for end, value in (values or {}).items():
                weights[end].copy_(value)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The plain base: PEFT then calls the layer alone, bit for bit."""
        try:
            self._enable(False)
            yield
        finally:
            self._enable(True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout."""
        modes = [(part, part.training) for layer in self.layers.values() for part in layer.modules()]
        try:
            for layer in self.layers.values():
                layer.eval()
            yield
        finally:
            for part, mode in modes:
                part.training = mode

    def _enable(self, on: bool) -> None:
        for layer in self.layers.values():
            layer._disable_adapters = not on  # what PEFT's enable_adapters does, without touching requires_grad


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)


@contextmanager
def adapted(unet: nn.Module, text_encoder: nn.Module, spec: Spec) -> Iterator[Adapters]:
    """Adapters on the named layers of both models; on leaving, the very modules that were there are put back.

    Raises GuardError where PEFT is missing, nothing is named, or PEFT leaves a layer out.
    """
    placed: list[tuple[nn.Module, str, nn.Module]] = []
    layers: dict[str, Any] = {}
    try:
        for model, names in ((unet, spec.unet), (text_encoder, spec.text)):
            if names:
                layers |= _inject(model, names, spec, placed)
        if not layers:
            raise GuardError("No layer was chosen for training: choose a target that this model has.")
        _initialise(layers, spec)
        yield Adapters(layers, spec)
    finally:
        for parent, attribute, module in reversed(placed):
            setattr(parent, attribute, module)
        for model in (unet, text_encoder):
            model.__dict__.pop("peft_config", None)


def _inject(model: nn.Module, names: Mapping[str, str], spec: Spec, placed: list) -> dict[str, Any]:
    for path in names:
        parent, _, attribute = path.rpartition(".")
        placed.append((model.get_submodule(parent), attribute, model.get_submodule(path)))
    try:  # here, since PEFT's import takes seconds, and the pack guards and samples without it
        made = spec.form.place(model, {path: spec.size(name) for path, name in names.items()}, spec.dropout)
    except ImportError as error:
        raise GuardError(f"Training needs PEFT ({error}): pip install -r requirements.txt, then restart.") from error
    return {names[path]: layer for path, layer in made.items()}


@torch.no_grad()
def _initialise(layers: dict[str, Any], spec: Spec) -> None:
    generator = torch.Generator().manual_seed(role_seed(spec.seed, spec.role))
    for name in sorted(layers):
        for end, weight in spec.form.weights(layers[name]).items():
            spec.form.draw(layers[name], end, weight, generator)
