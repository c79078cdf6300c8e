"""White noise, and what is none."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.provenance import noise
from modular_lora_guard.modular_lora.provenance.noise import is_white

SHAPES = [(4, 8, 8), (4, 9, 9), (16, 64, 64), (4, 64, 96), (16, 5, 12, 20), (64, 40), (8, 3, 1, 77), (4, 1, 1)]


def randn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(seed=st.integers(0, 2**40), scale=st.floats(0.01, 100), shift=st.floats(-3, 3))
def test_what_a_generator_gives_is_white(shape, seed, scale, shift):
    assert is_white(randn(shape, seed) * scale + shift)
    assert is_white((randn(shape, seed) * scale).half())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_at_all_is_no_picture(shape):
    assert is_white(torch.zeros(shape))


def pictures() -> dict[str, torch.Tensor]:
    """Latents in which something is seen."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    disc = ((x**2 + y**2) < 0.3).float().expand(4, 32, 32)
    return {
        "disc": disc,
        "gradient": x.expand(4, 32, 32),
        "checkerboard": ((torch.arange(32)[:, None] + torch.arange(32)) % 2).float().expand(4, 32, 32),
        "lines": (torch.arange(32) % 4 == 0).float().expand(4, 32, 32),
        "disc in noise": disc + 0.7 * randn((4, 32, 32), 1),
        "disc in the signs of noise": randn((4, 32, 32), 2).abs() * (2 * disc - 1),
        "dot": torch.nn.functional.pad(torch.ones(4, 1, 1), (15, 16, 15, 16)),
        "blurred noise": torch.nn.functional.avg_pool2d(randn((4, 34, 34), 3), 3, 1),
        "repeated noise": randn((4, 16, 16), 4).repeat_interleave(2, 1).repeat_interleave(2, 2),
        "not finite": torch.full((4, 32, 32), torch.inf),
    }


@pytest.mark.parametrize("name", list(pictures()))
def test_a_picture_is_told(name):
    assert not is_white(pictures()[name])


def test_the_example_runs():
    assert doctest.testmod(noise, extraglobs={"torch": torch}).failed == 0
