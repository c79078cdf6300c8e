"""Draws the docs' tables from docs/figures/*.json: what stands between two markers is written anew.

    python -m tools.benchmarks.tables

A marker names the file and, if not all rows are wanted, what their names begin with; for those of the evidence,
which table: ``<!-- figures training.json step cpu-s, peak -->`` ... ``<!-- end -->``,
``<!-- figures evidence.json arms -->`` ...
"""

from __future__ import annotations

import importlib
import json
import re

from modular_lora_guard.modular_lora.util import atomic

from .figures import FOLDER

DOCS = FOLDER.parent
PAGES = (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")))
COLUMNS = (
    *("name", "combinations", "files_least", "concept_least", "kept_least", "magnitude_most"),
    *("value", "ratio", "interval", "status", "max_error", "test", "commit", "result", "levels", "without"),
    *("vehicles", "kept", "task", "mistaken", "style_unasked", "mean_g", "evaluations_more"),
)
BLOCK = re.compile(r"(<!-- figures (\S+)([^>]*?) -->\n).*?(<!-- end -->)", re.S)


def drawn(text: str) -> str:
    """``text`` with every marked table as the figures are now."""
    return BLOCK.sub(lambda m: m[1] + table(m[2], [p.strip() for p in m[3].split(";") if p.strip()]) + m[4], text)


def table(file: str, beginnings: list[str]) -> str:
    """Rows of one file as Markdown, in the order of ``beginnings``, and where they were measured."""
    found = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    if "recipes" in found:
        return importlib.import_module(".evidence_equal", __package__).tables(found, beginnings[0])
    if "arms" in found:
        return importlib.import_module(".evidence", __package__).tables(found, beginnings[0])
    rows = found["rows"]
    picked = [row for start in beginnings or [""] for row in rows if row["name"].startswith(start)]
    columns = [c for c in COLUMNS if any(c in row for row in picked)]
    cells = [[_cell(row.get(c)) for c in columns] for row in picked]
    head = ["figure" if c == "name" else c.replace("_", " ") for c in columns]
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, cells)]
    sources = dict.fromkeys(f"`{row['command']}`; {row['machine']}; {row['date']}" for row in picked)
    return "\n".join([*lines, "", *(f"* {source}" for source in sources)]) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:.2g}" if isinstance(value, float) and 0 < abs(value) < 0.01 else str(value)
    return text.replace("|", r"\|")


def main() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if (new := drawn(text)) != text:
            atomic.write(path, new)


if __name__ == "__main__":
    main()
