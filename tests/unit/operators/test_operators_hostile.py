"""Signatures, images and records of any shape: what is not valid is refused with a sentence, not a traceback."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.modular_lora.provenance import keys, lossy, marking, png
from modular_lora_guard.modular_lora.provenance import record as records
from modular_lora_guard.modular_lora.provenance.attested import KEY
from modular_lora_guard.modular_lora.provenance.attested import verify as verify_attestation
from modular_lora_guard.modular_lora.provenance.keys import MissingSignature, SignatureError, Tampered
from modular_lora_guard.modular_lora.provenance.signing import sign, signature_path, verify
from modular_lora_guard.operators import cli
from PIL import Image
from support.damage import damaged
from support.signatures import refused, saved_image

Chunk = tuple[bytes, bytes]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8).map(repr),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
DEEP = "[" * 600 + "]" * 600  # read, but too deep to be written in an object


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = tmp_path_factory.mktemp("keys") / "host.pem"
    keys.keygen(key)
    return key


@pytest.fixture(scope="module")
def trusted(host) -> dict[str, Path]:
    return {"host": host.with_suffix(".pub")}


@pytest.fixture(scope="module")
def signed(host, tmp_path_factory) -> Path:
    """A file with its signature."""
    path = tmp_path_factory.mktemp("signed") / "safety.safetensors"
    path.write_bytes(b"any bytes")
    sign(path, host)
    return path


@pytest.fixture(scope="module")
def attested(host, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    saved_image(path, host)
    return path


# Bundles


def places(value: Any, way: tuple = ()) -> list[tuple]:
    """Ways to every value in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, part in inner for place in places(part, (*way, key)))]


def put(value: Any, way: tuple, new: Any) -> Any:
    """A copy of a document with another value in one place."""
    if not way:
        return new
    made = copy.copy(value)
    made[way[0]] = put(value[way[0]], way[1:], new)
    return made


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_bundle_with_any_value_in_any_place_is_refused_or_still_means_the_same(data, signed, trusted):
    whole = json.loads(signature_path(signed).read_text())
    inside = data.draw(st.booleans())  # what is signed, or what is around it
    said = json.loads(base64.b64decode(whole["dsseEnvelope"]["payload"])) if inside else whole
    way = data.draw(st.sampled_from(places(said)))
    changed = put(said, way, data.draw(JSON))
    if inside:
        payload = base64.b64encode(json.dumps(changed).encode()).decode()
        changed = put(whole, ("dsseEnvelope", "payload"), payload)
    check(signed, json.dumps(changed).encode(), trusted, may_hold=not inside and way not in ((), ("dsseEnvelope",)))


@settings(max_examples=80, deadline=None)
@given(raw=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()), cut=st.integers(0, 2000))
def test_any_bytes_any_json_and_any_cut_of_a_bundle_are_refused(raw, cut, signed, trusted):
    check(signed, raw, trusted)
    whole = signature_path(signed).read_bytes()
    check(signed, whole[: cut % len(whole)], trusted)


def check(path: Path, bundle: bytes, trusted: dict[str, Path], may_hold: bool = False) -> None:
    """A file with this bundle beside it is refused in one printable line."""
    whole = signature_path(path).read_bytes()
    try:
        signature_path(path).write_bytes(bundle)
        why = said_of(verify, path, trusted)
        assert why.isprintable()
        assert why or may_hold, bundle
    finally:
        signature_path(path).write_bytes(whole)


def said_of(call, *arguments) -> str:
    """The sentence of a refusal, "" where there is none."""
    try:
        call(*arguments)
    except SignatureError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("signatures", [[], [{}], [None], {}, None, "x", ["x"], [[]], 1, "two"])
def test_a_bundle_with_none_or_several_signatures_is_refused(signatures, signed, trusted):
    said = json.loads(signature_path(signed).read_text())
    one = said["dsseEnvelope"]["signatures"]
    said["dsseEnvelope"]["signatures"] = one * 2 if signatures == "two" else signatures
    whole = signature_path(signed).read_bytes()
    try:
        signature_path(signed).write_text(json.dumps(said))
        refused(Tampered, verify, signed, trusted)
    finally:
        signature_path(signed).write_bytes(whole)


# Images


def chunks(raw: bytes) -> list[Chunk]:
    found, place = [], 8
    while place < len(raw):
        (size,) = struct.unpack_from(">I", raw, place)
        found.append((raw[place + 4 : place + 8], raw[place + 8 : place + 8 + size]))
        place += 12 + size
    return found


