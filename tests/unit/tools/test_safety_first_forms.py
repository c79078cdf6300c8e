"""The forms of safety first on the demo world's narrow net: what acts at a g, by what it is found, second moments."""

from __future__ import annotations

import math

import pytest
import torch
from modular_lora_guard.modular_lora.guard import activity
from modular_lora_guard.tools.world import ASSETS, SAFETY_LORA, TASK_LORA, base, diffusion, lorafile, narrow
from modular_lora_guard.tools.world.equal import drawing, forms, training
from modular_lora_guard.tools.world.equal.forms import ALL, FORMS, Bounds, Net, Run, Texts

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
