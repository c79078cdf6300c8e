"""Content Credentials by c2pa's own reader and ours: whole, tampered, taken off, lost, of a stranger, ended."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from modular_lora_guard.modular_lora.provenance import attested, credentials, keys, lossy, marking
from modular_lora_guard.modular_lora.provenance.credentials import Claim, Input
from modular_lora_guard.modular_lora.provenance.keys import Expired, MissingSignature, Tampered, UnknownKey
from modular_lora_guard.operators import cli, policy
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.certificates import DAY, Pair, authority, now, signer
from support.errors import refuses
from support.signatures import refused

SUFFIXES = [".png", ".jpg", ".webp"]
PIXELS = np.random.default_rng(5).integers(0, 255, (48, 64, 3), np.uint8)
RECORD = {"status": "guarded", "net_strength": {"a": 0.9731234}, "layers": [1, 2, 3], "name": "Ä & <b>"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def root(place: Path) -> Pair:
    return authority(place, "root")


@pytest.fixture(scope="module")
def host(place: Path, root: Pair) -> Pair:
    return signer(place, "host", root)


@pytest.fixture(scope="module")
def key(place: Path) -> Path:
    keys.keygen(place / "service.pem")
    return place / "service.pem"


def encoded(suffix: str, pixels: np.ndarray = PIXELS, key: Path | None = None) -> tuple[bytes, str]:
    """A file with its record, as comfy_host/saving.py makes one, and the record's text."""
    image, stream = Image.fromarray(pixels), io.BytesIO()
    record = RECORD | attested.pixels(pixels) | {marking.SOURCE_TYPE: marking.TRAINED}
    if suffix != ".png":
        image.save(stream, attested.MIMES[suffix].partition("/")[2], quality=90)
        raw = stream.getvalue()
        record |= {attested.DATA: lossy.read("a", lossy.with_packet(raw, b"", image.size)).data_sha256}
    if key is not None:
        record = attested.signed(record, keys.private_key(key))
    text = json.dumps(record, sort_keys=True)
    if suffix != ".png":
        return lossy.with_packet(raw, marking.packet(marking.TRAINED, text), image.size), text
    info = PngInfo()
    info.add_text(attested.KEY, text)
    info.add_itxt(marking.KEYWORD, marking.packet(marking.TRAINED).decode())
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue(), text


def signed(path: Path, by: Pair, key: Path | None = None, **claim) -> Path:
    raw, text = encoded(path.suffix, key=key)
    said = Claim(**{"source": marking.TRAINED, "attestation": text, "pack": "0.1.0"} | claim)
    signer = credentials.signer(by.certificate, by.key)
    path.write_bytes(credentials.sign(raw, attested.MIMES[path.suffix], said, signer))
    return path


def library_says(path: Path, root: Pair | None = None) -> tuple[str, dict]:
    """The validation state and the manifest, by the library alone."""
    trust = {"trust": {"trust_anchors": root.certificate.read_text()}} if root else {}
    verify = {"remote_manifest_fetch": False, "ocsp_fetch": False}
    with (
        c2pa.Context.from_dict({"verify": verify, **trust}) as context,
        c2pa.Reader(attested.MIMES[path.suffix], io.BytesIO(path.read_bytes()), context=context) as reader,
    ):
        return reader.get_validation_state(), reader.get_active_manifest()


