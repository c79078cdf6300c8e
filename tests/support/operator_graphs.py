"""Policies for the operators' tests, put where the server reads them."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from support.errors import refuses
from support.graphs import GraphError, guarded_graph


def enforcement(comfy) -> SimpleNamespace:
    """The pack's modules as ComfyUI loaded them."""
    folder = "modular_lora_guard.comfy_host.enforcement"
    return SimpleNamespace(
        enforce=importlib.import_module(f"{folder}.hooks"), policy=importlib.import_module(f"{folder}.policy")
    )


def required(*sha256: str, least: float = 0.9) -> str:
    """The [guard] of a policy."""
    some = ", ".join(f'{{sha256 = "{one}", min_net_strength = {least}}}' for one in sha256)
    return f"[guard]\nrequired = [{some}]\n"


class Operator:
    """Writes and takes away the policy of the ComfyUI in this process; queues prompts as its server does."""

    def __init__(self, comfy, run_graph: Callable[[dict], dict]):
        modules = enforcement(comfy)
        self.comfy, self.run_graph, self.enforce, self.policies = comfy, run_graph, modules.enforce, modules.policy
        self.path: Path = modules.policy.folder() / "policy.toml"

    def write(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text, encoding="utf-8")
        self.enforce.watch()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.enforce.watch()

    def queue(self, graph: dict) -> dict[str, str]:
        """Node -> why it was refused when it was queued; empty: it was not."""
        said = self.enforce.on_prompt({"prompt": graph, "partial_execution_targets": ["save"]})
        if "partial_execution_targets" in said:
            return {}
        valid, error, _, errors = asyncio.run(self.comfy.execution.validate_prompt("test", said["prompt"], None))
        assert not valid
        assert error["type"] == "prompt_outputs_failed_validation"
        return {node: errors[node]["errors"][0]["details"] for node in errors}

    def run(self, graph: dict) -> dict:
        """What came out; GraphError where it was refused when queued, or when it ran."""
        if refused := self.queue(graph):
            raise GraphError("validation", " ".join(refused.values()))
        return self.run_graph(copy.deepcopy(graph))  # the executor writes into it

    def record(self) -> list[dict]:
        self.policies.write_waiting()
        files = sorted((self.path.parent / "record").glob("record-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def guarded(seed: int, **changes) -> dict:
    graph = guarded_graph(**changes)
    graph["sample"]["inputs"]["seed"] = seed
    return graph


def stopped(operator: Operator, graph: dict, code: str | tuple[str, ...], *named: str) -> GraphError:
    """The error of a graph that passes when queued, or never went through the queue, and stops as it runs."""
    with refuses(code, *named) as caught:
        operator.run_graph(copy.deepcopy(graph))
    assert caught.value.stage == "execution"
    assert operator.record()[-1]["kind"] == "refused"
    return caught.value
