"""The fault runs that docs/figures/reliability.json counts, a few of them: guarded runs that are ended from inside."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import torch
from modular_lora_guard.tools.benchmarks import faults

RUNS, ALL_RUNS = 20, 1000


@pytest.fixture(scope="module")
def rig(comfy, trained) -> Iterator[faults.Rig]:
    from comfy import utils

    before = utils.PROGRESS_BAR_HOOK, utils.PROGRESS_BAR_ENABLED
    faults.stop_where_interrupted()
    with torch.inference_mode():
        yield faults.Rig(comfy.base / "models" / "checkpoints" / trained)
    utils.PROGRESS_BAR_HOOK, utils.PROGRESS_BAR_ENABLED = before


def test_faults_change_no_tensor_leave_no_branch_and_the_next_run_is_the_same(rig: faults.Rig, extent) -> None:
    runs = extent(RUNS, ALL_RUNS)
    with torch.inference_mode():
        count = faults.run(rig, runs, seed=7)
    assert count.runs == runs
    assert not count.wrong
    assert not count.changed
    assert len(set(count.faults) & {f"inside: {kind}" for kind in faults.INSIDE}) == len(faults.INSIDE)


def test_a_tensor_that_changed_is_found(rig: faults.Rig) -> None:
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    tensor = rig.base()[name]
    with torch.inference_mode():
        kept = tensor[0, 0].clone()
        tensor[0, 0] += 1
        assert rig.changed(list(rig.bits)) == {name}
        tensor[0, 0] = kept
        assert not rig.changed([name])


def test_a_branch_that_stayed_is_found(rig: faults.Rig) -> None:
    with torch.inference_mode():
        layer = next(m for m in rig.model.model.diffusion_model.modules() if isinstance(m, torch.nn.Linear))
        layer.__dict__["forward"] = layer.forward
        try:
            assert rig.settle(Random(1)) == 1
        finally:
            del layer.__dict__["forward"]
        assert rig.settle(Random(1)) == 0
