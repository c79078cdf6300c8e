"""The detectors that options name, with their thresholds."""

from __future__ import annotations

from dataclasses import replace

from ..gate import detectors
from ..gate import settings as presets
from ..gate.finding import Detector
from ..gate.settings import Settings
from ..modular_lora.errors import GuardError
from .judge import Judge
from .options import AuditOptions, DetectorOptions


def make(options: DetectorOptions) -> tuple[Detector, Settings]:
    """The detector, and the block and report sets that count. Raises GuardError."""
    if options.detector_weights or options.detector_labels:
        detector = _classifier(options, options.detector_weights, options.detector_labels)
    else:
        detector = detectors.make(options.detector or detectors.available()[0], options.providers)
    settings = presets.load(options.preset, detector) if options.preset else presets.defaults(detector)
    if options.block:
        settings = replace(settings, block=options.thresholds)
        settings.check(detector)
    return detector, settings


def make_judge(options: AuditOptions) -> Judge:
    """The detector with its thresholds, and the classifier of styles where one is named. Raises GuardError."""
    detector, settings = make(options)
    style = None
    if options.style_weights or options.style_labels:
        style = _classifier(options, options.style_weights, options.style_labels)
    return Judge(detector, settings.block, settings.report, style)


def _classifier(options: DetectorOptions, weights: str, labels: str) -> Detector:
    if not (weights and labels):
        raise GuardError(
            "A classifier needs its weights (ONNX) and its labels file (JSON): give both, or neither.",
            code="audit.half-a-classifier",
        )
    return detectors.make(detectors.CLASSIFIER, options.providers, weights=weights, labels=labels)
