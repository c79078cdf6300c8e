"""Weights and activations in every precision: the branches are the merged change in fp32, in the activation's dtype."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from modular_lora_guard.modular_lora.branches.changes import LowRank, Term
from modular_lora_guard.modular_lora.branches.fused import COMPUTE, FusedLayer
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec, layer_spec
from safetensors.torch import load_file
from support.errors import refuses
from support.graphs import layers_of, save_lora
from support.precision_toys import (
    FP8,
    ForeignLinear,
    PackedLinear,
    SVDQLinear,
    gguf_operations,
    gguf_weights,
    int8,
    mixed,
    scaled,
    swap,
)
from support.small_unet import sampled
from support.small_world import FEWER
from torch import nn

PREFIX = "model.diffusion_model."
LAYER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
FILES = ("safety.safetensors", "task.safetensors")


@pytest.fixture(autouse=True)
def _as_in_the_executor():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def tensors(comfy):
    """The U-Net of the demo world, as ComfyUI's loaders take it."""
    return unet_of(comfy, "world.safetensors")


def unet_of(comfy, checkpoint: str) -> dict[str, torch.Tensor]:
    found = load_file(comfy.base / "models" / "checkpoints" / checkpoint)
    return {name.removeprefix(PREFIX): t for name, t in found.items() if name.startswith(PREFIX)}


def load(tensors, metadata=None, **options):
    """ComfyUI's own loader of diffusion models (UNETLoader)."""
    from comfy.sd import load_diffusion_model_state_dict

    return load_diffusion_model_state_dict(dict(tensors), model_options=options, metadata=metadata)


@pytest.fixture
def guard(comfy, loras):
    def make(model, files=FILES):
        g, read = comfy.host_guard, comfy.host_files.read_lora
        safety = g.SafetyLora(read(loras.folder / files[0]), 1.0)
        task = g.TaskLora(read(loras.folder / files[1]), 0.7, 0.7)
        return comfy.host.unwrap(comfy.host.guard(model, None, (safety,), (task,), False, g.GuardLimits())[0])

    return make


@pytest.fixture
def merge(loras):
    """The stock LoRA loader, one file after the other."""

    def make(model, files=FILES):
        from comfy.sd import load_lora_for_models
        from comfy.utils import load_torch_file

        for name, strength in zip(files, (1.0, 0.7), strict=True):
            file = load_torch_file(str(loras.folder / name))
            model, _ = load_lora_for_models(model, None, file, strength, 0.0)
        return model

    return make


@pytest.fixture
def original(comfy, tensors):
    """The same model in fp32 from the values that another one's stored weights stand for."""

    def make(model, names=tensors):
        return load({name: comfy.anatomy.original_weight(model, f"diffusion_model.{name}") for name in names})

    return make


def errors(model, guard, merge, original, **how) -> tuple[float, float, float]:
    """Largest |x - merged in fp32| over the largest effect, for x: guarded, the stock merge; and the base's own."""
    patcher, reference = guard(model), original(model)
    base, ours = sampled(model, **how), sampled(patcher, **how)
    assert torch.equal(sampled(model, **how), base)
    dtypes = {t.dtype for layer in patcher.branches.layers.values() for f in layer._fused.values() for t in f.tensors}
    assert len(dtypes & COMPUTE) == len(dtypes) == 1
    assert len(patcher.branches.layers) > 100
    before, after = sampled(reference, **how), sampled(merge(reference), **how)
    effect = (after - before).abs().max()
    assert effect > 0.5
    far = lambda x, y: float((x - y).abs().max() / effect)  # noqa: E731
    return far(ours, after), far(sampled(merge(model), **how), after), far(base, before)


def stored(name: str, tensors):
    if name == "fp8 e4m3fn weights":
        return load(tensors, dtype=FP8)
    if name == "fp8 e5m2 weights":
        return load(tensors, dtype=torch.float8_e5m2)
    if name == "scaled fp8 weights":
        return load(scaled(tensors))
    if name == "fp8 weights, layer by layer (QuantizedTensor)":
        return load(*mixed(tensors))
    dtype = torch.float16 if name.startswith("fp16") else torch.bfloat16
    return load(tensors, dtype=dtype)


STORED = (
    "fp8 e4m3fn weights",
    "fp8 e5m2 weights",
    "scaled fp8 weights",
    "fp8 weights, layer by layer (QuantizedTensor)",
    "fp16 weights, fp32 compute",
    "bf16 weights, fp32 compute",
)


@pytest.mark.parametrize("name", STORED)
def test_stored_weights_keep_their_values_under_the_branches(name, tensors, guard, merge, original, matrix):
    ours, stock, _ = errors(stored(name, tensors), guard, merge, original)
    assert ours < 1e-3
    assert stock > ours  # a merge is rounded to the storage again
    matrix("families.json", name, "works", ours)


