"""Matching LoRA layers to weights through a key map laid out like ComfyUI's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.modular_lora.files.matching import Target, match_layers, mismatch, slice_shape
from modular_lora_guard.modular_lora.files.names import is_text
from modular_lora_guard.modular_lora.files.reader import LoraFile, LoraLayer
from support.errors import refuses

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
OUT = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight"
CONV = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
FUSED = "diffusion_model.single_blocks.0.linear1.weight"
SHAPES = {QUERY: (6, 4), OUT: (6, 4), CONV: (6, 4, 3, 3), FUSED: (9, 4)}
KEY_MAP = {
    f"lora_unet_{BLOCK.replace('.', '_')}_to_q": QUERY,
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": QUERY,
    QUERY.removesuffix(".weight"): QUERY,
    f"{BLOCK}.processor.to_q": QUERY,
    f"unet.{BLOCK}.processor.to_q": QUERY,
    f"unet.{BLOCK}.processor.to_out": OUT,
    "unet.down_blocks.0.resnets.0.conv1": CONV,
    "linear1": FUSED,
    "linear1_q": (FUSED, (0, 0, 3)),
    "linear1_k": (FUSED, (0, 3, 3)),
    "linear1_columns": (FUSED, (1, 2, 2)),
    "swapped": (FUSED, None, torch.flip),
    "absent": "diffusion_model.absent.weight",
}


def layer(name: str, down: tuple[int, ...] = (2, 4), up: tuple[int, ...] = (6, 2)) -> LoraLayer:
    return LoraLayer(name, torch.ones(down), torch.ones(up), None)


def lora(*layers: LoraLayer, **metadata: str) -> LoraFile:
    return LoraFile(Path("a.safetensors"), "a.safetensors", "0" * 64, metadata, {item.name: item for item in layers})


def match(file: LoraFile):
    return match_layers(file, file.layers, KEY_MAP, SHAPES, "SD15")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (f"lora_unet_{BLOCK.replace('.', '_')}_to_q", QUERY),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", QUERY),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", QUERY),
        (f"{BLOCK}.to_q", QUERY),
        (f"unet.{BLOCK}.to_q", QUERY),
        (f"unet.{BLOCK}.processor.to_q", QUERY),
        (f"base_model.model.{BLOCK}.to_q", QUERY),
        (f"unet.base_model.model.{BLOCK}.to_q", QUERY),
        (QUERY.removeprefix("diffusion_model.").removesuffix(".weight"), QUERY),
        (f"base_model.model.{QUERY.removeprefix('diffusion_model.').removesuffix('.weight')}", QUERY),
        (f"{BLOCK}.to_out.0", OUT),
        (f"unet.{BLOCK}.to_out.0", OUT),
        (f"unet.{BLOCK}.processor.to_out", OUT),
    ],
)
def test_every_spelling_of_a_layer_finds_its_weight(name, key):
    assert match(lora(layer(name))).targets == {name: Target(key)}


@pytest.mark.parametrize("name", ["absent", "lora_unet_elsewhere", f"{BLOCK}.to_r"])
def test_a_layer_that_the_model_lacks_is_unmatched(name):
    result = match(lora(layer(name), layer("linear1", up=(9, 2))))
    assert result.unmatched == (name,)
    assert result.targets == {"linear1": Target(FUSED)}


@pytest.mark.parametrize("down", [(2, 4, 3, 3), (2, 36)])
def test_a_kernel_may_come_flat(down):
    file = lora(layer("down_blocks.0.resnets.0.conv1", down, (6, 2, 1, 1)))
    assert match(file).targets == {"down_blocks.0.resnets.0.conv1": Target(CONV)}


def test_a_linear_layer_may_come_as_a_1x1_kernel():
    assert match(lora(layer(f"{BLOCK}.to_q", (2, 4, 1, 1), (6, 2, 1, 1)))).targets


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        (f"{BLOCK}.to_q", (2, 4), (5, 2)),
        (f"{BLOCK}.to_q", (2, 8), (6, 2)),
        (f"{BLOCK}.to_q", (2, 1, 2, 2), (6, 2)),
        ("down_blocks.0.resnets.0.conv1", (2, 4), (6, 2)),
        ("down_blocks.0.resnets.0.conv1", (2, 9, 2, 2), (6, 2)),
        ("linear1_q", (2, 4), (9, 2)),
        ("linear1_columns", (2, 4), (9, 2)),
    ],
)
def test_a_wrong_shape_is_an_error_with_both_shapes(name, down, up):
    with pytest.raises(GuardError) as error:
        match(lora(layer(name, down, up)))
    for part in ("a.safetensors", repr(name), str([up[0], *down[1:]]), "SD15", "use a LoRA made for this base"):
        assert part in str(error.value)


def test_slices_of_one_weight_stand_side_by_side():
    file = lora(layer("linear1_q", up=(3, 2)), layer("linear1_k", up=(3, 2)), layer("linear1_columns", (2, 2), (9, 2)))
    targets = match(file).targets
    assert targets["linear1_q"] == Target(FUSED, (0, 0, 3))
    assert [slice_shape(target, (9, 4)) for target in targets.values()] == [(3, 4), (3, 4), (9, 2)]


def test_two_layers_on_one_place_are_an_error():
    with refuses("lora.not-whole", QUERY, "SD15"):
        match(lora(layer(f"{BLOCK}.to_q"), layer(f"unet.{BLOCK}.to_q")))


def test_what_need_not_apply_whole_leaves_out_what_comfyui_leaves_out():
    """A wrong shape; of two layers on one place the one that comes first in the map, whatever the file's order."""
    generic = QUERY.removesuffix(".weight")
    wrong, first, last = layer("linear1", up=(5, 2)), layer(f"{BLOCK}.to_q"), layer(generic)
    order = list(KEY_MAP)
    assert order.index(generic) < order.index(f"{BLOCK}.processor.to_q")
    for file in (lora(wrong, first, last), lora(last, first, wrong)):
        result = match_layers(file, file.layers, KEY_MAP, SHAPES, "SD15", whole=False)
        assert result.targets == {f"{BLOCK}.to_q": Target(QUERY)}
        assert result.unmatched == ()
        assert result.left.keys() == {"linear1", generic}
        assert "[5, 4] in the file, [9, 4] in" in result.left["linear1"]
        assert f"and '{BLOCK}.to_q' both change {QUERY} of SD15" in result.left[generic]


