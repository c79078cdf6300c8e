"""Content Credentials (C2PA) in image files: signed with an operator's certificate and read again, without a network.

c2pa-python makes and reads them, and is optional. No time stamp is made, as that takes a network: when the signer's
certificate ends, so does what its credentials are worth.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import GuardError, one_line, plain
from . import keys
from .keys import Expired, Tampered, UnknownKey
from .marking import COMPOSITE

PACKAGE = '"c2pa-python>=0.38,<1"'
LABEL = "io.github.modularloraguard.attestation"  # of our assertion
ALGORITHMS = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}
MOST_BYTES = 2**20  # of a file of certificates
# What a certificate may be for: e-mail, documents, C2PA claims (C2PA specification, "Certificate profiles"). Without
# this list the library takes those for e-mail alone.
PURPOSES = "1.3.6.1.5.5.7.3.4\n1.3.6.1.5.5.7.3.36\n1.3.6.1.4.1.62558.2.1\n"
OFFLINE = {"remote_manifest_fetch": False, "ocsp_fetch": False}
UNTRUSTED, EXPIRED = "signingCredential.untrusted", "signingCredential.expired"


class CredentialsError(GuardError):
    """Content Credentials cannot be made or read: nothing is written without them where they are asked for."""

    code = "credentials"


@dataclass(frozen=True)
class Signer:
    """Who signs: the name and last moment of the certificate, the chain and the key as PEM, and the algorithm."""

    name: str
    until: datetime
    chain: bytes
    key: bytes
    algorithm: bytes


@dataclass(frozen=True)
class Input:
    """An image file that went into what is signed."""

    mime: str
    content: bytes


@dataclass(frozen=True)
class Claim:
    """What is said of an image.

    Attributes:
        source: IPTC's digital source type, see marking.py.
        attestation: JSON text of our record.
        pack: Version of this pack.
        edits: What was done to it since it was sampled, in order.
        inputs: Image files that went into it.
    """

    source: str
    attestation: str
    pack: str
    edits: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()


@dataclass(frozen=True)
class Credentials:
    """What was read.

    Attributes:
        signer: The name in the signer's certificate.
        trusted: Whether it is one of the certificates that were named; False where none was.
        ended: Whether that certificate has ended, so that it is not known whether it was still good.
        attestation: JSON text of our record, "" where it holds none.
        inputs: How many image files are said to have gone into it.
    """

    signer: str
    trusted: bool
    ended: bool
    attestation: str
    inputs: int


def signer(certificate: Path, key: Path) -> Signer:
    """Who signs, of two PEM files.

    Args:
        certificate: The signer's own certificate first, then those between it and the root's.
        key: Its private key, on one of the curves of `ALGORITHMS`.

    Raises:
        CredentialsError: The library is missing, or the file holds no certificate, or that of another key.
        SignatureError: The key cannot be read, others than its owner may read it, or it is on another curve.
    """
    _library()
    found = keys.private_key(key)
    chain = _certificates(certificate)
    if chain[0].public_key() != found.public_key():
        said = f"{certificate.name}: the first certificate is not that of {key.name}: name the two that belong together"
        raise CredentialsError(said, code="credentials.certificate")
    from cryptography.hazmat.primitives import serialization as form

    text = found.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    pem = b"".join(one.public_bytes(form.Encoding.PEM) for one in chain)
    return Signer(_name_of(chain[0]), chain[0].not_valid_after_utc, pem, text, ALGORITHMS[found.curve.name])


def sign(raw: bytes, mime: str, claim: Claim, by: Signer) -> bytes:
    """An image file with Content Credentials; what it held of them before is replaced.

    Args:
        raw: The file, whole: whatever is changed in it afterwards makes the credentials invalid.
        mime: image/png, image/jpeg or image/webp.
        claim: What is said.
        by: Who signs.

    Raises:
        CredentialsError: The library does not take the certificate (its purpose, its dates) or one of the inputs.
    """
    library = _library()
    settings = {"builder": {"thumbnail": {"enabled": False}}, "verify": OFFLINE, "trust": {"trust_config": PURPOSES}}
    signed = io.BytesIO()
    try:
        information = library.C2paSignerInfo(by.algorithm, by.chain, by.key, None)  # None: no time stamp
        with (
            library.Context.from_dict(settings) as context,
            library.Signer.from_info(information) as made,
            library.Builder(_manifest(claim), context) as builder,
        ):
            for number, one in enumerate(claim.inputs):
                _add(library, builder, number, one, claim)
            builder.sign(made, mime, io.BytesIO(raw), signed)
    except library.C2paError as error:
        said = f"Content Credentials of {by.name}: not signed ({one_line(error)}): check the certificate"
        raise CredentialsError(said, code="credentials.not-signed") from error
    return signed.getvalue()


def trial(by: Signer) -> None:
    """Sign a tiny image, so that what is wrong with a certificate is known before an image is waited for."""
    raw = io.BytesIO()
    Image.new("RGB", (1, 1)).save(raw, "PNG")
    sign(raw.getvalue(), "image/png", Claim(COMPOSITE, "{}", ""), by)


def read(name: str, raw: bytes, mime: str, certificates: Sequence[Path] = ()) -> Credentials:
    """What the Content Credentials of an image file say.

    Args:
        name: Of the file, for messages.
        raw: The file.
        mime: image/png, image/jpeg or image/webp.
        certificates: PEM files of the roots that the signer's certificate must come from. Where they hold
            certificates of signers too, it must be one of these. None: anybody's.

    Raises:
        CredentialsError: The library is missing, or the files hold no root.
        Tampered: They do not belong to this file, or cannot be read.
        Expired: ``certificates`` are named, and the signer's has ended.
        UnknownKey: The signer is not one that ``certificates`` name.
    """
    library = _library()
    roots, own = _trusted(certificates)
    trust = {"trust_config": PURPOSES} | ({"trust_anchors": roots} if roots else {})
    try:
        with (
            library.Context.from_dict({"verify": OFFLINE, "trust": trust}) as context,
            library.Reader(mime, io.BytesIO(raw), context=context) as reader,
        ):
            found = reader.get_active_manifest() or {}
            results = (reader.get_validation_results() or {}).get("activeManifest") or {}
    except library.C2paError as error:
        raise Tampered(f"{name}: its Content Credentials cannot be read ({one_line(error)}): it was changed") from error
    wrong = {one["code"] for one in results.get("failure", ())} - {UNTRUSTED}
    who = found.get("signature_info") or {}
    by = plain(who.get("common_name") or who.get("issuer") or "somebody without a name")
    if wrong - {EXPIRED} or not found:
        codes = ", ".join(sorted(wrong)) or "no manifest"
        raise Tampered(f"{name}: its Content Credentials do not fit it ({codes}): it was changed after {by} signed it")
    if certificates and wrong:
        raise Expired(
            f"{name}: the certificate of {by} has ended, and no time stamp says that it was signed before: "
            "ask for a picture that was signed anew"
        )
    trusted = bool(roots) and "signingCredential.trusted" in {one["code"] for one in results.get("success", ())}
    trusted &= not own or who.get("cert_serial_number") in own
    if certificates and not trusted:
        names = ", ".join(path.name for path in certificates)
        raise UnknownKey(f"{name}: its Content Credentials are of {by}, who is not in {names}: ask who made it")
    assertions = {one["label"]: one.get("data") for one in found.get("assertions", ())}
    ours = assertions.get(LABEL)
    text = ours.get("json") if isinstance(ours, dict) else None
    return Credentials(
        by, trusted, bool(wrong), text if isinstance(text, str) else "", len(found.get("ingredients", ()))
    )


def _manifest(claim: Claim) -> dict[str, Any]:
    """What is signed; our record as the text that it is, since the library gives lists of numbers back as bytes."""
    names = {"ingredientIds": [_id(number) for number in range(len(claim.inputs))]}
    if _parent(claim):
        actions = [
            {"action": "c2pa.opened", "parameters": names},
            {"action": "c2pa.edited", "digitalSourceType": claim.source},
        ]
    else:
        made: dict[str, Any] = {"action": "c2pa.created", "digitalSourceType": claim.source}
        actions = [made | ({"parameters": names} if claim.inputs else {})]
    actions += [{"action": "c2pa.edited", "description": name} for name in claim.edits]
    return {
        "claim_generator_info": [{"name": "Modular LoRA Guard", "version": claim.pack}],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": LABEL, "data": {"json": claim.attestation}},
        ],
    }


def _parent(claim: Claim) -> bool:
    """Whether the image is an edit of its one input, rather than one that inputs went into."""
    return claim.source == COMPOSITE and len(claim.inputs) == 1


def _id(number: int) -> str:
    return f"input-{number}"


def _add(library: Any, builder: Any, number: int, one: Input, claim: Claim) -> None:
    """Name an input, with the Content Credentials that it has; neither its pixels nor its name are taken over."""
    relation = "parentOf" if _parent(claim) else "inputTo"
    said = {"title": f"input {number + 1}", "relationship": relation, "label": _id(number)}
    try:
        builder.add_ingredient(said, one.mime, io.BytesIO(one.content))
    except library.C2paError as error:
        raise CredentialsError(
            f"input {number + 1} ({one.mime}) cannot be named in Content Credentials ({one_line(error)}): its own may "
            "be broken, use a copy without them",
            code="credentials.input",
        ) from error


def _trusted(paths: Sequence[Path]) -> tuple[str, frozenset[str]]:
    """Roots as PEM, and the serial numbers of signers' own certificates."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    roots, own = b"", []
    for one in (one for path in paths for one in _certificates(path)):
        try:
            root = one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except (x509.ExtensionNotFound, ValueError):
            root = False
        if root:
            roots += one.public_bytes(Encoding.PEM)
        else:
            own.append(str(one.serial_number))
    if paths and not roots:
        names = ", ".join(path.name for path in paths)
        said = f"{names}: no certificate of an authority is in it: name the root's, which the signer's comes from"
        raise CredentialsError(said, code="credentials.no-root")
    return roots.decode(), frozenset(own)


def _certificates(path: Path) -> list[Any]:
    """The certificates of a PEM file, at least one."""
    from cryptography import x509

    try:
        with path.open("rb") as file:
            return x509.load_pem_x509_certificates(file.read(MOST_BYTES))
    except OSError as error:
        said = f"{path.name}: certificate cannot be read ({error.strerror}): check its path"
        raise CredentialsError(said, code="credentials.certificate") from error
    except ValueError as error:
        said = f"{path.name}: holds no certificate in PEM: name the file that your authority gave you"
        raise CredentialsError(said, code="credentials.certificate") from error


def _name_of(certificate: Any) -> str:
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return plain(str(names[0].value) if names else certificate.subject.rfc4514_string())


def _library() -> Any:
    try:
        import c2pa
    except (ImportError, OSError, RuntimeError) as error:  # its own library may not fit the machine
        said = f"Content Credentials need a package that is not there ({one_line(error)}): pip install {PACKAGE}"
        raise CredentialsError(said, code="credentials.library") from error
    return c2pa
