"""What the speed benchmark works on: ComfyUI's own U-Nets with random weights, LoRA files for them, the contenders."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .figures import ROOT
from .speed_rounds import Contender

sys.path.append(str(ROOT / "tests"))
from support.graphs import save_lora

SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
    "use_temporal_attention": False,
}
SDXL = SD15 | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_heads": -1,
    "num_head_channels": 64,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
TOY = SD15 | {
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "num_heads": 2,
}
WIDTHS = {"sd15": ("SD15", SD15), "sdxl": ("SDXL", SDXL), "toy": ("SD15", TOY)}


@dataclass(frozen=True)
class World:
    """A model, the files made for it, and the pack's modules."""

    width: str
    patcher: object  # ComfyUI's ModelPatcher
    dtype: torch.dtype
    device: torch.device
    folder: Path
    pack: Callable[[str], object]  # module of the pack by name, after ComfyUI is on the path

    @property
    def unet(self) -> nn.Module:
        return self.patcher.model.diffusion_model

    def evaluation(self, latent: int, unet: nn.Module | None = None) -> Callable[[], Tensor]:
        """One cond+uncond batch through the U-Net at latent x latent."""
        generator = torch.Generator().manual_seed(1)
        make = lambda *shape: torch.randn(*shape, generator=generator).to(self.device, self.dtype)  # noqa: E731
        config = WIDTHS[self.width][1]
        x, t, context = make(2, 4, latent, latent), torch.full((2,), 500.0, device=self.device), None
        context = make(2, 77, config["context_dim"])
        more = {"y": make(2, config["adm_in_channels"])} if config["adm_in_channels"] else {}
        return lambda: (unet or self.unet)(x, t, context=context, transformer_options={}, **more)

    def layers(self, kind: str = "attention") -> dict:
        """Kohya's names and specs: of the ``attention`` blocks' Linear and 1x1 layers, of their first ``half``, or of
        ``all`` layers that take a branch."""
        info = self.pack("comfy_host.introspection").model_info(self.patcher)
        found: dict = {}
        for name, key in info.key_map.items():
            spec = info.specs.get(key) if isinstance(key, str) else None
            if name.startswith("lora_unet_") and spec and not spec.problem and spec not in found.values():
                found[name] = spec
        inside = {n: s for n, s in found.items() if "attention" in n or "transformer" in n or "_proj_" in n}
        half = dict(list(inside.items())[: len(inside) // 2])
        return {"all": found, "attention": inside, "half": half}[kind]

    def file(self, rank: int, seed: int, kind: str = "attention") -> Path:
        """A LoRA of that rank, fp16, made once."""
        path = self.folder / f"{self.width}_{kind}_r{rank}_{seed}.safetensors"
        if not path.exists():
            save_half(path, self.layers(kind), rank, seed)
        return path


def save_half(path: Path, layers: dict, rank: int, seed: int) -> None:
    """A LoRA with random factors, in fp16 as most files are."""
    save_lora(path, layers, rank, seed)
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def open_world(width: str, dtype: torch.dtype, comfyui: Path | None, cpu: bool, folder: Path) -> World:
    """Brings ComfyUI up in this process and builds the model with random weights on its load device."""

    pack = lambda name: importlib.import_module(f"modular_lora_guard.{name}")  # noqa: E731
    pack("comfy_host.standalone").start(comfyui, cpu)
    from comfy import model_management, model_patcher, supported_models

    family, unet = WIDTHS[width]
    config = getattr(supported_models, family)(dict(unet))
    config.unet_config |= {key: unet[key] for key in ("num_heads", "num_head_channels") if key in unet}
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "").eval()
    fill(model)
    device = model_management.get_torch_device()
    offload = torch.device("cpu")
    return World(width, model_patcher.ModelPatcher(model, device, offload), dtype, device, folder, pack)


def fill(model: nn.Module) -> None:
    """Weights out of one random block, scaled so that activations keep their size; norms 1, biases 0."""
    block, place = torch.randn(2**24 + 3, generator=torch.Generator().manual_seed(0)), 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                continue
            flat, size = parameter.view(-1), 0
            while size < flat.numel():
                part = min(flat.numel() - size, len(block) - place)
                flat[size : size + part] = block[place : place + part] / (parameter[0].numel() ** 0.5)
                size, place = size + part, (place + part) % len(block)
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


Loras = tuple[tuple[Path, float], ...]  # the first is the safety LoRA


def plain(world: World, latent: int) -> Contender:
    """The model without a LoRA: what the spread of the method is."""
    return Contender(nullcontext, world.evaluation(latent))


def merged(world: World, loras: Loras, latent: int) -> Contender:
    """Stock LoraLoader's merge; its weights are put in the place of W0 for the turn, in the same module."""
    from comfy import sd, utils
    from comfy.model_management import load_models_gpu

    patcher = world.patcher
    for path, strength in loras:
        patcher, _ = sd.load_lora_for_models(patcher, None, utils.load_torch_file(str(path)), strength, 0.0)
    load_models_gpu([patcher])
    state = dict(world.patcher.model.named_parameters())
    weights = {key: state[key] for key in patcher.patches}
    patcher.detach()
    load_models_gpu([world.patcher])

    @contextmanager
    def ready() -> Iterator[None]:
        before = {key: utils.set_attr_param(world.patcher.model, key, w) for key, w in weights.items()}
        try:
            yield
        finally:
            for key, w in before.items():
                utils.set_attr_param(world.patcher.model, key, w)

    return Contender(ready, world.evaluation(latent))


def guarded(world: World, loras: Loras, latent: int, measuring: bool = False) -> Contender:
    """Ours: Guard Model's own function, then what happens around a run; an evaluation like all but two of a run's."""
    patcher = guard(world, loras)

    @contextmanager
    def ready() -> Iterator[None]:
        try:
            with patcher.guard_begin():
                if not measuring:
                    patcher.branches.meter.stop()
                yield
        finally:
            patcher.guard_attachment.detach()

    return Contender(ready, world.evaluation(latent))


def guard(world: World, loras: Loras):
    """The guarded patcher, read from the files."""
    g, read = world.pack("modular_lora.guard.build"), world.pack("modular_lora.files.cache").kept_lora
    (first, strength), *others = ((read(path), strength) for path, strength in loras)
    tasks = tuple(g.TaskLora(lora, s, s) for lora, s in others)
    handle, _ = world.pack("comfy_host.patcher").guard(
        world.patcher, None, (g.SafetyLora(first, strength),), tasks, False, g.GuardLimits()
    )
    return world.pack("comfy_host.patcher").unwrap(handle)


def bypass(world: World, loras: Loras, latent: int) -> Contender:
    """Core's LoraLoaderBypass (newer ComfyUI); one key of injections each, since core's second takes the first's."""
    from comfy import sd, utils

    patcher, injections = world.patcher, {}
    for path, strength in loras:
        made, _ = sd.load_bypass_lora_for_models(patcher, None, utils.load_torch_file(str(path)), strength, 0.0)
        injections[path.name] = made.injections["bypass_lora"]
    patcher = world.patcher.clone()
    for name, parts in injections.items():
        patcher.set_injections(name, parts)

    @contextmanager
    def ready() -> Iterator[None]:
        patcher.inject_model()
        try:
            yield
        finally:
            patcher.eject_model()
            for module in world.unet.modules():  # core leaves the class's bound forward behind
                module.__dict__.pop("forward", None)

    return Contender(ready, world.evaluation(latent))


def peft(world: World, loras: Loras, latent: int) -> Contender:
    """PEFT's adapters, all active at once, on modules of its own around the same weights."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    read = world.pack("modular_lora.files.reader").read_lora
    unet = copy.deepcopy(world.unet, {id(p): p for p in world.unet.parameters()})
    specs = {name: spec.path.removeprefix("diffusion_model.") for name, spec in world.layers("all").items()}
    for number, (path, strength) in enumerate(loras):
        layers, adapter = read(path).layers, f"lora{number}"
        rank = next(iter(layers.values())).rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[specs[name] for name in layers])
        inject_adapter_in_model(config, unet, adapter)
        for name, layer in layers.items():
            _put(unet.get_submodule(specs[name]), adapter, layer, strength)
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([f"lora{number}" for number in range(len(loras))])
    unet.eval().requires_grad_(False).to(world.device, world.dtype)
    return Contender(nullcontext, world.evaluation(latent, unet))


def _put(module: nn.Module, adapter: str, layer, strength: float) -> None:
    with torch.no_grad():
        module.lora_A[adapter].weight.copy_(layer.down)
        module.lora_B[adapter].weight.copy_(layer.up)
    module.scaling[adapter] = strength * layer.scale


MAKERS = {
    "merged": merged,
    "guarded": guarded,
    "measured": partial(guarded, measuring=True),  # a run's first evaluation, with the probe
    "bypass": bypass,
    "peft": peft,
}
