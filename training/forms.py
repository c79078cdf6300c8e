"""What is trained beside a layer: LoRA, DoRA, LoHa, LoKr and OFT by PEFT, and what a file holds of each.

W = W0 + ΔW or, of OFT, R·W0; W0 out in[ k k], s = alpha / rank:

| form | W | in the file |
|---|---|---|
| LoRA, LoCon (arXiv 2106.09685) | W0 + s·B·A | lora_down (A), lora_up (B) |
| DoRA (arXiv 2402.09353) | m / |W0 + s·B·A|, row by row, times W0 + s·B·A | lora_down, lora_up, dora_scale |
| LoHa (arXiv 2108.06098) | W0 + s·(A₁·B₁) ⊙ (A₂·B₂) | hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b[, hada_t1, hada_t2] |
| LoKr (arXiv 2309.14859) | W0 + s·C ⊗ (A·B), or C ⊗ D | lokr_w1 or its factors, lokr_w2 or its factors |
| OFT (arXiv 2306.07280) | diag(R₁ ... Rₖ)ᵀ·W0, R = (I + Q)(I − Q)⁻¹, Q = −Qᵀ | oft_blocks: Q is blocks − blocksᵀ |

These are the names of LyCORIS and kohya, which ComfyUI reads and modular_lora/files/formats with it.

PEFT and LyCORIS divide DoRA's m by the lengths of the rows of W0 + ΔW; ComfyUI, and the guard with it, divide a
``dora_scale`` of one number an output by those of W0's rows. The file is for these, so it holds m·|W0| / |W0 + ΔW|.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..modular_lora.errors import GuardError
from ..modular_lora.files.formats import Adapter, LoraLayer
from ..modular_lora.files.formats.dora import DoraLayer
from ..modular_lora.files.formats.loha import LohaLayer
from ..modular_lora.files.formats.lokr import LokrLayer
from ..modular_lora.files.formats.oft import OftLayer
from .options import Options

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "modular_lora"
DOWN, UP, LENGTHS, ALPHA = "lora_down.weight", "lora_up.weight", "dora_scale", "alpha"

ALPHA_DIGITS = 1e-2  # an alpha may stand in the file as bf16

Tensors = dict[str, Tensor]  # end of a tensor's name in the file -> the tensor


@dataclass(frozen=True)
class Size:
    """Of one layer's adapter; of OFT the rank is the size that its blocks are at most to have."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Form(ABC):
    """One of them."""

    kind: ClassVar[str]
    thin: ClassVar[bool] = False  # whether ΔW is s·B·A and nothing else

    def place(self, model: nn.Module, sizes: Mapping[str, Size], dropout: float) -> dict[str, BaseTunerLayer]:
        """Wrap the layers at these paths; path -> wrapper. GuardError where PEFT leaves one out."""
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        with torch.random.fork_rng():  # PEFT draws values of its own, which are replaced
            inject_adapter_in_model(self._config(sizes, dropout), model, ADAPTER)
        made = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        if odd := sorted(set(made) ^ set(sizes)):
            raise GuardError(
                f"PEFT treats {len(odd)} layers otherwise than asked (first: {odd[0]}): choose another target."
            )
        return made

    @abstractmethod
    def _config(self, sizes: Mapping[str, Size], dropout: float) -> PeftConfig:
        """PEFT's."""

    @abstractmethod
    def weights(self, layer: Any) -> dict[str, nn.Parameter]:
        """What is trained of a wrapped layer, by the ends of the names that it has in the file."""

    @abstractmethod
    def draw(self, layer: Any, end: str, weight: Tensor, generator: torch.Generator) -> None:
        """Its first values, with which the layer answers as W0 does."""

    def tensors(self, layer: Any, values: Tensors, size: Size) -> Tensors:
        """What the file holds of a layer, from the values that are trained (float32, on the CPU)."""
        return values | {ALPHA: torch.tensor(size.alpha, dtype=torch.float64)}

    def values(self, layer: Any, saved: Adapter, size: Size) -> Tensors | None:
        """The inverse of `tensors` for a layer of a file; None where that has another form or alpha."""
        return None


