"""A toy model three times, as it comes, guarded and merged, and what ComfyUI's nodes do around it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from support.encoder_toys import randomise
from support.families import Family, make, named
from support.families_image import IMAGE, UNET
from support.graphs import save_lora

SD15 = {**UNET, "use_linear_in_transformer": False, "context_dim": 768}
FLUX = next(f for f in IMAGE if f.config == "Flux")
SIZE, CFG = 16, 4.0
LATENT = (1, 4, SIZE, SIZE)


def node(kind: str, module: str = "nodes", **inputs):
    """The outputs of one of ComfyUI's nodes (of its module ``nodes``, or one of ``comfy_extras``).

    An input that this version of the node does not have is left out.
    """
    cls = getattr(importlib.import_module(module if module == "nodes" else f"comfy_extras.{module}"), kind)
    call = cls.execute if hasattr(cls, "execute") else getattr(cls(), cls.FUNCTION)
    output = call(**{name: value for name, value in inputs.items() if name in inspect.signature(call).parameters})
    return output if isinstance(output, tuple) else output.result


def patch(kind: str, module: str, **inputs) -> Callable:
    """A node that takes a MODEL and gives a MODEL."""
    return lambda model: node(kind, module, model=model, **inputs)[0]


def toy_unet(config: str = "SD15", **changes):
    """A ModelPatcher around a U-Net of two levels with random weights, made by ComfyUI's own classes."""
    return make(Family("toy", config, SD15 | changes, LATENT[1:], (77, 768)))


@dataclass(frozen=True)
class Trio:
    """One model as it comes, with both LoRAs merged by ComfyUI's own loader, and what guards it with the same files."""

    base: object
    merged: object
    guard: Callable


def make_trio(comfy, model, folder) -> Trio:
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    g, info, merged, loras = comfy.host_guard, comfy.anatomy.model_info(model), model, []
    layers = named(info, "lora_unet_", sliced=False)
    for role, strength in (("safety", 1.0), ("task", 0.6)):
        path = folder / f"{role}.safetensors"
        save_lora(path, layers, rank=3 + len(loras), seed=len(loras), size=0.2)
        merged, _ = load_lora_for_models(merged, None, load_torch_file(str(path)), strength, 0.0)
        loras.append(comfy.host_files.read_lora(path))
    safety, tasks = (g.SafetyLora(loras[0], 1.0),), (g.TaskLora(loras[1], 0.6, 0.6),)
    guard = lambda patcher: comfy.host.unwrap(comfy.host.guard(patcher, None, safety, tasks, False, g.GuardLimits())[0])  # noqa: E731
    return Trio(model, merged, guard)


def random_cond(seed: int, tokens: int = 77, width: int = 768, **entries) -> list:
    return [[torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)), entries]]


def sample(model, positive=None, negative=None, latent=None, cfg: float = CFG, **settings) -> torch.Tensor:
    """Two steps of the stock KSampler's own function, which seeds the global generator as well."""
    import nodes

    latent = {"samples": torch.zeros(LATENT)} if latent is None else latent
    conds = random_cond(1) if positive is None else positive, random_cond(2) if negative is None else negative
    options = {"seed": 3, "steps": 2, "cfg": cfg, "sampler_name": "euler", "scheduler": "normal", **settings}
    return nodes.common_ksampler(model, positive=conds[0], negative=conds[1], latent=latent, **options)[0]["samples"]


def assert_kept(
    comfy, trio: Trio, run: Callable, without: Callable = sample, change: Callable | None = None, **expected
) -> int:
    """Guarded = merged within rounding in ``run``, which must differ from ``without`` and the LoRAs must matter in it.

    ``change`` patches the model, before the guard and after it. Returns the evaluations of one run.
    """
    if change is None:
        guarded, change = [trio.guard(trio.base)], lambda model: model
    else:
        guarded = [change(trio.guard(trio.base)), trio.guard(change(trio.base))]
    reference, base, plain = run(change(trio.merged)), run(change(trio.base)), without(trio.merged)
    effect = (reference - base).abs().max()
    assert effect > 0.05 * reference.abs().max()
    if plain.shape == reference.shape:
        assert (reference - plain).abs().max() > 0.01 * reference.abs().max()
    for model in guarded:
        ours = run(model)
        assert (ours - reference).abs().max() < expected.get("error", 1e-3) * effect
        record = comfy.host.attestation(model)
        assert record.status == expected.get("status", "guarded")
        assert record.firings == record.layers * record.evaluations > 0
    return record.evaluations


def prompts() -> tuple[list, list]:
    return random_cond(1), random_cond(2)


def noise_image(size: int) -> torch.Tensor:
    return torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(5))  # b h w 3


def make_flux(comfy, folder) -> tuple[Trio, Callable]:
    """A transformer, Flux: the three of it, and a run with ``change`` made to its conditionings."""
    pooled = {"pooled_output": torch.randn(1, 24, generator=torch.Generator().manual_seed(4)), "guidance": 3.5}
    conds = [random_cond(seed, *FLUX.context, **pooled) for seed in (1, 2)]

    def run(model, change=lambda *conds: conds):
        return sample(model, *change(*conds), {"samples": torch.zeros(1, *FLUX.latent)})

    return make_trio(comfy, make(FLUX), folder), run


def controlled(control, positive, negative, size: int = 8 * SIZE) -> list:
    return node(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=control,
        image=noise_image(size),
        strength=0.8,
        start_percent=0.0,
        end_percent=1.0,
    )


def control_network():
    """A toy ControlNet's network for the toy model, every zero convolution filled."""
    from comfy import ops
    from comfy.cldm import cldm

    settings = {k: v for k, v in SD15.items() if k not in ("out_channels", "num_heads", "num_head_channels")}
    network = cldm.ControlNet(**settings, hint_channels=3, num_head_channels=16, operations=ops.manual_cast)
    randomise(network)
    return network.eval()
