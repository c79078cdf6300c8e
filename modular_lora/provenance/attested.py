"""Image files that carry the record of the run that made them: whether it is signed, and of exactly this image.

A PNG has the record in a text, a JPEG or WebP in its XMP packet, each beside IPTC's digital source type. Content
Credentials, which sign the whole file, hold the same record once more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line
from . import credentials, keys, lossy, marking, png
from .credentials import Credentials, CredentialsError
from .keys import MissingSignature, Tampered

KEY = "modular_lora_attestation"  # of a PNG's text
ATTESTATION = "attestation"  # purpose of the statement
DATA = "data_sha256"  # a record's field: see lossy.Lossy
MIMES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
LIMIT = 2**20  # bytes of a record's text


@dataclass(frozen=True)
class Attested:
    """A file whose record was signed, or whose Content Credentials were, and is of exactly this image.

    Attributes:
        key: Name of the trusted key that signed the record; "" where none was named.
        record: What it says.
        holds_credentials: Whether the file holds Content Credentials.
        credentials: What they are; None also where the library that reads them is missing and nobody asked for them.
    """

    key: str
    record: Mapping[str, Any]
    holds_credentials: bool
    credentials: Credentials | None


@dataclass(frozen=True)
class _Carried:
    """What a file carries: the record's text, what of it the file itself gives, and whether it has credentials."""

    text: str
    gives: Mapping[str, Any]
    credentials: bool


def signed(record: Mapping[str, Any], key: Any) -> dict[str, Any]:
    """A record with the signature of ``key`` (from `keys.private_key`) over all of it."""
    return keys.sign_statement(record, ATTESTATION, key)


def pixels(image: np.ndarray) -> dict[str, Any]:
    """What a record says of the pixels that it is written beside: 8-bit, h w c."""
    height, width, channels = image.shape
    return {
        "pixels_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "pixels_size": [width, height, channels],
    }


def verify(path: Path, public_keys: Mapping[str, Path], certificates: Sequence[Path] = ()) -> Attested:
    """Check an image file that a save node wrote, and that its record was made for it.

    Args:
        path: PNG, JPEG or WebP.
        public_keys: Trusted keys by name, one of which must have signed the record; none: that is not asked.
        certificates: See `credentials.read`; none: Content Credentials need not be there, and may be anybody's.

    Raises:
        MissingSignature: There is no record, or it is not signed, or there are no Content Credentials with it.
        Tampered: The record or the credentials are not of this file, were changed, or do not say the same.
        UnknownKey: Somebody else signed.
        Expired: The signer's certificate has ended.
        CredentialsError: What reads Content Credentials is missing, and ``certificates`` ask for them.
        SignatureError: There is no such file, or it is no image of these kinds.
    """
    path = Path(path)
    found = _png(path) if path.suffix.lower() == ".png" else _lossy(path)
    record = _record(found.text, path)
    name = keys.verify_statement(record, ATTESTATION, public_keys, path.name) if public_keys else ""
    for field, value in found.gives.items():
        if record.get(field) != value:
            raise Tampered(f"{path.name}: the image is not the one that was signed: its {field} differs")
    if not found.credentials:
        if certificates:
            raise MissingSignature(f"{path.name}: carries no Content Credentials: they were taken off, or never there")
        return Attested(name, record, False, None)
    return Attested(name, record, True, _credentials(path, found.text, certificates))


def _credentials(path: Path, text: str, certificates: Sequence[Path]) -> Credentials | None:
    """The Content Credentials of a file, whose record must be the file's own."""
    try:
        found = credentials.read(path.name, lossy.load(path), MIMES[path.suffix.lower()], certificates)
    except CredentialsError as error:
        if certificates or error.code != "credentials.library":
            raise
        return None
    if found.attestation and found.attestation != text:
        raise Tampered(f"{path.name}: its Content Credentials hold another attestation than its text: it was edited")
    if certificates and not found.attestation:
        raise MissingSignature(f"{path.name}: its Content Credentials hold no attestation: ask {found.signer} for one")
    return found


def _png(path: Path) -> _Carried:
    """Of a PNG; what of the record its pixels give."""
    found = png.read(path)
    ours = [(kind, text) for kind, keyword, text in found.texts if keyword == KEY.encode()]
    if not ours:
        raise MissingSignature(f"{path.name}: carries no attestation: it was not saved as an attested image, or edited")
    if len(ours) > 1:
        raise Tampered(f"{path.name}: carries more than one attestation: it was edited")
    ((kind, text),) = ours
    if kind != b"tEXt" or len(text) > LIMIT:
        raise Tampered(f"{path.name}: its attestation is not stored as the save nodes do: it was edited")
    said = _record(text.decode("latin-1"), path).get(marking.SOURCE_TYPE)
    packets = [content for _, keyword, content in found.texts if keyword == marking.KEYWORD.encode()]
    if packets and packets != [bytes(4) + marking.packet(str(said))]:  # iTXt: not compressed, no language, no other key
        raise Tampered(f"{path.name}: its XMP does not say what its attestation does: it was edited")
    return _Carried(text.decode("latin-1"), pixels(found.pixels), found.credentials)


def _lossy(path: Path) -> _Carried:
    """Of a JPEG or WebP; what of the record its encoded image gives."""
    found = lossy.read(path.name, lossy.load(path))
    text = marking.attestation_in(found.packet)
    if not text:
        raise MissingSignature(f"{path.name}: carries no attestation: it was not saved as an attested image, or edited")
    source = _record(text, path).get(marking.SOURCE_TYPE, "")
    if not isinstance(source, str) or len(text) > LIMIT or marking.packet(source, text) != found.packet:
        raise Tampered(f"{path.name}: its attestation is not stored as the save nodes do: it was edited")
    return _Carried(text, {DATA: found.data_sha256}, found.credentials)


def _record(text: str, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Tampered(
            f"{path.name}: its attestation is not the JSON of a save node ({one_line(error)}): it was changed"
        ) from error
    if not isinstance(record, dict):
        raise Tampered(f"{path.name}: its attestation is not an object: it was changed")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where a key comes twice, since readers differ in which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found
