#!/usr/bin/env python3
"""Try the guard, test it, open it in the browser, train LoRAs, audit them.

    python3 run.py demo      draw the comparison without a browser; leaves demo_output/report.html
    python3 run.py check     lint, types and the tests that need no ComfyUI, beside your own PyTorch
    python3 run.py test      install the test tools, check lint and types, run every test
    python3 run.py comfy     open ComfyUI with the pack and the demo world in it
    python3 run.py lora      train, convert, project and inspect LoRAs: python3 run.py lora --help
    python3 run.py audit     what LoRAs do to suppressed concepts, measured: python3 run.py audit --help
    python3 run.py operator  keys, signatures, record and policy of a host: python3 run.py operator --help
    python3 run.py evidence  the paper's table on the demo world (docs/evidence.md; hours on a CPU)
    python3 run.py evidence-equal  the same at equal quality, with safety first (docs/evidence.md; hours, in slices)

The first run makes an environment of its own in .run/ (delete the folder to start afresh) with ComfyUI 0.3.75, which is
a year old (26 November 2025): the newest that a package registry has whole. --comfyui-git REF takes a newer one, where
git reaches its repository. A ComfyUI that COMFYUI_PATH or comfy-cli's default workspace names is used instead; nothing
is written into it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - this very check is for older ones
    sys.exit("run.py needs Python 3.10 or newer; this is {}.{}. Start it with a newer one.".format(*sys.version_info))

sys.path.append(str(Path(__file__).resolve().parent / "importable"))
from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.modular_lora.places import check_writable
from modular_lora_guard.modular_lora.util.boundary import TYPED, contained
from modular_lora_guard.tools.bootstrap import browser, check, comfyui, environment, front_end, paths, usage
from modular_lora_guard.tools.bootstrap.console import RunError, say
from modular_lora_guard.tools.bootstrap.process import child_environment, exit_when_terminated, run_attached

WITHOUT_CLONE_ON_PATH = "import sys; sys.path[:] = [p for p in sys.path if p]; "  # our nodes/ would hide ComfyUI's
OWN_LINE = {  # command -> module, help
    "lora": (
        "training",
        "make-safety, combine-safety, convert-safety, train-task, train-safety, project, inspect, dataset "
        "(docs/training.md)",
    ),
    "audit": ("audit", "run, page, gate-error (docs/audit.md)"),
    "operator": ("operators", "keygen, sign, verify, record, policy (docs/operators.md)"),
    "evidence": ("tools.world", "the paper's table on the demo world (docs/evidence.md)"),
    "evidence-equal": ("tools.world.equal", "the paper's claim at equal quality, in slices (docs/evidence.md)"),
}
PYTEST = WITHOUT_CLONE_ON_PATH + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command with its options, and what goes on to pytest or ComfyUI."""
    parser = argparse.ArgumentParser(
        prog="run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which = common.add_mutually_exclusive_group()
    which.add_argument("--bundled", action="store_true", help="ignore COMFYUI_PATH and comfy-cli")
    which.add_argument(
        "--comfyui-git", metavar="REF", help="ComfyUI at this tag, branch or commit, beside the pinned one"
    )
    demo = commands.add_parser(
        "demo", allow_abbrev=False, parents=[common], help="draw the comparison and write the report"
    )
    demo.add_argument("--steps", type=_number(1, 10_000), default=20, help="sampling steps of every image (20)")
    demo.add_argument(
        "--seed", type=_number(0, 2**63), default=1, help="seed of the first prompt, which others follow (1)"
    )
    demo.add_argument("--output", type=Path, default=paths.DEMO_OUTPUT, help="folder of the report (demo_output)")
    commands.add_parser(
        "check",
        allow_abbrev=False,
        help="lint, types and the tests that need no ComfyUI, beside an existing PyTorch; what follows goes to pytest",
    )
    test = commands.add_parser(
        "test",
        allow_abbrev=False,
        parents=[common],
        help="lint and test, on two cores unless files or tests are named; what follows goes to pytest (-n 0: one)",
    )
    test.add_argument("--all", action="store_true", help="run the long trials whole (90 minutes), not samples of them")
    comfy = commands.add_parser(
        "comfy", allow_abbrev=False, parents=[common], help="open ComfyUI; what follows goes to ComfyUI"
    )
    comfy.add_argument("--port", type=_number(1, 65_535), help="port of the server (a free one)")
    comfy.add_argument("--no-browser", action="store_true", help="only print the address")
    for name, (_, help) in OWN_LINE.items():
        commands.add_parser(name, add_help=False, help=help)
    if arguments and arguments[0] in OWN_LINE:
        options, rest = common.parse_known_args(arguments[1:])  # they may stand behind a command's own words as well
        options.command = arguments[0]
        return options, rest
    options, rest = parser.parse_known_args(arguments)
    rest = [argument for argument in rest if argument != "--"]
    if rest and options.command == "demo":
        parser.error(f"unknown option for demo: {' '.join(rest)}")
    if options.command == "comfy" and any(argument.partition("=")[0] == "--port" for argument in rest):
        parser.error("--port is an option of run.py comfy: give it before --")
    if options.command == "test" and options.all:
        rest.append("--all")
    return options, rest


def _number(least: int, most: int) -> Callable[[str], int]:
    """A whole number within bounds, as an option's type."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not from {least} to {most}")
        return value

    return number


def demo_process(host: comfyui.Host, command: str, *arguments: str | Path) -> int:
    """Run a command of the demo package with ComfyUI's interpreter."""
    extra = {} if host.bundled else {"PYTHONDONTWRITEBYTECODE": "1"}
    given = [host.python, "-m", "tools.demo", command, "--comfyui", host.folder, *arguments]
    return run_attached(given, environment=child_environment(extra), cwd=paths.ROOT)


def run_demo(host: comfyui.Host, options: argparse.Namespace) -> int:
    output = options.output.expanduser().resolve()
    return demo_process(host, "demo", "--steps", str(options.steps), "--seed", str(options.seed), "--output", output)


def run_comfy(host: comfyui.Host, options: argparse.Namespace, rest: Sequence[str]) -> int:
    port = ["--port", str(options.port)] if options.port else []
    quiet = ["--no-browser"] if options.no_browser else []
    return demo_process(host, "comfy", *port, *quiet, "--", *rest)


def run_own_line(host: comfyui.Host, command: str, rest: Sequence[str]) -> int:
    """A module with its own command line.

    The demo world's checkpoint is put in its place where the clone has that world, and for the operators the packages
    with which signatures are made and checked.
    """
    code, variables = 0, {}
    if command == "operator":
        if needs_signatures(rest):
            variables = environment.ensure_signatures(host.python, bundled=host.bundled)
    elif paths.WORLD_ASSETS.is_dir():
        code = demo_process(host, "world")
    settings = {"MODULAR_LORA_COMFYUI": str(host.folder), TYPED: f"run.py {command}", **variables}
    entry = [host.python, "-m", OWN_LINE[command][0], *rest]
    return code or run_attached(entry, environment=child_environment(settings), cwd=paths.ROOT)


def needs_signatures(rest: Sequence[str]) -> bool:
    """The record's lines are shown without them."""
    return tuple(rest[:2]) != ("record", "show")


def run_test(host: comfyui.Host, rest: Sequence[str]) -> int:
    """Lint, format and types, then every test; the last lines are pytest's own summary."""
    tools = environment.ensure_test_tools(host.python, bundled=host.bundled)
    variables = {
        **tools,
        **browser.ensure(),
        **front_end.ensure(host.python),
        "MODULAR_LORA_COMFYUI": str(host.folder),
        "MODULAR_LORA_WORLD": str(paths.WORLD),
    }
    code = demo_process(host, "world")
    if code:
        return code
    settings = check.test_environment(variables)
    code, _ = check.run_steps(host.python, check.STEPS, settings)
    if spread := spread_over_cores(rest):
        settings["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return code or run_attached([host.python, "-c", PYTEST, *spread, *rest], environment=settings, cwd=paths.ROOT)


def spread_over_cores(rest: Sequence[str]) -> tuple[str, ...]:
    """Options with which whole files go to workers; none where files or tests are named."""
    named = any((paths.ROOT / argument.partition("::")[0]).is_file() for argument in rest)
    return () if named else environment.spread()


def main(arguments: Sequence[str]) -> int:
    options, rest = parse(arguments)
    exit_when_terminated()
    return contained(
        lambda: run(options, rest),
        lambda text: say(f"run.py: {text}"),
        expected=(RunError, GuardError),
        interrupted="interrupted.",
        logs=paths.LOGS,
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.command in OWN_LINE:
        usage.check(options.command, rest)  # ends here for help, and for what cannot be meant
    if options.command == "check":
        return check.run_check(PYTEST, rest)
    if options.command == "demo":
        check_writable(options.output.expanduser().resolve(), "--output")
    host = comfyui.find(bundled=options.bundled, ref=options.comfyui_git)
    say(f"ComfyUI {host.version} in {host.folder} ({host.origin})")
    if options.command == "demo":
        return run_demo(host, options)
    if options.command == "comfy":
        return run_comfy(host, options, rest)
    if options.command in OWN_LINE:
        return run_own_line(host, options.command, rest)
    return run_test(host, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
