"""A JPEG or WebP file as what it holds beside its image: one XMP packet and one store of Content Credentials.

Neither can be in the hash of a record that stands in the packet, so that hash is of everything else, byte for byte: the
image as it was encoded and every other segment or chunk. Whatever is put into such a file beside the two changes it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import GuardError
from .keys import SignatureError, Tampered

MOST_BYTES = 2**28
JPEG, RIFF = b"\xff\xd8", b"RIFF"
_APP0, _APP1, _APP11, _SCAN = b"\xff\xe0", b"\xff\xe1", b"\xff\xeb", b"\xff\xda"
_XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"  # XMP specification, part 3
_MOST_SEGMENT = 0xFFFF - 2 - len(_XMP_HEADER)  # a segment's length has two bytes and counts itself
_EXTENDED, _XMP, _CREDENTIALS = b"VP8X", b"XMP ", b"C2PA"
_XMP_FLAG = 0x04  # of the extended header: the file holds a packet


@dataclass(frozen=True)
class Lossy:
    """What a file holds.

    Attributes:
        packet: Its XMP packet; empty: it has none.
        data_sha256: Of everything beside that and its Content Credentials.
        credentials: Whether it holds Content Credentials.
    """

    packet: bytes
    data_sha256: str
    credentials: bool


def load(path: Path) -> bytes:
    """The bytes of a file. Raises SignatureError where it cannot be read, or is longer than an image can be."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise SignatureError(f"{path.name}: cannot be read ({error.strerror}): check its path") from error
    if len(raw) > MOST_BYTES:
        raise SignatureError(f"{path.name}: has more than {MOST_BYTES} bytes: check the file")
    return raw


def read(name: str, raw: bytes) -> Lossy:
    """What a JPEG or WebP file holds; ``name`` begins the messages.

    Raises:
        SignatureError: It is neither.
        Tampered: Its structure is cut off, or there are two of what there may be one of.
    """
    digest, packets, stores = hashlib.sha256(), [], 0
    for kind, content in _parts(name, raw):
        if kind == _XMP:
            packets.append(content)
        elif kind == _CREDENTIALS:
            stores += _begins(content)
        else:
            digest.update(content)
    if len(packets) > 1:
        raise Tampered(f"{name}: holds more than one XMP packet: it was edited")
    if stores > 1:
        raise Tampered(f"{name}: holds Content Credentials more than once: it was edited")
    return Lossy(packets[0] if packets else b"", digest.hexdigest(), bool(stores))


def with_packet(raw: bytes, packet: bytes, size: tuple[int, int]) -> bytes:
    """A JPEG or WebP file that has no packet, with this one.

    Args:
        raw: The file.
        packet: XMP.
        size: Width and height.

    Raises:
        GuardError: The packet is longer than a JPEG takes.
    """
    if raw.startswith(JPEG):
        if len(packet) > _MOST_SEGMENT:
            said = f"the attestation takes {len(packet)} bytes, a JPEG holds {_MOST_SEGMENT}: save it as png or webp."
            raise GuardError(said, code="save.too-long")
        segment = _APP1 + struct.pack(">H", 2 + len(_XMP_HEADER) + len(packet)) + _XMP_HEADER + packet
        first = 4 + int.from_bytes(raw[4:6], "big") if raw[2:4] == _APP0 else 2  # JFIF's segment comes first
        return raw[:first] + segment + raw[first:]
    chunks = [(raw[place : place + 4], content) for place, content in _chunks("image", raw)]
    if chunks[0][0] != _EXTENDED:
        width, height = ((side - 1).to_bytes(3, "little") for side in size)
        chunks.insert(0, (_EXTENDED, bytes(4) + width + height))
    head = bytearray(chunks[0][1])
    head[0] |= _XMP_FLAG
    chunks[0] = (_EXTENDED, bytes(head))
    chunks.append((_XMP, packet))
    body = b"".join(kind + struct.pack("<I", len(c)) + c + bytes(len(c) & 1) for kind, c in chunks)
    return RIFF + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _begins(content: bytes) -> bool:
    """Whether a segment or chunk of Content Credentials is the first of a store; a JPEG's may take several."""
    return not content.startswith(_APP11) or content[8:12] == b"\0\0\0\1"


def _parts(name: str, raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of every segment or chunk; of those that are neither of the two, all bytes."""
    if raw.startswith(JPEG):
        yield from _segments(name, raw)
    elif raw.startswith(RIFF) and raw[8:12] == b"WEBP":
        for place, content in _chunks(name, raw):
            kind, end = raw[place : place + 4], place + 8 + len(content) + (len(content) & 1)
            yield kind, content if kind in (_XMP, _CREDENTIALS) else raw[place:end]
    else:
        raise SignatureError(f"{name}: is not a JPEG or WebP file: check the file")


def _segments(name: str, raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Of a JPEG, up to its first scan, which goes to the end of the file."""
    place = 2
    while (kind := raw[place : place + 2]) != _SCAN:
        end = place + 2 + int.from_bytes(raw[place + 2 : place + 4], "big")
        if len(kind) < 2 or kind[0] != 0xFF or not place + 4 <= end <= len(raw):
            raise Tampered(f"{name}: ends within a segment: it was cut off")
        segment = raw[place:end]
        if kind == _APP1 and segment[4:].startswith(_XMP_HEADER):
            yield _XMP, segment[4 + len(_XMP_HEADER) :]
        else:
            yield (_CREDENTIALS if kind == _APP11 else kind), segment
        place = end
    yield _SCAN, raw[place:]


def _chunks(name: str, raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Place and content of every chunk of a WebP."""
    if struct.unpack("<I", raw[4:8])[0] + 8 != len(raw):
        raise Tampered(f"{name}: is longer or shorter than it says: it was changed")
    place = 12
    while place < len(raw):
        size = int.from_bytes(raw[place + 4 : place + 8], "little")
        end = place + 8 + size
        if end + (size & 1) > len(raw):
            raise Tampered(f"{name}: ends within a chunk: it was cut off")
        if size & 1 and raw[end]:
            raise Tampered(f"{name}: has data between two chunks: it was edited")
        yield place, raw[place + 8 : end]
        place = end + (size & 1)
