"""Signatures of files (safety LoRAs, policies) with OpenSSF's model-signing.

NAME.sig beside a file is a Sigstore bundle that ``python -m model_signing verify key`` reads as well. It signs the
SHA-256 of the file's bytes, not its name, and, where one is given, a last day: model-signing's key mode has none, so
it stands as ``expires`` among the signed serialization parameters, which its own verifier leaves unread.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import one_line, writing
from ..util import atomic
from ..util.hashing import hash_file
from . import keys
from .keys import Expired, MissingSignature, SignatureError, Tampered

ENDING = ".sig"
LIMIT = 2**20  # bytes of a bundle


@dataclass(frozen=True)
class Claim:
    """What a bundle says, before anything of it is verified."""

    bundle: bytes  # what the library is to verify: the very fields that were read here, so that it reads no others
    key: str  # hint of the signing key
    sha256: str  # of the file
    expires: str  # ISO date, or ""


def signature_path(path: Path) -> Path:
    return path.with_name(path.name + ENDING)


def sign(path: Path, private_key: Path, *, expires: datetime.date | None = None) -> Path:
    """Sign a file with a private key (PEM); the bundle's path. The signature holds to the end of ``expires``, UTC."""
    path, target = Path(path), signature_path(Path(path))
    keys.private_key(private_key)  # its permissions and its curve
    hashing, manifest, signing, _ = _library()
    if not path.is_file():
        raise SignatureError(f"{path.name}: no such file: check its path")
    config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    config.set_hashing_config(_dated(hashing, manifest, expires))
    with writing(target.name, SignatureError), atomic.replacing(target) as part:
        config.sign(path.resolve(), part)
    return target


def verify(path: Path, public_keys: Mapping[str, Path], *, sha256: str | None = None) -> str:
    """Name of the trusted key that signed a file; no network is needed.

    ``sha256`` of bytes that were read before: those must be what is signed. Raises MissingSignature, Tampered,
    UnknownKey or Expired, else SignatureError.
    """
    path = Path(path)
    claim = _claim(path)
    name, _ = keys.trusted_key(claim.key, public_keys, path.name)
    *_, verifying = _library()
    with _verifying(path, claim, f"changed after {name} signed it"):
        _run(verifying.Config().use_elliptic_key_verifier(public_key=Path(public_keys[name])), path, claim)
    if sha256 is not None and sha256 != claim.sha256:
        raise Tampered(f"{path.name}: SHA-256 is {sha256}, {name} signed {claim.sha256}: use the file that was signed")
    _check_date(path, claim)
    return name


def verify_keyless(path: Path, identity: str, issuer: str, trust: Path | None = None) -> str:
    """The identity that signed a file through Sigstore; the library fetches Sigstore's roots unless ``trust`` is given.

    ``trust``: a trust configuration file of the Sigstore instance, which replaces the network.
    """
    path = Path(path)
    if not signature_path(path).is_file():
        raise MissingSignature(f"{path.name}: has no {signature_path(path).name} beside it: sign it")
    *_, verifying = _library()
    try:
        config = verifying.Config().use_sigstore_verifier(identity=identity, oidc_issuer=issuer, trust_config=trust)
        config.verify(path.resolve(), signature_path(path))
    except Exception as error:  # library, network or malformed-bundle errors
        raise SignatureError(
            f"{path.name}: not verified as signed by {identity} ({one_line(error)}): it needs a network or a trust file"
        ) from error
    return identity


def _sha256(path: Path) -> str:
    """Of the file as it is now: a digest kept by size and time would trust the clock of whoever wrote the file."""
    try:
        return hash_file(path)
    except OSError as error:
        raise SignatureError(f"{path.name}: cannot be read ({error.strerror}): check its path") from error