def joined(parts: list[Chunk]) -> bytes:
    """A PNG of these chunks, each with its right check sum."""
    made = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def split(parts: list[Chunk]) -> list[Chunk]:
    """The same image with its pixels in three chunks."""
    (data,) = [data for kind, data in parts if kind == b"IDAT"]
    thirds = [(b"IDAT", part) for part in (data[:9], data[9:20], data[20:])]
    before = [part for part in parts if part[0] not in (b"IDAT", b"IEND")]
    return [*before, *thirds, (b"IEND", b"")]


RED = zlib.compress(b"\0" + b"\xff\0\0" * 8)
STREAM = "the pixels' stream"
EDITS = {
    "a second header": lambda p: [p[0], p[0], *p[1:]],
    "another header behind the first": lambda p: [p[0], (b"IHDR", p[0][1][:4] + b"\0\0\0\1" + p[0][1][8:]), *p[1:]],
    "the header at the end": lambda p: [*p[1:-1], p[0], p[-1]],
    "no header": lambda p: p[1:],
    "a long header": lambda p: [(b"IHDR", p[0][1] + b"\0"), *p[1:]],
    "a smaller image than its pixels": lambda p: [(b"IHDR", p[0][1][:4] + b"\0\0\0\1" + p[0][1][8:]), *p[1:]],
    "a larger image than its pixels": lambda p: [(b"IHDR", p[0][1][:4] + b"\0\0\0\7" + p[0][1][8:]), *p[1:]],
    "an image of no height": lambda p: [(b"IHDR", p[0][1][:4] + bytes(4) + p[0][1][8:]), *p[1:]],
    "an image of 2^62 pixels": lambda p: [(b"IHDR", b"\x7f\xff\xff\xff" * 2 + p[0][1][8:]), *p[1:]],
    "interlaced": lambda p: [(b"IHDR", p[0][1][:12] + b"\1"), *p[1:]],
    "16 bits": lambda p: [(b"IHDR", p[0][1][:8] + b"\x10" + p[0][1][9:]), *p[1:]],
    "a palette": lambda p: [p[0], (b"PLTE", b"\0\0\0"), *p[1:]],
    "no end": lambda p: p[:-1],
    "a second end": lambda p: [*p, p[-1]],
    "an end that holds something": lambda p: [*p[:-1], (b"IEND", b"x")],
    "more pixels behind the end": lambda p: [*p, (b"IDAT", RED)],
    "no pixels": lambda p: [part for part in p if part[0] != b"IDAT"],
    "a second stream in the same chunk": lambda p: stream(p, lambda data: data + RED),
    "a second stream in a chunk of its own": lambda p: [*p[:-1], (b"IDAT", RED), p[-1]],
    "bytes behind the stream": lambda p: stream(p, lambda data: data + b"\0"),
    "a stream cut at its check sum": lambda p: stream(p, lambda data: data[:-4]),
    "a stream cut by 20 bytes": lambda p: stream(p, lambda data: data[:-20]),
    "a stream that is none": lambda p: stream(p, lambda data: b"junk"),
    "an empty stream": lambda p: stream(p, lambda data: b""),
    "a row too many": lambda p: stream(p, lambda data: zlib.compress(zlib.decompress(data) + bytes(25))),
    "a row too few": lambda p: stream(p, lambda data: zlib.compress(zlib.decompress(data)[:-25])),
    "a filter that does not exist": lambda p: stream(p, lambda d: zlib.compress(b"\x09" + zlib.decompress(d)[1:])),
    "a stream of 100 MB": lambda p: stream(p, lambda data: zlib.compress(bytes(10**8))),
    "pixels in two places": lambda p: [*split(p)[:-2], (b"tEXt", b"a\0b"), *split(p)[-2:]],
    "pixels in another order": lambda p: [*split(p)[:-4], *reversed(split(p)[-4:-1]), p[-1]],
    "a chunk that is not known": lambda p: [*p[:-1], (b"abCd", b""), p[-1]],
    "a chunk whose name is no text": lambda p: [*p[:-1], (b"\xff\n\0\x7f", b""), p[-1]],
    "an attestation in compressed text": lambda p: [
        (b"zTXt", KEY.encode() + b"\0\0" + zlib.compress(d.partition(b"\0")[2])) if k == b"tEXt" else (k, d)
        for k, d in p
    ],
    "a second attestation, compressed": lambda p: [*p[:-1], (b"zTXt", KEY.encode() + b"\0\0x"), p[-1]],
    "a second attestation, in other letters": lambda p: [*p[:-1], (b"iTXt", KEY.encode() + b"\0\0\0\0\0x"), p[-1]],
    "an attestation that is no JSON": lambda p: text(p, b"\xff{"),
    "an attestation that is too deep": lambda p: text(p, b"[" * 10**5),
    "an attestation of 2 MiB": lambda p: text(p, b'{"status": "' + b"x" * 2**21 + b'"}'),
}