@dataclass(frozen=True)
class Lora(Form):
    """LoRA, and LoCon on convolutions."""

    kind = "LoRA"
    thin = True

    def _config(self, sizes: Mapping[str, Size], dropout: float) -> PeftConfig:
        from peft import LoraConfig

        (rank, alpha), patterns = _usual(sizes), _patterns(sizes)
        return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, **patterns, **self._more())

    def _more(self) -> dict[str, Any]:
        return {}

    def weights(self, layer: Any) -> dict[str, nn.Parameter]:
        factors = {DOWN: layer.lora_A, UP: layer.lora_B}
        return {end: held[ADAPTER].get_parameter("weight") for end, held in factors.items()}

    def draw(self, layer: Any, end: str, weight: Tensor, generator: torch.Generator) -> None:
        """A ~ U(−1/√in, 1/√in), kaiming_uniform(a=√5) as PEFT and sd-scripts draw it; B = 0."""
        if end == UP:
            weight.zero_()
        else:
            _uniform(weight, generator)

    def values(self, layer: Any, saved: Adapter, size: Size) -> Tensors | None:
        if not isinstance(saved, LoraLayer) or not math.isclose(saved.scale, size.scale, rel_tol=ALPHA_DIGITS):
            return None
        return {DOWN: saved.down, UP: saved.up}


@dataclass(frozen=True)
class Dora(Lora):
    """DoRA: a length of its own for every row of the changed weight."""

    kind = "DoRA"
    thin = False

    def place(self, model: nn.Module, sizes: Mapping[str, Size], dropout: float) -> dict[str, BaseTunerLayer]:
        made = super().place(model, sizes, dropout)
        for layer in made.values():  # lengths in half precision would change W0 itself by their rounding
            assert isinstance(layer, nn.Module), "every wrapper of PEFT's is one"
            for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
                layer.get_submodule(name).float()
        return made

    def _more(self) -> dict[str, Any]:
        return {"use_dora": True}

    def weights(self, layer: Any) -> dict[str, nn.Parameter]:
        return super().weights(layer) | {LENGTHS: layer.lora_magnitude_vector[ADAPTER].weight}

    def draw(self, layer: Any, end: str, weight: Tensor, generator: torch.Generator) -> None:
        """m = |W0|, row by row; the factors as LoRA's."""
        if end == LENGTHS:
            weight.copy_(_weight(layer).norm(dim=1).reshape(weight.shape))
        else:
            super().draw(layer, end, weight, generator)

    def tensors(self, layer: Any, values: Tensors, size: Size) -> Tensors:
        W0, total = _sum(layer, values[DOWN], values[UP], size.scale)
        lengths = values[LENGTHS].flatten() * W0.norm(dim=1) / total.norm(dim=1)
        shaped = lengths.reshape(-1, *[1] * (layer.get_base_layer().weight.dim() - 1))  # out 1[ 1 1]
        return super().tensors(layer, values | {LENGTHS: shaped}, size)

    def values(self, layer: Any, saved: Adapter, size: Size) -> Tensors | None:
        found = super().values(layer, saved.base, size) if isinstance(saved, DoraLayer) else None
        if found is None or not isinstance(saved, DoraLayer):
            return None
        m, shape = saved.magnitude.float(), self.weights(layer)[LENGTHS].shape
        if m.numel() != shape.numel() or m.shape[0] != m.numel():
            return None  # a length for every input
        if not saved.of_sum:
            W0, total = _sum(layer, found[DOWN].float(), found[UP].float(), size.scale)
            m = m.flatten() * total.norm(dim=1) / W0.norm(dim=1)
        return found | {LENGTHS: m.reshape(shape)}


