"""The commands that run.py starts with ComfyUI's interpreter: demo, comfy and world."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from ...comfy_host.standalone import has_accelerator
from ...modular_lora.errors import GuardError
from ...modular_lora.places import check_writable
from ...modular_lora.util.boundary import contained
from ..bootstrap.console import RunError, say
from ..bootstrap.paths import LOGS, WORLD, base_of
from ..bootstrap.process import exit_when_terminated
from .base import prepare
from .client import ClientError
from .server import Server
from .settings import DemoWorld


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--comfyui", type=Path, required=True)
    demo = commands.add_parser("demo", parents=[common])
    demo.add_argument("--steps", type=int, required=True)
    demo.add_argument("--seed", type=int, required=True)
    demo.add_argument("--output", type=Path, required=True)
    comfy = commands.add_parser("comfy", parents=[common])
    comfy.add_argument("--port", type=int)
    comfy.add_argument("--no-browser", action="store_true")
    comfy.add_argument("extra", nargs="*")
    commands.add_parser("world", parents=[common])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    options = parse(arguments)
    exit_when_terminated()

    def work() -> int:
        world = DemoWorld.expanded(WORLD)
        if options.command == "demo":
            return _demo(options, world)
        return _comfy(options, world) if options.command == "comfy" else 0

    return contained(
        work,
        lambda text: say(f"\n{options.command}: {text}"),
        expected=(RunError, GuardError, ClientError),
        interrupted="interrupted; the server is shut down.",
        logs=LOGS,
    )


def server(options: argparse.Namespace, world: DemoWorld, name: str, **more: Any) -> Server:
    """A server on a base directory in `.run/`, with the pack and the demo world in place."""
    base = base_of(options.comfyui)
    prepare(base, checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    log = LOGS / f"{name}.log"
    return Server(options.comfyui, sys.executable, base, log=log, cpu=not has_accelerator(), **more)


def _demo(options: argparse.Namespace, world: DemoWorld) -> int:
    from .show import show

    check_writable(options.output, "--output")
    say("Starting ComfyUI …")
    with server(options, world, "demo-server") as running:
        show(running, world, steps=options.steps, seed=options.seed, output=options.output)
    return 0


def _comfy(options: argparse.Namespace, world: DemoWorld) -> int:
    import webbrowser

    say("Starting ComfyUI …")
    with server(options, world, "comfy-server", port=options.port, extra=options.extra) as running:
        say(f"ComfyUI is at {running.url}  (log: {running.log}; Ctrl+C ends it)")
        say("Workflow > Browse Templates > Modular LoRA Guard has graphs to start from.")
        say("In a graph of yours: put the node Guard behind the checkpoint loader, and choose the safety LoRA on it.")
        if not options.no_browser:
            webbrowser.open(running.url)
        return running.wait()
