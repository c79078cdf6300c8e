"""Block weights: names of blocks, both notations, and what is refused."""

from __future__ import annotations

import pytest
from modular_lora_guard.modular_lora.files.block_weights import block_of, parse_block_weights
from support.errors import refuses


def key(stage: str, index: int) -> str:
    return f"diffusion_model.{stage}.{index}.1.transformer_blocks.0.attn1.to_q.weight"


SD15 = [key("input_blocks", i) for i in (1, 2, 4, 5, 7, 8)]
SD15 += [key("middle_block", 1), *(key("output_blocks", i) for i in range(3, 12))]
ALL = [*(key("input_blocks", i) for i in range(12)), *(key("middle_block", i) for i in range(3))]
ALL += [key("output_blocks", i) for i in range(12)]


def parse(text: str, keys=SD15, all_keys=ALL) -> dict[str, float]:
    return dict(parse_block_weights(text, keys, all_keys, "style.safetensors"))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        (key("input_blocks", 4), "IN04"),
        (key("input_blocks", 11), "IN11"),
        (key("middle_block", 0), "M00"),
        (key("middle_block", 2), "M00"),
        (key("output_blocks", 9), "OUT09"),
        ("diffusion_model.double_blocks.18.img_attn.qkv.weight", "DOUBLE18"),
        ("diffusion_model.single_blocks.0.linear1.weight", "SINGLE00"),
        ("diffusion_model.double_layers.3.attn.w1q.weight", "DOUBLE03"),
        ("diffusion_model.single_stream_blocks.31.block.ff_i.w1.weight", "SINGLE31"),
        ("diffusion_model.joint_blocks.23.x_block.attn.qkv.weight", "BLOCK23"),
        ("diffusion_model.transformer_blocks.59.attn.to_q.weight", "BLOCK59"),
        ("diffusion_model.blocks.39.cross_attn.k.weight", "BLOCK39"),
        ("diffusion_model.blocks.block27.blocks.0.block.attn.to_q.0.weight", "BLOCK27"),
        ("diffusion_model.layers.29.attention.qkv.weight", "BLOCK29"),
        ("diffusion_model.noise_refiner.0.attention.qkv.weight", "BASE"),
        ("diffusion_model.txt_in.individual_token_refiner.blocks.0.mlp.0.weight", "BASE"),
        ("diffusion_model.time_embed.0.weight", "BASE"),
        ("diffusion_model.out.2.weight", "BASE"),
        ("clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight", "BASE"),
        ("other.diffusion_model.input_blocks.4.weight", "BASE"),
    ],
)
def test_a_weight_key_belongs_to_its_block(name, block):
    assert block_of(name) == block


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_no_text_means_no_factors(text):
    assert parse(text) == {}


def test_seventeen_numbers_name_base_and_the_blocks_of_an_sd15_attention_lora_in_model_order():
    found = parse(",".join(str(i) for i in range(17)))
    order = ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{i:02d}" for i in range(3, 12))]
    assert found == dict(zip(order, map(float, range(17)), strict=True))


def test_the_order_of_the_keys_does_not_matter():
    text = ",".join(str(i) for i in range(17))
    assert parse(text, SD15[::-1]) == parse(text)


def test_fifty_eight_numbers_name_base_and_the_blocks_of_a_flux_lora_doubles_first():
    keys = [f"diffusion_model.single_blocks.{i}.linear1.weight" for i in range(38)]
    keys += [f"diffusion_model.double_blocks.{i}.img_attn.qkv.weight" for i in range(19)]
    found = parse(",".join(str(i) for i in range(58)), keys, keys)
    assert list(found) == ["BASE", *(f"DOUBLE{i:02d}" for i in range(19)), *(f"SINGLE{i:02d}" for i in range(38))]
    assert found["SINGLE37"] == 57


def test_one_number_for_every_block_of_the_model_is_taken_as_well():
    found = parse(",".join(["1"] * 26))
    assert len(found) == 26
    assert {"IN00", "OUT00", "M00", "BASE"} <= set(found)


def test_where_both_counts_fit_the_blocks_that_the_lora_touches_come_first():
    assert parse("1, 0.5", [key("middle_block", 1)], [key("input_blocks", 0)]) == {"BASE": 1.0, "M00": 0.5}


def test_named_blocks_leave_the_others_out():
    assert parse(" in01:0.5 , M00: -1,BASE:0 ") == {"IN01": 0.5, "M00": -1.0, "BASE": 0.0}


def test_a_named_block_may_be_one_that_the_lora_does_not_touch():
    assert parse("OUT00:0") == {"OUT00": 0.0}


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("1,0.5", "blocks.count", ("2 ", "17 ", "BASE, IN01", "26 ")),
        ("1", "blocks.count", ("1 ",)),
        ("IN01:0.5,1", "blocks.count", ("2 ",)),
        ("IN77:1", "blocks.unknown", ("IN77", "IN00")),
        ("IN01:0.5,XX:1,AB:2", "blocks.unknown", ("AB, XX",)),
        ("IN01:", "blocks.no-number", ("''",)),
        ("IN01:half", "blocks.no-number", ("'half'",)),
        ("IN01:nan", "blocks.no-number", ("'nan'",)),
        ("IN01:inf", "blocks.no-number", ("'inf'",)),
        (",".join(["1"] * 16 + ["-inf"]), "blocks.no-number", ("'-inf'",)),
        (",".join(["1"] * 16 + [""]), "blocks.no-number", ("''",)),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_name_of_the_file(text, code, named):
    with refuses(code, "style.safetensors", *named):
        parse(text)
