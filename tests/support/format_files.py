"""LoRA files of every format on a small model, each made by the library that trains it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

LINEAR, POINT, KERNEL, LINE = "Linear", "Conv2d 1x1", "Conv2d 3x3", "Conv1d"
DEPTH, UP = "Conv2d, grouped", "ConvTranspose2d"
LAYER, GROUP, RMS = "LayerNorm", "GroupNorm", "RMSNorm"
PATHS = {LINEAR: "linear", POINT: "point", KERNEL: "kernel", LINE: "line", LAYER: "layer", GROUP: "group", RMS: "rms"}
PATHS |= {DEPTH: "depth", UP: "up"}


class Net(nn.Module):
    """One layer of every kind that a file can change."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Conv2d(4, 12, 3, stride=2, padding=1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(12, 12, 2, stride=2)
        self.group = nn.GroupNorm(3, 12)
        self.point = nn.Conv2d(12, 16, 1)
        self.line = nn.Conv1d(16, 24, 3, padding=1)
        self.layer = nn.LayerNorm(24)
        self.linear = nn.Linear(24, 36)
        self.rms = nn.RMSNorm(36, eps=1e-6)
        self.out = nn.Linear(36, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.tanh(self.depth(self.kernel(x))))  # b 12 h w
        h = self.point(torch.tanh(self.group(h)))  # b 16 h w
        h = self.line(torch.tanh(h).flatten(2)).transpose(1, 2)  # b hw 24
        return self.out(self.rms(self.linear(self.layer(h))))


class Model(nn.Module):
    """What holds the root, as ComfyUI's BaseModel holds diffusion_model."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.diffusion_model = Net()
            for p in self.parameters():
                p.data = p.data + 0.1 * torch.randn(p.shape)
        self.requires_grad_(False)


def example() -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def key_map(model: nn.Module) -> dict[str, str]:
    """File name -> weight key, under the names that ComfyUI's map has for one family or another."""
    names = {}
    for path, module in model.diffusion_model.named_modules():
        for key in (f"diffusion_model.{path}.{end}" for end in ("weight", "bias") if hasattr(module, end)):
            if key.endswith(".bias"):
                names[key] = key
                continue
            for prefix in ("diffusion_model.", "base_model.model.", "transformer.", "unet."):
                names[f"{prefix}{path}"] = key
            names[f"lora_unet_{path}"] = names[f"lycoris_{path}"] = key
    return names


@dataclass(frozen=True)
class Maker:
    """``make(net, path, file)`` writes a file that changes the layer at ``path`` and gives the library's own net."""

    format: str
    library: str
    kinds: tuple[str, ...]
    make: Callable[[Net, str, Path], Callable[[Tensor], Tensor] | None]
    as_library: bool = True  # whether the library's own forward at strength 1 is met
    as_core: bool = True  # whether ComfyUI's merge of the file alone is met

    def __str__(self) -> str:
        return f"{self.format}, {self.library}"


def noise(module: nn.Module, size: float) -> None:
    """Random values in place of a library's initial ones, which change nothing."""
    generator = torch.Generator().manual_seed(7)
    for p in module.parameters():
        p.data = p.data + size * torch.randn(p.shape, generator=generator).to(p)


def lycoris(algo: str, **options) -> Callable:
    """By one of LyCORIS's modules, saved as its networks save theirs."""

    def make(net: Net, path: str, file: Path, size: float = 0.3):
        import lycoris.modules as modules

        net = copy.deepcopy(net)
        layer = net.get_submodule(path)
        lora = getattr(modules, algo)(f"lora_unet_{path}", layer, 1.0, **{"lora_dim": 2, "alpha": 3.0, **options})
        lora.apply_to()
        noise(lora, size)
        tensors = {f"{lora.lora_name}.{name}": value.detach().clone() for name, value in lora.state_dict().items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, file, {"ss_network_module": "lycoris"})
        return net

    return make


def peft(config: str, **options) -> Callable:
    """By PEFT, saved by its own save_pretrained."""

    def make(net: Net, path: str, file: Path):
        import peft

        settings = getattr(peft, config)(target_modules=[path], **options)
        model = peft.get_peft_model(copy.deepcopy(net), settings)
        noise_of_adapter(model)
        model.save_pretrained(file.parent / "peft", safe_serialization=True)
        (file.parent / "peft" / "adapter_model.safetensors").replace(file)
        return model

    return make


def noise_of_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + 0.3 * torch.randn(p.shape, generator=generator)


def diffusers(net: Net, path: str, file: Path):
    """LoRA by PEFT, saved by a diffusers pipeline's save_lora_weights."""
    import peft
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_state_dict_to_diffusers

    model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, lora_alpha=2, target_modules=[path]))
    noise_of_adapter(model)
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(model))
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(file.parent, unet_lora_layers=state, weight_name=file.name)
    return model


def by_hand(**tensors: Callable[[Tensor], Tensor]) -> Callable:
    """A file of these tensors, each made of the layer's weight."""

    def make(net: Net, path: str, file: Path):
        weight = net.get_submodule(path).weight
        save_file({f"lora_unet_{path}.{name}": make(weight).contiguous() for name, make in tensors.items()}, file)

    return make


def _by_cosine(*shape: int) -> Tensor:
    return 0.3 * torch.cos(torch.arange(float(torch.Size(shape).numel()))).reshape(shape)


