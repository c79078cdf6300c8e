"""Which folder may import what: ComfyUI only behind one door, and nothing of the core imports what stands behind it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HOST_FOLDERS = ("comfy_host", "nodes")  # the only ones that import ComfyUI
CORE_FOLDERS = ("modular_lora", "operators", "gate", "audit", "training")  # import no host folder and no ComfyUI
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
}
# Command lines open ComfyUI themselves, as they start outside it. The left side may shrink and must not grow.
DOORS = {("training/cli.py", "comfy_host/standalone.py")}


def imports(path: Path, root: Path) -> Iterator[str]:
    """What a file imports: a dotted name, or the path in ``root`` where the import is relative."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                inner = base / alias.name
                found = inner if inner.with_suffix(".py").exists() or inner.is_dir() else base
                yield found.relative_to(root).as_posix() + ("" if found.is_dir() else ".py")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(given.value) for given in node.args[:1] if isinstance(given, ast.Constant))


def comfyui_outside(root: Path, host: tuple[str, ...], folders: tuple[str, ...]) -> list[tuple[str, str]]:
    """(file, import) of every import of ComfyUI in ``folders`` that are no ``host`` folder."""
    files = [path for folder in folders if folder not in host for path in sorted((root / folder).rglob("*.py"))]
    return [
        (path.relative_to(root).as_posix(), name)
        for path in files
        for name in imports(path, root)
        if name.partition(".")[0] in COMFYUI and "/" not in name
    ]


def host_in_core(root: Path, host: tuple[str, ...], core: tuple[str, ...]) -> set[tuple[str, str]]:
    """(file, import) of every import of a host folder in the core."""
    return {
        (path.relative_to(root).as_posix(), name)
        for folder in core
        for path in (root / folder).rglob("*.py")
        for name in imports(path, root)
        if name.partition("/")[0] in host and ("/" in name or (root / name).is_dir())
    }


def test_only_the_host_folders_import_comfyui() -> None:
    assert comfyui_outside(ROOT, HOST_FOLDERS, CORE_FOLDERS) == []


def test_the_core_imports_no_host() -> None:
    assert host_in_core(ROOT, HOST_FOLDERS, CORE_FOLDERS) == DOORS


@pytest.mark.parametrize(
    "line",
    ["import comfy.sd", "from folder_paths import x", "def f():\n    import nodes", "import_module('comfy.options')"],
)
def test_an_import_of_comfyui_in_the_core_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "one.py").write_text(line)
    found = comfyui_outside(tmp_path, ("host",), ("core", "host"))
    assert [file for file, _ in found] == ["core/one.py"]


@pytest.mark.parametrize("line", ["from ..host import one", "from ..host.one import x", "from .. import host"])
def test_an_import_of_the_host_in_the_core_is_found(line: str, tmp_path: Path) -> None:
    for folder in ("core", "host"):
        (tmp_path / folder).mkdir()
    (tmp_path / "host" / "one.py").touch()
    (tmp_path / "core" / "two.py").write_text(line)
    found = host_in_core(tmp_path, ("host",), ("core",))
    assert {file for file, _ in found} == {"core/two.py"}
