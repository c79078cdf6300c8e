"""A PNG file as the save nodes write one, and nothing beside it: whatever else a file holds may show another image.

One chunk of Content Credentials (C2PA) may be in it too, which is not looked into here.

Readers of PNG are lenient: one takes the first of two headers, another the last, a third shows what a cut file has
left. So the structure is checked here, chunk by chunk, before a library decodes the pixels.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from .keys import SignatureError, Tampered

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = frozenset((b"tEXt", b"zTXt", b"iTXt"))
PLAIN = frozenset((b"pHYs", b"tIME"))  # change nothing that is seen
CREDENTIALS = b"caBX"  # C2PA specification, "Embedding manifests into PNG"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # colour type -> values of a pixel; a palette (3) is refused
MOST_TEXT = 64 * 2**20  # bytes of one text, a workflow for instance
MOST_PIXELS = 2**28
PIECE = 2**20  # bytes that are read or decompressed at a time


@dataclass(frozen=True)
class Png:
    """What a PNG holds.

    Attributes:
        pixels: 8-bit, h w c.
        texts: Kind, keyword and content of every text chunk, as they stand in the file.
        credentials: Whether it holds Content Credentials.
    """

    pixels: np.ndarray
    texts: tuple[tuple[bytes, bytes, bytes], ...]
    credentials: bool


def read(path: Path) -> Png:
    """Pixels and texts of a PNG of 8 bits a channel that holds nothing else.

    Raises:
        SignatureError: there is no such file, or it is no PNG.
        Tampered: it is a PNG of another structure: a header, pixels or an end too many or too few, a wrong check sum,
            a chunk that may change what is seen, data that do not fill the image or go beyond it.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                raise SignatureError(f"{path.name}: is not a PNG: check the file")
            texts, credentials = _structure(path.name, file)
        with Image.open(path, formats=("PNG",)) as image:
            found = np.asarray(image)
    except SignatureError:
        raise
    except (OSError, Image.DecompressionBombError) as error:  # the file itself, or its filters
        why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise SignatureError(f"{path.name}: is not a PNG that can be read ({why}): check the file") from error
    except (ValueError, SyntaxError, zlib.error) as error:
        raise Tampered(f"{path.name}: cannot be decoded ({type(error).__name__}): it was changed") from error
    return Png(found if found.ndim == 3 else found[..., None], tuple(texts), credentials)


def _structure(name: str, file: BinaryIO) -> tuple[list[tuple[bytes, bytes, bytes]], bool]:
    """The texts of a file whose structure is whole, and whether it holds Content Credentials; Tampered otherwise."""
    texts: list[tuple[bytes, bytes, bytes]] = []
    credentials = False
    stream: _Stream | None = None
    before = b""
    for kind, size, data in _chunks(name, file):
        if kind == b"IHDR":
            if stream is not None:
                raise Tampered(f"{name}: has a second header{_EDITED}")
            stream = _Stream(name, _header(name, size, data))
        elif stream is None:
            raise Tampered(f"{name}: has no header{_EDITED}")
        elif kind == b"IDAT":
            if stream.begun and before != b"IDAT":
                raise Tampered(f"{name}: has pixels in two places{_EDITED}")
            for piece in data:
                stream.feed(piece)
        elif kind in TEXTS:
            texts.append(_text(name, kind, size, data))
        elif kind == b"IEND":
            stream.end()
            if size or any(data) or file.read(1):  # an empty chunk still has a check sum to read
                raise Tampered(f"{name}: goes on after the end{_EDITED}")
            return texts, credentials
        elif kind == CREDENTIALS:
            if credentials:
                raise Tampered(f"{name}: holds Content Credentials more than once{_EDITED}")
            credentials = True
        elif kind not in PLAIN:
            raise Tampered(f"{name}: holds {_shown(kind)}, which may change what is seen{_EDITED}")
        before = kind
    raise Tampered(f"{name}: has no end: it was cut off")


_EDITED = ": it was edited"


def _chunks(name: str, file: BinaryIO) -> Iterator[tuple[bytes, int, Iterator[bytes]]]:
    """Kind, length and content (in pieces) of every chunk; its check sum is looked at once it was read."""
    while head := file.read(8):
        if len(head) < 8:
            raise Tampered(f"{name}: ends within a chunk: it was cut off")
        (size,), kind = struct.unpack(">I", head[:4]), head[4:]
        content = _content(name, file, kind, size)
        yield kind, size, content
        for _ in content:  # what nobody asked for
            pass


def _content(name: str, file: BinaryIO, kind: bytes, size: int) -> Iterator[bytes]:
    total = zlib.crc32(kind)
    while size:
        piece = file.read(min(size, PIECE))
        if not piece:
            raise Tampered(f"{name}: ends within a chunk: it was cut off")
        total, size = zlib.crc32(piece, total), size - len(piece)
        yield piece
    if file.read(4) != total.to_bytes(4, "big"):
        raise Tampered(f"{name}: {_shown(kind)} does not have its check sum: it was changed")


def _shown(kind: bytes) -> str:
    return f"a {kind.decode('latin-1')!a} chunk"


def _header(name: str, size: int, data: Iterator[bytes]) -> int:
    """Bytes that the pixels of the declared size take, a filter's number before each row included."""
    raw = b"".join(data) if size == 13 else b""
    if len(raw) != 13:
        raise Tampered(f"{name}: its header has {size} bytes, not 13{_EDITED}")
    width, height, depth, colour, compression, filters, interlace = struct.unpack(">IIBBBBB", raw)
    if depth != 8 or colour not in CHANNELS or compression or filters or interlace:
        raise Tampered(f"{name}: is not stored as the save nodes do, in 8-bit colours without a palette{_EDITED}")
    if not 0 < width * height <= MOST_PIXELS:
        raise Tampered(f"{name}: says that it has {width} x {height} pixels, at most {MOST_PIXELS} are read{_EDITED}")
    return height * (1 + width * CHANNELS[colour])


class _Stream:
    """The pixels' one zlib stream, which must give as many bytes as the header says, and end there."""

    def __init__(self, name: str, wanted: int):
        self._name, self._left, self.begun = name, wanted, False
        self._stream = zlib.decompressobj()

    def feed(self, piece: bytes) -> None:
        self.begun = True
        if self._stream.eof:
            raise Tampered(f"{self._name}: has data behind its pixels{_EDITED}")
        made = bytes(PIECE)
        while piece or len(made) == PIECE:  # all of a piece may be taken in before all of it is given out
            try:
                made = self._stream.decompress(piece, PIECE)
            except zlib.error as error:
                raise Tampered(f"{self._name}: its pixels cannot be decompressed: they were changed") from error
            self._left -= len(made)
            if self._left < 0:
                raise Tampered(f"{self._name}: has more pixels than its header says{_EDITED}")
            piece = self._stream.unconsumed_tail
        if self._stream.unused_data:
            raise Tampered(f"{self._name}: has data behind its pixels{_EDITED}")

    def end(self) -> None:
        if self._left or not self._stream.eof:
            raise Tampered(f"{self._name}: has fewer pixels than its header says: it was cut off")


def _text(name: str, kind: bytes, size: int, data: Iterator[bytes]) -> tuple[bytes, bytes, bytes]:
    if size > MOST_TEXT:
        raise Tampered(f"{name}: carries a text of {size} bytes, at most {MOST_TEXT} are read{_EDITED}")
    keyword, _, content = b"".join(data).partition(b"\0")
    return kind, keyword, content
