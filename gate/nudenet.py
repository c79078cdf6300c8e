"""NudeNet's 320n (YOLOv8n, 18 body-part labels), from the weights in the `nudenet` package, which is AGPL-3.0.

Only the weights' file is used; the session, letterbox and post-processing are this module's. Preparation and own
boxes equal those of nudenet 3.4.2's ``NudeDetector.detect`` on the file of the image. Seen in that version:

* Channels. ``detect`` swaps red and blue twice, so the network sees the order that it is given. A path is read with
  ``cv2.imread``, which is BGR; an RGB array stays RGB, which is what the network was trained on. Scores and thresholds
  that people quote come from ``detect(path)``: that is `NAME`. `NAME_RGB` equals ``detect`` on an RGB array.
* A score below 0.2 is dropped; each anchor keeps its likeliest label alone; overlapping boxes (IoU > 0.45) lose to the
  likeliest whatever the labels. A guard must not lose a blocked label to another one beside it. So `Finding.scores` are
  maxima over all anchors, and after nudenet's own boxes come those that only its label rivalry dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import GateError
from .finding import Box, Finding
from .packages import file_of, version_of
from .runner import Runner, chunks, to_bytes

NAME = "nudenet 320n"
NAME_RGB = "nudenet 320n rgb"
SHA256 = "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f"
SIZE = 320  # pixels of the network's square input
LABELS = (
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)
BLOCKED = (
    "FEMALE_BREAST_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)
THRESHOLD = 0.45
FLOOR = 0.2  # of an anchor's score
BOX_FLOOR = 0.25  # of a box's score, exclusive
OVERLAP = 0.45  # IoU above which the likelier box wins


def weights() -> Path | None:
    """The package's own ONNX file, or None where the package is not installed."""
    return file_of("nudenet", "320n.onnx")


class NudeNet:
    """The detector; `make` in detectors.py serves it. Raises GateError without the package or with other weights."""

    licence = "AGPL-3.0 (weights and package)"
    labels: tuple[str, ...] = LABELS
    exclusive: tuple[str, ...] = ()
    block: Mapping[str, float]
    report: Mapping[str, float]
    has_boxes = True
    covers = "18 body parts, exposed or covered, and faces, in photographs above all"
    blind_to = (
        "violence, gore, weapons, hate, likeness, age, acts without a named part; weak on drawings and stylised art"
    )

    def __init__(self, providers: Sequence[str] = (), threads: int = 0, *, rgb: bool = False):
        if (path := weights()) is None:
            raise GateError(
                f"detector {NAME}: the package nudenet (AGPL-3.0) is not installed: pip install nudenet.",
                code="gate.not-installed",
            )
        self._runner = Runner(path, SHA256, providers, threads)
        self._cv2 = _opencv()
        self._rgb = rgb
        self.name = f"{NAME_RGB if rgb else NAME} (nudenet {version_of('nudenet')})"
        self.sha256, self.device, self.notes = SHA256, self._runner.device, self._runner.notes
        self.block = dict.fromkeys(BLOCKED, THRESHOLD)
        self.report = {label: THRESHOLD for label in LABELS if label not in BLOCKED}

    def detect(self, images: np.ndarray) -> list[Finding]:
        """See `Detector`."""
        found: list[Finding] = []
        for part in chunks(images, self._runner.chunk):
            raw = self._runner.run(self._prepared(to_bytes(part)), self._runner.outputs)[0]  # b 22 anchors
            found += [read(one, images.shape[1:3]) for one in raw]
        return found

    def _prepared(self, images: np.ndarray) -> np.ndarray:
        """Images b h w 3 uint8 RGB as the network takes them: b 3 320 320, 0..1, black right and below."""
        n, height, width, _ = images.shape
        side = max(height, width)
        square = np.zeros((side, side, 3), np.uint8)
        out = np.empty((n, SIZE, SIZE, 3), np.uint8)
        for i, image in enumerate(images):
            square[:height, :width] = image if self._rgb else image[..., ::-1]
            # the resize of nudenet itself: another one would shift scores by more than 1e-4
            out[i] = self._cv2.resize(square, (SIZE, SIZE), interpolation=self._cv2.INTER_LINEAR)
        return np.ascontiguousarray(out.transpose(0, 3, 1, 2)).astype(np.float32) * np.float32(1 / 255)


