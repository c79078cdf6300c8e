"""The paper's claim at equal quality, on the demo world's narrow net: goes on where it stopped, counts what is there.

python3 run.py evidence-equal [--minutes N]      appends to docs/figures/evidence_cells.jsonl, writes evidence.json
python3 run.py evidence-equal --anew FOLDER      the same from nothing: all LoRAs, cells and figures are made in FOLDER
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from modular_lora_guard.modular_lora.command import finish, typed
from modular_lora_guard.modular_lora.util.terminal import open_to_all

from . import counting, protocol, results, work
from .protocol import PACK, Cell, Protocol
from .results import Result

FIGURES = PACK / "docs" / "figures" / "evidence.json"
PLACES = {  # where things are, and below the folder of --anew
    "loras": (work.LORAS, "loras"),
    "results": (results.FILE, results.FILE.name),
    "figures": (FIGURES, FIGURES.name),
    "work": (PACK / "demo_output" / "equal", "work"),
}
logger = logging.getLogger("modular_lora")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=typed("tools.world.equal"), description=__doc__.splitlines()[0])
    made.add_argument("--minutes", type=float, help="begin no cell after so many minutes; 0 only counts")
    made.add_argument("--anew", type=Path, metavar="FOLDER", help="train, draw and judge all again, in this folder")
    made.add_argument("--protocol", type=Path, default=protocol.FILE, help="TOML of trainings, images and tests")
    made.add_argument("--loras", type=Path, help="folder of the LoRAs; what is missing is trained")
    made.add_argument("--results", type=Path, help="file of what was judged; cells are appended")
    made.add_argument("--figures", type=Path, help="file of the figures")
    made.add_argument("--work", type=Path, help="folder of intermediate LoRAs")
    return made


def main(arguments: Sequence[str]) -> int:
    open_to_all()
    chosen = parser().parse_args(arguments)
    return finish(lambda: run(chosen), "the same command goes on from here")


def run(chosen: argparse.Namespace) -> str:
    """Work until everything is done or the time is up, then count; what is to be said."""
    for name, (own, below) in PLACES.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, chosen.anew / below if chosen.anew else own)
    made = Protocol.read(chosen.protocol)
    done = results.read(chosen.results, made)
    cells = list(made.cells())
    todo = [cell for cell in cells if cell not in done]
    begun = time.monotonic()
    bench = work.Bench.opened(made, chosen.loras, chosen.work) if todo and chosen.minutes != 0 else None
    while bench and todo and (chosen.minutes is None or time.monotonic() - begun < 60 * chosen.minutes):
        logger.info("%s; %d of %d cells are done, about %s left", todo[0], len(done), len(cells), left(done, todo))
        result = bench.run(todo[0], done)
        results.append(chosen.results, made, result)
        done[todo.pop(0)] = result
    counting.write(chosen.figures, made, done)
    spent = sum(result.seconds for result in done.values()) / 3600
    rest = f"about {left(done, todo)} left" if todo else "nothing is left"
    return f"{len(done)} of {len(cells)} cells done, in {spent:.1f} CPU hours; {rest}; figures are in {chosen.figures}"


def left(done: Mapping[Cell, Result], todo: Iterable[Cell]) -> str:
    """The time that the other cells will take, from that of cells of the same arm, else of all arms."""
    by_arm: dict[str, list[float]] = {}
    for cell, result in done.items():
        by_arm.setdefault(cell.arm, []).append(result.seconds)
    if not by_arm:
        return "an unknown time"
    mean = statistics.fmean(seconds for some in by_arm.values() for seconds in some)
    seconds = sum(statistics.fmean(by_arm.get(cell.arm, [mean])) for cell in todo)
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
