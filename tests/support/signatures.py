"""What the tests of signatures share: refusals by kind, and saved images with attestations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from modular_lora_guard.modular_lora.provenance import attested, keys
from modular_lora_guard.modular_lora.provenance.attested import KEY
from modular_lora_guard.modular_lora.provenance.keys import SignatureError
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def refused(kind: type[SignatureError], call, *arguments, **options) -> str:
    """The message of the refusal: this very kind, one printable line."""
    with pytest.raises(SignatureError) as error:
        call(*arguments, **options)
    assert type(error.value) is kind, error.value
    assert str(error.value).isprintable()
    return str(error.value)


def saved_image(path: Path, key: Path | None, **changes) -> dict:
    """A PNG with a record in its text, as nodes/save.py writes it."""
    pixels = np.random.default_rng(3).integers(0, 255, (6, 8, 3), np.uint8)
    record = {"status": "guarded", "net_strength": {"a.safetensors": 0.9731234}, **changes}
    record |= attested.pixels(pixels)
    if key is not None:
        record = attested.signed(record, keys.private_key(key))
    save_png(path, Image.fromarray(pixels), record)
    return record


def save_png(path: Path, image: Image.Image, record: dict) -> None:
    info = PngInfo()
    info.add_text(KEY, json.dumps(record, sort_keys=True))
    image.save(path, pnginfo=info)
