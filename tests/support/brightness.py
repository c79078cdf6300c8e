"""A detector of two colours."""

from __future__ import annotations

import numpy as np
from modular_lora_guard.gate.finding import Finding


class Brightness:
    """Scores an image by its red and its green."""

    name, sha256, licence, device = "brightness", "1" * 64, "none", "CPUExecutionProvider"
    labels, exclusive, has_boxes = ("red", "green"), (), False
    covers, blind_to, notes = "light", "all else", ()
    block, report = {"red": 0.5}, {}

    def detect(self, images: np.ndarray) -> list[Finding]:
        return [Finding({"red": float(p[..., 0].mean()), "green": float(p[..., 1].mean())}) for p in images]
