"""Signatures of safety LoRAs and policies, and of the attestations in images; every refusal by its name."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.provenance import attested, keys, lossy, signing
from modular_lora_guard.modular_lora.provenance.attested import KEY
from modular_lora_guard.modular_lora.provenance.attested import verify as verify_attestation
from modular_lora_guard.modular_lora.provenance.keys import (
    Expired,
    MissingSignature,
    SignatureError,
    Tampered,
    UnknownKey,
)
from modular_lora_guard.modular_lora.provenance.signing import sign, signature_path, verify
from modular_lora_guard.operators import cli, policy
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.errors import refuses
from support.gate_graphs import gated_run, install_stub, part
from support.graphs import guarded_graph
from support.signatures import refused, save_png, saved_image

TODAY = datetime.datetime.now(datetime.timezone.utc).date()
DAY = datetime.timedelta(days=1)
LORA = Path(__file__).resolve().parents[3] / "tools" / "world" / "assets" / "demo_safety_vehicles.safetensors"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two private keys; the public ones lie beside them."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("host", "other"):
        keys.keygen(folder / f"{name}.pem")
    return folder / "host.pem", folder / "other.pem"


@pytest.fixture
def trusted(pair) -> dict[str, Path]:
    return {"host": pair[0].with_suffix(".pub")}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "safety.safetensors"
    path.write_bytes(LORA.read_bytes())
    return path


def test_a_signed_lora_names_its_signer_and_a_renamed_one_too(lora, pair, trusted):
    assert sign(lora, pair[0]) == lora.with_name("safety.safetensors.sig")
    both = {"other": pair[1].with_suffix(".pub"), **trusted}
    assert verify(lora, both) == "host"
    moved = lora.with_name("new name.safetensors")
    lora.rename(moved)
    signature_path(lora).rename(signature_path(moved))
    assert verify(moved, both, sha256=read_lora(moved).sha256) == "host"


@pytest.mark.slow
def test_the_signature_is_one_that_model_signing_itself_verifies(lora, pair, trusted):
    sign(lora, pair[0], expires=TODAY + DAY)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(lora), "--signature"]
    command += [str(signature_path(lora)), "--public_key", str(trusted["host"])]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    command[3:5] = ["sign", "key"]
    own = lora.with_name("own.safetensors")
    own.write_bytes(LORA.read_bytes())
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(own), "--signature", str(signature_path(own))]
    subprocess.run([*command, "--private_key", str(pair[0])], check=True, capture_output=True)
    assert verify(own, trusted) == "host"


def test_a_file_without_a_signature_or_with_that_of_another_key_is_refused(lora, pair, trusted):
    assert "has no safety.safetensors.sig beside it" in refused(MissingSignature, verify, lora, trusted)
    sign(lora, pair[1])
    assert "trusted are: host" in refused(UnknownKey, verify, lora, trusted)
    assert "trusted are: none" in refused(UnknownKey, verify, lora, {})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # signing on a busy machine
@given(data=st.data())
def test_any_flipped_bit_of_the_file_or_its_signature_is_refused(data, pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("signed") / "policy.toml"
    path.write_bytes(b"[guard]\nrequired = []\n")
    sign(path, pair[0], expires=TODAY)
    trusted = {"host": pair[0].with_suffix(".pub")}
    target = data.draw(st.sampled_from([path, signature_path(path)]))
    raw = bytearray(target.read_bytes())
    place = data.draw(st.integers(0, 2**16)) % len(raw)  # a bundle's length differs from one signing to the next
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    before = target.read_bytes()
    target.write_bytes(raw)
    signer = ""
    with contextlib.suppress(SignatureError):
        signer = verify(path, trusted)
    if signer:  # a bundle's JSON has letters that mean nothing, such as the padding bits of its base64
        assert target != path
        assert payload(before) == payload(bytes(raw))


def payload(raw: bytes) -> dict:
    return json.loads(base64.b64decode(json.loads(raw)["dsseEnvelope"]["payload"]))


def test_a_tampered_file_and_a_tampered_signature_are_told_apart(lora, pair, trusted):
    sign(lora, pair[0])
    whole = signature_path(lora).read_text()
    said = json.loads(whole)
    value = base64.b64decode(said["dsseEnvelope"]["signatures"][0]["sig"])
    said["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(value[:-1] + bytes([value[-1] ^ 1])).decode()
    signature_path(lora).write_text(json.dumps(said))
    assert refused(Tampered, verify, lora, trusted).startswith("safety.safetensors.sig: does not hold")
    signature_path(lora).write_text(whole)
    lora.write_bytes(lora.read_bytes()[:-1] + b"?")
    assert refused(Tampered, verify, lora, trusted).startswith("safety.safetensors: was changed after host signed it")


def test_bytes_that_were_read_before_must_be_those_that_are_signed(lora, pair, trusted):
    sign(lora, pair[0])
    assert verify(lora, trusted, sha256=read_lora(lora).sha256) == "host"
    assert "host signed" in refused(Tampered, verify, lora, trusted, sha256="0" * 64)


def test_a_signature_holds_to_the_end_of_its_last_day(lora, pair, trusted, monkeypatch):
    sign(lora, pair[0], expires=TODAY)
    assert verify(lora, trusted) == "host"
    monkeypatch.setattr(signing, "_today", lambda: TODAY + DAY)
    assert f"expired on {TODAY}" in refused(Expired, verify, lora, trusted)


def test_the_last_day_cannot_be_changed_in_the_bundle(lora, pair, trusted):
    sign(lora, pair[0], expires=TODAY - DAY)
    said = json.loads(signature_path(lora).read_text())
    statement = payload(signature_path(lora).read_bytes())
    for changed in ({"expires": "2999-01-01"}, {}):
        statement["predicate"]["serialization"].pop("expires", None)
        statement["predicate"]["serialization"] |= changed
        said["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
        signature_path(lora).write_text(json.dumps(said))
        refused(Tampered, verify, lora, trusted)


def test_a_second_envelope_under_another_spelling_changes_nothing(lora, pair, trusted):
    sign(lora, pair[0], expires=TODAY - DAY)
    said = json.loads(signature_path(lora).read_text())
    forged = json.loads(json.dumps(said["dsseEnvelope"]))
    statement = payload(signature_path(lora).read_bytes())
    statement["predicate"]["serialization"]["expires"] = "2999-01-01"
    forged["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    for first, second in ((forged, said["dsseEnvelope"]), (said["dsseEnvelope"], forged)):
        signature_path(lora).write_text(json.dumps(said | {"dsseEnvelope": first, "dsse_envelope": second}))
        with pytest.raises((Tampered, Expired)):
            verify(lora, trusted)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "null", "[]", "\0", '{"dsseEnvelope": {"payload": "?"}}', "[" * 100_000, '{"dsseEnvelope": []}'],
)
def test_a_bundle_that_is_none_is_refused(lora, trusted, text):
    signature_path(lora).write_text(text)
    refused(Tampered, verify, lora, trusted)


def test_a_signature_of_a_folder_is_none_of_a_file_in_it(lora, pair, trusted):
    folder = lora.parent / "folder"
    folder.mkdir()
    lora.rename(folder / lora.name)
    signatures = signature_path(folder / lora.name)
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(folder), "--signature", str(signatures)]
    subprocess.run([*command, "--private_key", str(pair[0])], check=True, capture_output=True)
    assert "is not the signature of one file" in refused(Tampered, verify, folder / lora.name, trusted)


def test_a_link_to_a_signed_file_is_followed(lora, pair, trusted):
    link = lora.with_name("link.safetensors")
    try:
        link.symlink_to(lora)
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")
    sign(link, pair[0])
    assert verify(link, trusted) == "host"


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps other permissions")
def test_a_private_key_that_others_can_read_is_not_used(lora, pair, tmp_path):
    key = tmp_path / "open.pem"
    key.write_bytes(pair[0].read_bytes())
    key.chmod(0o644)
    assert "chmod 600" in refused(SignatureError, sign, lora, key)
    key.chmod(0o600)
    sign(lora, key)
    assert pair[0].stat().st_mode & 0o777 == 0o600


def test_what_is_no_key_is_named(lora, pair, tmp_path):
    sign(lora, pair[0])
    junk = tmp_path / "junk.pem"
    junk.write_text("nothing")
    junk.chmod(0o600)
    assert "junk.pem" in refused(SignatureError, sign, lora, junk)
    assert "key ours: junk.pem is not a public key" in refused(SignatureError, verify, lora, {"ours": junk})
    assert "holds a private key" in refused(SignatureError, verify, lora, {"ours": pair[0]})
    assert "No such file" in refused(SignatureError, verify, lora, {"ours": tmp_path / "gone.pub"})
    assert "already exists" in refused(SignatureError, keys.keygen, pair[0])


def test_without_the_package_nothing_passes(lora, pair, trusted, monkeypatch):
    sign(lora, pair[0])
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert 'pip install "model-signing' in refused(SignatureError, verify, lora, trusted)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    assert 'pip install "model-signing' in refused(SignatureError, verify, lora, trusted)


def test_a_policy_with_a_trusted_key_beside_it_must_be_signed(pair, tmp_path):
    path = tmp_path / policy.FILE
    path.write_text("[guard]\nrequired = []\n")
    (tmp_path / policy.TRUSTED).parent.mkdir()
    (tmp_path / policy.TRUSTED).write_bytes(pair[0].with_suffix(".pub").read_bytes())
    with refuses("policy.signature", "policy.toml.sig"):
        policy.load(path)
    sign(path, pair[0])
    assert policy.load(path).signed
    path.write_text("[guard]\nrequired = []\n\n")
    with refuses("policy.signature", "policy.toml"):
        policy.load(path)


def test_a_signed_attestation_is_told_from_a_forged_one(pair, trusted, tmp_path):
    path = tmp_path / "a.png"
    record = saved_image(path, pair[0])
    found = verify_attestation(path, trusted)
    assert (found.key, found.record) == ("host", record)
    for change in ({"status": "guarded, outside start"}, {"net_strength": {}}, {"more": 1}):
        save_png(path, Image.open(path).copy(), record | change)
        assert "changed after host signed it" in refused(Tampered, verify_attestation, path, trusted)
    saved_image(path, pair[1])
    refused(UnknownKey, verify_attestation, path, trusted)
    saved_image(path, None)
    assert "carries no signature" in refused(MissingSignature, verify_attestation, path, trusted)
    Image.new("RGB", (8, 8)).save(path)
    assert "carries no attestation" in refused(MissingSignature, verify_attestation, path, trusted)
    path.write_bytes(b"no picture")
    refused(SignatureError, verify_attestation, path, trusted)


def test_a_true_attestation_moved_to_other_pixels_is_refused(pair, trusted, tmp_path):
    path = tmp_path / "a.png"
    record = saved_image(path, pair[0])
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    save_png(path, Image.fromarray(pixels), record)
    assert "its pixels_sha256 differs" in refused(Tampered, verify_attestation, path, trusted)
    pixels[0, 0, 0] ^= 1
    save_png(path, Image.fromarray(pixels.reshape(8, 6, 3)), record)
    assert "its pixels_size differs" in refused(Tampered, verify_attestation, path, trusted)


def test_a_png_that_shows_or_says_something_else_beside_the_signed_record_is_refused(pair, trusted, tmp_path):
    path = tmp_path / "a.png"
    record = saved_image(path, pair[0])
    whole, frame = Image.open(path).copy(), Image.new("RGB", (8, 6), "red")
    info = PngInfo()
    info.add_text(KEY, json.dumps(record, sort_keys=True))
    whole.save(path, pnginfo=info, save_all=True, append_images=[frame])
    assert "chunk" in refused(Tampered, verify_attestation, path, trusted)
    whole.save(path, pnginfo=info, transparency=(0, 0, 0))
    assert "'tRNS' chunk" in refused(Tampered, verify_attestation, path, trusted)
    twice = PngInfo()
    twice.add_text(KEY, json.dumps(record | {"status": "guarded, better"}))
    twice.add_text(KEY, json.dumps(record, sort_keys=True))
    whole.save(path, pnginfo=twice)
    assert "more than one attestation" in refused(Tampered, verify_attestation, path, trusted)
    doubled = PngInfo()
    doubled.add_text(KEY, '{"status": "guarded, better", ' + json.dumps(record, sort_keys=True)[1:])
    whole.save(path, pnginfo=doubled)
    assert "a key comes twice" in refused(Tampered, verify_attestation, path, trusted)
    save_png(path, whole, record)
    verify_attestation(path, trusted)
    path.write_bytes(path.read_bytes() + b"more")
    assert "after the end" in refused(Tampered, verify_attestation, path, trusted)
    path.write_bytes(path.read_bytes()[:-30])
    refused(Tampered, verify_attestation, path, trusted)


def test_a_signature_for_one_purpose_is_none_for_another(pair, trusted):
    said = keys.sign_statement({"n": 1}, "record head", keys.private_key(pair[0]))
    assert keys.verify_statement(said, "record head", trusted, "head") == "host"
    refused(Tampered, keys.verify_statement, said, attested.ATTESTATION, trusted, "head")


@pytest.mark.parametrize("signature", [1, {}, {"key": 1, "value": ""}, {"key": "KEY", "value": "?"}, "x", []])
def test_what_is_no_signature_is_refused(pair, trusted, signature):
    said = keys.sign_statement({"n": 1}, "x", keys.private_key(pair[0]))
    if isinstance(signature, dict) and signature.get("key") == "KEY":
        signature |= {"key": said["signature"]["key"]}
    refused(Tampered, keys.verify_statement, said | {"signature": signature}, "x", trusted, "it")


def test_the_command_signs_and_verifies_and_says_in_one_line_what_is_wrong(lora, tmp_path, capsys, caplog):
    key, public = tmp_path / "made.pem", f"ours={tmp_path / 'made.pub'}"
    assert cli.main(["keygen", str(key)]) == 0
    assert cli.main(["sign", str(lora), "--key", str(key), "--expires", str(TODAY)]) == 0
    assert cli.main(["verify", str(lora), "--keys", public]) == 0
    assert capsys.readouterr().out.endswith("safety.safetensors: signed by ours\n")
    assert cli.main(["verify", str(lora)]) == 1
    assert "no key is trusted" in caplog.messages[-1]
    assert cli.main(["verify", str(lora), "--keys", public, public]) == 1
    assert "two keys are called ours" in caplog.messages[-1]
    assert cli.main(["verify", str(lora), "--identity", "me@example.org"]) == 1
    assert "needed together" in caplog.messages[-1]
    path = tmp_path / "a.png"
    saved_image(path, key)
    assert cli.main(["verify", str(path), "--keys", public]) == 0
    assert capsys.readouterr().out.startswith("a.png: guarded, signed by ours\n{")
    saved_image(path, key, status="unattested")
    assert cli.main(["verify", str(path), "--keys", public]) == 1
    assert "what is signed reads: unattested" in caplog.messages[-1]
    lora.write_bytes(b"x")
    assert cli.main(["verify", str(lora), "--keys", public]) == 1
    assert len(caplog.messages) == 5
    assert all("\n" not in message for message in caplog.messages)


def test_the_policy_command_says_what_a_policy_sets_or_which_line_is_wrong(pair, tmp_path, capsys, caplog):
    path = tmp_path / policy.FILE
    path.write_text(f'[guard]\nrequired = [{{sha256 = "{"a" * 64}"}}]\n[record]\nsigning_key = "host.pem"\n')
    assert cli.main(["policy", "check", str(path)]) == 1
    assert "host.pem: private key cannot be read" in caplog.messages[-1]
    (tmp_path / "host.pem").write_bytes(pair[0].read_bytes())
    (tmp_path / "host.pem").chmod(0o600)
    assert cli.main(["policy", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "must carry: sha256 aaaaaaaaaaaaaaaa" in said
    assert "attestations signed" in said
    path.write_text("[guard]\nrequierd = []\n")
    assert cli.main(["policy", "check", str(path)]) == 1
    assert "line 2" in caplog.messages[-1]
    path.unlink()
    assert cli.main(["policy", "check", str(path)]) == 1
    assert "no such policy" in caplog.messages[-1]


@pytest.fixture
def signing_policy(comfy, pair, tmp_path, monkeypatch):
    """A policy in force whose key signs what is saved."""
    path = tmp_path / policy.FILE
    path.write_text('[guard]\nrequired = []\n[open]\nunattested = true\n[record]\nsigning_key = "host.pem"\n')
    (tmp_path / "host.pem").write_bytes(pair[0].read_bytes())
    (tmp_path / "host.pem").chmod(0o600)
    found = part(comfy, "operators.policy").load(path)
    monkeypatch.setattr(part(comfy, "comfy_host.saving").policies, "current", lambda: found)


def test_saved_images_are_signed_with_the_policys_key(comfy, signing_policy, run_graph, loras, trusted):
    graph = guarded_graph()
    graph["save"]["inputs"]["filename_prefix"] = "signed"
    run_graph(graph)
    (path,) = sorted(comfy.output.glob("signed_*.png"))
    found = verify_attestation(path, trusted)
    assert (found.key, found.record["status"]) == ("host", "guarded")
    text = Image.open(path).text[KEY].replace('"evaluations": 2', '"evaluations": 3')
    save_png(path, Image.open(path).copy(), json.loads(text))
    refused(Tampered, verify_attestation, path, trusted)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_the_record_in_a_lossy_image_is_signed_for_that_very_image(
    format, comfy, signing_policy, monkeypatch, run_graph, loras, trusted
):
    stub = install_stub(comfy, monkeypatch)
    stub.score = lambda saved_image: 0.0
    graph = gated_run()
    graph["save"]["inputs"] |= {"filename_prefix": f"signed_{format}", "format": format}
    run_graph(graph)
    path, other = [f for f in sorted(comfy.output.glob(f"signed_{format}_*")) if f.suffix != ".json"][:2]
    assert verify_attestation(path, trusted).record["gate"]["detector"] == "stub 1"
    packet = lossy.read("a", path.read_bytes()).packet
    Image.open(other).save(path)
    path.write_bytes(lossy.with_packet(path.read_bytes(), packet, (64, 64)))
    assert "its data_sha256 differs" in refused(Tampered, verify_attestation, path, trusted)
    Image.open(other).save(path)
    refused(MissingSignature, verify_attestation, path, trusted)
