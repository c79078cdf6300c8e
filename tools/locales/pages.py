"""Help pages in other languages: ``web/docs/<node>/<language>.md`` beside the English ``web/docs/<node>.md``.

The front end asks for the page of its language and falls back to the English one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..bootstrap.paths import ROOT
from .texts import TEXTS, load

LANGUAGES = ("zh", "ja")
FOLDER = ROOT / "web" / "docs"
CODE = re.compile(r"`([^`\n]+)`")
HEADING, ROW = re.compile(r"^#+ ", re.M), re.compile(r"^\| ", re.M)

Node = dict[str, Any]


def problems(nodes: dict[str, Node]) -> list[str]:
    """What is wrong with the translated pages, a line each.

    Args:
        nodes: The English ``nodeDefs.json``.
    """
    found = []
    for language in LANGUAGES:
        texts = {text: text for text in load(TEXTS / "kept.json")} | load(TEXTS / f"{language}.json")
        for name, node in nodes.items():
            where = f"web/docs/{name}/{language}.md"
            path = FOLDER / name / f"{language}.md"
            if not path.exists():
                found.append(f"{language}: no {where}")
                continue
            english = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
            found += [f"{where}: {line}" for line in _compared(path, english, node, texts, nodes)]
    known = {f"{name}/{language}.md" for name in nodes for language in LANGUAGES}
    there = {path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*.md")}
    return found + [f"left over: web/docs/{name}" for name in sorted(there - known)]


def _compared(path: Path, english: str, node: Node, texts: dict[str, str], nodes: dict[str, Node]) -> list[str]:
    page, found = path.read_text(encoding="utf-8"), []
    names = {entry["display_name"] for entry in nodes.values()}  # the only code spans that are translated
    title = texts.get(node["display_name"], "")
    if not title or not page.startswith(f"# {title}\n"):
        found.append(f"does not begin with the node's name, {title}")
    for name in sorted(
        (set(CODE.findall(english)) - names) ^ (set(CODE.findall(page)) - {texts.get(n) for n in names})
    ):
        found.append(f"`{name}` is not in both this page and the English one")
    for name, entry in node["inputs"].items():
        shown = texts.get(entry["name"], "")
        if f"`{name}`" in page and shown and shown not in page:
            found.append(f"`{name}` is shown as {shown} on the node, and the page does not say so")
    for what, pattern in (("headings", HEADING), ("rows", ROW)):
        counted, wanted = len(pattern.findall(page)), len(pattern.findall(english))
        if counted != wanted:
            found.append(f"{counted} {what}, the English page {wanted}")
    return found
