"""The operators' command line: what it needs to start, and what it does without."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from modular_lora_guard.modular_lora.provenance import credentials, keys, record
from modular_lora_guard.tools.bootstrap import environment, paths

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "numpy", "PIL", "cryptography", "model_signing", "comfy")


@pytest.mark.parametrize("arguments", [["--help"], ["record", "show", "FOLDER"], ["record", "show", "--help"]])
def test_help_and_the_records_lines_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    record.Record(tmp_path).append("refused", rule="nodes")
    given = [str(tmp_path) if word == "FOLDER" else word for word in arguments]
    command = [sys.executable, "-X", "importtime", "-m", "operators", *given]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    imported = set(re.findall(r"\| +([\w.]+)$", answer.stderr, re.M))
    assert "modular_lora_guard.modular_lora.provenance.record" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("kind", record.KINDS)
def test_every_kind_that_the_help_names_is_found(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from modular_lora_guard.operators import cli

    record.Record(tmp_path).append(kind)
    assert cli.main(["record", "show", str(tmp_path), "--kind", kind]) == 0
    assert f'"kind": "{kind}"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["record", "show", str(tmp_path), "--kind", "refusal"])
    assert kind in capsys.readouterr().err


def test_run_py_asks_for_the_packages_of_signatures_only_where_they_are_needed() -> None:
    code = "import sys, run; print(run.needs_signatures(sys.argv[1:]))"
    for given, needed in (
        (["keygen", "a.pem"], "True"),
        (["record", "verify", "x"], "True"),
        (["record", "show", "x"], "False"),
    ):
        answer = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True)
        assert answer.stdout.strip() == needed, given


@pytest.mark.parametrize("bundled", [True, False])
def test_the_packages_are_installed_once_and_never_into_an_existing_comfyui(
    bundled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(environment, "pip", lambda python, title, arguments: asked.append([*map(str, arguments)]))
    monkeypatch.setattr(paths, "RUN", tmp_path / "run")
    monkeypatch.setattr(paths, "VENV", tmp_path / "venv")
    monkeypatch.setattr(paths, "SIGNATURE_PACKAGES", tmp_path / "beside")
    for _ in range(2):
        found = environment.ensure_signatures(environment.python_of(paths.VENV), bundled=bundled)
    beside = [] if bundled else ["--target", str(tmp_path / "beside")]
    assert asked == [[*beside, *environment.SIGNATURES]]
    assert found == ({} if bundled else {"PYTHONPATH": str(tmp_path / "beside")})


def test_the_packages_are_named_alike_everywhere() -> None:
    stated = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tests = (ROOT / "requirements-test.txt").read_text(encoding="utf-8").splitlines()
    for package in environment.SIGNATURES:
        assert f'"{package}"' in stated
        assert package in tests
        assert package in f"{keys.PACKAGES} {credentials.PACKAGE}"
