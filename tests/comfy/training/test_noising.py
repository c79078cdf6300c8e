"""The table of noise levels that is asked of ComfyUI's model_sampling, against what ComfyUI does with it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

KINDS = ("EPS", "V_PREDICTION", "V_PREDICTION_EDM", "STABLE_CASCADE", "EDM", "FLOW", "V_PREDICTION_CONTINUOUS", "FLUX")
PREDICTIONS = {"EPS": "epsilon", "STABLE_CASCADE": "epsilon", "FLOW": "velocity", "FLUX": "velocity"}
SETTINGS = {"shift": 1.15, "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}


@pytest.fixture
def made(comfy):
    base, noising = importlib.import_module("comfy.model_base"), "modular_lora_guard.comfy_host.noising"

    def make(kind: str):
        sampling = base.model_sampling(SimpleNamespace(sampling_settings=SETTINGS), base.ModelType[kind])
        return sampling, importlib.import_module(noising).schedule_of(sampling)

    return make


@pytest.mark.parametrize("kind", [*KINDS, "FLOW_COSMOS"])
def test_noise_and_answers_are_comfyuis(kind, made):
    sampling, schedule = made(kind)
    generator = torch.Generator().manual_seed(0)
    x0, eps, said = (torch.randn(5, 4, 2, 2, generator=generator) for _ in range(3))
    t = torch.linspace(0, len(schedule) - 1, 5).long()
    sigma = sampling.sigmas[t]
    x = sampling.noise_scaling(sigma, eps.clone(), x0.clone())
    x_t = schedule.add_noise(x0, t, eps)
    assert torch.allclose(x_t, sampling.calculate_input(sigma, x), rtol=1e-4, atol=1e-5)
    denoised, rest = schedule.to_x0_eps(said, x_t, t)
    wanted = sampling.calculate_denoised(sigma, said, x)
    assert torch.allclose(denoised, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    whole = sampling.noise_scaling(sigma, rest.clone(), denoised.clone())
    assert torch.allclose(whole, x, rtol=1e-2, atol=1e-2)
    assert schedule.prediction == PREDICTIONS.get(kind, "velocity" if kind == "FLOW_COSMOS" else "v_prediction")
    begun = sampling.noise_scaling(sampling.sigmas[-1:], eps[:1].clone(), torch.zeros(1, 4, 2, 2), max_denoise=True)
    assert torch.allclose(schedule.start * eps[:1], sampling.calculate_input(sampling.sigmas[-1:], begun), atol=1e-4)


def test_the_table_of_sd1_is_ddpms(made):
    sampling, schedule = made("EPS")
    abar = 1 / (1 + sampling.sigmas.double() ** 2)
    assert torch.allclose(schedule.signal.double(), abar.sqrt(), rtol=1e-6)
    assert torch.allclose(schedule.noise.double(), (1 - abar).sqrt(), rtol=1e-6)
    assert torch.equal(schedule.said_of_noise, torch.ones(1000))
    assert schedule.start == 1.0


def test_a_shift_that_a_node_sets_is_in_the_table(made):
    sampling, before = made("FLOW")
    sampling.set_parameters(shift=6.0)
    after = importlib.import_module("modular_lora_guard.comfy_host.noising").schedule_of(sampling)
    assert bool((after.noise[:-1] > before.noise[:-1]).all())


def test_what_maps_images_is_told(made, comfy):
    noising = importlib.import_module("modular_lora_guard.comfy_host.noising")
    base = importlib.import_module("comfy.model_base")
    config = SimpleNamespace(sampling_settings={})
    assert noising.maps_images(base.model_sampling(config, base.ModelType.IMG_TO_IMG))
    assert not noising.maps_images(base.model_sampling(config, base.ModelType.FLOW))
