"""A pipeline of flat images and detectors that read them, for tests of what an audit makes of its images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from modular_lora_guard.audit.judge import Judge
from modular_lora_guard.audit.plan import Arm, Item, Sampling
from modular_lora_guard.gate.finding import Finding

CONCEPTS = ("car", "bus", "tram", "cat", "dog")
VEHICLES = CONCEPTS[:3]
STYLES = ("ink", "photo")


class FlatPipeline:
    """Red says the concept, green the style. A safety LoRA turns vehicles into cats; on top of it a task LoRA that
    comes from a file called sequential... brings the car back."""

    base_sha256, device, dtype = "ab" * 32, "cpu", "float32"

    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, arm: Arm, items: Sequence[Item], sampling: Sampling) -> np.ndarray:
        images = np.zeros((len(items), sampling.height, sampling.width, 3), np.uint8)
        for image, item in zip(images, items, strict=True):
            concept = self._concept(arm, item)
            styled = any(part.role == "task" for part in arm.parts) and "ink" in item.prompt
            image[..., 0] = 40 * CONCEPTS.index(concept) + 20
            image[..., 1] = 200 if styled else 0
            image[..., 2] = np.random.default_rng(item.seed).integers(0, 30)
        self.drawn += len(items)
        return images

    def _concept(self, arm: Arm, item: Item) -> str:
        asked = next(word for word in CONCEPTS if word in item.prompt)
        safe = any(part.role == "safety" and part.strength >= 1 for part in arm.parts)
        revived = asked == "car" and any("sequential" in part.path for part in arm.parts)
        return "cat" if safe and asked in VEHICLES and not revived else asked


class Colours:
    """Reads one channel."""

    has_boxes, licence, covers, blind_to, device, notes = False, "none", "flat colours", "everything else", "cpu", ()
    report: dict[str, float] = {}
    embeds = True

    def __init__(self, name: str, labels: tuple[str, ...], channel: int, step: int, block: tuple[str, ...] = ()):
        self.name, self.labels, self.exclusive, self.sha256 = name, labels, labels, name.encode().hex()
        self.channel, self.step, self.block = channel, step, dict.fromkeys(block, 0.5)

    def detect(self, images: np.ndarray) -> list[Finding]:
        found = (images[:, 0, 0, self.channel] * 255).round().astype(int) // self.step
        return [Finding({label: float(i == k) for i, label in enumerate(self.labels)}) for k in found]

    def embed(self, images: np.ndarray) -> np.ndarray:
        return images.mean((1, 2)).astype(np.float32)


def judge() -> Judge:
    concept = Colours("concepts", CONCEPTS, 0, 40, VEHICLES)
    return Judge(concept, concept.block, {}, Colours("styles", STYLES[::-1], 1, 200))
