"""Keys of an operator (elliptic curve, PEM files), and signed statements: JSON objects that carry a signature.

A key's hint is the SHA-256 of its public PEM text, as model-signing writes it into its bundles. A statement is signed
over its purpose and its JSON with sorted keys, so that a signature for one purpose is none for another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import GuardError
from ..util.file_state import FileState

PACKAGES = '"model-signing>=1.1,<2" pyOpenSSL'
CURVES = ("secp256r1", "secp384r1", "secp521r1")  # those that model-signing takes
SIGNATURE = "signature"  # a statement's own field
LIMIT = 64 * 1024  # bytes of a key file


class SignatureError(GuardError):
    """A key, a signature or what is signed is not as it must be; the subclasses say how."""

    code = "signature"


class MissingSignature(SignatureError):
    """There is no signature."""

    code = "signature.missing"


class Tampered(SignatureError):
    """What is signed was changed, or the signature was."""

    code = "signature.tampered"


class UnknownKey(SignatureError):
    """The signature was made with a key that is not among the trusted ones."""

    code = "signature.unknown-key"


class Expired(SignatureError):
    """The signature was good until a date that has passed."""

    code = "signature.expired"


def needs(error: ImportError) -> SignatureError:
    """What to say where an optional package is not installed."""
    return SignatureError(f"Signatures need a package that is not there ({error}): pip install {PACKAGES}")


def keygen(path: Path) -> Path:
    """Make a P-256 key: the private key at ``path`` (PEM, readable by its owner alone), the public one beside it.

    Returns the public key's path, ``path`` with .pub. Raises SignatureError where either file is there already.
    """
    serialization, ec, _ = _cryptography()
    public = path.with_suffix(".pub")
    for taken in (path, public):
        if taken.exists():
            raise SignatureError(f"{taken}: already exists; keys are never overwritten, choose another name")
    key = ec.generate_private_key(ec.SECP256R1())
    formats = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(serialization.Encoding.PEM, *formats))
        public.write_bytes(_public_pem(key.public_key()))
    except OSError as error:
        raise SignatureError(f"{path}: cannot be written ({error.strerror}): check the folder") from error
    return public


def private_key(path: Path) -> Any:
    """The private key of a PEM file, read again only where the file has changed.

    Raises SignatureError for a missing or unreadable file, one that others than its owner may read (POSIX), one with a
    password, and a key that is not on one of the curves.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise SignatureError(f"{path.name}: private key cannot be read ({error.strerror}): check its path") from error
    if os.name == "posix" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SignatureError(
            f"{path.name}: private key may be read by others (mode {stat.S_IMODE(status.st_mode):o}): chmod 600 it"
        )
    return _private_key(path, FileState.of(status))


@lru_cache(maxsize=8)
def _private_key(path: Path, state: FileState) -> Any:
    serialization, ec, _ = _cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm as Unsupported

    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, Unsupported) as error:
        raise SignatureError(
            f"{path.name}: is not a private key in PEM without a password: make one with keygen"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise SignatureError(f"{path.name}: private key is not on {', '.join(CURVES)}: make one with keygen")
    return key


def public_keys(paths: Mapping[str, Path]) -> dict[str, tuple[str, Any]]:
    """Trusted keys by hint: (name, key). Raises SignatureError, naming the key, where a file holds none."""
    return {hint(key): (name, key) for name, path in paths.items() for key in [_public_key(name, Path(path))]}


def _public_key(name: str, path: Path) -> Any:
    serialization, ec, _ = _cryptography()
    raw = _read(path)
    if b"PRIVATE KEY" in raw:
        raise SignatureError(f"key {name}: {path.name} holds a private key: name the .pub file, keep this one away")
    from cryptography.exceptions import UnsupportedAlgorithm as Unsupported

    try:
        key = serialization.load_pem_public_key(raw)
    except (ValueError, Unsupported) as error:
        raise SignatureError(
            f"key {name}: {path.name} is not a public key in PEM: name the file that keygen made"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise SignatureError(f"key {name}: {path.name} is not on {', '.join(CURVES)}: make one with keygen")
    return key


def hint(public_key: Any) -> str:
    """SHA-256 of a public key's PEM text."""
    return hashlib.sha256(_public_pem(public_key)).hexdigest()


def sign_statement(said: Mapping[str, Any], purpose: str, key: Any) -> dict[str, Any]:
    """``said`` with its signature; ``key`` from ``private_key``. Values must be JSON's own."""
    _, ec, _ = _cryptography()
    plain = {name: value for name, value in said.items() if name != SIGNATURE}
    value = key.sign(_bytes(plain, purpose), ec.ECDSA(_hash(key.curve)))
    signature = {"key": hint(key.public_key()), "value": base64.b64encode(value).decode()}
    return {**plain, SIGNATURE: signature}


def verify_statement(said: Mapping[str, Any], purpose: str, trusted: Mapping[str, Path], subject: str) -> str:
    """Name of the trusted key that signed ``said``; ``subject`` begins the message of the SignatureError."""
    signature = said.get(SIGNATURE)
    if signature is None:
        raise MissingSignature(f"{subject}: carries no signature: anybody may have written it")
    if not isinstance(signature, dict) or not all(isinstance(signature.get(n), str) for n in ("key", "value")):
        raise Tampered(f"{subject}: its signature is not one: it was changed after it was signed")
    name, key = trusted_key(signature["key"], trusted, subject)
    _check(said, purpose, key, f"{subject}: does not fit its signature: it was changed after {name} signed it")
    return name


def verify_own(said: Mapping[str, Any], purpose: str, key: Any, subject: str) -> None:
    """SignatureError unless a private key, this very one, signed ``said``."""
    signature = said.get(SIGNATURE)
    if not isinstance(signature, dict) or signature.get("key") != hint(key.public_key()):
        raise UnknownKey(f"{subject}: was not signed with the key in use")
    _check(said, purpose, key.public_key(), f"{subject}: does not fit its signature: it was changed")


def _check(said: Mapping[str, Any], purpose: str, public_key: Any, message: str) -> None:
    signature = said[SIGNATURE]
    plain = {name: value for name, value in said.items() if name != SIGNATURE}
    _, ec, InvalidSignature = _cryptography()
    try:
        value = base64.b64decode(signature["value"], validate=True)
        public_key.verify(value, _bytes(plain, purpose), ec.ECDSA(_hash(public_key.curve)))
    except (InvalidSignature, KeyError, TypeError, ValueError, RecursionError) as error:
        raise Tampered(message) from error


def trusted_key(claimed: str, trusted: Mapping[str, Path], subject: str) -> tuple[str, Any]:
    """Name and key of the hint that a signature claims; UnknownKey where it is not a trusted one."""
    known = public_keys(trusted)
    if claimed not in known:
        names = ", ".join(sorted(trusted)) or "none is"
        shown = "".join(c for c in claimed[:12] if c.isalnum())
        raise UnknownKey(
            f"{subject}: signed with key {shown}..., trusted are: {names}: ask its maker for the public key"
        )
    return known[claimed]


def _hash(curve: Any) -> Any:
    from cryptography.hazmat.primitives import hashes

    kinds: dict[int, type] = {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}
    return kinds[curve.key_size]()


def _bytes(said: Mapping[str, Any], purpose: str) -> bytes:
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return f"modular_lora {purpose}\n{text}".encode()


def _public_pem(public_key: Any) -> bytes:
    serialization, _, _ = _cryptography()
    return public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LIMIT)
    except OSError as error:
        raise SignatureError(f"{path.name}: key cannot be read ({error.strerror}): check its path") from error


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise needs(error) from error
    return serialization, ec, InvalidSignature
