"""The forms of safety first on the demo world's narrow net: what acts at a g, by what it is found, second moments."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard import activity
from modular_lora_guard.tools.benchmarks import safety_first
from modular_lora_guard.tools.world import ASSETS, SAFETY_LORA, TASK_LORA, base, data, diffusion, lorafile, narrow
from modular_lora_guard.tools.world.equal import drawing, forms, training
from modular_lora_guard.tools.world.equal.forms import ALL, FORMS, Bounds, Net, Run, Texts
from modular_lora_guard.tools.world.equal.protocol import INK, KEPT, VEHICLES
from support.giving_way import calibrated

PROMPTS = ["noto, car", "gloss, pizza", "flat, owl"]


@pytest.fixture(scope="module")
def net() -> Net:
    model, _ = narrow.load()
    return Net(model, *(lorafile.load(ASSETS / name, model.unet) for name in (SAFETY_LORA, TASK_LORA)))


@pytest.fixture
def given(net) -> tuple[torch.Tensor, torch.Tensor, Texts]:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return x, torch.full((3,), 700), Texts.of(net.model, PROMPTS)


def folded(net: Net, x, t, share: float) -> torch.Tensor:
    with torch.no_grad(), drawing.folded(net.model.unet, (net.safety, 1.0), (net.task, share)):
        return base.guided(net.model, PROMPTS)(x, t)


def test_every_prompts_rows_have_the_task_at_their_own_g(net, given):
    x, t, texts = given
    shares = torch.tensor([0.0, 0.5, 1.0])
    found, nothing = net.evaluate(x, t, texts, shares)
    assert nothing == {}
    for row, share in enumerate(shares.tolist()):
        expected = folded(net, x, t, share)[row]
        assert (found[row] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_images_activity_is_the_one_that_a_calibration_measures(net, given):
    x, _, texts = given
    _, energies = net.evaluate(x, torch.full((3,), 999), texts, lambda *_: 0.0)
    found = forms.figures("image", energies, texts)[ALL]
    lorafile.attach(net.model.unet, net.safety)
    expected = training.activities(net.model, *net.model.text(PROMPTS), x)
    lorafile.attach(net.model.unet)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_bounds_are_those_of_a_calibration():
    generator = torch.Generator().manual_seed(1)
    for shift in (0.0, 3.0):  # overlapping, and apart
        kept, concept = torch.rand(40, generator=generator), shift + 0.9 + torch.rand(30, generator=generator)
        made = activity.calibrate(
            "0" * 64, 1.0, (4, 8, 8), 0, *([[v] for v in side.tolist()] for side in (concept, kept))
        )
        assert forms.bounds(kept, concept) == pytest.approx(made.bounds, rel=1e-5)


@pytest.mark.parametrize("name", list(FORMS))
def test_far_below_the_bounds_a_form_is_the_sum_and_far_above_them_safety_alone(name, net, given):
    x, t, texts = given
    layers = [ALL, *lorafile.targets(net.model.unet)]
    for low, share in ((math.inf, 1.0), (0.0, 0.0)):
        known = Bounds({(FORMS[name].scope, step): dict.fromkeys(layers, (low, low)) for step in range(2)})
        run = Run(net, FORMS[name], known, texts)
        run.predict(x, t)  # what goes by the run's own evaluations knows nothing in the first one
        found, expected = run.predict(x, t), folded(net, x, t, share)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        first = 1.0 if not (FORMS[name].muted or FORMS[name].local) else share
        assert run.mean.tolist() == pytest.approx([(first + share) / 2] * 3)


def test_a_region_gives_way_where_it_is_and_layers_of_the_text_by_the_least_of_it(net, given):
    _, _, texts = given
    run = Run(net, FORMS["region, first step, muted"], Bounds(), texts)
    places = torch.ones(3, 1, 8, 8)
    places[0, 0, 2, 5] = 0.25
    run.shares = {ALL: places}
    energies = {"attn1.to_q": (torch.ones(3, 16),) * 2, "attn2.to_k": (torch.ones(3, 7),) * 2}
    here = run._here("attn1.to_q", energies).reshape(3, 4, 4)
    assert here[0, 1, 2] == 0.25
    assert here.sum() == 3 * 16 - 0.75
    assert run._here("attn2.to_k", energies).tolist() == [0.25, 1.0, 1.0]


def test_second_moments_fade_what_only_the_concepts_prompts_give():
    """Inputs of kept prompts span two dimensions, of concept prompts a third, neither the fourth."""
    kept = {"layer": torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64))}
    concept = {"layer": torch.diag(torch.tensor([0.0, 1.0, 3.0, 0.0], dtype=torch.float64))}
    down, up = torch.randn(2, 4, generator=torch.Generator().manual_seed(2)), torch.ones(3, 2)
    made, same, scale = forms.kept_clear({"layer": (down, up, 0.5)}, kept, concept, 4.0)["layer"]
    assert torch.equal(same, up)
    assert scale == 0.5
    expected = down * torch.tensor([1.0, 1 / (1 + 4.0), 0.0, 1.0])
    assert (made - expected).abs().max() < 1e-5


def test_from_a_start_the_last_steps_of_a_longer_schedule_are_sampled(net):
    seen = []

    def predict(x, t):
        seen.append((x.clone(), int(t[0])))
        return torch.zeros_like(x)

    start, noise = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 2.0)
    found = diffusion.sample(predict, noise, 5, start, 0.5)
    assert [t for _, t in seen] == [499, 399, 299, 199, 99]
    sigma = diffusion.SIGMAS[499]
    assert torch.allclose(seen[0][0] * (1 + sigma**2).sqrt(), start + 2 * sigma)
    assert torch.allclose(found, start + 2 * sigma)  # nothing was predicted: nothing goes


# The figures


def found(count: int, **columns) -> dict[str, list]:
    """What the judge says of images: nothing, but for some columns."""
    return {"hit": [False] * count, "top": [-1] * count, "style": [0] * count, "ink": [False] * count,
            "g": [1.0] * count} | columns  # fmt: skip


def test_the_judge_is_not_asked_for_vehicles_in_ink():
    """Vehicles are seen in every image with the task's word and in no other: in ink these do not count."""
    images = safety_first.images()
    hit = [one.kind == VEHICLES and one.style == data.TASK_STYLE for one in images]
    seen = [found(len(images), hit=hit, ink=hit, style=[data.TASK_STYLE if one else 0 for one in hit])]
    assert safety_first._row("gloss", seen)["vehicles"].startswith("16.7% ")
    assert safety_first._row("gloss", seen)["vehicles"].endswith(" of 144")
    assert safety_first._row(INK, seen)["vehicles"].startswith("0.0% ")
    assert safety_first._row(INK, seen)["vehicles"].endswith(" of 120")
    assert safety_first._row("gloss", seen)["style_unasked"] == "0.0% of 120"
    unasked = [found(len(images), ink=[one.kind == VEHICLES and one.concept == 0 for one in images])]
    assert safety_first._row(INK, unasked)["style_unasked"] == "4.2% of 120"
    wrong = [found(len(images), hit=[one.kind == KEPT and one.style == 0 for one in images])]
    assert safety_first._row(INK, wrong)["mistaken"] == "20.0% of 60"
    assert safety_first._row(INK, wrong)["vehicles"].startswith("0.0% ")