BIASED = {
    "lora_down.weight": lambda w: _by_cosine(2, *w.shape[1:]),
    "lora_up.weight": lambda w: _by_cosine(w.shape[0], 2, *(1 for _ in w.shape[2:])),
    "diff_b": lambda w: _by_cosine(w.shape[0]),  # as many outputs as inputs where the layer is transposed
}
LENGTHS = lambda w: 1.5 + w.flatten(1)[:, 0].reshape(-1, *(1 for _ in w.shape[1:]))  # noqa: E731
KRON = {"lokr_w1": lambda w: _by_cosine(3, 1), "lokr_w2": lambda w: _by_cosine(w.shape[0] // 3, *w.shape[1:])}
LAYERS = (LINEAR, POINT, KERNEL, LINE)
FLAT = (LINEAR, POINT, KERNEL)
TUCKER = {"use_tucker": True}
DORA = {"weight_decompose": True}
MAKERS = (
    Maker("LoRA", "PEFT", FLAT, peft("LoraConfig", r=2, lora_alpha=2)),
    Maker("LoRA", "diffusers", FLAT, diffusers),
    Maker("LoRA and LoCon", "LyCORIS", LAYERS, lycoris("LoConModule")),
    Maker("LoCon in Tucker form", "LyCORIS", (KERNEL,), lycoris("LoConModule", **TUCKER)),
    Maker("LoHa", "PEFT", FLAT, peft("LoHaConfig", r=2, alpha=2)),
    Maker("LoHa", "LyCORIS", LAYERS, lycoris("LohaModule")),
    Maker("LoHa of high rank", "LyCORIS", FLAT, lycoris("LohaModule", lora_dim=8)),
    Maker("LoHa in Tucker form", "LyCORIS", (KERNEL,), lycoris("LohaModule", **TUCKER)),
    Maker("LoKr", "PEFT", FLAT, peft("LoKrConfig", r=2, alpha=2)),
    Maker("LoKr", "LyCORIS", LAYERS, lycoris("LokrModule", factor=2)),
    Maker("LoKr, both factors decomposed", "LyCORIS", FLAT, lycoris("LokrModule", lora_dim=1, decompose_both=True)),
    Maker("LoKr of whole factors", "LyCORIS", FLAT, lycoris("LokrModule", factor=4, full_matrix=True)),
    # core's own product of such factors has the kernel in the wrong place (torch.kron pads in front)
    Maker("LoKr of whole factors", "LyCORIS", (LINE,), lycoris("LokrModule", factor=4, full_matrix=True), True, False),
    # core's own product of such factors stops with an error, which it logs (torch.kron of a strided tensor)
    Maker("LoKr in Tucker form", "LyCORIS", (KERNEL,), lycoris("LokrModule", lora_dim=1, **TUCKER), True, False),
    # core leaves the bias of its own out
    Maker("LoRA with lora_bias", "PEFT", FLAT, peft("LoraConfig", r=2, lora_alpha=2, lora_bias=True), True, False),
    # core does not read PEFT's magnitude vector and merges a DoRA as a LoRA
    Maker("DoRA over LoRA", "PEFT", FLAT, peft("LoraConfig", r=2, lora_alpha=2, use_dora=True), True, False),
    # core divides by the lengths of W0's rows, LyCORIS by those of W0 + dW
    Maker("DoRA over LoRA", "LyCORIS", FLAT, lycoris("LoConModule", **DORA), False),
    Maker("DoRA on inputs", "LyCORIS", FLAT, lycoris("LoConModule", wd_on_out=False, **DORA)),
    Maker("DoRA over LoHa", "LyCORIS", FLAT, lycoris("LohaModule", **DORA), False),
    Maker("DoRA over LoKr", "LyCORIS", FLAT, lycoris("LokrModule", factor=2, **DORA), False),
    Maker("OFT", "LyCORIS", LAYERS, lycoris("DiagOFTModule", lora_dim=4)),
    # core takes the bound as it stands in the file, LyCORIS times the layer's outputs
    Maker("OFT, bounded", "LyCORIS", FLAT, lycoris("DiagOFTModule", lora_dim=4, constraint=0.5), False),
    Maker("full difference with bias", "LyCORIS", LAYERS, lycoris("FullModule")),
    Maker("norm", "LyCORIS", (LAYER, GROUP), lycoris("NormModule")),
    Maker("norm", "by hand", (RMS,), by_hand(w_norm=lambda w: 0.3 * torch.cos(torch.arange(36.0)))),
    Maker("LoRA with a bias", "by hand", (*FLAT, DEPTH, UP), by_hand(**BIASED)),
    Maker("DoRA over LoRA", "by hand", (DEPTH, UP), by_hand(**BIASED, dora_scale=LENGTHS)),
    Maker("LoKr of whole factors", "by hand", (DEPTH, UP), by_hand(**KRON)),
    Maker("replaced weight", "by hand", (*FLAT, LAYER, RMS), by_hand(set_weight=lambda w: w + _by_cosine(*w.shape))),
)
REFUSED = {  # what the error must name
    Maker("BOFT", "LyCORIS", (POINT,), lycoris("ButterflyOFTModule", lora_dim=4)): "BOFT",
    Maker("GLoRA", "LyCORIS", (LINEAR,), lycoris("GLoRAModule")): "GLoRA",
    Maker("IA3", "LyCORIS", (LINEAR,), lycoris("IA3Module")): "on_input",
    Maker("IA3", "PEFT", (LINEAR,), peft("IA3Config", feedforward_modules=[])): "IA3",
    Maker("OFT", "PEFT", (LINEAR,), peft("OFTConfig", oft_block_size=4, r=0)): "OFT",
    Maker("BOFT", "PEFT", (LINEAR,), peft("BOFTConfig", boft_block_size=4)): "BOFT",
    Maker("VeRA", "PEFT", (LINEAR,), peft("VeraConfig", r=4)): "VeRA",
}
