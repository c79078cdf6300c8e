"""What the documentation points at is there: symbols of the code, files, and pages with their sections."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md")))]
MAPS = ["docs/architecture.md", "docs/contributing.md"]  # the pages that say where things are in the code
SYMBOL = re.compile(r"`([\w/]+\.py):([\w.]+)`")
FOLDERS = (
    "audit|comfy_host|docs|gate|importable|locales|modular_lora|nodes|operators|tests|tools|training|web|workflows"
)
PLACE = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*-]*\w[*/]?)")  # in code and in running text
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def defined(tree: ast.Module, symbol: str) -> bool:
    """Whether a module defines ``name`` or ``Class.name`` itself: a function, a class or an assignment."""
    body: list[ast.stmt] = tree.body
    for name in symbol.split("."):
        found = [node for node in body if name in names(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names(node: ast.stmt) -> Iterator[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def symbols(page: str) -> list[tuple[str, str]]:
    return SYMBOL.findall((ROOT / page).read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names by which links reach the sections of a page, as GitHub makes them."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MAPS)
def test_every_symbol_that_a_page_names_is_defined_there(page: str) -> None:
    found = symbols(page)
    missing = [
        f"{path}:{symbol}"
        for path, symbol in found
        if not (ROOT / path).is_file() or not defined(ast.parse((ROOT / path).read_text(encoding="utf-8")), symbol)
    ]
    assert found
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_folder_that_a_page_names_is_there(page: str) -> None:
    found = PLACE.findall(LINK.sub("", (ROOT / page).read_text(encoding="utf-8")))  # links have their own test
    assert [path for path in found if not any(ROOT.glob(path))] == []


def test_the_architecture_answers_where_things_are() -> None:
    """One answer at least for each question of a newcomer, in a folder of the product."""
    folders = {path.partition("/")[0] for path, _ in symbols("docs/architecture.md")}
    assert {"nodes", "comfy_host", "modular_lora", "training", "gate", "audit", "operators"} <= folders
    assert (ROOT / "docs/architecture.md").read_text(encoding="utf-8").count("```mermaid") == 4


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_repository_leads_somewhere(page: str) -> None:
    broken = []
    for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        target, _, section = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = (ROOT / page).parent / unquote(target) if target else ROOT / page
        if not path.exists() or (section and section not in anchors(path)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize(
    ("symbol", "there"),
    [("f", True), ("C", True), ("C.m", True), ("X", True), ("Y", True), ("g", False), ("C.n", False), ("f.x", False)],
)
def test_a_symbol_that_is_gone_is_noticed(symbol: str, there: bool) -> None:
    tree = ast.parse("from a import g\nX = 1\nY: int = 2\ndef f(): ...\nclass C:\n    def m(self): ...\n")
    assert defined(tree, symbol) is there
