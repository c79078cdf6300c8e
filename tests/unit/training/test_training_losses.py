"""Errors, weights of noise levels, and noise, against formulas written out element by element."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.training.model import Schedule
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from modular_lora_guard.training.task import losses, noise
from support.errors import refuses
from support.toys import ToyHostModel

ABAR = torch.linspace(0.999, 0.01, 100)
DDPM, V = Schedule.ddpm(ABAR), Schedule.ddpm(ABAR, "v_prediction")
FLOW = Schedule.flow(torch.linspace(0.01, 1, 100))
SIGMAS = torch.linspace(0.05, 20, 100)
EDM = Schedule.of(  # arXiv 2206.00364, table 1, deviation of the data 0.5
    1 / (SIGMAS**2 + 0.25).sqrt(), SIGMAS / (SIGMAS**2 + 0.25).sqrt(), 0.25 / (SIGMAS**2 + 0.25).sqrt(),
    0.5 * SIGMAS / (SIGMAS**2 + 0.25).sqrt(), SIGMAS.log() / 4,
)  # fmt: skip


def place(schedule: Schedule, t: int, kind: str, c: float, scale: float) -> float:
    """sd-scripts' get_huber_threshold_if_needed; its timestep of a flow is σ · 1000 of 1000."""
    if kind == "constant":
        return c * scale
    if kind == "exponential":
        share = float(schedule.noise[t]) if schedule is FLOW else t / 100
        return math.exp(math.log(c) * share) * scale
    a, s = float(schedule.signal[t]), float(schedule.noise[t])
    return c if a == 0 else (1 - c) / (1 + s / a) ** 2 + c


@given(
    st.sampled_from(["l2", "l1", "huber", "smooth_l1"]),
    st.sampled_from(["snr", "exponential", "constant"]),
    st.sampled_from([DDPM, V, FLOW]),
    st.integers(0, 99),
    st.floats(0.01, 1),
    st.floats(0.1, 3),
)
def test_errors_are_those_of_the_formulas(kind, schedule_of_c, schedule, t, c, scale):
    options = TaskOptions(loss_type=kind, huber_schedule=schedule_of_c, huber_c=c, huber_scale=scale)
    values = [-3.0, -0.2, 0.0, 0.05, 2.0]
    prediction = torch.tensor(values).view(1, 1, 1, 5)
    found = losses.errors(prediction, torch.zeros_like(prediction), torch.tensor([t]), schedule, options).flatten()
    at = place(schedule, t, schedule_of_c, c, scale)
    expected = {
        "l2": [e * e for e in values],
        "l1": [abs(e) for e in values],
        "huber": [2 * at * (math.sqrt(e * e + at * at) - at) for e in values],
        "smooth_l1": [2 * (math.sqrt(e * e + at * at) - at) for e in values],
    }[kind]
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@given(st.integers(0, 99))
def test_debiased_estimation_is_sd_scripts_for_epsilon_and_v(t):
    options, at = TaskOptions(debiased_estimation_loss=True), torch.tensor([t])
    snr = min(float(ABAR[t] / (1 - ABAR[t])), 1000)
    assert losses.weights(DDPM, at, options).item() == pytest.approx(1 / math.sqrt(snr), rel=1e-3)
    assert losses.weights(V, at, options).item() == pytest.approx(1 / (snr + 1), rel=1e-3)


def test_debiased_estimation_is_refused_where_it_is_not_defined():
    options, model = TaskOptions(debiased_estimation_loss=True), ToyHostModel()
    for prediction in ("epsilon", "v_prediction"):
        losses.check(options, ToyHostModel(prediction=prediction))
    for schedule, named in ((FLOW, "a velocity"), (EDM, "neither")):
        model.schedule = schedule
        with refuses("option.loss", model.family, named):
            losses.check(options, model)
        losses.check(TaskOptions(min_snr_gamma=5.0), model)


def test_two_weightings_of_one_loss_are_refused():
    with refuses("option.loss", "min_snr_gamma"):
        TaskOptions(debiased_estimation_loss=True, min_snr_gamma=5.0)
    with refuses("option.wrong-value", "huber_c"):
        TaskOptions(loss_type="huber", huber_c=0.0)
    with refuses("option.unknown-key", "loss_type"):
        SafetyOptions(loss_type="huber")  # an erasure has its own error


def bilinear(small: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Of one channel, pixel by pixel: centres lie at (i + ½) / n, beyond the outer ones their values go on."""
    out = torch.empty(height, width)
    rows, columns = small.shape
    for y in range(height):
        for x in range(width):
            at = [
                min(max((i + 0.5) * n / full - 0.5, 0.0), n - 1.0)
                for i, n, full in ((y, rows, height), (x, columns, width))
            ]
            low = [int(value) for value in at]
            high = [min(low[0] + 1, rows - 1), min(low[1] + 1, columns - 1)]
            v, u = at[0] - low[0], at[1] - low[1]
            top = (1 - u) * small[low[0], low[1]] + u * small[low[0], high[1]]
            bottom = (1 - u) * small[high[0], low[1]] + u * small[high[0], high[1]]
            out[y, x] = (1 - v) * top + v * bottom
    return out


@pytest.mark.parametrize("shape", [(1, 2, 12, 8), (1, 2, 1, 12, 8)])
def test_multires_noise_is_the_sum_of_its_levels(shape):
    options = TaskOptions(multires_noise_iterations=6, multires_noise_discount=0.4, noise_offset=0.1)
    found = noise.drawn(shape, options, torch.Generator().manual_seed(3))
    draws = torch.Generator().manual_seed(3)
    total = torch.randn(*shape, generator=draws)
    total = total + 0.1 * torch.randn(1, 2, *[1] * (len(shape) - 2), generator=draws)
    total = total.view(2, 12, 8)
    for i in range(6):
        ratio = (2 + 2 * float(torch.rand((), generator=draws))) ** i
        size = max(1, int(12 / ratio)), max(1, int(8 / ratio))
        coarse = torch.randn(1, 2, *size, generator=draws)[0]
        total = total + 0.4**i * torch.stack([bilinear(channel, 12, 8) for channel in coarse])
        if 1 in size:
            break
    assert i > 0
    mean = total.mean()
    deviation = math.sqrt(float(((total - mean) ** 2).sum()) / (total.numel() - 1))
    assert torch.allclose(found.view(2, 12, 8), total / deviation, atol=1e-4)
    assert found.shape == shape


def test_without_any_of_it_the_noise_is_what_it_was():
    seed = random.Random(0).randrange(2**31)
    plain = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(noise.drawn((2, 4, 8, 8), TaskOptions(), torch.Generator().manual_seed(seed)), plain)
