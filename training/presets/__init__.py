"""Presets: values of the options for a purpose, a TOML file each, with what differs between groups of model families.

A file's plain keys hold for every model. Its tables hold for one group: ``sd`` for SD1.x and SD2.x, whose images are of
about 512 pixels, ``flow`` for models of flow matching (SD3, Flux, Qwen-Image, Z-Image, Wan, ...), and ``sdxl`` for all
others, which predict noise or v at about 1024 pixels. What is given beside a preset wins over it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from ...modular_lora.options import parse
from ..options import Options

GROUPS = ("sd", "sdxl", "flow")
SMALL = ("SD15", "SD2")  # how ComfyUI's names of the families of ``sd`` begin
T = TypeVar("T", bound=Options)


def group(family: str, flow: bool) -> str:
    """The group of a family (ComfyUI's name); ``flow``: whether its network says a velocity of flow matching."""
    return "flow" if flow else "sd" if family.startswith(SMALL) else "sdxl"


def values(name: str, of: str) -> dict[str, Any]:
    """Option values of a preset for a group."""
    found = parse(Path(__file__).with_name(f"{name}.toml"))
    return {key: value for key, value in found.items() if key not in GROUPS} | found.get(of, {})


def load(cls: type[T], config: Path | None, given: dict[str, Any], of: str) -> T:
    """Options of a preset for the group ``of``, overridden by a TOML file, overridden by ``given``; OptionError.

    The file or ``given`` names the preset; without one this is `options.load`.
    """
    known = (parse(config) if config else {}) | given
    if not known.get("preset"):
        return cls(**known)
    name = cls(preset=known["preset"]).preset  # refuses what is none, and one of the other training
    return cls(**values(name, of) | known)


def said(options: Options, of: str) -> list[str]:
    """A line on the preset of the options: what they have of it, and what was given beside it."""
    if not options.preset:
        return []
    own, other = [], []
    for name, value in values(options.preset, of).items():
        given = getattr(options, name)
        own += [f"{name} {value!r}"] if given == value else []
        other += [f"{name} {given!r} for {value!r}"] if given != value else []
    line = f"preset {options.preset} ({of}): {', '.join(own) or 'nothing of it'}"
    return [line + (f"; given beside it: {', '.join(other)}" if other else "")]
