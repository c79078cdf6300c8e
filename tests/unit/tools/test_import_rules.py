"""Which folder may import what: ComfyUI only behind one door, and nothing of the core imports what stands behind it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HOST, NODES = "comfy_host", "nodes"
CORE_FOLDERS = ("modular_lora", "operators", "gate", "audit", "training")  # import no host folder and no ComfyUI
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "execution",
    "folder_paths",
    "latent_preview",
    "main",
    "node_helpers",
    "nodes",
    "server",
    "utils",
}
SCHEMAS = "comfy_api"  # ComfyUI's stable API of nodes: all that nodes/ imports
# Command lines open ComfyUI themselves, as they start outside it. The left side may shrink and must not grow.
DOORS = {("training/cli.py", "comfy_host/standalone.py")}
STANDS_ON = {  # folder of the core -> the others that it may import
    "modular_lora": (),
    "gate": ("modular_lora",),
    "training": ("modular_lora",),
    "operators": ("modular_lora", "gate"),
    "audit": ("modular_lora", "gate", "training"),
}
# Parts of modular_lora/, the lowest first: each imports those above it in this list, and none below or beside it but
# where it stands in one line with it.
LAYERS = (("errors.py", "tensor_hashing.py", "util"), ("branches",), ("files",), ("guard", "provenance"))

START = "nodes/extension.py"  # what ComfyUI loads
AT_WORK = {  # what trains and audits is imported when it does, so that ComfyUI starts sooner
    "audit/session.py",
    "comfy_host/pipeline.py",
    "comfy_host/trainer_model.py",
    "training/kohya/engine.py",
    "training/output.py",
    "training/safety/closed/make.py",
    "training/safety/train.py",
    "training/task/train.py",
}


def imports(path: Path, root: Path, walk=ast.walk) -> Iterator[str]:
    """What a file imports: a dotted name; of a relative import the path in ``root``, of a folder with a slash last."""
    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                inner = base / alias.name
                found = inner if inner.with_suffix(".py").exists() or inner.is_dir() else base
                yield found.relative_to(root).as_posix() + ("/" if found.is_dir() else ".py")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(given.value) for given in node.args[:1] if isinstance(given, ast.Constant))


def at_once(module: ast.Module) -> Iterator[ast.AST]:
    """What runs when a module is imported: nothing inside functions, and nothing that is for type checkers alone."""
    waiting: list[ast.AST] = [module]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def loaded_with(root: Path, first: str) -> set[str]:
    """Our files that are imported as soon as ``first`` is."""
    found, waiting = set(), [first]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        waiting += ours_of(root / name, root)
    return found


def ours_of(path: Path, root: Path) -> Iterator[str]:
    """Our files that a file imports at once."""
    for name in imports(path, root, at_once):
        if name.endswith(".py"):
            yield name
        elif name.endswith("/") and (root / name / "__init__.py").exists():
            yield f"{name}__init__.py"


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def comfyui_in(root: Path, *folders: str, but: str = "") -> list[tuple[str, str]]:
    """(file, import) of every import of ComfyUI in ``folders``, apart from its package ``but``."""
    return [
        (path.relative_to(root).as_posix(), name)
        for path in python_files(root, *folders)
        for name in imports(path, root)
        if name.partition(".")[0] in COMFYUI - {but} and "/" not in name
    ]


def ours_in(root: Path, folders: tuple[str, ...], imported: tuple[str, ...]) -> set[tuple[str, str]]:
    """(file, import) of every import of one of our folders (``imported``) in others (``folders``)."""
    return {
        (path.relative_to(root).as_posix(), name)
        for path in python_files(root, *folders)
        for name in imports(path, root)
        if "/" in name and name.partition("/")[0] in imported
    }


def upward(root: Path, package: str, layers: tuple[tuple[str, ...], ...]) -> set[tuple[str, str]]:
    """(file, import) of every import from a layer of a package into a higher one."""
    height = {f"{package}/{part}": number for number, layer in enumerate(layers) for part in layer}
    below = {
        (path.relative_to(root).as_posix(), name)
        for part in height
        for path in ([root / part] if part.endswith(".py") else python_files(root, part))
        for name in imports(path, root)
    }
    place = lambda path: height.get("/".join(path.split("/")[:2]), -1)  # noqa: E731
    return {(file, name) for file, name in below if place(name) > place(file)}


def test_only_comfy_host_imports_comfyui_and_the_nodes_import_its_schemas() -> None:
    assert comfyui_in(ROOT, *CORE_FOLDERS) == []
    assert comfyui_in(ROOT, NODES, but=SCHEMAS) == []


def test_the_core_imports_no_host() -> None:
    assert ours_in(ROOT, CORE_FOLDERS, (HOST, NODES)) == DOORS


@pytest.mark.parametrize("folder", CORE_FOLDERS)
def test_a_folder_of_the_core_imports_those_that_it_stands_on(folder: str) -> None:
    others = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {folder, *STANDS_ON[folder], HOST}
    assert others >= {"nodes", "tools"} - {folder}
    assert ours_in(ROOT, (folder,), tuple(others)) == set()


def test_what_trains_and_audits_is_not_imported_when_comfyui_starts() -> None:
    assert all((ROOT / name).is_file() for name in AT_WORK)
    loaded = loaded_with(ROOT, START)
    assert "comfy_host/patcher.py" in loaded
    assert not loaded & AT_WORK


@pytest.mark.parametrize(
    ("line", "found"),
    [("from . import b", True), ("def f():\n    from . import b", False), ("class C:\n    from .b import x", True),
     ("if TYPE_CHECKING:\n    from . import b", False)],
)  # fmt: skip
def test_what_is_imported_at_once(line: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.py").write_text(line)
    (tmp_path / "core" / "b.py").write_text("")
    assert ("core/b.py" in loaded_with(tmp_path, "core/a.py")) == found


def test_comfy_host_imports_no_node() -> None:
    assert ours_in(ROOT, (HOST,), (NODES,)) == set()


def test_the_layers_of_the_core_import_downwards() -> None:
    assert upward(ROOT, "modular_lora", LAYERS) == set()
    parts = {path.name for path in (ROOT / "modular_lora").iterdir() if (path / "__init__.py").exists()}
    assert parts <= {part for layer in LAYERS for part in layer}, "a folder that no layer names is held to no rule"


@pytest.mark.parametrize(
    "line",
    ["import comfy.sd", "from folder_paths import x", "def f():\n    import nodes", "import_module('comfy.options')"],
)
def test_an_import_of_comfyui_in_the_core_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "one.py").write_text(line)
    assert [file for file, _ in comfyui_in(tmp_path, "core")] == ["core/one.py"]


def test_what_a_node_imports_beside_the_schemas_is_found(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    lines = "from comfy_api.latest import io", "import comfy.samplers", "def f():\n    import nodes"
    (tmp_path / "nodes" / "one.py").write_text("\n".join(lines))
    assert [name for _, name in comfyui_in(tmp_path, "nodes", but="comfy_api")] == ["comfy.samplers", "nodes"]


@pytest.mark.parametrize("line", ["from ..host import one", "from ..host.one import x", "from .. import host"])
def test_an_import_of_the_host_in_the_core_is_found(line: str, tmp_path: Path) -> None:
    for folder in ("core", "host"):
        (tmp_path / folder).mkdir()
    (tmp_path / "host" / "one.py").touch()
    (tmp_path / "core" / "two.py").write_text(line)
    assert {file for file, _ in ours_in(tmp_path, ("core",), ("host",))} == {"core/two.py"}


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("low/a.py", "from ..high.b import x", True),
        ("low/a.py", "from .. import high", True),
        ("low.py", "from .high.b import x", True),
        ("high/b.py", "from ..low.a import x", False),
        ("high/b.py", "from ..beside.c import x", False),
    ],
)
def test_an_import_of_a_higher_layer_is_found(file: str, line: str, found: bool, tmp_path: Path) -> None:
    for path in ("low/a.py", "high/b.py", "beside/c.py", "low.py"):
        (tmp_path / "core" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "core" / path).touch()
    (tmp_path / "core" / file).write_text(line)
    layers = (("low", "low.py"), ("high", "beside"))
    assert {name for name, _ in upward(tmp_path, "core", layers)} == ({f"core/{file}"} if found else set())


def test_no_test_imports_comfy_by_the_name_of_the_fixture() -> None:
    """Checkers of imports take ``comfy.host`` for ComfyUI in a file that has ``import comfy.x`` anywhere."""
    found = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)]
        if not any(argument.arg == "comfy" for one in functions for argument in one.args.args):
            continue
        names = [a for one in ast.walk(tree) if isinstance(one, ast.Import) for a in one.names if a.asname is None]
        found += [f"{file.relative_to(ROOT)}: import {a.name}" for a in names if a.name.split(".")[0] == "comfy"]
    assert found == [], "write: from comfy import ..."
