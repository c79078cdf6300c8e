"""The tools that drive ComfyUI's front end in a real Chromium for tests, and what happens where there are none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from modular_lora_guard.tools.bootstrap.paths import ROOT

COMFYUI, WORLD = os.environ.get("MODULAR_LORA_COMFYUI"), os.environ.get("MODULAR_LORA_WORLD")
NODE = os.environ.get("MODULAR_LORA_NODE") or shutil.which("node")
SCRIPTS = ROOT / "tests" / "support" / "front_end"


def need_browser() -> None:
    """Skip the test where there is no browser to test with; in CI that is a failure."""
    if reason := _missing():
        (pytest.fail if in_ci() else pytest.skip)(reason)


def front_end_options(which: str) -> list[str]:
    """A server's options for ComfyUI's own front end ("pinned"), or for the newest one that is tested ("newest").

    The test is skipped where that one is not there; in CI that is a failure.
    """
    if which == "pinned":
        return []
    folder = os.environ.get("MODULAR_LORA_FRONT_END")
    if not folder:
        reason = os.environ.get("MODULAR_LORA_NO_FRONT_END", "MODULAR_LORA_FRONT_END is not set")
        (pytest.fail if in_ci() else pytest.skip)(f"{reason}: run the tests with `python3 run.py test`")
    return ["--front-end-root", folder]


def in_ci() -> bool:
    """Whether this is a run of a CI service, which sets ``CI``."""
    return os.environ.get("CI", "").strip().lower() not in ("", "0", "false", "no")


def _missing() -> str | None:
    if not COMFYUI or not WORLD:
        return "MODULAR_LORA_COMFYUI and MODULAR_LORA_WORLD are not set: run the tests with `python3 run.py test`"
    if reason := os.environ.get("MODULAR_LORA_NO_BROWSER"):
        return reason
    if not NODE or not os.environ.get("MODULAR_LORA_PLAYWRIGHT"):
        return "node or playwright-core is missing: run the tests with `python3 run.py test`"
    return None


def visit(script: str, *arguments: str | Path, timeout: float) -> Any:
    """What a script of tests/support/front_end prints about its visit."""
    command = [str(NODE), SCRIPTS / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
