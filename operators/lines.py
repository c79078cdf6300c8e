"""The line of a key in a TOML text, for errors: tomllib does not say it."""

from __future__ import annotations

import re

from ..modular_lora.validation import Place

_HEADER = re.compile(r"^\s*(\[\[?)([^\[\]]+)\]")
_ASSIGNED = re.compile(r"""^\s*((?:[\w-]+|"[^"\n]*"|'[^'\n]*')(?:\s*\.\s*(?:[\w-]+|"[^"\n]*"|'[^'\n]*'))*)\s*=""")
_NEXT = re.compile(r"^\s*\[", re.MULTILINE)
_PART = re.compile(r"""[\w-]+|"[^"\n]*"|'[^'\n]*'""")
_TOKEN = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|[\[\]{},]|[^\s\[\]{},#"']+""")


def line_of(text: str, key: Place) -> int:
    """The line, from 1, of ``key`` or of the nearest thing around it; 1 where nothing of it is written."""
    best, position = (), 0
    for path, start in _places(text):
        if path == key[: len(path)] and len(path) > len(best):
            best, position = path, start
    for part in key[len(best) :]:
        found = _element(text, position, part) if isinstance(part, int) else _named(text, position, part)
        position = position if found is None else found
    return text.count("\n", 0, position) + 1


def _places(text: str):
    """(path, offset) of every header and assigned key."""
    header: Place = ()
    counts: dict[Place, int] = {}
    offset = 0
    for line in text.splitlines(keepends=True):
        if match := _HEADER.match(line):
            header = _parts(match[2])
            if match[1] == "[[":
                counts[header] = counts.get(header, -1) + 1
                header = (*header, counts[header])
            yield header, offset
        elif match := _ASSIGNED.match(line):
            yield (*header, *_parts(match[1])), offset
        offset += len(line)


def _parts(name: str) -> Place:
    return tuple(part.strip("\"'") for part in _PART.findall(name))


def _element(text: str, position: int, index: int) -> int | None:
    """Where element ``index`` of the list that begins behind ``position`` begins."""
    depth = seen = 0
    for token in _TOKEN.finditer(text, position):
        if depth == 1 and seen == index and token[0] not in "]," and token[0][0] != "#":
            return token.start()
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        elif token[0] == "," and depth == 1:
            seen += 1
        if depth == 0 and token[0] == "]":
            return None
    return None


def _named(text: str, position: int, name: str) -> int | None:
    """Where a key stands in the value that begins at ``position``; None where it is written otherwise, with escapes."""
    found = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])").search(text, position, _end(text, position))
    return found.start() if found else None


def _end(text: str, position: int) -> int:
    """Where that value ends: with its last bracket or its line, a table with the next one, the whole with the text."""
    if not position:
        return len(text)
    depth, line = 0, (text + "\n").find("\n", position)
    if _HEADER.match(text[position:line]):
        following = _NEXT.search(text, line)
        return following.start() if following else len(text)
    for token in _TOKEN.finditer(text, position):
        if not depth and token.start() > line:
            return line
        depth += (token[0] in "[{") - (token[0] in "]}")
        if not depth and token[0] in "]}":
            return token.end()
    return len(text)
