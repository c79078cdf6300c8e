"""Graphs around the gate's nodes, and a detector whose scores the test decides."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
from modular_lora_guard.gate.finding import Box, Finding

from support.graphs import guarded_graph, node, sampler

KEY = "modular_lora_attestation"
RED, GREEN = 0xFF0000, 0x00FF00
PLAIN = {  # Gate Settings as they stand when the node is new
    "detector": "stub",
    "classifier": "none",
    "labels": "none",
    "preset": "none",
    "threshold": 0.0,
    "classes": "",
    "action": "as the preset says",
    "provider": "CPU",
}


@dataclass
class Stub:
    """A detector whose scores the test decides: ``score`` gets an image h w 3; ``box`` is x, y, width, height."""

    score: Callable[[np.ndarray], float]
    box: tuple[float, ...] | None = None
    block: dict = field(default_factory=lambda: {"thing": 0.5})
    seen: list[int] = field(default_factory=list)  # batch sizes
    report: dict = field(default_factory=dict)
    name, sha256, licence, device, notes = "stub 1", "5" * 64, "none", "CPU", ()
    labels, exclusive = ("thing", "odd thing 2"), ()
    covers, blind_to = "what the test says", "the rest"

    @property
    def has_boxes(self) -> bool:
        return self.box is not None

    def detect(self, images: np.ndarray) -> list[Finding]:
        self.seen.append(len(images))
        return [self._finding(float(self.score(image))) for image in images]

    def _finding(self, score: float) -> Finding:
        boxes = (Box("thing", score, *self.box),) if self.box else ()
        return Finding({"thing": score, "odd thing 2": 0.0}, boxes)


def redness(image: np.ndarray) -> float:
    return float(image[..., 0].mean() * (1 - image[..., 1].mean()))


def install_stub(comfy, monkeypatch) -> Stub:
    """A stub in place of every detector; red images are what it looks for."""
    detectors, detector = part(comfy, "gate.detectors"), Stub(redness)
    monkeypatch.setattr(detectors, "make", lambda name, *args, **files: detector)
    monkeypatch.setattr(detectors, "available", lambda: ("stub",))
    return detector


def part(comfy, name: str) -> ModuleType:
    """A module of the pack as ComfyUI loaded it."""
    return importlib.import_module(f"modular_lora_guard.{name}")


def settings(**changes) -> dict:
    return node("ModularLoraGateSettings", **PLAIN | changes)


def colours(*values: int, size: int = 64) -> dict:
    """A graph of one IMAGE batch, ["batch", 0], with an image of each colour."""
    graph, last = {}, ""
    for i, value in enumerate(values):
        graph[f"one{i}"] = node("EmptyImage", width=size, height=size, batch_size=1, color=value)
        if last:
            graph[f"both{i}"] = node("ImageBatch", image1=[last, 0], image2=[f"one{i}", 0])
        last = f"both{i}" if last else f"one{i}"
    graph["batch"] = graph.pop(last)
    return graph


def gated_colours(*values: int, **changes) -> dict:
    graph = colours(*values) | {"settings": settings(**changes)}
    graph["gate"] = node("ModularLoraGate", images=["batch", 0], gate=["settings", 0])
    graph["show"] = node("PreviewAny", source=["gate", 4])
    return graph


def gated_run(**changes) -> dict:
    """A guarded batch of three behind a gate and Save Image (Guarded); the plain samples are ["decode", 0]."""
    graph = guarded_graph()
    graph["latent"]["inputs"]["batch_size"] = 3
    graph["settings"] = settings(**changes)
    graph["gate"] = node("ModularLoraGate", images=["decode", 0], gate=["settings", 0])
    graph["save"] = save(["gate", 0])
    return graph


def save(images: list, **changes) -> dict:
    plain = {"filename_prefix": "g", "format": "png", "quality": 90, "unfit": "refuse", "save_flagged": False}
    return node("ModularLoraSaveGated", images=images, **plain | changes)


def sampled_and_gated(max_tries: int, batch: int = 3, **changes) -> dict:
    """Guarded Sample and Gate, and beside it the same run through Guarded KSampler and Guarded VAE Decode."""
    graph = guarded_graph()
    graph["latent"]["inputs"]["batch_size"] = batch
    graph["save"] = node("PreviewAny", source=["decode", 1])
    graph["settings"] = settings(**changes)
    graph["gate"] = sampler(["guard", 0], "ModularLoraSampleAndGate", vae=["ckpt", 2], max_tries=max_tries)
    graph["gate"]["inputs"]["gate"] = ["settings", 0]
    graph["show"] = node("PreviewAny", source=["gate", 4])
    return graph


def files(comfy, prefix: str) -> list:
    return sorted(comfy.output.glob(f"{prefix}_*"))


def sha(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image)).hexdigest()
