"""How many lines of code the product has, a folder at a time: no docstrings, comments and blank lines, no tests.

    python -m tools.lines [FOLDER]

FOLDER is another working tree to count, for a comparison; without it, the clone that this file is in.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SILENT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def count(source: str) -> int:
    """Lines with code; a text over several lines counts with all of them unless it is a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
            lines -= set(range(first.lineno, first.end_lineno + 1)) if first else set()
    return len(lines)


def folders(root: Path) -> Counter[str]:
    """Lines by folder at the top of ``root``, "." for the files there; nothing of tests/ and of hidden folders."""
    found: Counter[str] = Counter()
    for path in root.rglob("*.py"):
        where = path.relative_to(root).parts
        if where[0] != "tests" and not any(part.startswith(".") for part in where):
            found[where[0] if len(where) > 1 else "."] += count(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT)
    found = folders(parser.parse_args().folder)
    for name, number in sorted(found.items()):
        print(f"{number:7,} {name}")
    print(f"{found.total():7,} lines")


if __name__ == "__main__":
    main()
