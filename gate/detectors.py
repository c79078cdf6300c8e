"""The detectors by name; which are there depends on what is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import nsfw, nudenet
from .classifier import Classifier
from .errors import GateError
from .finding import Detector

CLASSIFIER = "classifier"
PACKAGED = {nudenet.NAME: nudenet, nudenet.NAME_RGB: nudenet, nsfw.NAME: nsfw}  # their weights come with packages
NAMES = (*PACKAGED, CLASSIFIER)


def available() -> tuple[str, ...]:
    """Names that `make` can serve here, the preferred first; NudeNet's package is an optional extra."""
    lacking = {name for name, module in PACKAGED.items() if module.weights() is None}
    return tuple(name for name in NAMES if name not in lacking)


def make(name: str, providers: Sequence[str] = (), threads: int = 0, **files: str | Path) -> Detector:
    """A detector ready to judge.

    ``providers`` and ``threads`` are onnxruntime's, see `Runner`. "classifier" takes ``weights`` (ONNX) and ``labels``
    (JSON, see docs/gate.md); the others take no files, theirs come with their packages. Raises GateError.
    """
    wanted = {"weights", "labels"} if name == CLASSIFIER else set()
    if name not in NAMES:
        raise GateError(f"detector: {name!r} does not exist: one of {', '.join(NAMES)}.", code="gate.unknown-detector")
    if files.keys() != wanted:
        given = ", ".join(sorted(files)) or "none"
        raise GateError(
            f"detector {name}: takes the files {', '.join(sorted(wanted)) or 'none'}, given {given}.",
            code="gate.detector-files",
        )
    if name == CLASSIFIER:
        return Classifier(files["weights"], files["labels"], providers, threads)
    if name == nsfw.NAME:
        return nsfw.OpenNsfw(providers, threads)
    return nudenet.NudeNet(providers, threads, rgb=name == nudenet.NAME_RGB)