def changed_pixel(path: Path) -> None:
    """One byte of the image's data, with a check sum that fits where there is one."""
    raw = path.read_bytes()
    if path.suffix == ".png":
        with Image.open(path) as image:
            pixels, text = np.asarray(image).copy(), dict(image.text)
        pixels[0, 0, 0] ^= 1
        info, stream = PngInfo(), io.BytesIO()
        info.add_text(attested.KEY, text[attested.KEY])
        Image.fromarray(pixels).save(stream, "PNG", pnginfo=info)
        first = raw.index(b"caBX") - 4
        chunk = raw[first : first + 12 + int.from_bytes(raw[first : first + 4], "big")]
        path.write_bytes(stream.getvalue()[:33] + chunk + stream.getvalue()[33:])
    else:
        at = raw.index(b"\xff\xda") + 200 if path.suffix == ".jpg" else raw.index(b"VP8 ") + 200
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_library_calls_a_signed_file_trusted_and_finds_what_was_said(suffix, tmp_path, root, host, key):
    path = signed(tmp_path / f"a{suffix}", host, key, edits=("ImageScale", "gate: blur"))
    state, manifest = library_says(path, root)
    assert state == "Trusted"
    assert library_says(path)[0] == "Valid"
    said = {one["label"]: one["data"] for one in manifest["assertions"]}
    assert said["c2pa.actions.v2"]["actions"] == [
        {"action": "c2pa.created", "digitalSourceType": marking.TRAINED},
        {"action": "c2pa.edited", "description": "ImageScale"},
        {"action": "c2pa.edited", "description": "gate: blur"},
    ]
    record = json.loads(said[credentials.LABEL]["json"])
    assert RECORD.items() <= record.items()
    with Image.open(path) as image:
        if suffix == ".png":
            assert np.array_equal(np.asarray(image), PIXELS)
        assert marking.TRAINED.encode() in image.info["xmp"]
    found = attested.verify(path, {"service": key.with_suffix(".pub")}, [root.certificate])
    assert (found.key, found.record, found.credentials.signer, found.credentials.trusted) == (
        "service",
        record,
        "host",
        True,
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tampered_pixels_are_refused_by_the_library_by_the_key_and_by_the_certificate(
    suffix, tmp_path, root, host, key
):
    path = signed(tmp_path / f"a{suffix}", host, key)
    changed_pixel(path)
    assert library_says(path, root)[0] == "Invalid"
    public = {"service": key.with_suffix(".pub")}
    for asked in (({}, [root.certificate]), (public, []), (public, [root.certificate])):
        refused(Tampered, attested.verify, path, *asked)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_credentials_of_changed_pixels_are_refused_where_the_record_was_made_anew(suffix, tmp_path, root, host):
    """Without a key a record can be written by anybody, so that it is for the credentials to tell."""
    path = signed(tmp_path / f"a{suffix}", host)
    if suffix == ".png":
        raw, _ = encoded(suffix, PIXELS ^ 1)
        whole = path.read_bytes()
        first = whole.index(b"caBX") - 4
        path.write_bytes(
            raw[:33] + whole[first : first + 12 + int.from_bytes(whole[first : first + 4], "big")] + raw[33:]
        )
    else:
        changed_pixel(path)
        found = lossy.read("a", path.read_bytes())
        old = json.loads(marking.attestation_in(found.packet))[attested.DATA]
        path.write_bytes(path.read_bytes().replace(old.encode(), found.data_sha256.encode()))
    refused(Tampered, attested.verify, path, {}, [root.certificate])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_credentials_that_were_taken_off_or_lost_by_encoding_again_are_missed(suffix, tmp_path, root, host, key):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(suffix, key=key)[0])
    assert attested.verify(path, {"service": key.with_suffix(".pub")}).credentials is None
    assert "no Content Credentials" in refused(MissingSignature, attested.verify, path, {}, [root.certificate])
    again = signed(tmp_path / f"b{suffix}", host, key)
    with Image.open(again) as image:
        image.load()
        plain = Image.fromarray(np.asarray(image))
    plain.save(again)
    assert b"jumb" not in again.read_bytes()
    assert "no attestation" in refused(MissingSignature, attested.verify, again, {}, [root.certificate])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_strangers_credentials_are_whole_and_not_trusted(suffix, tmp_path, root, host, key):
    other = signer(tmp_path, "stranger", authority(tmp_path, "other root"))
    path = signed(tmp_path / f"a{suffix}", other, key)
    assert library_says(path, root)[0] == "Valid"
    assert "stranger" in refused(UnknownKey, attested.verify, path, {}, [root.certificate])
    found = attested.verify(path, {"service": key.with_suffix(".pub")})
    assert (found.credentials.signer, found.credentials.trusted) == ("stranger", False)
    colleague = signed(tmp_path / f"b{suffix}", signer(tmp_path, "colleague", root), key)
    assert attested.verify(colleague, {}, [root.certificate]).credentials.trusted
    both = [root.certificate, host.certificate]
    assert "colleague" in refused(UnknownKey, attested.verify, colleague, {}, both)
    assert attested.verify(signed(tmp_path / f"c{suffix}", host), {}, both).credentials.signer == "host"
    with refuses("credentials.no-root", "host.crt"):
        attested.verify(colleague, {}, [host.certificate])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_credentials_with_another_attestation_than_the_files_own_are_refused(suffix, tmp_path, root, host, key):
    path = signed(tmp_path / f"a{suffix}", host, key, attestation='{"status": "guarded"}')
    assert library_says(path, root)[0] == "Trusted"
    assert "another attestation" in refused(Tampered, attested.verify, path, {"service": key.with_suffix(".pub")})
    bare = signed(tmp_path / f"b{suffix}", host, key, attestation="")
    assert "hold no attestation" in refused(MissingSignature, attested.verify, bare, {}, [root.certificate])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_more_than_one_store_of_credentials_is_refused(suffix, tmp_path, host, key):
    path = signed(tmp_path / f"a{suffix}", host, key)
    raw = path.read_bytes()
    if suffix == ".png":
        first = raw.index(b"caBX") - 4
        chunk = raw[first : first + 12 + int.from_bytes(raw[first : first + 4], "big")]
        path.write_bytes(raw[:first] + chunk + raw[first:])
    elif suffix == ".jpg":
        first = raw.index(b"\xff\xeb")
        segment = raw[first : first + 2 + int.from_bytes(raw[first + 2 : first + 4], "big")]
        path.write_bytes(raw[:first] + segment + raw[first:])
    else:
        chunk = raw[raw.index(b"C2PA") :]
        size = int.from_bytes(raw[4:8], "little") + len(chunk)
        path.write_bytes(raw[:4] + size.to_bytes(4, "little") + raw[8:] + chunk)
    said = refused(Tampered, attested.verify, path, {"service": key.with_suffix(".pub")})
    assert "more than once" in said