def test_a_rearranged_weight_keeps_its_rearrangement():
    assert match(lora(layer("swapped", up=(9, 2)))).targets == {"swapped": Target(FUSED, None, torch.flip)}


def test_only_the_names_asked_for_are_matched():
    file = lora(layer("linear1", up=(9, 2)), layer("lora_te1_text_model_encoder_layers_0_mlp_fc1"))
    result = match_layers(file, ["linear1"], KEY_MAP, SHAPES, "SD15")
    assert list(result.targets) == ["linear1"]
    assert result.unmatched == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", True),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", True),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", True),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", False),
        ("base_model.model.unet.down_blocks.0.attentions.0.proj_in", False),
        ("lora_transformer_transformer_blocks_0_attn_to_q", False),
    ],
)
def test_text_encoder_layers_are_told_by_prefix(name, expected):
    assert is_text(name) is expected


def test_a_text_layer_in_peft_names_finds_its_weight():
    key_map = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": "w"}
    name = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    file = lora(layer(name))
    assert match_layers(file, [name], key_map, {"w": (6, 4)}, "CLIP").targets == {name: Target("w")}


def test_the_sentence_for_a_file_that_does_not_match():
    file = lora(layer("x"), layer("y"), ss_base_model_version="sdxl_base_v1-0")
    assert mismatch(file, match(file), "SD15") == (
        "a.safetensors matches 0 of its 2 layers to SD15; it says it was trained for sdxl_base_v1-0 "
        "(ss_base_model_version): use a LoRA made for this base."
    )
    file = lora(layer("linear1", up=(9, 2)), layer("y"))
    assert mismatch(file, match(file), "SD15") == (
        "a.safetensors matches 1 of its 2 layers to SD15, not 'y'; it does not say what base it was trained for: "
        "use a LoRA made for this base."
    )
