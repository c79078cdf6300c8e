"""``gate-error``: the gate's own error on images that a person has sorted into two folders."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from ..gate import labelled
from ..gate.labelled import LabelledError
from ..modular_lora import options as optionfile
from ..modular_lora.places import check_writable
from . import detecting, images
from .options import DetectorOptions
from .words import interval, rate

OWN = ("command", "said", "flagged", "clean", "output")
TENTH = 10  # every tenth point of the curve is printed; the file has all


def add_command(commands: Any) -> None:
    """To argparse's subparsers."""
    help = "misses and false alarms of a detector on a folder that it should flag and one that it should not"
    command = commands.add_parser("gate-error", help=help, description=help, allow_abbrev=False)
    command.add_argument("flagged", type=Path, help="folder of images that show what is suppressed")
    command.add_argument("clean", type=Path, help="folder of images that do not")
    command.add_argument("--output", type=Path, default=Path("gate_error.json"), help="JSON; the plot lies beside it")
    optionfile.add_arguments(command, DetectorOptions)


def command(chosen: dict[str, Any]) -> str:
    """Measure, write JSON and plot, and say rates, intervals and curve. Raises GuardError."""
    values = {name: value for name, value in chosen.items() if name not in OWN}
    check_writable(chosen["output"].absolute().parent, "--output")
    detector, settings = detecting.make(optionfile.load(DetectorOptions, None, values))
    found = labelled.measure(chosen["flagged"], chosen["clean"], detector, settings)
    labelled.save(found, chosen["output"])
    return "\n".join([labelled.format_error(found), *_curve(found), *_plot(found, chosen["output"])])


def _curve(found: LabelledError) -> list[str]:
    head = f"{'threshold':>9} {'missed':>7} {'interval':>17} {'false alarms':>13} {'interval':>17}"
    return [head] + [
        f"{p.threshold:>9g} {rate(p.missed):>7} {interval(p.missed):>17} {rate(p.false_alarms):>13} "
        f"{interval(p.false_alarms):>17}"
        for p in found.curve[::TENTH]
    ]


def _plot(found: LabelledError, output: Path) -> list[str]:
    """Writes the curve; where it is, or why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        return [f"{output.absolute()}; matplotlib is not installed, so there is no plot"]
    plot = importlib.import_module(".plots", __package__).curve(found.curve, dict(found.settings.block))
    path = output.with_suffix(".svg")
    images.write(path, plot.encode())
    return [str(output.absolute()), str(path.absolute())]
