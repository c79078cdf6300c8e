"""LoRA in its simplest form, behind the interface that sd-scripts' training scripts call."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import nn

UNET, TEXT = ("Transformer2DModel",), ("CLIPAttention", "CLIPMLP")


class LoRAModule(nn.Module):
    """y = forward(x) + multiplier · alpha / rank · up(down(x)), in place of the forward of a Linear or Conv2d."""

    def __init__(self, name: str, module: nn.Module, rank: int, alpha: float):
        super().__init__()
        if isinstance(module, nn.Conv2d):
            shape = (module.kernel_size, module.stride, module.padding)
            self.lora_down = nn.Conv2d(module.in_channels, rank, *shape, bias=False)
            self.lora_up = nn.Conv2d(rank, module.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(module.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, module.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.lora_name, self.lora_dim, self.scale, self.multiplier = name, rank, alpha / rank, 1.0
        object.__setattr__(self, "target", module)

    def apply_to(self) -> None:
        self.org_forward = self.target.forward
        self.target.forward = self.forward

    def forward(self, x):
        return self.org_forward(x) + self.lora_up(self.lora_down(x)) * (self.multiplier * self.scale)


class LoRANetwork(nn.Module):
    def __init__(self, text_encoder, unet, rank: int, alpha: float, conv_rank: int | None):
        super().__init__()
        encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
        prefixes = [f"lora_te{i + 1}" if len(encoders) > 1 else "lora_te" for i in range(len(encoders))]
        make = lambda *where: list(_modules(*where, rank, alpha, conv_rank))  # noqa: E731
        self.text_encoder_loras = [m for p, te in zip(prefixes, encoders, strict=True) for m in make(p, te, TEXT)]
        self.unet_loras = make("lora_unet", unet, UNET)

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True) -> None:
        self.text_encoder_loras = self.text_encoder_loras if apply_text_encoder else []
        self.unet_loras = self.unet_loras if apply_unet else []
        for lora in self.text_encoder_loras + self.unet_loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def set_multiplier(self, multiplier: float) -> None:
        for lora in self.text_encoder_loras + self.unet_loras:
            lora.multiplier = multiplier

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
        return [{"params": list(self.parameters()), "lr": unet_lr or default_lr}], ["all"]

    def prepare_grad_etc(self, text_encoder, unet) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet) -> None:
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def enable_gradient_checkpointing(self) -> None:
        pass

    def load_weights(self, file: str):
        return self.load_state_dict(load_file(file), False)

    def save_weights(self, file: str, dtype, metadata) -> None:
        save_file({k: v.detach().clone().to(dtype or v.dtype) for k, v in self.state_dict().items()}, file, metadata)


def _modules(prefix: str, root: nn.Module, classes, rank, alpha, conv_rank):
    for path, block in root.named_modules():
        if type(block).__name__ in classes:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
                    yield LoRAModule(f"{prefix}_{path}_{name}".replace(".", "_"), module, rank, alpha)
        elif conv_rank and prefix == "lora_unet" and isinstance(block, nn.Conv2d) and block.kernel_size == (3, 3):
            yield LoRAModule(f"{prefix}_{path}".replace(".", "_"), block, conv_rank, alpha)


def create_network(
    multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, conv_dim=None, **kwargs
):
    unknown = set(kwargs) - {"dropout", "conv_alpha"}
    if unknown:
        raise ValueError(f"unknown network_args {sorted(unknown)}")
    return LoRANetwork(text_encoder, unet, network_dim or 4, network_alpha or 1.0, int(conv_dim or 0))
