"""A terminal or pipe of Windows' code page 1252: what the commands say arrives, and nothing they say raises."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout

import pytest
from modular_lora_guard.modular_lora.util import terminal
from modular_lora_guard.tools.bootstrap import console
from modular_lora_guard.tools.bootstrap.paths import ROOT
from modular_lora_guard.training.pace import curve

SAID = "W0 − ΔW is ≥ 0.5, ‖ΔW‖ → ∞, ESD's η, 安全 LoRA, \udc80"
PLAIN = "W0 - dW is >= 0.5, ||dW|| -> inf, ESD's eta, \\u5b89\\u5168 LoRA, \\udc80"
PRODUCT = (
    "audit",
    "comfy_host",
    "gate",
    "modular_lora",
    "nodes",
    "operators",
    "tools/bootstrap",
    "tools/demo",
    "training",
)


def written_on(encoding: str, say: Callable[[], object]) -> str:
    """What a strict standard output of this encoding got from ``say``."""
    written = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(written, encoding, "strict", write_through=True)):
        say()
        return written.getvalue().decode(encoding)


def opened() -> None:
    terminal.open_to_all()
    sys.stdout.write(SAID)


def test_without_help_such_a_stream_raises() -> None:
    with pytest.raises(UnicodeEncodeError):
        written_on("cp1252", lambda: sys.stdout.write(SAID))


def test_the_streams_write_what_their_encoding_lacks() -> None:
    assert written_on("cp1252", opened) == PLAIN


def test_run_py_says_it_without_touching_the_stream() -> None:
    assert written_on("cp1252", lambda: console.say(SAID, end="")) == PLAIN


def test_a_curve_keeps_its_course() -> None:
    assert written_on("cp1252", lambda: console.say(curve([7, 6, 5, 4, 3, 2, 1, 0]), end="")) == "#7654321"


def test_a_stream_that_can_write_it_writes_it_as_it_is() -> None:
    assert written_on("utf-8", opened) == SAID.replace("\udc80", "\\udc80")


@pytest.mark.slow  # other interpreters import PyTorch
@pytest.mark.parametrize("command", [["training", "train-safety"], ["audit", "run"], ["operators"]], ids=" ".join)
def test_help_is_printed_on_that_code_page(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert done.stdout.decode("cp1252").startswith("usage: ")


def test_every_character_of_ours_that_the_code_page_lacks_has_words() -> None:
    lacking = set()
    for folder in PRODUCT:
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            statements = {id(one.value) for one in ast.walk(tree) if isinstance(one, ast.Expr)}  # docstrings
            texts = [one for one in ast.walk(tree) if isinstance(one, ast.Constant) and id(one) not in statements]
            said = "".join(one.value for one in texts if isinstance(one.value, str))
            lacking |= {f"{one} in {file.name}" for one in said if _said_otherwise(one)}
    assert lacking == set()


def _said_otherwise(one: str) -> bool:
    if 0xD800 <= ord(one) <= 0xDFFF or one in terminal.READ_AS:
        return False
    return not one.encode("cp1252", "ignore")