def stream(parts: list[Chunk], change) -> list[Chunk]:
    return [(kind, change(data)) if kind == b"IDAT" else (kind, data) for kind, data in parts]


def text(parts: list[Chunk], content: bytes) -> list[Chunk]:
    return [(k, KEY.encode() + b"\0" + content) if k == b"tEXt" else (k, d) for k, d in parts]


@pytest.mark.parametrize("name", EDITS)
def test_an_image_of_another_structure_is_refused_although_its_signature_is_true(name, attested, trusted, tmp_path):
    path = tmp_path / "b.png"
    path.write_bytes(joined(EDITS[name](chunks(attested.read_bytes()))))
    with pytest.raises(SignatureError) as error:
        verify_attestation(path, trusted)
    assert str(error.value).isprintable()


def test_an_image_whose_pixels_are_in_several_chunks_is_the_same_image(attested, trusted, tmp_path):
    path = tmp_path / "b.png"
    path.write_bytes(joined(split(chunks(attested.read_bytes()))))
    assert verify_attestation(path, trusted) == verify_attestation(attested, trusted)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_chunks_in_any_order_and_number_are_read_only_as_the_format_has_them(data, attested, trusted, tmp_path_factory):
    """The reference is a pattern over the chunks' kinds: header, texts, pixels, texts, end; one text is ours."""
    header, ours, *pixels, end = split(chunks(attested.read_bytes()))
    letters = {"h": header, "o": ours, "p": pixels[0], "q": pixels[1], "r": pixels[2], "e": end}
    letters |= {"t": (b"tEXt", b"a\0b"), "s": (b"pHYs", bytes(9)), "x": (b"tRNS", bytes(6))}
    edits = st.lists(st.tuples(st.integers(0, 8), st.sampled_from([*letters, ""]), st.booleans()), max_size=3)
    order = list("hopqre")
    for place, letter, insert in data.draw(edits):
        order[place : place + (not insert)] = letter
    path = tmp_path_factory.mktemp("chunks") / "b.png"
    path.write_bytes(joined([letters[letter] for letter in order]))
    whole = re.fullmatch(r"h[ots]*pqr[ots]*e", "".join(order)) and order.count("o") == 1
    why = said_of(verify_attestation, path, trusted)
    assert why.isprintable()
    assert bool(whole) == (not why), order


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_changed_byte_any_cut_and_anything_inserted_is_refused(data, attested, trusted, tmp_path_factory):
    raw = damaged(data, attested.read_bytes())
    if raw == attested.read_bytes():
        return
    path = tmp_path_factory.mktemp("changed") / "b.png"
    path.write_bytes(raw)
    with pytest.raises(SignatureError) as error:
        verify_attestation(path, trusted)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_the_pixels_are_those_that_the_library_reads(mode, tmp_path):
    made = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 30).convert(mode)
    made.save(tmp_path / "a.png", compress_level=0)
    assert png.read(tmp_path / "a.png").pixels.tobytes() == made.tobytes()
    Image.new(mode, (2000, 1500)).save(tmp_path / "flat.png")  # gives out much more than it takes in
    assert png.read(tmp_path / "flat.png").pixels.shape[:2] == (1500, 2000)


def test_what_is_no_file_is_refused(tmp_path, trusted):
    refused(SignatureError, verify_attestation, tmp_path / "gone.png", trusted)
    (tmp_path / "folder.png").mkdir()
    refused(SignatureError, verify_attestation, tmp_path / "folder.png", trusted)
    refused(SignatureError, verify_attestation, tmp_path / "gone.jpg", trusted)
    (tmp_path / "other.webp").write_bytes(b"no picture")
    refused(SignatureError, verify_attestation, tmp_path / "other.webp", trusted)
    Image.new("RGB", (8, 6)).save(tmp_path / "plain.webp")
    refused(MissingSignature, verify_attestation, tmp_path / "plain.webp", trusted)