def test_text_that_comes_after_the_credentials_makes_them_invalid(tmp_path, root, host, key):
    path = signed(tmp_path / "a.png", host, key)
    raw = path.read_bytes()
    info, stream = PngInfo(), io.BytesIO()
    info.add_text("more", "text")
    Image.new("L", (1, 1)).save(stream, "PNG", pnginfo=info)
    first = stream.getvalue().index(b"tEXt") - 4
    chunk = stream.getvalue()[first : first + 12 + int.from_bytes(stream.getvalue()[first : first + 4], "big")]
    path.write_bytes(raw[:-12] + chunk + raw[-12:])
    assert library_says(path, root)[0] == "Invalid"
    refused(Tampered, attested.verify, path, {"service": key.with_suffix(".pub")})


@pytest.mark.slow
def test_without_a_time_stamp_a_certificates_end_ends_what_it_signed(tmp_path, root, key):
    for seconds in (2, 8, 30):  # signing may wait for the machine
        ends = now() + seconds * DAY / 86400
        try:
            path = signed(tmp_path / "a.png", signer(tmp_path, "short", root, ends=ends), key)
            break
        except credentials.CredentialsError:
            continue
    assert attested.verify(path, {}, [root.certificate]).credentials.trusted
    while now() <= ends + DAY / 86400:
        time.sleep(0.1)
    state, manifest = library_says(path, root)
    assert (state, manifest["signature_info"]["common_name"]) == ("Invalid", "short")
    assert "short" in refused(Expired, attested.verify, path, {}, [root.certificate])
    found = attested.verify(path, {"service": key.with_suffix(".pub")})  # its own signature has no last day
    assert (found.key, found.credentials.ended) == ("service", True)


@pytest.mark.parametrize("curve", [ec.SECP384R1, ec.SECP521R1])
def test_longer_curves_sign_too(curve, tmp_path, root):
    path = signed(tmp_path / "a.jpg", signer(tmp_path, "long", root, curve=curve))
    assert library_says(path, root)[0] == "Trusted"


@pytest.mark.parametrize("purpose", ["1.3.6.1.5.5.7.3.36", "1.3.6.1.4.1.62558.2.1"], ids=["documents", "claims"])
def test_certificates_for_documents_and_for_claims_are_taken(purpose, tmp_path, root):
    path = signed(tmp_path / "a.jpg", signer(tmp_path, "made", root, purpose=x509.ObjectIdentifier(purpose)))
    assert attested.verify(path, {}, [root.certificate]).credentials.trusted


def test_a_certificate_that_cannot_sign_is_named(tmp_path, root, host):
    tls = signer(tmp_path, "tls", root, purpose=x509.oid.ExtendedKeyUsageOID.SERVER_AUTH)
    old = signer(tmp_path, "old", root, ends=now() - DAY)
    soon = signer(tmp_path, "soon", root, begins=now() + DAY)
    for pair in (tls, old, soon, root):
        with refuses("credentials.not-signed", pair.certificate.stem):
            credentials.trial(credentials.signer(pair.certificate, pair.key))
    for certificate, named in ((root.certificate, "root.crt"), (host.key, "host.key"), (tmp_path / "no.crt", "no.crt")):
        with refuses("credentials.certificate", named):
            credentials.signer(certificate, host.key)


