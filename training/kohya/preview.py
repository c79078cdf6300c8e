"""The safety LoRA as a forward branch on sd-scripts' own modules, for previews only.

W0 is not touched (it may be fp8, or away on the CPU): y = forward(x) + strength·B_s·(A_s·x), around whatever forward
a module has, the task LoRA's included.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...modular_lora.branches.attachment import ALL_ROLES, FusedLayer
from ...modular_lora.branches.changes import LowRank, Term
from ...modular_lora.branches.layer_spec import layer_spec
from ...modular_lora.errors import GuardError
from ...modular_lora.files.reader import LoraFile

logger = logging.getLogger("modular_lora")

Branch = tuple[nn.Module, FusedLayer]


@dataclass(frozen=True, eq=False)
class Modules:
    """Modules of a model that sd-scripts has loaded, by kohya's layer names."""

    named: Mapping[str, nn.Linear | nn.Conv2d]
    gone: tuple[str, ...]  # prefixes of text encoders that the script does not hold

    def branches(self, lora: LoraFile, strength: float) -> list[Branch]:
        """Every layer of ``lora`` on its module; GuardError unless all of them have one of their shape.

        Layers of text encoders that the script does not hold (their outputs are cached) are counted in the log.
        """
        known = {name for name in lora.layers if name in self.named}
        missing = [name for name in lora.layers if name not in known]
        absent = [name for name in missing if name.startswith(self.gone)]
        if len(absent) < len(missing) or not known:
            first = next(name for name in missing if name not in absent or not known)
            raise GuardError(
                f"{lora.name}: {len(missing)} of {len(lora.layers)} layers are not in the model that sd-scripts loaded "
                f"(first {first}): use the safety LoRA of this base, under kohya's names.",
                code="kohya.not-in-model",
            )
        if absent:
            logger.warning(
                "%s: %d text-encoder layers are not in previews, its outputs are cached", lora.name, len(absent)
            )
        return [self._branch(lora, name, strength) for name in lora.layers if name in known]

    def _branch(self, lora: LoraFile, name: str, strength: float) -> Branch:
        module, layer = self.named[name], lora.plain[name]
        spec = layer_spec(name, module)
        down, up = layer.down.flatten(1), layer.up.flatten(1)
        wanted = (spec.weight_shape[0], torch.Size(spec.weight_shape[1:]).numel())
        if spec.problem or (up.shape[0], down.shape[1]) != wanted:
            why = spec.problem or f"{list(wanted)} in the model, {[up.shape[0], down.shape[1]]} in the file"
            raise GuardError(
                f"{lora.name}: layer {name} is {why}: use the safety LoRA of this base.", code="kohya.not-in-model"
            )
        return module, FusedLayer(spec, [Term("safety", LowRank(down, up), strength * layer.scale)])


def find_modules(
    unet: nn.Module, text_encoders: Mapping[str, nn.Module | None], name: Callable[[str], str] = str
) -> Modules:
    """Linear and Conv2d modules under kohya's names: prefix and path, dots as underscores; None: let go of.

    ``name`` gives what ComfyUI calls a layer of such a name.
    """
    named = {
        name(f"{prefix}_{path.replace('.', '_')}"): module
        for prefix, model in {"lora_unet": unet, **text_encoders}.items()
        if model is not None
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    return Modules(named, tuple(f"{prefix}_" for prefix, model in text_encoders.items() if model is None))


@contextmanager
def attached(branches: Sequence[Branch]) -> Iterator[None]:
    """The branches on their modules; every module's ``__dict__`` is as it was afterwards."""
    placed: list[tuple[nn.Module, object]] = []
    try:
        for module, layer in branches:
            placed.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = _with_branch(module.forward, layer)
        yield
    finally:
        for module, former in reversed(placed):
            if former is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = former
        for _, layer in branches:
            layer.free()


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's generators (CPU and CUDA) go on afterwards as if nothing had drawn from them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy)
        random.setstate(python)


def _with_branch(forward: Callable, layer: FusedLayer) -> Callable:
    def branched(x: Tensor, *args, **kwargs) -> Tensor:
        y = forward(x, *args, **kwargs)
        with torch.autocast(y.device.type, enabled=False):
            return layer.add(y, x.to(y.dtype), ALL_ROLES)

    return branched
