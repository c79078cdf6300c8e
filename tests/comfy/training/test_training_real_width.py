"""The promises of a training, kept by networks of real width with random weights: minutes, and gigabytes of memory."""

from __future__ import annotations

import psutil
import pytest
import torch
from modular_lora_guard.tools.benchmarks.speed_models import SD15, SDXL
from support.families import Family
from support.families_image import POOLED
from support.family_training import check_family

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

FIGURES = "training_width.json"
WIDE = (  # gibibytes that it takes, the family, how it is trained; bf16 rounds what is merged and what is answered
    (12, Family("SD1.5, fp32", "SD15", SD15, (4, 8, 8), (77, 768)), {}),
    (
        14,
        Family("SDXL, bf16", "SDXL", SDXL, (4, 8, 8), (77, 2048), POOLED),
        {"dtype": torch.bfloat16, "mixed_precision": "bf16", "near": 0.1},
    ),
)


@pytest.mark.parametrize(("room", "family", "how"), WIDE, ids=[family.name for _, family, _ in WIDE])
def test_a_network_of_real_width_is_trained(room, family, how, comfy, data, tmp_path, matrix, request):
    if not request.config.getoption("--all"):
        pytest.skip("a network of real width takes minutes: run with --all")
    if psutil.virtual_memory().available < room * 2**30:
        pytest.skip(f"{family.name} takes {room} GiB of memory, which this machine has not free")
    check_family(family, comfy, data, tmp_path, **how)
    matrix(FIGURES, family.name, "works")
