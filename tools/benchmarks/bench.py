"""What the benchmarks share: their command lines, LoRA files as the guard takes them, and how figures are said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard.build import SafetyLora, TaskLora

from .figures import record


class Silent:
    """A watch of a training that shows nothing."""

    def check(self) -> None:
        """Nothing interrupts."""

    stage = step = validated = sample = say = lambda self, *said: None


def parser(
    doc: str, file: str = "", *, checkpoint: bool = False, part: str | None = None, threads: bool = False
) -> argparse.ArgumentParser:
    """The command line of a benchmark.

    Args:
        doc: Its module's docstring, which is shown as it is.
        file: The file in docs/figures that ``--record`` writes; "" for a benchmark that writes another way.
        checkpoint: Whether it works on a checkpoint in ComfyUI.
        part: Of ``tools.benchmarks.reliability``, where the benchmark is one.
        threads: Whether the number of CPU threads is an option.
    """
    prog = f"benchmarks.reliability {part}" if part else None
    made = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if checkpoint:
        made.add_argument("checkpoint", type=Path, help="the expanded demo world (python -m tools.world.expand FOLDER)")
        made.add_argument("--comfyui", type=Path, help="ComfyUI's folder")
    if threads:
        made.add_argument("--threads", type=int, default=1)
    if file:
        made.add_argument("--record", action="store_true", help=f"write docs/figures/{file}")
    return made


def finish(rows: dict[str, object], file: str, command: str, recorded: bool) -> None:
    """Say the rows (name -> value); where ``recorded``, put them into docs/figures/``file`` with the command."""
    sys.stdout.write("".join(f"{name}: {value}\n" for name, value in rows.items()))
    if recorded:
        record(file, rows, command)


def loras(
    safety: Path, tasks: Iterable[tuple[Path, float]] = (), strength: float = 1.0
) -> tuple[tuple[SafetyLora, ...], tuple[TaskLora, ...]]:
    """A safety LoRA at ``strength`` and task LoRAs at theirs, read from their files."""
    others = tuple(TaskLora(read_lora(path), by, by) for path, by in tasks)
    return (SafetyLora(read_lora(safety), strength),), others