@pytest.fixture(scope="module")
def cases() -> list[safety_first.Case]:
    bench = SimpleNamespace(started=lambda prompts: [torch.zeros(1, 4, 8, 8)] * len(prompts))
    return list(safety_first._cases(bench, read_lora(ASSETS / "equal" / "null_space.safetensors")))


def test_what_a_cases_images_show_is_asked_of_base_styles_words_and_the_style_of_the_tasks(cases):
    word = data.STYLES[data.TASK_STYLE]
    for case in cases:
        for one in case.images:
            assert one.prompt.startswith(f"{word}, ") == one.styled
            assert not one.negative.startswith(f"{word}, ")
        assert len({one.seed for one in case.images}) == len(case.images)
    assert len({case.name for case in cases}) == len(cases)


def test_a_cases_rates_are_of_the_images_that_say_something(cases):
    """A vehicle in every image with the task's word, none elsewhere; every other kept concept right, all in style."""
    case = next(case for case in cases if "a kept concept in one prompt" in case.name)
    shown = [one for one in case.images if not one.styled]
    asked = [one.concept if i % 2 else -1 for i, one in enumerate(case.images)]
    seen = found(
        len(case.images),
        hit=[one.styled for one in case.images],
        top=asked,
        style=[data.TASK_STYLE] * len(case.images),
        g=[0.25 if one.styled else 0.75 for one in case.images],
    )
    row = safety_first._case_row("gloss", case, seen)
    assert row["vehicles"].startswith("0.0% ")
    assert row["kept"] == f"50.0% of {len(shown)}"
    assert row["task"] == f"100.0% of {len(case.images) - len(shown)}"
    assert row["mean_g"] == "0.75"
    ink = safety_first._case_row(INK, case, seen)
    assert (ink["kept"], ink["task"]) == ("", f"0.0% of {len(case.images) - len(shown)}")
    assert safety_first._case_row("", case, seen).keys() == {"vehicles", "kept", "task"}


