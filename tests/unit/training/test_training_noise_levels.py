"""Tables of noise levels of every parameterisation against their formulas, and the densities over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.training.model import Cond, Schedule
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.safety import sampling
from modular_lora_guard.training.task import timesteps
from support.erasure_toys import ABAR, Toy, erasure, noise

SIGMAS = torch.linspace(0.01, 1, 100)  # of a flow
DATA = 0.5  # deviation of EDM's data


def edm() -> Schedule:
    """arXiv 2206.00364, table 1: c_in, c_skip and c_out at log-spaced σ."""
    s = torch.linspace(-6, 4, 100).exp().double()
    total = s**2 + DATA**2
    skip, out = DATA**2 / total, s * DATA / total.sqrt()
    return Schedule.of(1 / total.sqrt(), s / total.sqrt(), skip * total.sqrt(), out, s.log() / 4)


def all_of() -> dict[str, Schedule]:
    return {
        "epsilon": Schedule.ddpm(ABAR, "epsilon"),
        "v_prediction": Schedule.ddpm(ABAR, "v_prediction"),
        "velocity": Schedule.flow(SIGMAS),
        "edm": edm(),
    }


def images(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_0, ε and timesteps; two dimensions of a latent more than of an image do not matter."""
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(rows, 3, 1, 2, 2, generator=generator) for _ in range(2))
    return x0, eps, torch.linspace(0, 99, rows).long()


@pytest.mark.parametrize("name", all_of())
def test_what_the_network_should_say_amounts_to_the_image_and_the_noise_again(name):
    schedule, (x0, eps, t) = all_of()[name], images(7)
    x_t = schedule.add_noise(x0, t, eps)
    again = schedule.to_x0_eps(schedule.target(x0, t, eps), x_t, t)
    assert torch.allclose(again[0], x0, rtol=1e-3, atol=1e-3)
    assert torch.allclose(again[1], eps, rtol=1e-3, atol=1e-3)
    assert schedule.prediction == {"edm": "v_prediction"}.get(name, name)


def test_the_targets_are_the_papers():
    x0, eps, t = images(7)
    abar, sigma = ABAR[t].view(-1, 1, 1, 1, 1), SIGMAS[t].view(-1, 1, 1, 1, 1)
    found = {name: (s.add_noise(x0, t, eps), s.target(x0, t, eps)) for name, s in all_of().items()}
    mixed = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    wanted = {
        "epsilon": (mixed, eps),
        "v_prediction": (mixed, abar.sqrt() * eps - (1 - abar).sqrt() * x0),
        "velocity": ((1 - sigma) * x0 + sigma * eps, eps - x0),
    }
    for name, pair in wanted.items():
        for one, other in zip(found[name], pair, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(found["epsilon"][1], eps)


@given(st.integers(0, 99), st.floats(0.5, 20))
def test_min_snr_weights_the_error_of_the_image(t, gamma):
    """|ΔF|² under the weight is min(SNR, γ) |Δx_0|², whatever F is (arXiv 2303.09556, section 3.4)."""
    at = torch.tensor([t])
    x_t, said = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(t)).unbind()
    for schedule in all_of().values():
        moved = schedule.to_x0_eps(said + 1, x_t, at)[0] - schedule.to_x0_eps(said, x_t, at)[0]
        wanted = schedule.snr(at).clamp(max=gamma) * moved.flatten()[0] ** 2
        assert schedule.min_snr(at, gamma).item() == pytest.approx(wanted.item(), rel=1e-2, abs=1e-6)


def test_a_walk_of_a_flow_is_eulers_and_ends_in_the_data():
    """Velocity of data N(1.5, 0): (x − 1.5) / σ, on which one step or many end at 1.5."""
    schedule, x = Schedule.flow(SIGMAS), noise(3)

    def network(x_t, t, cond):
        return (x_t - 1.5) / SIGMAS[t].view(-1, 1, 1, 1)

    for steps in (1, 4, 20):
        found = sampling.sample(network, schedule, x, Cond.of(torch.zeros(3, 1, 1)), None, 1.0, steps)
        assert torch.allclose(found, torch.full_like(x, 1.5), atol=1e-4)
    t, to = torch.full((3,), 80), torch.full((3,), 40)
    said = network(x, t, None)
    euler = x + (SIGMAS[40] - SIGMAS[80]) * said
    assert torch.allclose(sampling.step(schedule, said, x, t, to), euler, atol=1e-6)


@pytest.mark.parametrize("objective", ["esd-x", "leco", "sdd"])
def test_erasing_with_velocities_is_erasing_with_epsilons(objective):
    """The same denoiser told as a velocity: its relative loss is that of ε, pool, targets and all."""
    sigmas = ((1 - ABAR).sqrt() / (ABAR.sqrt() + (1 - ABAR).sqrt())).double()
    alike = torch.ones_like(sigmas)
    begun = float((1 - sigmas[-1]) / ABAR[-1].sqrt())  # the last level is not of noise alone

    class Told(Toy):
        """x of a flow is x of DDPM times (1 − σ) / √ᾱ."""

        def __init__(self):
            super().__init__()
            self.schedule = Schedule.of(1 - sigmas, sigmas, alike, -sigmas, sigmas, start=begun)

        def predict(self, x_t, t, cond):
            scale = (ABAR[t].sqrt() / (1 - sigmas[t].float())).view(-1, 1, 1, 1)
            eps = super().predict(x_t * scale, t, cond)
            x0 = (x_t - sigmas[t].float().view(-1, 1, 1, 1) * eps) / (1 - sigmas[t].float()).view(-1, 1, 1, 1)
            return eps - x0

    told, plain = Told().disturb(), Toy().disturb()
    a, b = (erasure(toy, relative=True, objective=objective, on_policy=False) for toy in (told, plain))
    for step in range(3):
        assert a.loss(step).item() == pytest.approx(b.loss(step).item(), rel=2e-2)


def drawn(schedule: Schedule, **changes) -> torch.Tensor:
    options = TaskOptions(**changes)
    return timesteps.drawn(schedule, options, 20_000, torch.Generator().manual_seed(0))


def shifted(shift: float) -> torch.Tensor:
    t = torch.arange(1, 1001) / 1000
    return shift * t / (1 + (shift - 1) * t)


def test_densities_of_a_flow_with_a_shift():
    """Mean σ: of the model's own table, of none of its shift, and of the middle of the table."""
    schedule, sigmas = Schedule.flow(shifted(3.0)), shifted(3.0)
    own, even = sigmas[drawn(schedule)], sigmas[drawn(schedule, timestep_density="uniform")]
    assert own.mean().item() == pytest.approx(sigmas.mean().item(), abs=0.01)
    assert even.mean().item() == pytest.approx(0.5, abs=0.01)
    assert even.std().item() == pytest.approx(12**-0.5, abs=0.01)
    place = drawn(schedule, timestep_density="logit_normal", density_mean=0.5, density_deviation=0.8) / 1000
    logits = torch.logit(place.clamp(1e-4, 1 - 1e-4))
    assert logits.mean().item() == pytest.approx(0.5, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("density", ["own", "uniform", "logit_normal"])
def test_every_density_stays_in_the_table_and_goes_with_its_generator(density):
    for schedule in all_of().values():
        one, two = drawn(schedule, timestep_density=density), drawn(schedule, timestep_density=density)
        assert torch.equal(one, two)
        assert 0 <= int(one.min()) <= int(one.max()) < len(schedule)


def test_ddpms_own_density_is_that_of_before():
    wanted = torch.randint(100, (20_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn(Schedule.ddpm(ABAR)), wanted)
