"""What ComfyUI's registry is given: an archive of what users need, and a project file without a warning.

The rules are those of comfy-cli 1.23.0 (``comfy node validate``, ``pack`` and ``publish``): the archive has the files
that git tracks, less .comfyignore's patterns, plus everything below the folders that ``includes`` names, whatever
.comfyignore says of it.
"""

from __future__ import annotations

import io
import subprocess
import zipfile

import pytest
from modular_lora_guard.modular_lora.options import tomllib
from modular_lora_guard.tools.bootstrap import paths

MEGABYTES, FILES = 3, 700  # far above what is there, far below the 31 MB of everything
KNOWN = {  # of the classifiers that begin with "Environment ::", those that the registry knows
    "Environment :: GPU :: NVIDIA CUDA",
    "Environment :: GPU :: AMD ROCm",
    "Environment :: GPU :: Intel Arc",
    "Environment :: GPU :: Apple Metal",
    "Environment :: NPU :: Huawei Ascend",
}
SYSTEMS = ("OS Independent", "Microsoft", "POSIX", "MacOS")


def tracked(*options: str) -> list[str]:
    """Paths that git tracks."""
    command = ["git", "-C", str(paths.ROOT), "ls-files", *options]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip("not a git clone")
    return answer.stdout.splitlines()


def left_out() -> list[str]:
    """Those of them that .comfyignore keeps out of the archive."""
    return tracked("-i", "-c", "-X", ".comfyignore")


@pytest.fixture
def project() -> dict:
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_no_folder_is_forced_into_the_archive(project: dict) -> None:
    assert "includes" not in project["tool"]["comfy"], "it would bring whole folders in past .comfyignore"


def test_the_archive_is_small() -> None:
    names = sorted(set(tracked()) - set(left_out()))
    names = [name for name in names if (paths.ROOT / name).is_file()]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(paths.ROOT / name, name)
    assert len(names) < FILES
    assert made.tell() < MEGABYTES * 1e6


def test_the_archive_has_what_the_pack_reads_when_it_runs() -> None:
    kept = set(tracked()) - set(left_out())
    folders = {name.partition("/")[0] for name in kept}
    assert {"nodes", "comfy_host", "modular_lora", "operators", "gate", "audit", "training", "importable"} <= folders
    assert {"web", "locales", "workflows", "docs"} <= folders
    assert {"__init__.py", "version.py", "pyproject.toml", "requirements.txt", "icon.svg", "run.py"} <= kept
    assert {"tools/bootstrap/usage.json", "training/known_bases.json"} <= kept
    pages = [name for name in tracked() if name.startswith("web/docs/")]
    assert pages
    assert set(pages) <= kept


def test_every_classifier_is_one_that_the_registry_knows(project: dict) -> None:
    named = project["project"]["classifiers"]
    assert {one for one in named if one.startswith("Environment ::")} <= KNOWN
    systems = [one.removeprefix("Operating System :: ") for one in named if one.startswith("Operating System ::")]
    assert systems
    assert all(one.startswith(SYSTEMS) for one in systems)


def test_what_the_registry_asks_for_is_given(project: dict) -> None:
    comfy, stated = project["tool"]["comfy"], project["project"]
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert comfy["Icon"].startswith("https://")
    assert stated["urls"]["Repository"]
    assert stated["license"]
    assert stated["name"] == stated["name"].lower()


def test_the_registrys_archive_leaves_out_what_users_do_not_need_and_nothing_else() -> None:
    names = left_out()
    left = {name.partition("/")[0] for name in names}
    assert {"tests", ".ci"} <= left
    assert not left & {
        "__init__.py",
        "nodes",
        "modular_lora",
        "pyproject.toml",
        "requirements.txt",
        "LICENSE",
        "NOTICE",
    }
    of_tools = [name for name in names if name.startswith("tools/")]
    assert {name.split("/")[1] for name in of_tools} == {"benchmarks", "locales", "templates", "world"}
    assert all(name.startswith("tools/world/assets/") for name in of_tools if name.startswith("tools/world/"))