def _claim(path: Path) -> Claim:
    """What the bundle beside a file says; MissingSignature or Tampered."""
    place = signature_path(path)
    try:
        with place.open("rb") as file:
            raw = file.read(LIMIT)
    except FileNotFoundError as error:
        raise MissingSignature(f"{path.name}: has no {place.name} beside it: sign it, or get its signature") from error
    except OSError as error:
        raise SignatureError(f"{place.name}: cannot be read ({error.strerror}): check its permissions") from error
    try:
        return _parsed(json.loads(raw))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Tampered(
            f"{place.name}: is not the signature of one file by a key ({one_line(error)}): sign it again"
        ) from error


def _parsed(bundle: Any) -> Claim:
    """The claim of a bundle, with a bundle of nothing but what was read here; any error where it is none."""
    hint, envelope = bundle["verificationMaterial"]["publicKey"]["hint"], bundle["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"], validate=True)
    statement = json.loads(payload)
    (resource,), how = statement["predicate"]["resources"], statement["predicate"]["serialization"]
    (signature,) = envelope["signatures"]
    if (resource["name"], resource["algorithm"], how["method"]) != (".", "sha256", "files"):
        raise ValueError("it signs more than one file, or not by SHA-256")
    said = (hint, resource["digest"], how.get("expires", ""))
    if not all(isinstance(text, str) for text in said):
        raise ValueError("a field is not text")
    whole = {
        "mediaType": bundle["mediaType"],
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": envelope["payloadType"],
            "signatures": [{"sig": signature["sig"], "keyid": ""}],
        },
    }
    return Claim(json.dumps(whole).encode(), *said)


def _run(config: Any, path: Path, claim: Claim) -> None:
    """The library's verification, which reads a file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "bundle.sig"
        copy.write_bytes(claim.bundle)
        config.verify(path.resolve(), copy)


@contextlib.contextmanager
def _verifying(path: Path, claim: Claim, changed: str) -> Iterator[None]:
    """Whatever the library raises, said as what was changed: the file or its signature."""
    try:
        yield
    except Exception as error:  # a bundle may be anything, and so is what the library raises over it
        if not path.is_file():
            raise SignatureError(f"{path.name}: no such file: check its path") from error
        found = _sha256(path)
        if found != claim.sha256:
            raise Tampered(f"{path.name}: was {changed} (SHA-256 is {found}): use the file that was signed") from error
        name = signature_path(path).name
        raise Tampered(f"{name}: does not hold ({one_line(error)}): it was {changed}") from error


def _check_date(path: Path, claim: Claim) -> None:
    if not claim.expires:
        return
    try:
        last = datetime.date.fromisoformat(claim.expires)
    except ValueError as error:
        raise SignatureError(
            f"{path.name}: signed until {claim.expires[:40]!r}, which is not a date: sign it again"
        ) from error
    if _today() > last:
        raise Expired(f"{path.name}: its signature expired on {last}: sign it again, or get the new one")


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.timezone.utc).date()


def _dated(hashing: Any, manifest: Any, expires: datetime.date | None) -> Any:
    """A hashing configuration of model-signing whose manifests also say a last day."""
    config = hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)
    if expires is None:
        return config
    last_day = expires.isoformat()

    class Dated(manifest.Manifest):
        @property
        def serialization_type(self):
            return {**super().serialization_type, "expires": last_day}

    class DatedConfig(hashing.Config):
        def hash(self, model_path, **options):
            plain = config.hash(model_path, **options)
            kind = manifest.SerializationType.from_args(plain.serialization_type)
            items = [kind.new_item(item.identifier, item.digest) for item in plain.resource_descriptors()]
            return Dated(plain.model_name, items, kind)

    return DatedConfig()


def _library() -> tuple[Any, Any, Any, Any]:
    """hashing, manifest, signing and verifying of model-signing; it is optional, and slow to import."""
    try:
        from model_signing import hashing, manifest, signing, verifying
    except ImportError as error:
        raise keys.needs(error) from error
    return hashing, manifest, signing, verifying