def test_what_was_drawn_with_another_second_safety_lora_is_not_taken_for_it(cases):
    same, other = (read_lora(ASSETS / name) for name in ("equal/null_space.safetensors", TASK_LORA))
    case = next(case for case in cases if case.second)
    again = [safety_first.Case(case.name, case.images, second=one).key for one in (same, other)]
    assert again[0] == case.key != again[1]


def test_the_recorded_command_says_what_was_run_and_no_folder():
    chosen = argparse.Namespace(seeds=[31, 33], tasks=["ink"], second=Path("some") / "my_animals.safetensors")
    said = "python -m tools.benchmarks.safety_first --parts"
    assert safety_first._command("forms", chosen) == f"{said} forms --seeds 31 33 --tasks ink"
    expected = f"{said} cases --seeds 31 --tasks ink --second my_animals.safetensors"
    assert safety_first._command("cases", chosen) == expected


def test_of_two_safety_loras_the_least_g_counts_each_found_while_both_act(net, tmp_path: Path):
    """The first has 8/16 by its activity beside the second, 4/16 more or less alone; the second always has 1."""
    model, texts = net.model, Texts.of(net.model, ["noto, car"])
    files = [read_lora(ASSETS / name) for name in (SAFETY_LORA, TASK_LORA)]
    first, second = (lorafile.load(file.path, model.unet) for file in files)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(safety_first.work.NOISE))
    values = []
    for acting in ((first, second), (first,)):
        lorafile.attach(model.unet, *acting)
        values.append(float(training.activities(model, texts.context[:1], texts.bias[:1], noise, first)))
    lorafile.attach(model.unet)
    both, alone = values
    width = 4 * abs(both - alone)
    high = both + 8.5 / 16 * width
    told = [
        calibrated(files[0], tmp_path / "first.safetensors", high - width, high, "0" * 64),
        calibrated(files[1], tmp_path / "second.safetensors", 100.0, 200.0, "0" * 64),
    ]
    bench = SimpleNamespace(net=net, files=told)
    assert safety_first.Bench.built(bench, texts, told[1]).tolist() == [8 / 16]
    assert safety_first.Bench.built(bench, texts).tolist() == [12 / 16 if alone < both else 4 / 16]
    assert not any(layer.adapters for layer in lorafile.targets(model.unet).values())
