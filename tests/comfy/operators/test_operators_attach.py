"""A policy that attaches the guard to every model: ordinary graphs, without a node of the guard and as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import new_executor
from PIL import Image
from support.drop_in import SAFETY, merged, ordinary
from support.errors import refuses
from support.graphs import GraphError, node, sampler
from support.pack_nodes import NODES

TASK, OTHER = "task.safetensors", "other.safetensors"
LEVEL = 1 / 255


def attached(sha256, more: str = "", file: str = SAFETY, keys: str = "") -> str:
    one = f'{{sha256 = "{sha256(file)}", file = "{file}", min_net_strength = 0.9{keys}}}'
    return f'[guard]\nattach = "always"\nrequired = [{one}]\n{more}'


@pytest.fixture(scope="module", autouse=True)
def packs(comfy, loras) -> Iterator[None]:
    comfy.nodes.NODE_CLASS_MAPPINGS |= NODES
    yield
    for name in NODES:
        del comfy.nodes.NODE_CLASS_MAPPINGS[name]


@pytest.fixture(scope="module")
def executors(comfy) -> SimpleNamespace:
    """One for graphs under the policy and one for references: the server empties its cache when a policy comes."""
    return SimpleNamespace(attached=new_executor(comfy), plain=new_executor(comfy))


@pytest.fixture
def always(operator, sha256):
    operator.write(attached(sha256))
    return operator


@pytest.fixture
def run(operator, run_graph, executors):
    """Queues a graph as it is, and runs it."""

    def go(graph: dict) -> dict:
        if refused := operator.queue(graph):
            raise GraphError("validation", " ".join(refused.values()))
        return run_graph(copy.deepcopy(graph), executors.attached)

    return go


def test_an_ordinary_graph(always, run):
    run(ordinary((TASK, 0.7)))
