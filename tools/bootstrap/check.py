"""`run.py check`: what can be checked with PyTorch and without ComfyUI."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import environment, paths
from .console import RunError, say
from .links import link_folder
from .process import child_environment, run_attached

# Which tests need no ComfyUI: the marker that tests/conftest.py works out. Long ones are left to `run.py test`.
UNIT_TESTS = ("tests", "-m", "unit and not slow and not sampled")
HAS_TORCH = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
STEPS = {  # what is said -> arguments of the interpreter
    "lint": ("-m", "ruff", "check", "."),
    "format": ("-m", "ruff", "format", "--check", "."),
    "types": ("-m", "mypy"),
}


def interpreter() -> Path:
    """The interpreter that runs run.py if it has PyTorch, else that of `.run/venv`.

    Raises:
        RunError: neither has PyTorch.
    """
    candidates = [Path(sys.executable), environment.python_of(paths.VENV)]
    found = next((python for python in candidates if python.exists() and has_torch(python)), None)
    if found is None:
        raise RunError(
            f"run.py check needs PyTorch, and {sys.executable} has none: `{sys.executable} -m pip install torch`, or "
            "start run.py with an interpreter that has it."
        )
    return found


def has_torch(python: Path) -> bool:
    """Whether ``python`` finds PyTorch, which is not imported for it."""
    answer = subprocess.run([str(python), "-c", HAS_TORCH], env=child_environment(), capture_output=True, check=False)
    return answer.returncode == 0


def run_check(pytest_entry: str, rest: Sequence[str]) -> int:
    """Lint, format, types and unit tests; all four run, so that one call shows everything.

    Args:
        pytest_entry: The code with which pytest is started (see run.py).
        rest: Further arguments of pytest.

    Returns:
        0, or the exit code of the first step that failed.
    """
    began = time.monotonic()
    python = environment.ensure_check(interpreter())
    settings = test_environment({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})
    for name in ("MODULAR_LORA_COMFYUI", "MODULAR_LORA_WORLD"):
        settings.pop(name, None)
    tests = ("-c", pytest_entry, "-q", "--hypothesis-profile", "dev", *environment.spread(), *UNIT_TESTS, *rest)
    code, failed = run_steps(python, {**STEPS, "unit tests": tests}, settings)
    took = f"{time.monotonic() - began:.0f} s"
    say(f"check: failed in {took}: {', '.join(failed)}" if failed else f"check: passed in {took}")
    return code


def test_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of tests, in which what Python compiles is kept, and in `.run` alone.

    Every worker, server and command of the tests imports PyTorch, most of them ComfyUI: where nothing compiled is kept
    (``PYTHONDONTWRITEBYTECODE`` of the machine is not followed here), each compiles them anew.
    """
    settings = child_environment({"PYTHONPYCACHEPREFIX": str(paths.BYTECODE), **extra})
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    return settings


def run_steps(python: Path, steps: Mapping[str, Sequence[str]], settings: Mapping[str, str]) -> tuple[int, list[str]]:
    """Run every step, also after one that fails.

    mypy takes a package's name from its folder, and a clone may be called anything: where pyproject.toml tells mypy to
    look, a link has the name under which the pack is imported.

    Args:
        python: The interpreter.
        steps: What is said of a step, and the interpreter's arguments.
        settings: The environment variables.

    Returns:
        0 or the first exit code that is not, and the steps that failed.
    """
    link_folder(paths.ROOT, paths.TYPES / paths.IMPORT_NAME)
    codes = {}
    for name, arguments in steps.items():
        say(f"{name}:")
        codes[name] = run_attached([python, *arguments], environment=settings, cwd=paths.ROOT)
    return next((code for code in codes.values() if code), 0), [name for name, code in codes.items() if code]