@dataclass(frozen=True)
class _Products(Form):
    """LoHa and LoKr, whose tensors PEFT calls as their files do."""

    layout: ClassVar[type[Adapter]]

    def place(self, model: nn.Module, sizes: Mapping[str, Size], dropout: float) -> dict[str, BaseTunerLayer]:
        made = super().place(model, sizes, dropout)
        for layer in made.values():
            assert isinstance(layer, nn.Module), "every wrapper of PEFT's is one"
            layer.eval()  # in training PEFT draws a random number of every layer, for a dropout that is 0
        return made

    def weights(self, layer: Any) -> dict[str, nn.Parameter]:
        held = {end: getattr(layer, end) for end in layer.adapter_layer_names}
        return {end: weights[ADAPTER] for end, weights in held.items() if ADAPTER in weights}

    def values(self, layer: Any, saved: Adapter, size: Size) -> Tensors | None:
        if not isinstance(saved, self.layout) or not math.isclose(
            saved.scale, layer.scaling[ADAPTER], rel_tol=ALPHA_DIGITS
        ):
            return None
        held = [getattr(saved, f.name) for f in fields(saved)[1:]]
        return {end: tensor for end, tensor in zip(saved.roles, held, strict=False) if tensor is not None}


@dataclass(frozen=True)
class Loha(_Products):
    """LoHa; with ``use_tucker`` the kernels of convolutions stand by themselves."""

    use_tucker: bool = False

    kind = "LoHa"
    layout = LohaLayer

    def _config(self, sizes: Mapping[str, Size], dropout: float) -> PeftConfig:
        from peft import LoHaConfig

        (rank, alpha), patterns = _usual(sizes), _patterns(sizes)
        return LoHaConfig(r=rank, alpha=alpha, use_effective_conv2d=self.use_tucker, **patterns)

    def draw(self, layer: Any, end: str, weight: Tensor, generator: torch.Generator) -> None:
        """As LyCORIS and sd-scripts: B₁ and B₂ of deviation 1, A₁ (and the kernels) of 0.1, A₂ = 0.

        PEFT's own draw makes the product's gradient some ten times smaller, at a rank of 16 and 640 inputs.
        """
        deviation = {"hada_w1_b": 1.0, "hada_w2_b": 1.0, "hada_w2_a": 0.0}.get(end, 0.1)
        weight.copy_(deviation * torch.randn(weight.shape, generator=generator))


@dataclass(frozen=True)
class Lokr(_Products):
    """LoKr; a factor of which the rank would be half its size or more is whole, and two whole ones are not scaled."""

    factor: int = 0
    decompose_both: bool = False

    kind = "LoKr"
    layout = LokrLayer

    def _config(self, sizes: Mapping[str, Size], dropout: float) -> PeftConfig:
        from peft import LoKrConfig

        (rank, alpha), patterns = _usual(sizes), _patterns(sizes)
        more: dict[str, Any] = {"decompose_factor": self.factor or -1, "decompose_both": self.decompose_both}
        return LoKrConfig(r=rank, alpha=alpha, **more, **patterns)

    def place(self, model: nn.Module, sizes: Mapping[str, Size], dropout: float) -> dict[str, BaseTunerLayer]:
        made = super().place(model, sizes, dropout)
        layer: Any  # PEFT's LoKrLayer
        for layer in made.values():
            if not self._scaled(layer):
                layer.scaling[ADAPTER] = 1.0
        return made

    def _scaled(self, layer: Any) -> bool:
        return not {"lokr_w1", "lokr_w2"} <= self.weights(layer).keys()

    def draw(self, layer: Any, end: str, weight: Tensor, generator: torch.Generator) -> None:
        """As LyCORIS: kaiming_uniform(a=√5), and the second product 0."""
        if end in ("lokr_w2", "lokr_w2_b"):
            weight.zero_()
        else:
            _uniform(weight, generator)

    def tensors(self, layer: Any, values: Tensors, size: Size) -> Tensors:
        return super().tensors(layer, values, size) if self._scaled(layer) else values


