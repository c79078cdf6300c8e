"""Any classifier in ONNX that a labels file describes: one score a label, no boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import GateError
from .finding import Finding
from .labels import Labels, read
from .runner import Runner, chunks


class Classifier:
    """A network and its labels file. Raises GateError where they do not fit each other."""

    has_boxes = False

    def __init__(self, weights: str | Path, labels: str | Path, providers: Sequence[str] = (), threads: int = 0):
        self._said: Labels = read(labels)
        said = self._said
        self._runner = Runner(weights, said.sha256, providers, threads)
        self._output = said.output or self._runner.outputs[0]
        for name in filter(None, (self._output, said.embedding)):
            if name not in self._runner.outputs:
                there = ", ".join(self._runner.outputs)
                raise GateError(
                    f"{Path(labels).name}: {Path(weights).name} has no output {name!r}: it has {there}.",
                    code="gate.no-output",
                )
        self.name, self.licence, self.sha256 = said.name, said.licence, self._runner.sha256
        self.covers, self.blind_to = said.covers, said.blind_to
        self.labels = (*said.labels, *said.groups)
        self.exclusive = said.labels if said.excludes else ()
        self.block, self.report = said.block, said.report
        self.device, self.notes = self._runner.device, self._runner.notes
        self.embeds = bool(said.embedding)

    def detect(self, images: np.ndarray) -> list[Finding]:
        """See `Detector`; a group's score is the sum of its labels' where they exclude each other, else the highest."""
        found: list[Finding] = []
        for part in chunks(images, self._runner.chunk):
            found += map(self._finding, self._scores(part))
        return found

    def embed(self, images: np.ndarray) -> np.ndarray:
        """The embedding output, b d float32, one row an image. Raises GateError where the labels file names none."""
        if not self.embeds:
            raise GateError(
                f'{self.name}: no embedding is named: name an output under "embedding" in its labels file.',
                code="gate.no-embedding",
            )
        parts = [
            self._runner.run(self._prepared(part), [self._said.embedding])[0].reshape(len(part), -1)
            for part in chunks(images, self._runner.chunk)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def _scores(self, part: np.ndarray) -> np.ndarray:
        """Scores b labels, 0..1."""
        raw = self._runner.run(self._prepared(part), [self._output])[0]
        if raw.size != len(part) * len(self._said.labels):
            shape = "×".join(map(str, raw.shape))
            raise GateError(
                f"{self.name}: output {self._output} is {shape}, not one score for {len(self._said.labels)} labels.",
                code="gate.scores-shape",
            )
        raw = raw.reshape(len(part), -1)
        if self._said.activation == "softmax":
            powers = np.exp(raw - raw.max(1, keepdims=True))
            return powers / powers.sum(1, keepdims=True)
        if self._said.activation == "sigmoid":
            return 1 / (1 + np.exp(-np.clip(raw, -80, 80)))
        if raw.min() < -1e-3 or raw.max() > 1 + 1e-3:
            raise GateError(
                f"{self.name}: scores from {raw.min():.3g} to {raw.max():.3g}: "
                "name the activation, softmax or sigmoid.",
                code="gate.scores-range",
            )
        return np.clip(raw, 0, 1)

    def _finding(self, scores: np.ndarray) -> Finding:
        single = dict(zip(self._said.labels, scores.tolist(), strict=True))
        join = sum if self._said.excludes else max
        return Finding(
            single | {name: min(1.0, join(single[m] for m in members)) for name, members in self._said.groups.items()}
        )

    def _prepared(self, part: np.ndarray) -> np.ndarray:
        """Images b h w 3, RGB, 0..1, in the form that the labels file names."""
        said = self._said
        if part.shape[1:3] != said.size:
            height, width = said.size
            part = np.stack([_resized(image, (height, width), said.resize) for image in part])
        if said.channels == "bgr":
            part = part[..., ::-1]
        part = (part - np.array(said.mean, np.float32)) / np.array(said.std, np.float32)
        return np.ascontiguousarray(part.transpose(0, 3, 1, 2) if said.layout == "nchw" else part, np.float32)


def _resized(image: np.ndarray, size: tuple[int, int], rule: str) -> np.ndarray:
    """The image h w 3 at ``size`` (h, w), bilinear with anti-aliasing, in float so that nothing is rounded."""
    height, width = image.shape[:2]
    if rule == "stretch":
        return _scaled(image, size)
    pick = max if rule == "crop" else min
    scale = pick(size[0] / height, size[1] / width)
    fitted = _scaled(image, (max(1, round(height * scale)), max(1, round(width * scale))))
    if rule == "crop":
        y, x = (fitted.shape[0] - size[0]) // 2, (fitted.shape[1] - size[1]) // 2
        return fitted[y : y + size[0], x : x + size[1]]
    out = np.zeros((*size, 3), np.float32)
    y, x = (size[0] - fitted.shape[0]) // 2, (size[1] - fitted.shape[1]) // 2
    out[y : y + fitted.shape[0], x : x + fitted.shape[1]] = fitted
    return out


def _scaled(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    planes = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(3)]
    return np.stack([np.asarray(p.resize((size[1], size[0]), Image.Resampling.BILINEAR)) for p in planes], -1)
