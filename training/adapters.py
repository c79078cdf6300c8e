"""LoRA adapters on a model by PEFT: put in for a training, taken out again, the model bitwise what it was.

dW = alpha / rank · B A, with A (rank in[ k k]) drawn from the seed of the LoRA's role and B (out rank[ 1 1]) = 0
(arXiv 2106.09685; PEFT's lora_A and lora_B are kohya's lora_down and lora_up).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..modular_lora.errors import GuardError
from ..modular_lora.files.reader import LoraFile
from .seeds import role_seed

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTER = "modular_lora"

Factors = dict[str, tuple[Tensor, Tensor, float]]  # kohya layer name -> down, up, alpha


@dataclass(frozen=True)
class Spec:
    """Where adapters go: ``unet`` and ``text`` map module paths to kohya layer names."""

    unet: Mapping[str, str]
    text: Mapping[str, str]
    rank: int
    alpha: float
    dropout: float
    seed: int
    role: str  # "task" or "safety"


class Adapters:
    """The adapters of one training; made by `adapted`."""

    def __init__(self, layers: dict[str, LoraLayer], alpha: float):
        self.layers, self.alpha = layers, alpha  # kohya layer name -> PEFT's wrapper of that layer

    def parameters(self, names: Iterable[str] | None = None) -> list[nn.Parameter]:
        """A and B of every layer, or of those with these kohya names."""
        wanted = None if names is None else frozenset(names)
        chosen = (layer for name, layer in self.layers.items() if wanted is None or name in wanted)
        return [weight for layer in chosen for weight in self._pair(layer)]

    def downs(self) -> dict[str, nn.Parameter]:
        """A (rank in[ k k]) by kohya layer name."""
        return {name: self._pair(layer)[0] for name, layer in self.layers.items()}

    def factors(self, value_of: Callable[[nn.Parameter], Tensor] = lambda weight: weight) -> Factors:
        """Copies of all factors, float32 on the CPU; ``value_of`` gives what stands behind a weight."""
        pairs = {name: self._pair(layer) for name, layer in self.layers.items()}
        return {n: (_copy(value_of(down)), _copy(value_of(up)), self.alpha) for n, (down, up) in pairs.items()}

    def pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of the layer of this kohya name."""
        return self._pair(self.layers[name])

    @torch.no_grad()
    def load(self, lora: LoraFile) -> None:
        """Go on from a LoRA file; GuardError unless it has the same layers, shapes and alpha."""
        if missing := sorted(set(self.layers) ^ set(lora.layers)):
            raise GuardError(
                f"{lora.name}: {len(missing)} layers differ from those to be trained (first: {missing[0]}): "
                "choose the target and text-encoder setting it was trained with.",
                code="train.other-layers",
            )
        for name, layer in self.layers.items():
            saved = lora.plain[name]
            for weight, value in zip(self._pair(layer), (saved.down, saved.up), strict=True):
                if weight.shape != value.shape or saved.alpha not in (None, self.alpha):
                    raise GuardError(
                        f"{lora.name}: layer {name} has rank {saved.rank} and alpha {saved.alpha}, the training "
                        f"{weight.shape[0]} and {self.alpha}: set network_dim and network_alpha to the file's.",
                        code="train.other-rank",
                    )
                weight.copy_(value)

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
        layers = list(self.layers.values())
        try:
            for layer in layers:
                assert isinstance(layer, nn.Module), "every wrapper of PEFT's is one"
                layer.eval()
            yield
        finally:
            for layer in layers:
                layer.lora_dropout.train()

    def _enable(self, on: bool) -> None:
        for layer in self.layers.values():
            layer._disable_adapters = not on  # what LoraLayer.enable_adapters does, without touching requires_grad

    @staticmethod
    def _pair(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return layer.lora_A[ADAPTER].get_parameter("weight"), layer.lora_B[ADAPTER].get_parameter("weight")


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32, copy=True)


@contextmanager
def adapted(unet: nn.Module, text_encoder: nn.Module, spec: Spec) -> Iterator[Adapters]:
    """Adapters on the named layers of both models; on leaving, the very modules that were there are put back.

    Raises GuardError where PEFT is missing, nothing is named, or PEFT leaves a layer out.
    """
    placed: list[tuple[nn.Module, str, nn.Module]] = []
    layers: dict[str, LoraLayer] = {}
    try:
        for model, names in ((unet, spec.unet), (text_encoder, spec.text)):
            if names:
                layers |= _inject(model, names, spec, placed)
        if not layers:
            raise GuardError("No layer was chosen for training: choose a target that this model has.")
        _initialise(layers, spec)
        yield Adapters(layers, spec.alpha)
    finally:
        for parent, attribute, module in reversed(placed):
            setattr(parent, attribute, module)
        for model in (unet, text_encoder):
            model.__dict__.pop("peft_config", None)


def _inject(model: nn.Module, names: Mapping[str, str], spec: Spec, placed: list) -> dict[str, LoraLayer]:
    try:  # here, since its import takes seconds, and the pack guards and samples without it
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise GuardError(f"Training needs PEFT ({error}): pip install -r requirements.txt, then restart.") from error
    for path in names:
        parent, _, attribute = path.rpartition(".")
        placed.append((model.get_submodule(parent), attribute, model.get_submodule(path)))
    alpha: Any = spec.alpha  # PEFT's type says int, and any number will do
    config = LoraConfig(r=spec.rank, lora_alpha=alpha, lora_dropout=spec.dropout, target_modules=list(names))
    with torch.random.fork_rng():  # PEFT draws an A of its own, which is replaced
        inject_adapter_in_model(config, model, ADAPTER)
    wrapped = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    if odd := sorted(set(wrapped) ^ set(names)):
        raise GuardError(
            f"PEFT treats {len(odd)} layers otherwise than asked (first: {odd[0]}): choose another target."
        )
    return {names[path]: module for path, module in wrapped.items()}


@torch.no_grad()
def _initialise(layers: dict[str, LoraLayer], spec: Spec) -> None:
    """A ~ U(−1/√in, 1/√in), kaiming_uniform(a=√5) as PEFT and sd-scripts draw it; B = 0."""
    generator = torch.Generator().manual_seed(role_seed(spec.seed, spec.role))
    for name in sorted(layers):
        down, up = Adapters._pair(layers[name])
        bound = 1 / math.sqrt(down[0].numel())
        down.copy_((2 * torch.rand(down.shape, generator=generator) - 1) * bound)
        up.zero_()
