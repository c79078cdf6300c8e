"""What was found, cell by cell: one line of JSON each in docs/figures/evidence_cells.jsonl, appended and never changed.

A line has the protocol's hash, the LoRA files that acted by their hashes, and of every image, in the order of
`Protocol.images`, what the judge said. What is not there is not done yet; a cell that is there is never run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modular_lora_guard.modular_lora.errors import GuardError, writing

from .drawing import Seen
from .protocol import PACK, Cell, Protocol

FILE = PACK / "docs" / "figures" / "evidence_cells.jsonl"


@dataclass(frozen=True)
class Result:
    """One cell that is done.

    Attributes:
        loras: SHA-256 of the LoRA files that acted, by role.
        seen: What the judge said.
        seconds: CPU seconds that it took, its trainings included.
        activity: Of the safety LoRA on the prompt of every image; of safety alone.
        share: g of every image in sixteenths; of safety first.
        machine: What it ran on, and when.
    """

    cell: Cell
    loras: Mapping[str, str]
    seen: Seen
    seconds: float
    activity: tuple[float, ...] = ()
    share: tuple[int, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)


def line(protocol: Protocol, result: Result) -> str:
    """A result in the file's form; of the judge's columns with one digit each, the digits."""
    seen = result.seen
    said: dict[str, Any] = {"protocol": protocol.digest, **asdict(result.cell), "loras": dict(result.loras)}
    said |= {name: _digits(getattr(seen, name)) for name in ("hit", "style", "ink")} | {"top": list(seen.top)}
    if result.activity:
        said["activity"] = list(result.activity)
    if result.share:
        said["share"] = list(result.share)
    return json.dumps(said | {"seconds": round(result.seconds, 1), **result.machine}, separators=(",", ":")) + "\n"


def append(path: Path, protocol: Protocol, result: Result) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line(protocol, result))


def read(path: Path, protocol: Protocol) -> dict[Cell, Result]:
    """All cells that are done.

    Raises:
        GuardError: a line is of another protocol, of another number of images, or there twice.
    """
    found: dict[Cell, Result] = {}
    count = len(protocol.images())
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        said = json.loads(text)
        cell = Cell(*(said[name] for name in ("arm", "recipe", "task", "training_seed")))
        seen = Seen(
            _flags(said["hit"]), tuple(said["top"]), tuple(int(digit) for digit in said["style"]), _flags(said["ink"])
        )
        if said["protocol"] != protocol.digest or len(seen.hit) != count or cell in found:
            raise GuardError(
                f"{path.name}: the line of {cell} is of another protocol, or there twice: put the file of this "
                "protocol back, or begin a new one with --results.",
                code="evidence.results",
            )
        extra = {name: said[name] for name in ("date", "machine") if name in said}
        activity, share = (tuple(said.get(name, ())) for name in ("activity", "share"))
        found[cell] = Result(cell, said["loras"], seen, said["seconds"], activity, share, extra)
    return found


def _digits(column: tuple[int, ...]) -> str:
    return "".join(str(int(value)) for value in column)


def _flags(digits: str) -> tuple[bool, ...]:
    return tuple(digit == "1" for digit in digits)
