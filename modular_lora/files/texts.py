"""Text files as every part of the pack reads them: captions, prompts, synonyms, data-set TOML."""

from __future__ import annotations

from ..errors import GuardError

MARKS = (  # UTF-32's marks begin with UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)
CONTROLS = tuple(map(chr, (*range(9), *range(14, 32))))  # without tab, line and page ends
MOST = 0.1  # share of control characters: more is text in an encoding that was not recognised, or no text


class TextError(GuardError):
    """Bytes that are no text; the message says what they are, without a file's name."""

    code = "text"


def decode(data: bytes) -> str:
    """The text of a file's bytes: UTF-8, UTF-16 or UTF-32, with a byte-order mark or without. Raises TextError.

    Without a mark UTF-16 and UTF-32 are known by the zero bytes of their ASCII letters, spaces and line ends. A text
    without any of these is refused where its bytes are no UTF-8, or control characters; a few letters of Chinese can
    be neither, and no reader can tell.
    """
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise TextError(f"is not {encoding.removesuffix('-sig').upper()} ({error.reason})") from error
    controls = sum(map(text.count, CONTROLS))
    if "\0" in text or controls > MOST * len(text):
        raise TextError(f"holds {controls} control characters, as text in an unknown encoding or no text does")
    return text


def encoding_of(data: bytes) -> str:
    """What `decode` takes the bytes for, by Python's name. Raises TextError."""
    marked = next((name for mark, name in MARKS if data.startswith(mark)), "")
    return marked or (_guessed(data) if 0 in data else "utf-8")


def _guessed(data: bytes) -> str:
    """The encoding of bytes with zeros among them: the one in which most bytes are of ASCII letters."""
    counts = {
        "utf-32-le": _ascii(data, 4, 0),
        "utf-32-be": _ascii(data, 4, 3),
        "utf-16-le": _ascii(data, 2, 0),
        "utf-16-be": _ascii(data, 2, 1),
    }
    best, second, *_ = sorted(counts.values(), reverse=True)
    # ASCII with a zero byte in it can be read as UTF-16 of other letters; so most of a text that is UTF-8 must be ASCII
    if best == second or (_is_utf8(data) and 2 * best <= len(data)):
        raise TextError("holds zero bytes: it is not text, or UTF-16 or UTF-32 of unknown byte order")
    return max(counts, key=counts.__getitem__)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _ascii(data: bytes, width: int, place: int) -> int:
    """Bytes of letters of ``width`` bytes that are zero but for an ASCII one at ``place``."""
    if len(data) % width:
        return 0
    columns = [data[i::width] for i in range(width)]
    others = [column for i, column in enumerate(columns) if i != place]
    rows = zip(columns[place], *others, strict=True)
    return width * sum(9 <= letter < 127 and not any(rest) for letter, *rest in rows)
