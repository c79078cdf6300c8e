"""Text files in what editors and shells write: recognised, or refused, but never read as noise."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.files.texts import TextError, decode

ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
LETTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff")
WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=60)
QUICK = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", ["gloss, cat", "ein Kätzchen, 猫\n", "a", "Кот, b\r\n", "猫 and 犬, by the sea"])
def test_a_text_is_read_in_every_encoding_with_a_mark_and_without(encoding, text):
    data = text.encode(encoding)
    assert decode(data) == decode(MARKS[encoding] + data) == text


@QUICK
@given(WORDS, st.sampled_from(ENCODINGS))
def test_any_ascii_is_read_without_a_mark(text, encoding):
    assert decode(text.encode(encoding)) == text


@QUICK
@given(st.text(LETTERS, max_size=60), st.sampled_from(ENCODINGS))
def test_any_text_is_read_with_its_mark(text, encoding):
    assert decode(MARKS[encoding] + text.encode(encoding)) == text


@QUICK
@example(b"\x1a\x04>\x04B\x04")
@given(st.binary(max_size=80))
def test_any_bytes_are_a_text_without_zeros_or_an_error_of_ours(data):
    try:
        text = decode(data)
    except TextError:
        return
    assert "\0" not in text


@pytest.mark.parametrize(
    "data",
    [
        "Кот".encode("utf-16-le"),  # no ASCII letter: bytes of UTF-8 control characters
        "Kätzchen".encode("latin-1"),
        b"a cat\0",
        b"cat\0dog\0",
        b"\0\0\0\0",
        b"\xff\xfea\0b",  # cut in the middle of a letter
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "g\0l\0o\0s\0s\0".encode("utf-16"),  # encoded twice
    ],
)
def test_what_is_no_text_is_refused(data):
    with pytest.raises(TextError):
        decode(data)
