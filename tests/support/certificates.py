"""Certificates for Content Credentials, made for a test: authorities, and signers that they vouch for."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)
DIGITAL_SIGNATURE = {"digital_signature": True, "key_cert_sign": False, "crl_sign": False}
AUTHORITY = {"digital_signature": False, "key_cert_sign": True, "crl_sign": True}


@dataclass(frozen=True)
class Pair:
    """PEM files of a certificate and of its private key."""

    certificate: Path
    key: Path


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def authority(folder: Path, name: str) -> Pair:
    """A root of its own."""
    return _write(folder, name, None, None, authority=True)


def signer(folder: Path, name: str, by: Pair, **options: Any) -> Pair:
    """A signer whose certificate an authority signed; ``options``: begins, ends, purpose, curve."""
    return _write(folder, name, x509.load_pem_x509_certificate(by.certificate.read_bytes()), by.key, **options)


def _write(
    folder: Path,
    name: str,
    issuer: x509.Certificate | None,
    issuer_key: Path | None,
    *,
    authority: bool = False,
    begins: datetime.datetime | None = None,
    ends: datetime.datetime | None = None,
    purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    curve: type[ec.EllipticCurve] = ec.SECP256R1,
) -> Pair:
    key = ec.generate_private_key(curve())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Host"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )
    usage = {
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "encipher_only": False,
        "decipher_only": False,
        **(AUTHORITY if authority else DIGITAL_SIGNATURE),
    }
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins or now() - 900 * DAY)
        .not_valid_after(ends or now() + 300 * DAY)
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if issuer is not None:
        made = made.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        made = made.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False
        )
    with_key = form.load_pem_private_key(issuer_key.read_bytes(), None) if issuer_key else key
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    pair.certificate.write_bytes(made.sign(with_key, hashes.SHA256()).public_bytes(form.Encoding.PEM))
    pair.key.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    pair.key.chmod(0o600)
    return pair
