"""The worker's image, as far as it can be tried without a container runtime."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from modular_lora_guard.operators.counters import PACKAGE
from modular_lora_guard.tools.bootstrap.environment import SIGNATURES

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "tools" / "worker"


def instructions() -> list[tuple[str, str]]:
    """Instruction and its text, with continued lines joined."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_every_variable_is_given_before_it_is_used() -> None:
    known: set[str] = set()
    for name, said in instructions():
        assert set(re.findall(r"\$\{(\w+)\}", said)) <= known
        if name in ("ARG", "ENV"):
            known.add(said.partition("=")[0])
    assert [name for name, _ in instructions()] == ["ARG", "FROM", "ARG", "COPY", "RUN", "ENV"]


def test_it_installs_what_the_pack_asks_for_and_what_a_host_needs() -> None:
    words = shlex.split(dict(instructions())["RUN"])
    assert words[:4] == ["python", "-m", "pip", "install"]
    file = Path(words[words.index("-r") + 1].partition("modular-lora-guard/")[2])
    assert (ROOT / file).is_file()
    assert words[words.index("-r") + 2 :] == [*SIGNATURES, *shlex.split(PACKAGE)]


def test_the_policy_is_where_the_server_looks_for_it() -> None:
    hooks = (ROOT / "comfy_host" / "enforcement" / "policy.py").read_text(encoding="utf-8")
    variable, _, path = dict(instructions())["ENV"].partition("=")
    assert f'"{variable}"' in hooks
    assert path in (ROOT / "docs" / "hosting.md").read_text(encoding="utf-8")


def test_nothing_that_the_pack_needs_is_left_out_of_the_image() -> None:
    lines = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    left = {line for line in lines if line and not line.startswith("#")}
    needed = (
        "modular_lora",
        "comfy_host",
        "nodes",
        "operators",
        "gate",
        "web",
        "locales",
        "importable",
        "pyproject.toml",
    )
    assert not left & set(needed)
    assert {".run", ".git"} <= left