def read(output: np.ndarray, size: tuple[int, int]) -> Finding:
    """One image's output (22 anchors: centre x, y, width, height in 320ths, 18 scores) for an image of h, w."""
    boxes, scores = _corners(output[:4].T, size), output[4:].T  # anchors 4, anchors 18
    highest = dict(zip(LABELS, scores.max(0).tolist(), strict=True))
    own = _own(boxes, scores)
    every = _by_label(boxes, scores, own)
    return Finding(highest, tuple(_box(boxes[a], scores[a, c], c) for a, c in [*own, *every]))


def _corners(centred: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Anchors 4 as x, y, width, height in pixels of the image, clipped as nudenet does: origin first, then extent."""
    height, width = size
    extent = centred[:, 2:]
    place = np.concatenate([centred[:, :2] - extent / 2, extent], 1) * max(size) / SIZE
    x, y = np.clip(place[:, 0], 0, width), np.clip(place[:, 1], 0, height)
    return np.stack([x, y, np.minimum(place[:, 2], width - x), np.minimum(place[:, 3], height - y)], 1)


def _own(boxes: np.ndarray, scores: np.ndarray) -> list[tuple[int, int]]:
    """nudenet's own detections as (anchor, label): the likeliest label of an anchor, labels against each other."""
    best = scores.max(1)
    anchors = np.flatnonzero(best > BOX_FLOOR)
    kept = anchors[_suppressed(boxes[anchors], best[anchors])]
    return [(int(a), int(scores[a].argmax())) for a in kept]


def _by_label(boxes: np.ndarray, scores: np.ndarray, own: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(anchor, label) of what no own box of the same label covers, each label for itself, down to `FLOOR`."""
    found = []
    for label in np.flatnonzero(scores.max(0) >= FLOOR):
        anchors = np.flatnonzero(scores[:, label] >= FLOOR)
        mine = boxes[[a for a, c in own if c == label]].reshape(-1, 4)
        free = (_overlaps(boxes[anchors], mine) <= OVERLAP).all(1)
        anchors = anchors[free]
        found += [(int(a), int(label)) for a in anchors[_suppressed(boxes[anchors], scores[anchors, label])]]
    return found


def _suppressed(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Indices that non-maximum suppression keeps, the likeliest first; equals OpenCV's NMSBoxes."""
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        order = order[_overlaps(boxes[order], boxes[first : first + 1])[:, 0] <= OVERLAP]
    return np.array(kept, np.intp)


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes n 4 and m 4 (x, y, width, height): n m; 1 between boxes without area."""
    a, b = a[:, None].astype(np.float64), b[None].astype(np.float64)
    across = np.minimum(a[..., 0] + a[..., 2], b[..., 0] + b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    down = np.minimum(a[..., 1] + a[..., 3], b[..., 1] + b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    shared = np.clip(across, 0, None) * np.clip(down, 0, None)
    union = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - shared
    return np.divide(shared, union, out=np.ones_like(union), where=union > np.finfo(np.float64).eps)


def _box(place: np.ndarray, score: float, label: int) -> Box:
    x, y, width, height = map(float, place)
    return Box(LABELS[label], float(score), x, y, width, height)


def _opencv() -> Any:
    """OpenCV, which the nudenet package itself depends on."""
    try:
        import cv2
    except ImportError as error:
        raise GateError(f"OpenCV cannot be imported ({error}): pip install opencv-python-headless.") from error
    return cv2
