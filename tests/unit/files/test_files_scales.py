"""A scale that stands in a file's metadata and not in its tensors: found, said, refused in a safety LoRA, chosen."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.files.formats import LokrLayer
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard.build import SafetyLora, TaskLora
from safetensors.torch import save_file
from support.errors import refuses

LAYER = "transformer.transformer_blocks.0.attn.to_q"


def pair(layer: str = LAYER, rank: int = 4, seed: int = 0, style: tuple[str, str] = ("lora_A", "lora_B")) -> dict:
    generator = torch.Generator().manual_seed(seed)
    down, up = (f"{layer}.{name}.weight" for name in style)
    return {down: torch.randn(rank, 6, generator=generator), up: torch.randn(5, rank, generator=generator)}


def lora(folder, tensors, metadata, scale="refuse"):
    save_file(tensors, folder / "a.safetensors", metadata)
    return read_lora(folder / "a.safetensors", scale=scale)


def peft(**fields) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps(fields)}


def both(prefix: str, alpha: float, rank: float, **more) -> dict:
    return {f"{prefix}.lora_alpha": alpha, f"{prefix}.r": rank, **{f"{prefix}.{k}": v for k, v in more.items()}}


STATED = {  # metadata of a LoRA of rank 4 without an alpha -> its scale by that
    "diffusers": (peft(**both("transformer", 16, 4)), 4.0),
    "diffusers, rsLoRA": (peft(**both("transformer", 16, 4, use_rslora=True)), 8.0),
    "diffusers, rsLoRA off": (peft(**both("transformer", 2, 4, use_rslora=False)), 0.5),
    "diffusers, alpha by layer": (peft(**both("transformer", 4, 4, alpha_pattern={"attn.to_q": 12})), 3.0),
    "diffusers, rank by layer": (peft(**both("transformer", 8, 64, rank_pattern={r"^.+attn\.to_k$": 1})), None),
    "diffusers, alpha of another layer": (peft(**both("transformer", 8, 4, alpha_pattern={"attn.to_k": 12})), 2.0),
    "diffusers, LoHa's alpha": (peft(**{"transformer.alpha": 8, "transformer.r": 4}), 2.0),
    "PEFT without a part's name": (peft(lora_alpha=16, r=4), 4.0),
    "another part, the only one of the model": (peft(**both("unet", 16, 4), **both("text_encoder", 4, 4)), 4.0),
    "plain keys": ({"transformer.lora_alpha": "16", "transformer.r": "4"}, 4.0),
    "plain keys of no part": ({"lora_alpha": "16", "r": "4"}, 4.0),
    "alpha alone": ({"alpha": "8"}, 2.0),
    "kohya": ({"ss_network_alpha": "16", "ss_network_dim": "4"}, 4.0),
    "kohya, rsLoRA": (
        {"ss_network_alpha": "16", "ss_network_dim": "4", "ss_network_args": '{"rs_lora": "True"}'},
        8.0,
    ),
    "a rank that was joined": (peft(**both("transformer", 16, 2)), 8.0),
    "two that disagree": (peft(**both("unet", 16, 4), **both("other", 8, 4)), None),
}
NOTHING = {  # metadata that states the scale that is used, or none that can be read
    "equal": peft(**both("transformer", 4, 4)),
    "a text encoder's": peft(**both("text_encoder", 16, 4)),
    "no numbers": {"lora_alpha": "much", "ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"},
    "not finite": {"lora_alpha": "inf", "r": "4"},
    "rank 0": {"lora_alpha": "4", "r": "0"},
    "damaged": {"lora_adapter_metadata": "{" * 3000, "ss_network_args": "[1]"},
    "no object": {"lora_adapter_metadata": "[16, 4]"},
    "a number of any size": {"lora_alpha": "1" + "0" * 4000, "r": "4"},
    "other": {"modelspec.title": "alpha 16", "format": "pt"},
}


@pytest.mark.parametrize("case", STATED)
def test_a_stated_scale_is_found(tmp_path, case):
    metadata, scale = STATED[case]
    found = lora(tmp_path, pair(), metadata)
    assert found.layers[LAYER].scale == 1.0  # as ComfyUI reads it
    assert found.stated[LAYER].scale == scale
    (note,) = found.notes
    assert "1 of 1 layers act at scale 1" in note
    assert "the metadata states" in note
    assert note.isprintable()


@pytest.mark.parametrize("case", NOTHING)
def test_what_states_no_other_scale_is_no_finding(tmp_path, case):
    found = lora(tmp_path, pair(), NOTHING[case])
    assert (found.stated, found.notes) == ({}, ())


@pytest.mark.parametrize("case", STATED)
def test_an_alpha_in_the_file_is_the_scale(tmp_path, case):
    """A resized file keeps the metadata of the file that it was made of."""
    found = lora(tmp_path, pair() | {f"{LAYER}.alpha": torch.tensor(2.0)}, STATED[case][0])
    assert (found.stated, found.notes, found.layers[LAYER].scale) == ({}, (), 0.5)


def test_a_safety_lora_of_two_scales_is_refused_until_one_is_chosen(tmp_path):
    metadata = STATED["diffusers"][0]
    found = lora(tmp_path, pair(), metadata)
    assert TaskLora(found, 1.0, 1.0).lora is found
    with refuses("lora.two-scales", "scale 1", "4 (transformer.lora_alpha 16 over transformer.r 4)"):
        SafetyLora(found, 1.0)
    asked = {scale: lora(tmp_path, pair(), metadata, scale) for scale in ("tensors", "metadata")}
    assert {name: SafetyLora(one, 1.0).lora.layers[LAYER].scale for name, one in asked.items()} == {
        "tensors": 1.0,
        "metadata": 4.0,
    }
    assert len({one.acts_as for one in asked.values()}) == 2
    assert all(len(one.notes) == 1 for one in asked.values())


def test_a_scale_that_contradicts_itself_cannot_be_chosen(tmp_path):
    metadata = STATED["two that disagree"][0]
    with refuses("file.scale", "a.safetensors"):
        lora(tmp_path, pair(), metadata, "metadata")
    assert SafetyLora(lora(tmp_path, pair(), metadata, "tensors"), 1.0)


def test_a_choice_changes_nothing_where_there_is_one_scale(tmp_path):
    for scale in ("refuse", "tensors", "metadata"):
        found = lora(tmp_path, pair(), NOTHING["equal"], scale)
        assert (found.layers[LAYER].scale, found.notes, found.scale_shown) == (1.0, (), "")
        assert found.acts_as == found.sha256


def test_each_part_of_a_model_has_its_own_scale(tmp_path):
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    metadata = peft(**both("transformer", 4, 4), **both("text_encoder", 12, 4))
    found = lora(tmp_path, pair() | pair(text), metadata)
    assert {name: said.scale for name, said in found.stated.items()} == {text: 3.0}
    assert "1 of 2 layers act at scale 1" in found.notes[0]


numbers = st.floats(0.25, 128, allow_nan=False).map(lambda x: round(x, 3))


@settings(max_examples=60, deadline=None)
@given(alpha=numbers, r=st.integers(1, 64), rank=st.integers(1, 8), root=st.booleans(), data=st.data())
def test_the_chosen_scale_is_that_of_an_explicit_sum(alpha, r, rank, root, data, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("lora")
    tensors = pair(rank=rank, seed=data.draw(st.integers(0, 99)))
    bias = {f"{LAYER}.lora_B.bias": torch.arange(5.0) + 1}
    metadata = peft(**both("transformer", alpha, r, use_rslora=root))
    found = lora(tmp_path, tensors | bias, metadata, "metadata")
    scale = alpha / (math.sqrt(r) if root else r)
    layer = found.layers[LAYER]
    down, up = tensors.values()
    ours = layer.base.scale * layer.base.up @ layer.base.down
    expected = (alpha / (r**0.5 if root else r)) * up @ down
    assert torch.allclose(ours, expected, rtol=1e-2 if not found.stated else 1e-5)
    if found.stated:  # PEFT scales the bias of lora_B as well
        assert torch.allclose(layer.bias, scale * bias[f"{LAYER}.lora_B.bias"])


def kron(**more) -> dict:
    return {"a.lokr_w1": torch.rand(2, 3), "a.lokr_w2": torch.rand(4, 5), **more}


@pytest.mark.parametrize(
    ("alpha", "metadata", "stated"),
    [
        (1.0, {"ss_network_dim": "32", "ss_network_alpha": "1"}, 1 / 32),  # stored as it was trained
        (32.0, {"ss_network_dim": "32", "ss_network_alpha": "1"}, None),  # LyCORIS stores the rank: scale 1
        (8.0, {"ss_network_dim": "32", "ss_network_alpha": "8", "ss_network_args": '{"conv_dim": 8}'}, None),
        (9999999999.0, {"ss_network_dim": "16", "ss_network_alpha": "16"}, None),  # AI-Toolkit
        (1.0, {}, None),
        (None, {"ss_network_dim": "32", "ss_network_alpha": "16"}, 0.5),
        (None, peft(**{"transformer.alpha": 16, "transformer.r": 4}), 4.0),
    ],
)
def test_a_lokr_of_whole_factors(tmp_path, alpha, metadata, stated):
    tensors = kron() | ({} if alpha is None else {"a.alpha": torch.tensor(alpha)})
    found = lora(tmp_path, tensors, metadata)
    layer: LokrLayer = found.layers["a"]
    assert layer.scale == 1.0
    assert (found.stated["a"].scale if found.stated else None) == stated
    if stated:
        scaled = found.with_scale("metadata").layers["a"]
        assert torch.allclose(torch.kron(scaled.w1, scaled.w2), stated * torch.kron(layer.w1, layer.w2))
        assert scaled.scale == 1.0


@pytest.mark.parametrize(
    ("layer", "rank", "args", "stated"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", 12, {"split_qkv": "True"}, 0.5),
        ("lora_unet_single_blocks_0_linear1", 16, {"split_qkv": True}, 0.5),
        ("lora_unet_double_blocks_0_img_attn_qkv", 4, {"split_qkv": "True"}, None),  # resized, or not joined
        ("lora_unet_double_blocks_0_img_attn_qkv", 12, {"split_qkv": "False"}, None),
        ("lora_unet_double_blocks_0_img_attn_proj", 12, {"split_qkv": "True"}, None),
        ("lora_unet_double_blocks_0_img_attn_qkv", 12, {}, None),
    ],
)
def test_layers_that_sd_scripts_joined(tmp_path, layer, rank, args, stated):
    """Three or four LoRAs of rank 4 and alpha 2 as one of three or four times the rank, under the alpha of each."""
    metadata = {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_network_args": json.dumps(args)}
    tensors = pair(layer, rank, style=("lora_down", "lora_up")) | {f"{layer}.alpha": torch.tensor(2.0)}
    found = lora(tmp_path, tensors, metadata)
    assert found.layers[layer].scale == 2.0 / rank
    assert (found.stated[layer].scale if found.stated else None) == stated
    if stated:
        assert found.with_scale("metadata").layers[layer].scale == stated