def test_int8_weights_are_as_near_as_their_own_products(tensors, guard, merge, original):
    from comfy.quant_ops import QUANT_ALGOS

    if "int8_tensorwise" not in QUANT_ALGOS:
        pytest.skip("this ComfyUI has no int8 weights")
    ours, _, base = errors(load(int8(tensors)), guard, merge, original)
    assert ours < 1.5 * base  # the layers round their activations to int8


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_gguf_layers_take_a_branch_as_they_are(kind, tensors, guard, merge, original, matrix):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    packed = gguf_weights(tensors, getattr(gguf.GGMLQuantizationType, kind))
    model = load(packed, custom_operations=gguf_operations())
    patcher, reference = guard(model), original(model)
    before, after = sampled(reference), sampled(merge(reference))
    error = float((sampled(patcher) - after).abs().max() / (after - before).abs().max())
    assert error < 1e-3
    assert model.model.get_submodule(LAYER).weight.dtype == torch.uint8
    matrix("families.json", f"GGUF {kind} weights", "works", error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_compute_is_as_near_as_a_stock_merge(dtype, tensors, guard, merge, original):
    model = load(tensors)
    model.set_model_compute_dtype(dtype)
    ours, stock, base = errors(model, guard, merge, original)
    assert ours < 3 * max(stock, base)


def test_fp8_matrix_products_are_as_near_as_a_stock_merge(comfy, trained, loras, guard, merge, original):
    """With the demo world's own U-Net: random weights make too much of what is rounded."""
    from comfy import ops

    tensors, files = unet_of(comfy, trained), ("wide_safety.safetensors", "wide_task.safetensors")
    model = load(tensors, dtype=FP8, custom_operations=ops.fp8_ops)
    for name, rank, seed in zip(files, (4, 8), (1, 2), strict=True):
        save_lora(loras.folder / name, dict(layers_of(comfy.anatomy.model_info(model), "lora_unet_")), rank, seed)
    guard, merge = partial(guard, files=files), partial(merge, files=files)
    original = partial(original, names=tensors)
    ours, stock, base = errors(model, guard, merge, original, size=2)  # such products are slow on a CPU
    assert base > 0.01  # the activations are rounded to fp8 inside the layer, and only there
    assert ours < 1.5 * base < stock


def test_a_packed_linear_runs_and_its_weight_is_never_misread(tensors, guard, comfy, merge, matrix):
    model, plain = load(tensors), load(tensors)
    swap(model.model, PackedLinear)
    for path, module in model.model.named_modules():
        if isinstance(module, PackedLinear):
            plain.model.get_submodule(path).weight.copy_(module.unpacked())
    spec = comfy.anatomy.model_info(model).specs[f"{LAYER}.weight"]
    assert spec.weight_shape == (FEWER, FEWER)
    assert model.model.get_submodule(LAYER).weight.shape == (FEWER * FEWER, 1)
    before, after = sampled(plain), sampled(merge(plain))
    error = float((sampled(guard(model)) - after).abs().max() / (after - before).abs().max())
    assert error < 1e-3
    with refuses("layer.dtype", f"{LAYER}.weight", "torch.uint8"):
        comfy.anatomy.original_weight(model, f"{LAYER}.weight")
    matrix("families.json", "packed nn.Linear weights (bitsandbytes)", "works", error)


def test_a_linear_of_another_layout_is_refused_by_layer_and_class(comfy, tensors, guard, matrix):
    model = load(tensors)
    swap(model.model, ForeignLinear)
    with refuses("lora.not-whole", "ForeignLinear", f"[{FEWER}, {FEWER // 2}]"):
        guard(model)
    matrix("families.json", "weights in an unknown layout", "refused")


def test_nunchaku_is_refused_with_what_to_do(comfy, tensors, guard, matrix):
    model = load(tensors)
    swap(model.model, SVDQLinear)
    with refuses("layer.nunchaku", "SVDQW4A4Linear"):
        guard(model)
    matrix("families.json", "nunchaku (SVDQuant) weights", "refused")


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8])
def test_no_branch_is_ever_computed_in_one_byte(dtype):
    term = Term("safety", LowRank(torch.ones(1, 4), torch.ones(4, 1)), 1.0)
    layer = FusedLayer(LayerSpec("block.to_q", (4, 4)), [term])
    with refuses("layer.activations", "block.to_q", dtype):
        layer.fused(frozenset(("safety",)), dtype, torch.device("cpu"))
    assert not layer._fused


def test_shapes_come_from_features_and_kernel():
    assert layer_spec("w", nn.Conv2d(4, 6, (3, 1))).weight_shape == (6, 4, 3, 1)
    assert layer_spec("w", nn.Bilinear(2, 3, 4)).problem
    assert layer_spec("w", PackedLinear(nn.Linear(4, 6))).problem is None
    assert layer_spec("w", PackedLinear(nn.Linear(4, 6))).weight_shape == (6, 4)


def test_the_hash_tells_one_quantisation_from_another(comfy, tensors):
    sha = comfy.anatomy.model_sha256
    found = [sha(load(*mixed(tensors))), sha(load(tensors)), sha(load(tensors, dtype=FP8))]
    assert len(set(found)) == 3
    assert sha(load(*mixed(tensors))) == found[0]
    other = tensors | {"out.2.bias": tensors["out.2.bias"] + 1}
    assert sha(load(*mixed(other))) != found[0]


def test_fp8_weights_that_compute_in_bf16_have_bf16_branches(tensors, guard):
    model = load(tensors, dtype=FP8)
    model.set_model_compute_dtype(torch.bfloat16)
    patcher = guard(model)
    sampled(patcher)
    layers = patcher.branches.layers.values()
    assert {t.dtype for layer in layers for f in layer._fused.values() for t in f.tensors} == {torch.bfloat16}
    assert patcher.branches.nbytes() == patcher.branches.size(torch.bfloat16)