@dataclass(frozen=True)
class Oft(Form):
    """OFT of a layer's outputs, as LyCORIS' Diag-OFT: its blocks are as large as divide the outputs, up to the rank."""

    kind = "OFT"

    def place(self, model: nn.Module, sizes: Mapping[str, Size], dropout: float) -> dict[str, BaseTunerLayer]:
        from .rotation import Rotated

        made: dict[str, BaseTunerLayer] = {}
        for path, size in sizes.items():
            parent, _, attribute = path.rpartition(".")
            made[path] = Rotated(model.get_submodule(path), size.rank, ADAPTER, path)
            setattr(model.get_submodule(parent), attribute, made[path])
        return made

    def _config(self, sizes: Mapping[str, Size], dropout: float) -> PeftConfig:
        raise TypeError("PEFT's own OFT rotates a layer's inputs, which no reader of files knows")

    def weights(self, layer: Any) -> dict[str, nn.Parameter]:
        return {"oft_blocks": layer.oft_R[ADAPTER].weight}

    def draw(self, layer: Any, end: str, weight: Tensor, generator: torch.Generator) -> None:
        weight.zero_()

    def tensors(self, layer: Any, values: Tensors, size: Size) -> Tensors:
        """Blocks (k n n) whose half above the diagonal is Q's: PEFT holds that of −Q, in rows (k n·(n − 1)/2)."""
        n, upper = layer.size, -values["oft_blocks"]
        blocks = upper.new_zeros(len(upper), n, n)
        rows, columns = torch.triu_indices(n, n, 1)
        blocks[:, rows, columns] = upper
        return {"oft_blocks": blocks}

    def values(self, layer: Any, saved: Adapter, size: Size) -> Tensors | None:
        if not isinstance(saved, OftLayer) or saved.alpha or saved.blocks.shape[1] != layer.size:
            return None
        blocks = saved.blocks.float()
        rows, columns = torch.triu_indices(layer.size, layer.size, 1)
        return {"oft_blocks": (blocks.transpose(1, 2) - blocks)[:, rows, columns]}


LORA = Lora()


def form_of(options: Options) -> Form:
    """What the options ask for."""
    if options.algo == "loha":
        return Loha(options.use_tucker)
    if options.algo == "lokr":
        return Lokr(options.factor, options.decompose_both)
    if options.algo == "diag-oft":
        return Oft()
    return Dora() if options.dora_wd else LORA


def _usual(sizes: Mapping[str, Size]) -> tuple[int, Any]:
    """Rank and alpha of most layers; PEFT's type of alpha says int, and any number will do."""
    found = list(sizes.values())
    most = max(found, key=found.count)
    return most.rank, most.alpha


def _patterns(sizes: Mapping[str, Size]) -> dict[str, Any]:
    """PEFT's arguments that name the layers, and those of another rank or alpha by one expression a size."""
    usual = _usual(sizes)
    paths: dict[Size, list[str]] = {}
    for path, size in sizes.items():
        if (size.rank, size.alpha) != usual:
            paths.setdefault(size, []).append(re.escape(path))
    keys = {size: f"^(?:{'|'.join(found)})" for size, found in paths.items()}
    return {
        "target_modules": "|".join(map(re.escape, sizes)),  # of a list, PEFT takes what ends so as well
        "rank_pattern": {key: size.rank for size, key in keys.items()},
        "alpha_pattern": {key: size.alpha for size, key in keys.items()},
    }


def _uniform(weight: Tensor, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(weight[0].numel())
    weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)


def _weight(layer: Any) -> Tensor:
    """W0 (out in·k·k, float32, on the CPU)."""
    return layer.get_base_layer().weight.detach().to("cpu", torch.float32).flatten(1)


def _sum(layer: Any, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """W0 and W0 + s·B·A (out in·k·k, float32)."""
    W0 = _weight(layer)
    return W0, W0 + scale * (up.flatten(1) @ down.flatten(1))
