"""The gate's measured error beside its settings: a preset's own, or that of a detector's defaults in docs/figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..modular_lora.util import plain_json
from .finding import Detector
from .settings import Settings, defaults

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures" / "gate.json"  # not in the registry's archive
ENDING = ".error.json"  # of what `audit gate-error --output` wrote, beside a preset of that name
HOW = "python3 run.py audit gate-error FLAGGED CLEAN measures it"


def error_path(preset: Path) -> Path:
    """Where the error of a preset's settings is looked for."""
    return preset.with_name(preset.name.removesuffix(".json") + ENDING)


def is_error(name: str) -> bool:
    """Whether a file in the presets' folder is a measured error and no preset."""
    return name.endswith(ENDING)


def format_measured(detector: Detector, settings: Settings, preset: Path | None, has_second: bool) -> str:
    """The line on what was measured with exactly this detector and these thresholds, or that nothing was.

    Args:
        detector: The first detector.
        settings: As they are used.
        preset: The preset's file, if one was chosen.
        has_second: Whether a second detector must confirm, which figures of one do not cover.
    """
    alone = ", of the detector alone, without what is flagged for its prompt" * (settings.activity != "ignore")
    said = "" if has_second else _of_preset(detector, settings, preset) or _of_defaults(detector, settings)
    return f"measured error: {said or f'not measured with these settings ({HOW})'}" + alone


def _of_preset(detector: Detector, settings: Settings, preset: Path | None) -> str:
    if preset is None or not (found := _read(error_path(preset))):
        return ""
    same = found.get("block") == dict(settings.block) and found.get("review", {}) == dict(settings.review)
    measured = found.get("detector")
    if not same or not isinstance(measured, Mapping) or measured.get("sha256") != detector.sha256:
        return ""
    try:
        rates = [(name, found[name]) for name in ("missed", "false_alarms")]
        return "; ".join(
            f"{name.replace('_', ' ')} {one['k']} of {one['n']} [{one['low']:.1%}, {one['high']:.1%}]"
            for name, one in rates
        )
    except (KeyError, TypeError, ValueError):
        return ""


def _of_defaults(detector: Detector, settings: Settings) -> str:
    """The rows of docs/figures/gate.json that name this detector, which were measured at every detector's defaults."""
    usual = defaults(detector)
    if (settings.block, settings.review) != (usual.block, usual.review):
        return ""
    rows = (_read(FIGURES) or {}).get("rows")
    said = []
    for row in rows if isinstance(rows, list) else ():
        name, value = (str(row.get(key, "")) for key in ("name", "value")) if isinstance(row, Mapping) else ("", "")
        measured, _, what = name.removeprefix("error, ").partition(": ")
        if name.startswith("error, ") and what and detector.name.partition(" (")[0] == measured:
            said.append(f"{what} {value}")
    return "; ".join(said) + " (drawings of the demo world, docs/gate.md)" * bool(said)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return plain_json.read_object(path)
    except (OSError, ValueError):
        return None