def with_text(path: Path, text: str) -> None:
    """A lossy image with this text in the place of its attestation."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, "WEBP")
    path.write_bytes(lossy.with_packet(stream.getvalue(), marking.packet("", text), (8, 6)))


@settings(max_examples=80, deadline=None)
@given(value=JSON, inside=JSON)
def test_any_json_in_a_lossy_image_is_refused(value, inside, trusted, tmp_path_factory):
    path = tmp_path_factory.mktemp("lossy") / "a.webp"
    for said in (
        value,
        {"signature": value},
        {"signature": {"key": inside, "value": value}},
        {marking.SOURCE_TYPE: value, "signature": inside},
    ):
        with_text(path, json.dumps(said))
        with pytest.raises(SignatureError) as error:
            verify_attestation(path, trusted)
        assert str(error.value).isprintable()


def test_a_statement_too_deep_to_be_written_again_is_refused(host, trusted, tmp_path):
    said = keys.sign_statement({"n": 1}, "x", keys.private_key(host))
    path = tmp_path / "a.webp"
    for depth in (300, 900, 990, 5000, 10**5):
        deep = "[" * depth + "]" * depth
        with_text(path, f'{json.dumps(said)[:-1]}, "deep": {deep}}}')
        refused(Tampered, verify_attestation, path, trusted)


# Records


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_value_in_any_place_of_a_line_or_a_head_is_said_and_never_raised(data, host, trusted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    book = records.Record(folder, key=keys.private_key(host))
    for i in range(3):
        book.append("run", i=i)
    (path,) = folder.glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    target = data.draw(st.sampled_from(["line", "head", "bytes", "long"]))
    if target == "line":
        place = data.draw(st.sampled_from(places(lines)))
        changed = put(lines, place, data.draw(JSON))
        if changed == lines:
            return
        path.write_text(
            "".join(json.dumps(line) + "\n" for line in (changed if isinstance(changed, list) else [changed]))
        )
    elif target == "head":
        head = json.loads((folder / records.HEAD).read_text())
        place = data.draw(st.sampled_from(places(head)))
        changed = put(head, place, data.draw(JSON))
        if changed == head:
            return
        (folder / records.HEAD).write_text(json.dumps(changed))
    elif target == "bytes":
        path.write_bytes(data.draw(st.binary(min_size=1, max_size=60)))
    else:
        number = "9" * data.draw(st.sampled_from([18, 19, 30, 4300, 4301]))
        for where in (path, folder / records.HEAD):
            where.write_text(re.sub(r'"n": ?\d+', f'"n":{number}', where.read_text()))
    found = records.verify(folder, trusted)
    assert not found.whole
    assert all(problem.isprintable() for problem in found.problems)
    assert all(isinstance(said, dict) for *_, said in records.lines(folder))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"null", b"[]", b"\xff", DEEP.encode(), b'{"n": 1e400}', b'{"n": true}']
)
def test_a_writer_refuses_a_head_that_is_none(content, tmp_path):
    records.Record(tmp_path).append("run")
    (tmp_path / records.HEAD).write_bytes(content)
    with pytest.raises(GuardError):
        records.Record(tmp_path).append("run")


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "gone.png", "--keys", "gone.pub"],
        ["verify", "gone.safetensors", "--keys", "gone.pub"],
        ["verify", "folder", "--keys", "ours=folder"],
        ["sign", "gone", "--key", "gone.pem"],
        ["sign", "folder", "--key", "folder"],
        ["record", "verify", "gone"],
        ["record", "show", "gone"],
        ["record", "verify", "folder", "--head", "folder"],
        ["policy", "check", "gone"],
        ["policy", "check", "folder"],
    ],
)
def test_a_command_ends_with_one_line(arguments, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert cli.main(arguments) == 1
    assert len(caplog.messages) == 1
    assert caplog.messages[0].isprintable()


def test_a_key_of_an_unknown_kind_is_refused(signed, tmp_path, host):
    body = base64.b64encode(bytes.fromhex("3012300806062a0304050607030600deadbeef")).decode()
    for kind in ("PUBLIC KEY", "PRIVATE KEY"):
        path = tmp_path / f"{kind[:2]}.pem"
        path.write_text(f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----\n")
        path.chmod(0o600)
        refused(SignatureError, keys.private_key, path)
        refused(SignatureError, keys.public_keys, {"odd": path})
