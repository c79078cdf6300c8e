"""Presets: values of the options for a purpose, a TOML file each, with what differs between groups of model families.

A file's plain keys hold for every model. Its tables hold for one group: ``sd`` for SD1.x and SD2.x, whose images are of
about 512 pixels, ``flow`` for models of flow matching (SD3, Flux, Qwen-Image, Z-Image, Wan, ...), and ``sdxl`` for all
others, which predict noise or v at about 1024 pixels. What is given beside a preset wins over it.
"""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ...modular_lora.options import OptionError, parse
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

    The file or ``given`` names the preset; without one this is `options.load`. Values of the preset that contradict
    what is given are left out, as few of them as possible; `said` names them.
    """
    known = (parse(config) if config else {}) | given
    if not known.get("preset"):
        return cls(**known)
    name = cls(preset=known["preset"]).preset  # refuses what is none, and one of the other training
    preset = {key: value for key, value in values(name, of).items() if key not in known}
    for count in range(len(preset)):
        for left_out in itertools.combinations(preset, count):
            with suppress(OptionError):
                return cls(**{key: value for key, value in preset.items() if key not in left_out} | known)
    return cls(**known)  # whose error is about what is given, whatever the preset


def sets(options: Options, of: str, name: str) -> bool:
    """Whether the value of an option is its preset's."""
    return bool(options.preset) and values(options.preset, of).get(name) == getattr(options, name)


def said(options: Options, of: str) -> list[str]:
    """A line on the preset of the options: what they have of it, what was given beside it, and what is left out."""
    if not options.preset:
        return []
    own, other, left_out = [], [], []
    for name, value in values(options.preset, of).items():
        given = getattr(options, name)
        if given == value:
            own.append(f"{name} {value!r}")
        elif why := _contradiction(options, name, value):
            left_out.append(f"{name} {value!r} ({why})")
        else:
            other.append(f"{name} {given!r} for {value!r}")
    line = f"preset {options.preset} ({of}): {', '.join(own) or 'nothing of it'}"
    line += f"; given beside it: {', '.join(other)}" if other else ""
    return [line + (f"; LEFT OUT, since it contradicts what was given: {', '.join(left_out)}" if left_out else "")]


def _contradiction(options: Options, name: str, value: Any) -> str:
    """Why an option that is at its default cannot have this value beside the others, if it cannot."""
    if getattr(options, name) != next(f.default for f in dataclasses.fields(options) if f.name == name):
        return ""
    try:
        dataclasses.replace(options, **{name: value})
    except OptionError as error:
        return str(error).rstrip(".")
    return ""
