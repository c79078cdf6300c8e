"""The safety LoRA in disguise is told from LoRAs of other origin by the direction of the change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import LoraFile, read_lora
from modular_lora_guard.modular_lora.guard.disguise import LIKE
from modular_lora_guard.modular_lora.guard.grams import Factor
from modular_lora_guard.modular_lora.guard.interference import interference

ASSETS = Path(__file__).resolve().parents[3] / "tools" / "world" / "assets"
SAFETY = sorted((ASSETS / "evidence").glob("safety_*.safetensors"))
OTHERS = sorted([*(ASSETS / "evidence").glob("task_*"), *(ASSETS / "evidence").glob("sequential_*")])
DEMO = [ASSETS / f"demo_{name}.safetensors" for name in ("task_gloss", "sequential_gloss")]


def likeness(safety: LoraFile | dict, task: LoraFile | dict) -> float:
    safety, task = (one if isinstance(one, dict) else factors(one) for one in (safety, task))
    return interference(safety, 1.0, [("task", task, 1.0)], 0.5).likeness[0]


def factors(lora: LoraFile) -> dict[str, Factor]:
    return {name: Factor.of(layer) for name, layer in lora.plain.items()}


@pytest.mark.parametrize("path", [*SAFETY, ASSETS / "demo_safety_vehicles.safetensors"], ids=lambda path: path.stem)
def test_task_loras_are_far_below_the_limit_also_those_trained_on_top_of_it(path):
    safety = factors(read_lora(path))
    found = [abs(likeness(safety, read_lora(other))) for other in (*OTHERS, *DEMO)]
    assert len(found) == 8
    assert max(found) < 0.06


def test_a_safety_lora_of_the_same_concept_trained_from_another_seed_is_below_it_too():
    pairs = [(a, b) for a in SAFETY for b in SAFETY if a < b]
    found = [likeness(read_lora(a), read_lora(b)) for a, b in pairs]
    assert len(found) == 3
    assert 0.3 < min(found) <= max(found) < 0.33 < LIKE


def test_it_is_the_cosine_of_the_dense_changes_over_the_weights_that_both_change():
    generator = torch.Generator().manual_seed(0)
    drawn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    safety = {name: Factor(drawn(6, 2), drawn(2, 5)) for name in "abc"}
    task = {name: Factor(drawn(6, 3), drawn(3, 5), -0.4) for name in "bcd"}
    dense = lambda change: change.scale * change.up @ change.down  # noqa: E731
    S, T = (torch.cat([dense(one[name]).flatten() for name in "bc"]).double() for one in (safety, task))
    assert likeness(safety, task) == pytest.approx(float(S @ T / S.norm() / T.norm()), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.1, -0.1, 3.0])
def test_another_strength_precision_part_or_rank_stays_above_it(strength):
    lora = factors(read_lora(SAFETY[0]))
    forms = {
        "fp8": {n: Factor(f.up.to(torch.float8_e4m3fn).float(), f.down, strength) for n, f in lora.items()},
        "a third of its layers": {n: Factor(f.up, f.down, strength) for n, f in list(lora.items())[::3]},
        "half of its rank": {n: halved(f, strength) for n, f in lora.items()},
    }
    for name, task in forms.items():
        assert abs(likeness(lora, task)) > LIKE, name


def halved(change: Factor, scale: float) -> Factor:
    """The best approximation of half the rank."""
    U, S, V = torch.linalg.svd(change.up @ change.down, full_matrices=False)
    rank = change.down.shape[0] // 2
    return Factor(U[:, :rank] * S[:rank], V[:rank], scale)
