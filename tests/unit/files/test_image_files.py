"""One way to open images: whatever a file stores, every part of the pack sees what a viewer shows."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from modular_lora_guard.audit import images as audit_images
from modular_lora_guard.gate import labelled
from modular_lora_guard.gate.settings import Settings
from modular_lora_guard.modular_lora.files.images import ImageError, decode, decode_mask, under
from modular_lora_guard.training.data.config import from_folders
from modular_lora_guard.training.data.dataset import load, scan
from modular_lora_guard.training.data.images import thumbnail
from PIL import Image
from support.brightness import Brightness

SIDE = 64


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(values: np.ndarray, clear: int | None = None) -> bytes:
    """A 16-bit grey PNG, written by hand: h w, uint16; ``clear``: the grey that is transparent (tRNS)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0, 0, 0, 0)
    trns = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    data = chunk(b"IHDR", head) + trns + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def palette(clear: bool) -> bytes:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    return saved(image, transparency=1) if clear else saved(image)


FULL = np.full((SIDE, SIDE), 20000, np.uint16)
GREY = round(255 * 20000 / 65535)
KINDS = {  # what is stored -> (bytes, the colour that is seen)
    "grey": (saved(Image.new("L", (SIDE, SIDE), 77)), (77, 77, 77)),
    "grey of 16 bits": (png16(FULL), (GREY,) * 3),
    "dark grey of 16 bits": (png16(np.full_like(FULL, 200)), (1, 1, 1)),
    "grey of 16 bits, transparent": (png16(FULL, 20000), (255, 255, 255)),
    "palette": (palette(False), (0, 255, 0)),
    "palette, transparent": (palette(True), (255, 255, 255)),
    "alpha": (saved(Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 0))), (255, 255, 255)),
    "half alpha": (saved(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 51))), (204, 204, 204)),
    "grey with alpha": (saved(Image.new("LA", (SIDE, SIDE), (0, 0))), (255, 255, 255)),
    "CMYK": (saved(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "webp": (saved(Image.new("RGB", (SIDE, SIDE), (5, 6, 7)), "WEBP", lossless=True), (5, 6, 7)),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path) -> tuple[Path, np.ndarray]:
    data, colour = KINDS[request.param]
    (tmp_path / "1_x").mkdir()
    path = tmp_path / "1_x" / "a.png"
    path.write_bytes(data)
    return path, np.array(colour)


def test_every_part_sees_the_same_image(kind):
    """Data set, its sheet, the audit's folders and the gate's own error, against the colour that was stored."""
    path, colour = kind
    (image,) = scan(from_folders(path.parent.parent, defaults={"resolution": SIDE})).images
    (seen,) = labelled._images(path.parent, [])
    for found in (
        255 * load(image)[0].numpy(),
        np.asarray(thumbnail(path, SIDE)),
        audit_images.read([path], SIDE, SIDE)[0],
        255 * seen,
        np.asarray(decode(path.read_bytes()).image),
    ):
        assert np.abs(found.reshape(-1, 3) - colour).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_part_sees_it_upright(orientation, tmp_path):
    """The mark is in the upper left corner of what is seen, wherever it was stored."""
    upright = Image.new("RGB", (96, 64), "blue")
    upright.paste("red", (0, 0, 32, 32))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> Image.Transpose that stores it so
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    (tmp_path / "1_x").mkdir()
    path = tmp_path / "1_x" / "a.jpg"
    path.write_bytes(saved(stored, "JPEG", quality=100, exif=exif(orientation)))
    (image,) = scan(from_folders(tmp_path, defaults={"resolution": SIDE})).images
    (seen,) = labelled._images(path.parent, [])
    assert image.size == (96, 64)
    for found in (255 * seen, np.asarray(thumbnail(path, 96)), audit_images.read([path], 96, 64)[0]):
        assert found.shape == (64, 96, 3)
        assert np.abs(found[8, 8] - np.array([255, 0, 0])).max() < 8
        assert np.abs(found[8, -8] - np.array([0, 0, 255])).max() < 8


def test_a_phones_second_image_is_no_animation_and_frames_are(tmp_path):
    first, second = Image.new("RGB", (SIDE, SIDE), "red"), Image.new("RGB", (32, 32), "blue")
    phone = decode(saved(first, "MPO", save_all=True, append_images=[second]))
    assert (phone.frames, phone.image.size, phone.image.getpixel((5, 5))[0] > 200) == (1, (SIDE, SIDE), True)
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    for form in ("WEBP", "PNG", "GIF"):
        assert decode(saved(frames[0], form, save_all=True, append_images=frames[1:])).frames == 2


def test_a_mask_is_its_red_channel_on_black():
    half = np.full((4, 4, 4), 255, np.uint8)
    half[:, :2, 3] = 0
    white = decode_mask(saved(Image.fromarray(half)))
    assert (white.has_alpha, white.coloured) == (True, False)
    assert np.asarray(white.image).tolist() == [[0, 0, 255, 255]] * 4
    grey = decode_mask(png16(np.full((4, 4), 20000, np.uint16)))
    assert (grey.has_alpha, grey.coloured, grey.image.getpixel((0, 0))) == (False, False, GREY)
    green = decode_mask(saved(Image.new("RGB", (4, 4), (0, 255, 0))))
    assert (green.coloured, green.image.getbbox()) == (True, None)
    with pytest.raises(ImageError):
        decode_mask(b"no picture")


def test_files_that_are_not_read_are_named_and_side_files_are_not(tmp_path):
    for name in ("a.png", "b.JPG", "c.heic", "d.tif", "notes.txt", ".DS_Store", "Thumbs.db", "a.npz"):
        (tmp_path / name).write_bytes(KINDS["grey"][0])
    found, others = under(tmp_path)
    assert [p.name for p in found] == ["a.png", "b.JPG"]
    assert [p.name for p in others] == ["c.heic", "d.tif", "notes.txt"]
    (line,) = audit_images.left_out("task_pictures", str(tmp_path))
    assert line.startswith("task_pictures: 3 files ")
    assert line.endswith("c.heic; d.tif; notes.txt")
    assert audit_images.left_out("task_pictures", "") == []
    error = labelled.measure(tmp_path, tmp_path.parent, Brightness(), Settings({"red": 0.5}))
    assert (error.missed.n, error.others[:3]) == (2, tuple(f"{tmp_path.name}/{p.name}" for p in others))
