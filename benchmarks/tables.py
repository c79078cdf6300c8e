"""Draws the docs' tables from docs/figures/*.json: what stands between two markers is written anew.

    python -m benchmarks.tables

A marker names the file and, if not all rows are wanted, what their names begin with; for evidence.json, which table:
``<!-- figures training.json step cpu-s, peak -->`` ... ``<!-- end -->``, ``<!-- figures evidence.json arms -->`` ...
"""

from __future__ import annotations

import json
import os
import re

from .evidence import tables
from .figures import FOLDER

DOCS = FOLDER.parent
PAGES = (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")))
BLOCK = re.compile(r"(<!-- figures (\S+)([^>]*?) -->\n).*?(<!-- end -->)", re.S)


def drawn(text: str) -> str:
    """``text`` with every marked table as the figures are now."""
    return BLOCK.sub(lambda m: m[1] + table(m[2], [p.strip() for p in m[3].split(";") if p.strip()]) + m[4], text)


def table(file: str, beginnings: list[str]) -> str:
    """Rows of one file as Markdown, in the order of ``beginnings``, and where they were measured."""
    found = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    if "arms" in found:
        return tables(found, beginnings[0])
    rows = found["rows"]
    picked = [row for start in beginnings or [""] for row in rows if row["name"].startswith(start)]
    cells = [[str(row[key]).replace("|", r"\|") for key in ("name", "value")] for row in picked]
    lines = ["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]
    sources = dict.fromkeys(f"`{row['command']}`; {row['machine']}; {row['date']}" for row in picked)
    return "\n".join([*lines, "", *(f"* {source}" for source in sources)]) + "\n"


def main() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if (new := drawn(text)) != text:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(new, encoding="utf-8")
            os.replace(temporary, path)


if __name__ == "__main__":
    main()
