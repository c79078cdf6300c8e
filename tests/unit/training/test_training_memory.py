"""What a training says of its memory: what was measured against sums worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from modular_lora_guard.training.loop import Job, fit
from modular_lora_guard.training.memory import LEAST_STEPS, Growth, Need, foresee, said, size
from modular_lora_guard.training.options import TaskOptions
from torch import nn

CPU, FLOAT = torch.device("cpu"), 4


def test_what_is_held_at_once_is_measured() -> None:
    with Growth(CPU) as growth:
        first = torch.ones(2**24)
        both = first + 1  # two of 64 MiB
    assert 0.95 * 2**27 <= growth.bytes <= 1.2 * 2**27
    del first, both
    with Growth(CPU) as growth:
        pass
    assert growth.bytes < 2**24


def test_a_micro_batch_is_its_activations_and_leaves_nothing() -> None:
    weight, rows = nn.Parameter(torch.ones(32, 16)), torch.ones(2**19, 16)

    def loss() -> torch.Tensor:
        hidden = rows @ weight.t()  # 64 MiB, which square saves
        return hidden.square().sum()

    before = torch.random.get_rng_state()
    need = foresee(loss, [weight], TaskOptions(), CPU)
    assert torch.equal(before, torch.random.get_rng_state())
    hidden, gradients = rows.shape[0] * 32 * FLOAT, 32 * 16 * FLOAT
    assert hidden <= need.batch <= 6 * hidden  # four or five at once: the allocator decides
    assert need.gradients == gradients
    assert 2 * gradients <= need.optimizer <= 2 * gradients + 64, "AdamW's two moments, and its steps"
    assert torch.equal(weight, torch.ones(32, 16))


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


def test_the_largest_micro_batch_is_measured_and_the_steps_are_the_same(tmp_path) -> None:
    """Of images and clips, a batch of the one may take many times what a batch of the other does."""

    def train(name: str, measured: int) -> tuple[list[float], str]:
        weight = nn.Parameter(torch.ones(4))
        rows = torch.ones(measured, 4)
        job = Job(
            groups=[([weight], 1e-3)],
            loss=lambda step, micro: (weight * step).square().mean(),
            largest=lambda: (rows * weight).square().mean(),
            write=lambda path, step, masters: None,
            fingerprint={},
        )
        options = TaskOptions(output_name=name, output_dir=str(tmp_path), max_train_steps=LEAST_STEPS)
        watch = SimpleNamespace(check=lambda: None, say=lambda text: None, step=lambda *_: None)
        return fit(job, options, CPU, watch), job.notes[0]

    small, small_line = train("small", 1)
    large, large_line = train("large", 2**21)
    assert small == large
    assert float(large_line.split("(")[1].split(" MiB")[0]) > 50 > float(small_line.split("(")[1].split(" MiB")[0])
