"""The attestation inside JPEG and WebP files: a packet that other readers find, and a hash of everything else."""

from __future__ import annotations

import io
from contextlib import suppress
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.provenance import lossy, marking
from modular_lora_guard.modular_lora.provenance.keys import SignatureError, Tampered
from PIL import Image
from support.damage import damaged
from support.errors import refuses
from support.signatures import refused

FORMATS = ["JPEG", "WEBP"]
SIZE = (37, 21)  # odd, so that a chunk of odd length is among what is written
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"


def encoded(format: str, channels: int = 3, quality: int = 90) -> bytes:
    pixels = np.random.default_rng(4).integers(0, 255, (SIZE[1], SIZE[0], channels), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, quality=quality)
    return stream.getvalue()


def opened(raw: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(raw))
    image.load()
    return image


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_another_reader_finds_the_packet_and_the_pixels_stay(format, text):
    raw = encoded(format)
    packet = marking.packet(marking.TRAINED, text)
    made = lossy.with_packet(raw, packet, SIZE)
    image = opened(made)
    assert image.info["xmp"] == packet
    assert image.tobytes() == opened(raw).tobytes()
    found = ElementTree.fromstring(packet.decode().partition("?>")[2])
    assert [one.text for one in found.iter(IPTC)] == [marking.TRAINED]
    assert marking.attestation_in(packet) == text
    assert lossy.read("a", made).packet == packet


@pytest.mark.parametrize("format", FORMATS)
def test_the_hash_does_not_change_with_the_packet_and_does_with_anything_else(format):
    raw = encoded(format)
    empty, full = (lossy.read("a", lossy.with_packet(raw, packet, SIZE)) for packet in (b"", b"longer" * 9))
    assert empty.data_sha256 == full.data_sha256
    assert not full.credentials
    other = lossy.read("a", lossy.with_packet(encoded(format, quality=89), b"", SIZE))
    assert other.data_sha256 != empty.data_sha256


def test_an_image_with_an_alpha_channel_keeps_it():
    made = lossy.with_packet(encoded("WEBP", 4), b"packet", SIZE)
    assert opened(made).mode == "RGBA"
    assert opened(made).info["xmp"] == b"packet"


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_whatever_is_changed_beside_the_packet_changes_the_hash_or_is_refused(format, data):
    packet = b"packet-of-one-byte-each"
    whole = lossy.with_packet(encoded(format), packet, SIZE)
    first = whole.index(packet)
    raw = damaged(data, whole, kept=range(first, first + len(packet)))
    if raw == whole:
        return
    with suppress(SignatureError):
        found = lossy.read("a", raw)
        assert found.packet != packet or found.data_sha256 != lossy.read("a", whole).data_sha256


@pytest.mark.parametrize("format", FORMATS)
def test_a_second_packet_is_refused(format):
    made = lossy.with_packet(lossy.with_packet(encoded(format), b"one", SIZE), b"two", SIZE)
    assert "more than one XMP packet" in refused(Tampered, lossy.read, "a", made)


def test_what_is_neither_is_refused():
    for raw in (b"", b"\x89PNG\r\n\x1a\n", b"RIFF\x04\x00\x00\x00WAVE"):
        refused(SignatureError, lossy.read, "a.jpg", raw)
    for raw in (b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x00", b"\xff\xd8\xff\xe0\xff\xff", b"RIFF\x05\x00\x00\x00WEBPV"):
        refused(Tampered, lossy.read, "a.jpg", raw)


def test_an_attestation_that_a_jpeg_cannot_hold_is_refused_and_a_webp_takes_it():
    packet = marking.packet(marking.TRAINED, "x" * 70_000)
    with refuses("save.too-long", "70"):
        lossy.with_packet(encoded("JPEG"), packet, SIZE)
    assert lossy.read("a", lossy.with_packet(encoded("WEBP"), packet, SIZE)).packet == packet
