"""The command line of the audit: run, page and gate-error.

Every option of ``run`` can stand in a TOML file as well (--config), under the same name; the command line goes first.
An audit that was stopped goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..modular_lora import options as optionfile
from ..modular_lora.command import Lines, finish, typed
from ..modular_lora.errors import GuardError
from ..modular_lora.util.terminal import open_to_all
from . import engines, gate_error, session
from .options import AuditOptions
from .words import format_report

ENGINES = ("local", "processes", "ray")
OWN = ("command", "config", "checkpoint", "comfyui", "cpu", "engine", "workers", "devices", "ray_address", "gpus")
PIPELINE = ("comfy_host.standalone_pipeline", "open_pipeline")


def main(arguments: Sequence[str]) -> int:
    """Exit code 0, or 1 with one line that says what is wrong and what to do."""
    open_to_all()
    chosen = vars(parser().parse_args(arguments))
    command = {"run": run, "page": page, "gate-error": gate_error.command}[chosen["command"]]
    return finish(lambda: command(chosen | {"said": shlex.join(arguments)}), "the same command goes on from here")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=typed("audit"), description=__doc__, allow_abbrev=False)
    commands = made.add_subparsers(dest="command", required=True)
    help = "draw every arm with the same prompts and seeds, judge, and write the page"
    command = commands.add_parser("run", help=help, description=help, allow_abbrev=False)
    command.add_argument("--config", type=Path, metavar="TOML", help="options in a file, under the same names")
    command.add_argument("--checkpoint", type=Path, required=True, help="base model, a checkpoint file")
    command.add_argument("--comfyui", type=Path, help="folder of ComfyUI (found where the pack is in its custom_nodes)")
    command.add_argument("--cpu", action="store_true", help="draw on the CPU")
    _engine_arguments(command)
    optionfile.add_arguments(command, AuditOptions)
    help = "write the page anew from an audit's report.json and sheets"
    command = commands.add_parser("page", help=help, description=help)
    command.add_argument("folder", type=Path, help="the audit's output_dir")
    gate_error.add_command(commands)
    return made


def _engine_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("engine", "where images are drawn; the images are the same")
    group.add_argument("--engine", choices=ENGINES, default="local", help="this process, processes, or a Ray cluster")
    group.add_argument("--workers", type=int, default=1, help="processes or Ray actors (1)")
    group.add_argument("--devices", type=int, nargs="+", default=[], help="GPUs by index, a process each")
    group.add_argument("--ray_address", help="a running Ray cluster (without: one on this machine)")
    group.add_argument("--gpus", type=float, default=0.0, help="GPUs a Ray actor takes (0)")


def run(chosen: dict[str, Any]) -> str:
    """Draw, judge, write; the report as text and where the page is."""
    values = {name: value for name, value in chosen.items() if name not in (*OWN, "said")}
    options = optionfile.load(AuditOptions, chosen["config"], values)
    report = session.run(options, _engine(chosen), Lines(), f"{typed('audit')} {chosen['said']}")
    return f"{format_report(report)}\n{Path(options.output_dir).absolute() / 'index.html'}"


def page(chosen: dict[str, Any]) -> str:
    session.rewrite(chosen["folder"])
    return str(chosen["folder"].absolute() / "index.html")


def _engine(chosen: dict[str, Any]) -> engines.Engine:
    if not chosen["checkpoint"].is_file():
        raise GuardError(f"{chosen['checkpoint']}: no such checkpoint: check the path.")
    said = {"checkpoint": str(chosen["checkpoint"].absolute()), "cpu": chosen["cpu"]}
    said["comfyui"] = str(chosen["comfyui"].absolute()) if chosen["comfyui"] else ""
    spec = engines.PipelineSpec(*PIPELINE, said)
    if chosen["engine"] == "processes":
        return engines.Processes(spec, tuple(chosen["devices"]), chosen["workers"])
    if chosen["engine"] == "ray":
        return engines.RayCluster(spec, chosen["workers"], chosen["ray_address"], chosen["gpus"])
    return engines.Here(spec)
