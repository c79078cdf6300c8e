"""Guard: an ordinary graph with one node more gives the picture of the merge, guarded and attested."""

from __future__ import annotations

import pytest
import torch
from support.drop_in import SAFETY, guarded, merged, ordinary
from support.graphs import GraphError, node, sampler

TASK, OTHER = "task.safetensors", "other.safetensors"
LEVEL = 1 / 255


def pictures(run_graph, graph: dict, decoder: str = "decode") -> torch.Tensor:
    return run_graph(graph)[decoder][0].clone()


def attested(comfy, images: torch.Tensor) -> list:
    found = [comfy.ledger.known(image) for image in images]
    assert all(one.guarded for one in found)
    return [one.run for one in found]


def check(comfy, run_graph, graph: dict, behind: str = "ckpt", decoder: str = "decode", near: float = LEVEL, **safety):
    """The runs of a graph's pictures with Guard in it, which are those of the merge and not those of the graph alone."""
    ours = pictures(run_graph, guarded(graph, behind, **safety), decoder)
    runs = attested(comfy, ours)
    merge, alone = (pictures(run_graph, one, decoder) for one in (merged(graph, **safety), graph))
    assert (merge - alone).abs().max() > 4 * near
    assert (ours - merge).abs().max() <= near
    return runs


def loras(run, role: str = "task") -> list[tuple]:
    return [(one.name, one.strength_model, one.strength_clip, one.pending) for one in run.loras if one.role == role]


def test_an_ordinary_graph_with_one_node_more(comfy, run_graph, loras_, sha256):
    (run,) = check(comfy, run_graph, ordinary((TASK, 0.7)))
    assert run.status == "guarded"
    assert loras(run) == [(TASK, 0.7, 0.0, False)]
    assert [one.sha256 for one in run.loras] == [sha256(SAFETY), sha256(TASK)]
    assert loras(run, "safety") == [(SAFETY, 1.0, 1.0, False)]


@pytest.fixture
def loras_(loras):
    return loras