def test_an_input_and_its_own_credentials_are_kept(tmp_path, root, host):
    camera = signer(tmp_path, "camera", authority(tmp_path, "cameras"))
    source = signed(tmp_path / "source.png", camera).read_bytes()
    path = signed(tmp_path / "a.jpg", host, source=marking.COMPOSITE, inputs=(Input("image/png", source),))
    state, manifest = library_says(path, root)
    assert state == "Trusted"
    (one,) = manifest["ingredients"]
    assert (one["relationship"], one["format"]) == ("parentOf", "image/png")
    opened, edited = (action for a in manifest["assertions"] for action in a["data"].get("actions", ()))
    assert (opened["action"], edited["action"]) == ("c2pa.opened", "c2pa.edited")
    assert edited["digitalSourceType"] == marking.COMPOSITE
    with c2pa.Reader("image/jpeg", io.BytesIO(path.read_bytes())) as reader:
        assert reader.get_manifest(one["active_manifest"])["signature_info"]["common_name"] == "camera"
    changed_pixel(tmp_path / "source.png")
    broken = Input("image/png", (tmp_path / "source.png").read_bytes())
    path = signed(tmp_path / "b.jpg", host, source=marking.COMPOSITE, inputs=(broken,))
    state, manifest = library_says(path, root)
    failed = manifest["ingredients"][0]["validation_results"]["activeManifest"]["failure"]
    assert state == "Trusted"
    assert "assertion.dataHash.mismatch" in {said["code"] for said in failed}


def test_several_inputs_went_into_what_was_created(tmp_path, root, host):
    plain = io.BytesIO()
    Image.fromarray(PIXELS).save(plain, "BMP")
    source = signed(tmp_path / "source.webp", host).read_bytes()
    inputs = (Input("image/webp", source), Input("image/bmp", plain.getvalue()))
    path = signed(tmp_path / "a.webp", host, inputs=inputs)
    state, manifest = library_says(path, root)
    assert state == "Trusted"
    assert [one["relationship"] for one in manifest["ingredients"]] == ["inputTo"] * 2
    (created,) = (action for a in manifest["assertions"] for action in a["data"].get("actions", ()))
    assert created["action"] == "c2pa.created"
    assert len(created["parameters"]["ingredients"]) == 2
    with refuses("credentials.input", "input 1", "image/png"):
        signed(tmp_path / "b.webp", host, inputs=(Input("image/png", b"nothing"),))


def test_without_the_library_what_asks_for_it_is_an_error_and_the_key_still_counts(
    tmp_path, root, host, key, monkeypatch
):
    path = signed(tmp_path / "a.png", host, key)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with refuses("credentials.library", "c2pa-python"):
        credentials.signer(host.certificate, host.key)
    with refuses("credentials.library", "c2pa-python"):
        attested.verify(path, {}, [root.certificate])
    found = attested.verify(path, {"service": key.with_suffix(".pub")})
    assert (found.key, found.holds_credentials, found.credentials) == ("service", True, None)


def test_the_command_reads_both(tmp_path, root, host, key, capsys, caplog, monkeypatch):
    path, public = signed(tmp_path / "a.webp", host, key), f"service={key.with_suffix('.pub')}"
    certificates = ["--certificates", str(root.certificate)]
    assert cli.main(["verify", str(path), "--keys", public, *certificates]) == 0
    assert capsys.readouterr().out.startswith("a.webp: guarded, signed by service, Content Credentials of host\n{")
    assert cli.main(["verify", str(path), *certificates]) == 0
    assert capsys.readouterr().out.startswith("a.webp: guarded, Content Credentials of host\n{")
    assert cli.main(["verify", str(path), "--keys", public]) == 0
    assert "host, whose certificate --certificates did not name\n{" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert cli.main(["verify", str(path), "--keys", public]) == 0
    assert "not looked at: pip install" in capsys.readouterr().out
    assert cli.main(["verify", str(path)]) == 1
    assert "--certificates" in caplog.messages[-1]
    assert cli.main(["verify", str(key), *certificates]) == 1
    assert "service.pem" in caplog.messages[-1]


def test_the_policy_command_signs_once_to_tell_what_is_wrong(tmp_path, root, host, capsys, caplog):
    path = tmp_path / policy.FILE
    table = '[guard]\nrequired = []\n[credentials]\ncertificate = "{}"\nkey = "{}"\n'
    path.write_text(table.format(host.certificate.as_posix(), host.key.as_posix()))
    assert cli.main(["policy", "check", str(path)]) == 0
    assert "Content Credentials: of host, to the end of 20" in capsys.readouterr().out
    old = signer(tmp_path, "old", root, ends=now() - DAY)
    path.write_text(table.format("old.crt", "old.key"))
    assert old.key.exists()
    assert cli.main(["policy", "check", str(path)]) == 1
    assert "old" in caplog.messages[-1]
    path.write_text('[guard]\nrequired = []\n[credentials]\nkey = "old.key"\n')
    assert cli.main(["policy", "check", str(path)]) == 1
    assert "line 3, credentials" in caplog.messages[-1]
