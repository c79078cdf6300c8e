"""Data sets of real files: both forms, the report, what is loaded, and the batches."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from modular_lora_guard.training.data.batches import Plan
from modular_lora_guard.training.data.config import DatasetConfig, check_folders, from_folders, from_toml
from modular_lora_guard.training.data.dataset import DatasetReport, format_report, load, scan
from modular_lora_guard.training.data.images import decode
from PIL import Image, ImageFile
from support.errors import refuses


def paint(path: Path, size: tuple[int, int] = (64, 64), colour: object = "red", mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def noise(path: Path, size: tuple[int, int] = (96, 96), seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)
    return path


def toml(folder: Path, text: str) -> Path:
    path = folder / "data.toml"
    path.write_text(text.replace("HERE", folder.as_posix()), encoding="utf-8")
    return path


def looked_at(folder: Path, **defaults) -> tuple[DatasetConfig, DatasetReport]:
    config = from_folders(folder, defaults={"resolution": 64} | defaults)
    return config, scan(config)


@pytest.fixture
def messy(tmp_path) -> Path:
    """A folder with everything that goes wrong in one."""
    folder = tmp_path / "train" / "3_sks robot"
    noise(folder / "good.png").with_suffix(".txt").write_text("sks, robot\nsecond line")
    shutil.copy(folder / "good.png", folder / "twin.png")
    (folder / "twin.caption").write_text("sks, " + "word " * 90)
    noise(folder / "cut.png", seed=1).write_bytes((folder / "cut.png").read_bytes()[:9000])
    noise(folder / "cut.jpg", seed=2).write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    noise(folder / "cut.webp", seed=3, lossless=True).write_bytes((folder / "cut.webp").read_bytes()[:9000])
    (folder / "zero.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>")
    paint(folder / "glass.png", colour=(0, 0, 0, 0), mode="RGBA").with_suffix(".txt").write_text(" \n")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    (folder / "moving.txt").write_bytes(b"K\xe4tzchen")
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(folder / "turned.jpg", (80, 40), exif=exif)
    paint(folder / "small.bmp", (16, 16))
    paint(folder / "old.gif")
    (folder / "alone.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"finder")
    (folder / "good.npz").write_bytes(b"cache")
    paint(folder / "more" / "inside.png")
    paint(tmp_path / "train" / "notes" / "a.png")
    paint(tmp_path / "train" / "0_none" / "a.png")
    paint(tmp_path / "train" / "loose.png")
    return tmp_path / "train"


def test_the_report_names_everything_that_is_wrong(messy):
    _, report = looked_at(messy)
    stems = {
        kind: [re.split(r"[:( ]", name.rpartition("/")[2])[0] for name in names]
        for kind, names in report.findings.items()
    }
    assert stems == {
        "broken": ["cut.jpg", "cut.png", "cut.webp", "page.jpg", "zero.png"],
        "empty_captions": ["glass.png"],
        "unreadable_captions": ["moving.webp"],
        "without_caption": ["small.bmp", "turned.jpg"],
        "duplicates": ["twin.png"],
        "upscaled": ["small.bmp", "turned.jpg"],
        "cut_off": ["turned.jpg"],
        "turned": ["turned.jpg"],
        "transparent": ["glass.png"],
        "animated": ["moving.webp"],
        "further_lines": ["good.png"],
        "long_captions": ["twin.png"],
        "captions_alone": ["alone.txt"],
        "unsupported": ["old.gif"],
        "ignored_folders": ["0_none", "notes", "train", "more"],
    }
    assert [p.path.name for p in report.images] == [
        "glass.png", "good.png", "moving.webp", "small.bmp", "turned.jpg", "twin.png",
    ]  # fmt: skip
    assert (report.draws, report.folders, report.problems) == (18, (("3_sks robot", 6, 3, False),), ())
    assert {p.path.stem: p.caption for p in report.images}["turned"] == "sks robot"
    assert report.findings["ignored_folders"][2] == "train: 1 images beside the numbered folders"


def test_the_text_of_a_report_has_its_counts_and_names(messy):
    _, report = looked_at(messy)
    text = format_report(report)
    assert "6 images, 18 draws in 18 batches an epoch" in text
    broken = "5 broken images and clips, LEFT OUT: mend or delete them"
    assert f"{broken}: 3_sks robot/cut.jpg: damaged or truncated (OSError" in text
    assert "3_sks robot/zero.png: empty file (0 bytes)" in text
    assert "STOPS TRAINING" not in text
    assert all(text.count(f"  {len(names)} ") for names in report.findings.values())
    assert "bucket 64×64: 6 images, 18 draws" in text


def test_only_a_data_set_without_a_readable_image_stops_training(tmp_path):
    (tmp_path / "1_x").mkdir()
    (tmp_path / "1_x" / "a.png").write_bytes(b"")
    config, report = looked_at(tmp_path)
    assert report.problems == (f"{tmp_path}: none of 1 images can be trained on: see below, or correct the folder.",)
    assert "STOPS TRAINING" in format_report(report)
    with refuses("dataset.not-usable", "none of 1"):
        Plan(config, report, 0)


def test_folders_without_numbers_are_an_error_that_says_how_to_name_them(tmp_path):
    paint(tmp_path / "robot" / "a.png")
    with refuses("dataset.no-repeats", "10_name", "robot"):
        from_folders(tmp_path)
    with refuses("dataset.no-folder", "nowhere"):
        from_folders(tmp_path / "nowhere")


def test_truncated_files_are_found_where_the_host_lets_them_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = noise(tmp_path / "a.jpg").read_bytes()
    with refuses("image.damaged"):
        decode(data[: len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    assert decode(data).image.size == (96, 96)


def test_decompression_bombs_have_a_clear_line_whatever_the_host_has_set(tmp_path, monkeypatch):
    data = paint(tmp_path / "a.png", (16000, 12000), 0, "1").read_bytes()
    with refuses("image.too-large"):
        decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with refuses("image.too-large", "16000×12000", "178956970"):
        decode(data)


@pytest.mark.parametrize(
    ("mode", "colour", "ending"),
    [
        ("L", 128, "png"),
        ("I;16", 128 * 257, "png"),
        ("P", 7, "png"),
        ("1", 1, "png"),
        ("LA", (128, 255), "png"),
        ("CMYK", (0, 127, 127, 0), "jpg"),
        ("RGBA", (9, 9, 9, 255), "webp"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, ending):
    found = decode(paint(tmp_path / f"a.{ending}", colour=colour, mode=mode).read_bytes())
    assert (found.image.mode, found.image.size, found.alpha) == ("RGB", (64, 64), None)
    if colour in (128, 128 * 257, (128, 255)):
        assert found.image.getpixel((5, 5)) == (128, 128, 128)


def test_transparent_parts_are_white(tmp_path):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    found = decode((tmp_path / "a.png").read_bytes())
    assert (found.image.getpixel((5, 5)), found.image.getpixel((60, 5))) == ((255, 0, 0), (255, 255, 255))
    assert (found.alpha.getpixel((5, 5)), found.alpha.getpixel((60, 5))) == (255, 0)


def test_what_is_loaded_is_upright_in_its_bucket_and_can_be_mirrored(tmp_path):
    image = Image.new("RGB", (128, 64), "blue")
    image.paste("red", (0, 0, 128, 32))  # red above blue; EXIF turns the top to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "1_x").mkdir()
    image.save(tmp_path / "1_x" / "a.png", exif=exif)
    _, report = looked_at(tmp_path, resolution=64)
    found = report.images[0]
    pixels, mask = load(found)
    assert (found.size, pixels.shape, pixels.dtype, mask) == ((64, 128), (64, 64, 3), torch.float32, None)
    assert torch.equal(pixels[10, -1], torch.tensor([1.0, 0, 0]))
    assert torch.equal(load(found, flipped=True)[0], pixels.flip(1))


def test_images_are_averaged_when_they_shrink_and_interpolated_when_they_grow(tmp_path):
    (tmp_path / "1_x").mkdir()
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[::2] = 200  # rows of 200 and 0
    Image.fromarray(stripes).save(tmp_path / "1_x" / "a.png")
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 16:] = 200
    Image.fromarray(halves).save(tmp_path / "1_x" / "b.png")
    shrunk, grown = (load(image)[0] for image in looked_at(tmp_path)[1].images)
    assert torch.equal(shrunk, torch.full((64, 64, 3), 100 / 255))
    assert grown.shape == (64, 64, 3)
    assert 0.1 < grown[5, 32, 0] < 200 / 255
    for image in looked_at(tmp_path, resize_interpolation="nearest")[1].images:
        assert set((load(image)[0] * 255).round().unique().tolist()) <= {0.0, 200.0}


def test_an_image_that_changed_after_the_report_is_an_error(tmp_path):
    file = noise(tmp_path / "1_x" / "a.png")
    _, report = looked_at(tmp_path)
    noise(file, seed=9)
    with refuses("image.changed"):
        load(report.images[0])


def test_alpha_and_mask_images_are_masks_at_latent_resolution(tmp_path):
    image = Image.new("RGBA", (64, 64), (9, 9, 9, 0))
    image.paste((9, 9, 9, 255), (0, 0, 32, 64))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "p.png")
    paint(tmp_path / "b" / "p.png")
    paint(tmp_path / "b" / "q.png")
    paint(tmp_path / "masks" / "p.png", colour=(127, 255, 255))
    paint(tmp_path / "masks" / "z.png")
    text = """
        [[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = "HERE/a"
        alpha_mask = true
        [[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = "HERE/b"
        conditioning_data_dir = "HERE/masks"
    """
    report = scan(from_toml(toml(tmp_path, text)))
    (_, alpha), (_, grey), (_, none) = (load(image) for image in report.images)
    assert alpha.tolist() == [[1.0] * 4 + [0.0] * 4] * 8
    assert torch.equal(load(report.images[0], flipped=True)[1], alpha.flip(1))
    assert torch.allclose(grey, torch.full((8, 8), 127 / 255))
    assert none is None
    before = report.dataset_sha256
    paint(tmp_path / "masks" / "p.png", colour=(255, 0, 0, 0), mode="RGBA")
    changed = scan(from_toml(toml(tmp_path, text)))
    assert changed.findings["empty_masks"] == ("b/p.png",)
    assert [p.name for p in changed.images] == ["a/p.png", "b/q.png"]
    assert changed.dataset_sha256 != before
    assert "transparent" not in report.findings
    assert report.findings["missing_masks"] == ("b/q.png",)
    assert report.findings["unused_masks"] == ("z.png",)


def test_the_hash_knows_files_captions_and_settings_but_no_paths(tmp_path):
    for name in ("one", "two"):
        for index in range(3):
            noise(tmp_path / name / "2_x" / f"{index}.png", seed=index).with_suffix(".txt").write_text(f"c{index}")
    one, two = (looked_at(tmp_path / name)[1].dataset_sha256 for name in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "2_x").rename(tmp_path / "two" / "2_y")
    for old, new in (("0", "9"), ("2", "0")):
        for ending in (".png", ".txt"):
            (tmp_path / "two" / "2_y" / f"{old}{ending}").rename(tmp_path / "two" / "2_y" / f"{new}{ending}")
    assert looked_at(tmp_path / "two")[1].dataset_sha256 == one
    changed = {
        looked_at(tmp_path / "one", **change)[1].dataset_sha256 for change in ({"flip_aug": True}, {"keep_tokens": 2})
    }
    (tmp_path / "two" / "2_y" / "0.txt").write_text("other")
    changed.add(looked_at(tmp_path / "two")[1].dataset_sha256)
    (tmp_path / "one" / "2_x").rename(tmp_path / "one" / "3_x")
    changed.add(looked_at(tmp_path / "one")[1].dataset_sha256)
    assert len(changed - {one}) == 4


CASCADE = """
    [general]
    num_repeats = 2
    shuffle_caption = true
    caption_extension = "txt"
    color_aug = false
    [[datasets]]
    resolution = [64, 128]
    batch_size = 3
    keep_tokens = 1
    enable_bucket = true
    [[datasets.subsets]]
    image_dir = "HERE/a"
    num_repeats = 5
    class_tokens = "sks"
    [[datasets.subsets]]
    image_dir = "b"
    is_reg = true
    keep_tokens = 4
    [[datasets]]
    [[datasets.subsets]]
    image_dir = "HERE/a"
    caption_extension = ".caption"
"""


@pytest.fixture
def pair(tmp_path) -> Path:
    for name in ("a", "b"):
        noise(tmp_path / name / "p.png").with_suffix(".txt").write_text("x, y")
    return tmp_path


def test_values_fall_from_general_to_data_sets_to_subsets(pair):
    config = from_toml(toml(pair, CASCADE), {"num_repeats": 9, "batch_size": 7, "flip_aug": True})
    (first, second), (third,) = (dataset.subsets for dataset in config.datasets)
    assert [s.num_repeats for s in (first, second, third)] == [5, 2, 2]
    assert [s.rules.keep_tokens for s in (first, second, third)] == [1, 4, 0]
    assert [s.caption_endings for s in (first, third)] == [(".txt",), (".caption",)]
    assert all(s.rules.shuffle_caption and s.flip_aug for s in (first, second, third))
    assert [dataset.batch_size for dataset in config.datasets] == [3, 7]
    assert config.datasets[0].buckets.resolution == (64, 128)
    assert (second.image_dir, second.is_reg) == (pair / "b", True)


def test_bucket_limits_are_rounded_outwards_to_the_step(pair):
    options = "enable_bucket = true\nresolution = 512\nmin_bucket_reso = 300\nmax_bucket_reso = 1000"
    buckets = from_toml(toml(pair, GOOD.replace("s]]", f"s]]\n{options}", 1))).datasets[0].buckets
    assert (buckets.min_bucket_reso, buckets.max_bucket_reso) == (256, 1024)


def test_a_caption_extension_that_is_set_is_the_only_one_and_a_hint_names_the_other(pair):
    report = scan(from_toml(toml(pair, CASCADE)))
    assert report.findings["without_text"] == ("a/p.png (there is p.txt, caption_extension is .caption)",)


GOOD = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "HERE/a"\n'
WRONG = {
    "[general]\nshufle_caption = true\n" + GOOD: (
        "dataset.unknown-key",
        "[general]",
        "'shufle_caption'",
        "'shuffle_caption'",
    ),
    GOOD + "batch_size = 2\n": (
        "dataset.unknown-key",
        "[[datasets]] 1, [[datasets.subsets]] 1: 'batch_size'",
        " [[datasets]]",
    ),
    "[general]\nis_reg = true\n" + GOOD: ("dataset.unknown-key", "'is_reg'", "[[datasets.subsets]]"),
    GOOD + "color_aug = true\n": ("dataset.not-taken", "color_aug = True"),
    GOOD + "random_crop = true\n": ("dataset.not-taken", "random_crop = True"),
    GOOD + "face_crop_aug_range = [1.0, 2.0]\n": ("dataset.not-taken", "face_crop_aug_range = "),
    GOOD + 'metadata_file = "m.json"\n': ("dataset.no-metadata", "m.json"),
    "[general]\nmetadata_file = 'm.json'\n" + GOOD: ("dataset.unknown-key", "'metadata_file'"),
    "[general]\nprior_loss_weight = 0.5\n" + GOOD: ("dataset.not-taken", "prior_loss_weight"),
    GOOD + "num_repeats = 0\n": ("dataset.wrong-value", "num_repeats = 0", "1"),
    GOOD + "num_repeats = true\n": ("dataset.wrong-value", "num_repeats = True"),
    GOOD + 'caption_separator = ""\n': ("dataset.wrong-value", "caption_separator = ''"),
    GOOD + 'flip_aug = "yes"\n': ("dataset.wrong-value", "flip_aug = 'yes'"),
    GOOD + "caption_dropout_rate = 1.5\n": ("dataset.wrong-value", "caption_dropout_rate = 1.5", "0 … 1"),
    GOOD + 'resize_interpolation = "best"\n': ("dataset.wrong-value", "resize_interpolation = 'best'", "nearest"),
    GOOD.replace("HERE/a", "HERE/c"): ("dataset.no-folder", "/c "),
    "[[datasets]]\nresolution = [64]\n": ("dataset.wrong-value", "resolution = [64]", "[width, height]"),
    GOOD.replace("s]]", "s]]\nresolution = 100", 1): ("dataset.wrong-value", "resolution = 100", "8"),
    GOOD.replace("s]]", "s]]\nenable_bucket = true\nmin_bucket_reso = 640", 1): (
        "dataset.wrong-value",
        "resolution = 512",
        "min_bucket_reso 640",
    ),
    GOOD.replace("s]]", "s]]\nenable_bucket = true\nbucket_reso_steps = 20", 1): (
        "dataset.wrong-value",
        "bucket_reso_steps = 20",
        "8",
    ),
    GOOD.replace("s]]", "s]]\nenable_bucket = true\nresolution = 48", 1): (
        "dataset.wrong-value",
        "bucket_reso_steps = 64",
        "resol",
    ),
    "[[datasets]]\n": ("dataset.nothing-in-it", "[[datasets]] 1", "[[datasets.subsets]]"),
    "": ("dataset.nothing-in-it", "[[datasets]]"),
    "datasets = 3": ("dataset.wrong-value", "datasets = 3"),
    "[[datasets]]\n[[datasets.subsets]]\n": ("dataset.nothing-in-it", "image_dir"),
    "[genral]\n" + GOOD: ("dataset.unknown-key", "'genral'", "'general'"),
    "[general\n": ("dataset.toml",),
    GOOD + 'conditioning_data_dir = "HERE/b"\nalpha_mask = true\n': (
        "dataset.masks",
        "alpha_mask",
        "conditioning_data_dir",
    ),
    GOOD + 'conditioning_data_dir = "HERE/b"\n[[datasets.subsets]]\nimage_dir = "HERE/b"\n': (
        "dataset.masks",
        "1 of 2",
    ),
}


@pytest.mark.parametrize("text", WRONG)
def test_errors_name_file_table_key_and_remedy(pair, text):
    code, *named = WRONG[text]
    with refuses(code, "data.toml", *named) as caught:
        check_folders(from_toml(toml(pair, text)))
    assert "\n" not in str(caught.value) or "TOML" in str(caught.value)


def test_captions_are_found_by_any_ending_that_is_asked_for(pair):
    (pair / "a" / "p.wd14.TXT").write_text("tagged")
    text = GOOD + 'caption_extension = "wd14.txt"\n'
    report = scan(from_toml(toml(pair, text)))
    assert [(p.caption, p.caption_ending) for p in report.images] == [("tagged", ".wd14.TXT")]
    (plain,) = scan(from_toml(toml(pair, GOOD))).images
    assert (plain.caption, plain.caption_ending) == ("x, y", ".txt")
    assert set(report.findings) == {"upscaled"}


def test_the_same_folder_twice_in_a_data_set_counts_once(pair):
    report = scan(from_toml(toml(pair, GOOD + '[[datasets.subsets]]\nimage_dir = "HERE/a"\n')))
    assert len(report.images) == 1
    assert report.findings["ignored_folders"] == ("a: given twice in a data set, the first counts",)
