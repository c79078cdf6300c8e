"""Standard output and error that can write every character: the code page of a pipe on Windows lacks some of ours."""

from __future__ import annotations

import codecs
import io
import sys

READ_AS = {
    "−": "-",
    "≥": ">=",
    "≤": "<=",
    "Δ": "d",
    "η": "eta",
    "ε": "epsilon",
    "√": "sqrt ",
    "‖": "||",
    "∞": "inf",
    "→": "->",
    "█": "#",
} | {mark: str(height) for height, mark in enumerate("▁▂▃▄▅▆▇", 1)}  # of a curve, which stays one to read
HANDLER = "modular_lora.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What is written in the place of characters that an encoding lacks: words for ours, an escape for others'."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    said = "".join(READ_AS.get(one) or one.encode("ascii", "backslashreplace").decode() for one in lacking)
    return said, error.end


codecs.register_error(HANDLER, _plain)


def open_to_all() -> None:
    """Let both streams of this process write what their encoding lacks by ``READ_AS``, in place of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)
