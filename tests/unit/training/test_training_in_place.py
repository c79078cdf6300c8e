"""What autograd kept is what it was, whatever is written over it; the reference writes nowhere."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.training.in_place import _Kept, writing_allowed
from torch import Tensor


def gradients(network, *given: Tensor) -> list[Tensor]:
    leaves = [one.clone().requires_grad_() for one in given]
    return list(torch.autograd.grad(network(*leaves).sum(), leaves))


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_a_tensor_that_is_written_over() -> None:
    def plain(x):
        return (x * 2).sin() * (x * 2 + x)

    def writing(x):
        doubled = x * 2
        sine = doubled.sin()
        doubled += x
        return sine * doubled

    with writing_allowed():
        assert torch.allclose(*gradients(writing, numbers(4)), *gradients(plain, numbers(4)))


def test_a_part_that_begins_elsewhere_than_the_whole_that_is_written_to() -> None:
    def plain(x):
        return ((x * 2)[1:].sin() * x[1:]).sum() + (x * 2 + x).square().sum()

    def writing(x):
        doubled = x * 2
        sine = doubled[1:].sin()
        doubled += x
        return (sine * x[1:]).sum() + doubled.square().sum()

    with writing_allowed():
        assert torch.allclose(*gradients(writing, numbers(4)), *gradients(plain, numbers(4)))


def test_what_is_written_by_out() -> None:
    def plain(x):
        return ((x * 2).sin() * (x * 2 + x)).sum()

    def writing(x):
        doubled = x * 2
        sine = doubled.sin()
        torch.add(doubled, x, out=doubled)
        return (sine * doubled).sum()

    with writing_allowed():
        assert torch.allclose(*gradients(writing, numbers(4)), *gradients(plain, numbers(4)))


def test_a_part_that_is_written_to() -> None:
    def plain(x):
        doubled = x * 2
        return (doubled.sin() * torch.cat([doubled[:1] + x[:1], doubled[1:]])).sum()

    def writing(x):
        doubled = x * 2
        sine = doubled.sin()
        doubled[:1].add_(x[:1])
        return (sine * doubled).sum()

    with writing_allowed():
        assert torch.allclose(*gradients(writing, numbers(4)), *gradients(plain, numbers(4)))


@given(st.lists(st.tuples(st.sampled_from("smne"), st.integers(0, 3)), min_size=1, max_size=12))
def test_many_tensors_of_one_size_one_after_another(steps) -> None:
    """Later tensors stand where earlier ones stood, in memory and as Python objects, while those are still needed."""

    def follow(x: Tensor, write: bool) -> Tensor:
        total = x.sum()
        for kind, shift in steps:
            now = x * (shift + 1)  # a new tensor of the same size, its place in memory perhaps that of the last
            kept = now.sin() if kind in "sm" else now.square() if kind == "n" else now.exp()
            if write:
                now += shift
                now[:2].mul_(0.5)
            else:
                now = now + shift
                now = torch.cat([now[:2] * 0.5, now[2:]])
            total = total + (kept * now).sum()
            del now
        return total

    with writing_allowed():
        written = gradients(lambda x: follow(x, True), numbers(5))
    assert torch.allclose(*written, *gradients(lambda x: follow(x, False), numbers(5)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 3])
def test_tensors_of_no_elements_are_not_mistaken_for_one_another(rows) -> None:
    def network(x, w, write):
        total = x.sum()
        for width in (4, 2, 4, 3):
            y = x[:rows] @ w[:, :width]
            kept = y.sin()
            y = y.add_(1) if write else y + 1
            total = total + (kept * y).sum()
        return total

    given = numbers(5, 6), numbers(6, 4, seed=1)
    with writing_allowed():
        written = gradients(lambda x, w: network(x, w, True), *given)
    plain = gradients(lambda x, w: network(x, w, False), *given)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(written, plain, strict=True))


def test_nothing_is_kept_of_steps_that_are_over() -> None:
    kept = _Kept()
    x = numbers(8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.save, lambda saved: saved.tensor), kept:
        for _ in range(2000):
            y = x * 2
            z = y.sin() * y
            y.detach().add_(1)
            z.sum().backward()
    gc.collect()
    assert not any(kept._at.values())
    assert len(kept._at) < 2048
