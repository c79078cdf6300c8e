"""The rule for what a node shows, to which every test that runs a graph holds the pack's nodes."""

from __future__ import annotations

import pytest
from support.plain import assert_plain

PLAIN = """Guarded: the safety LoRA ran in all 20 evaluations of the model. 2 task LoRAs.
saved as added_3.safetensors in loras
task a.safetensors: 2 keys match no layer (first lora_unet_down_blocks_0_attentions_0)
A net strength of 1.001 is left beside 1 task LoRA."""


def test_lines_that_a_person_reads_are_let_through() -> None:
    assert_plain(PLAIN)


@pytest.mark.parametrize(
    "line",
    [
        "base world, content SHA-256 6f0d1c2b3a4e",
        "safety LoRA b.safetensors 0a1b2c3d4e5f: frozen",
        "sum of \u2016\u0394W\u2016",
        "norm 0.31",
        "lora_unet_down_blocks_0_attn, lora_unet_down_blocks_1_attn, lora_unet_mid_block_attn",
    ],
)
def test_hashes_norms_and_lists_of_layers_are_not(line: str) -> None:
    with pytest.raises(AssertionError):
        assert_plain(f"{PLAIN}\n{line}")
