"""Making a safety LoRA on a text model of a few numbers: room, thresholds, refusals, and what the file does."""

from __future__ import annotations

import re

import pytest
import torch
from modular_lora_guard.modular_lora.guard import activity
from modular_lora_guard.training.safety.closed.make import make_safety
from modular_lora_guard.training.safety.closed.options import MakeOptions
from support.closed_words import LAYERS, WIDTH, Words
from support.errors import refuses


def make(tmp_path, kept: int, **changes):
    preserve = tuple(f"kept {i}" for i in range(kept))
    values = {"concept": ("car",), "guide": ("heart",), "preserve": preserve, "output_dir": str(tmp_path)} | changes
    return make_safety(Words(), MakeOptions(**values), engine="test")


def moved(made, prompt: str) -> float:
    """Largest ‖ΔW x‖ / ‖W x‖ over tokens and layers, by the file."""
    model, found = Words(), []
    for path in LAYERS:
        layer = made.lora.plain[model.name(path)]
        W, x = model.weight(path).double(), model.rows(prompt).T
        found.append((layer.scale * layer.up.double() @ layer.down.double() @ x).norm(dim=0) / (W @ x).norm(dim=0))
    return float(torch.stack(found).max())


def test_with_room_what_is_kept_is_kept_exactly_and_the_report_says_how_much_room(tmp_path):
    made = make(tmp_path, 3)
    (part,) = made.parts
    assert part.exact
    assert part.kept_rank == 1 + 3 * 5  # the first token once; "", the guide and three prompts
    assert part.rank == 3
    assert max(moved(made, p) for p in ("", "heart", "kept 0", "kept 2")) < 1e-6
    assert moved(made, "car") > 0.5
    assert f"the kept prompts span 16 of {WIDTH} dimensions" in made.report
    assert "WARNING: the rest of the text's effect passes by other layers" in made.report
    assert "left out, since they see text mixed with the image or the timestep: 1 layers" in made.report
    assert "Not claimed" in made.report
    told = float(re.search(r"went ([\d.]+) % of the way", made.report)[1])
    assert told == pytest.approx(100 * part.erased["car"], abs=0.1)


def test_without_room_quiet_directions_are_given_up_with_the_change_of_every_prompt(tmp_path):
    made = make(tmp_path, 20, threshold=0.5)
    (part,) = made.parts
    assert not part.exact
    assert part.kept_rank == WIDTH
    assert "no room to keep exactly: directions used less than 0.5 were given up" in made.report
    assert "change of kept prompts: " in made.report
    for prompt in ("", "heart", "kept 0", "kept 19"):
        assert moved(made, prompt) == pytest.approx(part.kept[prompt], rel=1e-3)
    assert max(part.kept.values()) > 1e-4
    with refuses("make.no-room", "24 of 24 dimensions", "threshold is 0"):
        make(tmp_path, 20, threshold=0.0)
    with refuses("make.no-room", "1e-06"):
        make(tmp_path, 20, threshold=1e-6)
    (regression,) = make(tmp_path, 20, method="uce").parts
    assert regression.erased["car"] > 0.1


def test_a_layer_that_sees_mixed_text_is_refused_by_name(tmp_path):
    with refuses("make.mixed-input", "'joint'", "block.0.joint"):
        make(tmp_path, 2, layers=("joint",))
    only = make(tmp_path, 2, layers=("to_v",))
    assert sorted(only.lora.layers) == ["lora_unet_block_0_to_v", "lora_unet_block_1_to_v"]
    with refuses("option.too-long", "xxx"):
        make(tmp_path, 2, synonyms=("x" * 51,))


def test_templates_and_guides_go_together(tmp_path):
    made = make(
        tmp_path, 1, synonyms=("bus",), guide=("heart", "star"), templates=("{}", "a {} here"), everything_else="none"
    )
    (part,) = made.parts
    assert list(part.erased) == ["car", "a car here", "bus", "a bus here"]
    assert list(part.kept) == ["", "heart", "a heart here", "star", "a star here", "kept 0"]


def activity_of(model, lora, prompt: str) -> float:
    """The mean over the layers of |ΔW x|² / |W x + b|², written out token by token in float64."""
    shares = []
    for path in LAYERS:
        layer, W, b = lora.plain[model.name(path)], model.weight(path).double(), model.bias(path)
        change = layer.scale * layer.up.double() @ layer.down.double()
        acted = sum(float((change @ x).square().sum()) for x in model.rows(prompt))
        answer = sum(float((W @ x + (0 if b is None else b)).square().sum()) for x in model.rows(prompt))
        shares.append(acted / answer)
    return sum(shares) / len(shares)


def test_the_file_says_how_strongly_it_answers_to_its_prompts_and_to_others(tmp_path):
    made, model = make(tmp_path, 10, synonyms=("bus",), method="uce"), Words()
    found = activity.read(made.lora)
    assert (found.latent, found.seed, found.strength, found.base_sha256) == ((4, 16, 8), 7, 1.0, "0" * 64)
    about = ["car", "bus", "a photo of car", "a photo of bus", "a painting of car", "a painting of bus",
             "a drawing of car", "a drawing of bus"]  # fmt: skip
    kept = ["heart", *(f"kept {i}" for i in range(10))]
    for side, prompts in ((found.concept, about), (found.preserved, kept)):
        figures = [activity_of(model, made.lora, prompt) for prompt in prompts]
        assert (side.prompts, side.measured) == (len(prompts), len(prompts))
        assert side.at(0.0) == pytest.approx(min(figures), rel=1e-4)
        assert side.at(1.0) == pytest.approx(max(figures), rel=1e-4)
    assert f"calibration of safety activity: AUC {found.auc:.3f} on 8 prompts" in made.report


def test_without_calibration_nothing_is_written_and_one_that_fails_is_told(tmp_path):
    made = make(tmp_path, 3, calibrate=False)
    assert activity.KEY not in made.lora.metadata
    assert "calibration of safety activity: switched off" in made.report
    weak = make(tmp_path, 3, method="uce", ridge=1e9)
    assert activity.KEY not in weak.lora.metadata or activity.read(weak.lora).auc >= activity.LEAST_AUC
