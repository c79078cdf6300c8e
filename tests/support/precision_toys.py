"""The U-Net of the demo world in every storage that ComfyUI loads, and layers that other packs bring."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import nn

FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


def scaled(tensors: Tensors) -> Tensors:
    """Scaled fp8 as ComfyUI reads it: every matrix over its own ``scale_weight``."""
    made = {"scaled_fp8": torch.tensor([], dtype=FP8)}
    for name, tensor in tensors.items():
        made |= _over_scale(name, tensor, name.replace(".weight", ".scale_weight")) if _matrix(name, tensor) else {}
    return tensors | made


def mixed(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Layers of the transformers as QuantizedTensor (fp8), the others as they are; with the file's metadata."""
    chosen = [name for name, tensor in tensors.items() if _matrix(name, tensor) and ".transformer_blocks." in name]
    made = {}
    for name in chosen:
        made |= _over_scale(name, tensors[name], f"{name}_scale")
    layers = {name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in chosen}
    return tensors | made, {"_quantization_metadata": json.dumps({"layers": layers})}


def int8(tensors: Tensors) -> Tensors:
    """Layers of the transformers as QuantizedTensor (int8), as 0.33.0 reads it."""
    made = {}
    for name, tensor in tensors.items():
        if _matrix(name, tensor) and ".transformer_blocks." in name:
            scale = tensor.float().abs().amax() / 127
            made |= {name: (tensor.float() / scale).round().to(torch.int8), f"{name}_scale": scale}
            said = json.dumps({"format": "int8_tensorwise"}).encode()
            made[name.replace(".weight", ".comfy_quant")] = torch.tensor(list(said), dtype=torch.uint8)
    return tensors | made


def _matrix(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() == 2 and "emb" not in name


def _over_scale(name: str, tensor: torch.Tensor, scale_name: str) -> Tensors:
    scale = tensor.float().abs().amax() / torch.finfo(FP8).max
    return {name: (tensor.float() / scale).to(FP8), scale_name: scale}


class PackedLinear(nn.Linear):
    """What bitsandbytes does: an nn.Linear whose weight is bytes in one column; its forward unpacks them."""

    def __init__(self, source: nn.Linear):
        super().__init__(source.in_features, source.out_features, source.bias is not None, device="meta")
        self.scale = source.weight.detach().abs().amax() / 127
        stored = (source.weight.detach() / self.scale).round().to(torch.int8).view(torch.uint8)
        self.weight = nn.Parameter(stored.reshape(-1, 1), requires_grad=False)
        self.bias = source.bias

    def unpacked(self) -> torch.Tensor:
        return self.weight.view(torch.int8).float().reshape(self.out_features, self.in_features) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias)


class ForeignLinear(nn.Module):
    """A layer that is no nn.Linear and keeps its weight in a layout of its own."""

    def __init__(self, source: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.weight = nn.Parameter(torch.zeros(source.out_features, source.in_features // 2, dtype=torch.int8), False)

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


SVDQLinear = type("SVDQW4A4Linear", (ForeignLinear,), {"__module__": "nunchaku.models.linear"})


class GgmlTensor(torch.Tensor):
    """Packed bytes that say the shape of the weight in them, as ComfyUI-GGUF's GGMLTensor does."""

    kind: object
    whole: torch.Size

    @staticmethod
    def of(tensor: torch.Tensor, kind) -> GgmlTensor:
        from gguf import quants

        made = torch.from_numpy(quants.quantize(tensor.float().numpy(), kind)).as_subclass(GgmlTensor)
        made.kind, made.whole = kind, tensor.shape
        return made

    @property
    def shape(self):
        return self.whole if hasattr(self, "whole") else self.size()

    def detach(self):
        return self

    def to(self, *args, **kwargs):
        return self  # there is one device here

    def dequantised(self) -> torch.Tensor:
        from gguf import quants

        return torch.from_numpy(quants.dequantize(np.asarray(self.as_subclass(torch.Tensor)), self.kind))


def gguf_operations():
    """Operations in the manner of ComfyUI-GGUF: layers unpack in forward, and their state dict says sizes only."""
    import comfy.ops

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def _load_from_state_dict(self, tensors, prefix, *others):
                stored = tensors.get(f"{prefix}weight")
                if not isinstance(stored, GgmlTensor):
                    super()._load_from_state_dict(tensors, prefix, *others)
                    return
                self.weight = nn.Parameter(stored, requires_grad=False)
                if f"{prefix}bias" in tensors:
                    self.bias = nn.Parameter(tensors[f"{prefix}bias"].float(), requires_grad=False)

            def _save_to_state_dict(self, destination, prefix, keep_vars):
                if not isinstance(self.weight, GgmlTensor):
                    super()._save_to_state_dict(destination, prefix, keep_vars)
                    return
                destination[f"{prefix}weight"] = torch.empty(self.weight.size(), dtype=torch.uint8, device="meta")
                if self.bias is not None:
                    destination[f"{prefix}bias"] = torch.empty_like(self.bias, device="meta")

            def get_weight(self, stored, dtype):
                return stored.dequantised().to(dtype) if isinstance(stored, GgmlTensor) else stored.to(dtype)

            def forward_comfy_cast_weights(self, x):
                if not isinstance(self.weight, GgmlTensor):
                    return super().forward_comfy_cast_weights(x)
                return nn.functional.linear(x, self.get_weight(self.weight, x.dtype), self.bias)

    return Operations


def gguf_weights(tensors: Tensors, kind) -> Tensors:
    return {n: GgmlTensor.of(t, kind) if _matrix(n, t) and t.shape[1] % 32 == 0 else t for n, t in tensors.items()}


def swap(network: nn.Module, make) -> None:
    """Replace the Linear layers of the transformers by ``make(layer)``."""
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and ".transformer_blocks." in path:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, make(module))
