"""What a training says of its memory: counted tensors against sums worked out by hand."""

from __future__ import annotations

import torch
from modular_lora_guard.training.memory import Alive, Need, foresee, said, size
from modular_lora_guard.training.options import TaskOptions
from torch import nn

CPU, FLOAT = torch.device("cpu"), 4


def test_tensors_count_while_they_are_alive_and_given_ones_do_not() -> None:
    given = torch.ones(1000)
    with Alive() as alive:
        first = given + 1
        view = first[:10].view(2, 5)
        assert alive.now == 1000 * FLOAT
        second = given.t() if given.dim() == 2 else given[:5]  # over the storage that was given
        assert alive.now == 1000 * FLOAT
        both = torch.cat([first, given])
        assert alive.now == 3000 * FLOAT
        del first, both
        assert alive.now == 1000 * FLOAT, "a view keeps its storage"
        del view
        assert alive.now == 0
    assert alive.peak == 3000 * FLOAT
    assert len(second) == 5


def test_a_micro_batch_is_its_activations_and_leaves_nothing() -> None:
    weight, rows = nn.Parameter(torch.ones(8, 64)), torch.ones(128, 64)

    def loss() -> torch.Tensor:
        hidden = rows @ weight.t()  # 128 x 8, which square saves
        return hidden.square().sum()

    before = torch.random.get_rng_state()
    need = foresee(loss, [weight], TaskOptions(), CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    hidden, gradients = 128 * 8 * FLOAT, 8 * 64 * FLOAT
    assert 2 * hidden <= need.batch <= 4 * hidden + 2 * gradients
    assert need.gradients == gradients
    assert 2 * gradients <= need.optimizer <= 2 * gradients + 64, "AdamW's two moments, and its steps"
    assert torch.equal(weight, torch.ones(8, 64))


def test_the_most_at_once() -> None:
    assert Need(100, 30, 60, accumulating=False).total == 160
    assert Need(100, 30, 60, accumulating=True).total == 190
    assert Need(10, 30, 60, accumulating=False).total == 90


def test_the_line_says_where_it_is_not_enough() -> None:
    assert "NOT ENOUGH" not in said(Need(2**20, 0, 0, accumulating=False), CPU)
    line = said(Need(2**60, 0, 2**20, accumulating=False), CPU)
    assert "NOT ENOUGH" in line
    assert "gradient_checkpointing" in line
    assert (size(3 * 2**29), size(2**19)) == ("1.50 GiB", "0.5 MiB")
