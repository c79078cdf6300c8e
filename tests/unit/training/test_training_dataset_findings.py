"""What a data set's report finds that would train something else than was meant: masks, crops, captions, twins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from modular_lora_guard.training.data.config import DatasetError, from_folders, from_toml
from modular_lora_guard.training.data.dataset import DatasetReport, format_report, load, scan
from modular_lora_guard.training.data.export import to_toml
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.task.train import configure
from PIL import Image
from support.errors import refuses


def noise(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)
    return path


def rectangle(path: Path, size: tuple[int, int], box: tuple[int, int, int, int], mode: str = "L") -> Path:
    """A mask: white in the box and black around it, or with alpha white on nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, 0 if mode == "L" else (255, 255, 255, 0))
    image.paste("white", box)
    image.save(path)
    return path


def masked(folder: Path, more: str = "") -> DatasetReport:
    text = f"[general]\nresolution = 64\n{more}[[datasets]]\n[[datasets.subsets]]\n"
    text += f'image_dir = "{(folder / "a").as_posix()}"\nconditioning_data_dir = "{(folder / "m").as_posix()}"\n'
    (folder / "d.toml").write_text(text)
    return scan(from_toml(folder / "d.toml"))


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_mask_in_alpha_is_the_same_mask_as_in_grey(mode, tmp_path):
    noise(tmp_path / "a" / "p.png").with_suffix(".txt").write_text("x")
    rectangle(tmp_path / "m" / "p.png", (64, 64), (32, 0, 64, 64), mode)
    report = masked(tmp_path)
    assert load(report.images[0])[1].tolist() == [[0.0] * 4 + [1.0] * 4] * 8
    assert report.findings.get("transparent_masks", ()) == (("p.png",) if mode == "RGBA" else ())
    if mode == "RGBA":
        with refuses("dataset.kohya", "p.png"):
            to_toml(from_toml(tmp_path / "d.toml"), report)


def test_a_mask_of_another_size_is_scaled_and_one_of_another_shape_is_refused(tmp_path):
    for name, size in (("half", (64, 32)), ("rounded", (43, 21)), ("turned", (64, 128)), ("square", (64, 64))):
        noise(tmp_path / "a" / f"{name}.png", (128, 64)).with_suffix(".txt").write_text("x")
        rectangle(tmp_path / "m" / f"{name}.png", size, (0, 0, *size))
    report = masked(tmp_path)
    assert [p.path.stem for p in report.images] == ["half", "rounded"]
    assert [name.split(":")[0] for name in report.findings["odd_masks"]] == ["a/square.png", "a/turned.png"]
    assert "64×128 is another shape than its image's 128×64" in report.findings["odd_masks"][1]
    assert all(torch.equal(load(image)[1], torch.ones(8, 8)) for image in report.images)
    with refuses("dataset.kohya", "a/square.png", "64×64"):
        to_toml(from_toml(tmp_path / "d.toml"), report)


def test_an_image_that_would_train_nothing_is_left_out_and_said(tmp_path):
    for name in ("black", "cropped", "shown"):
        noise(tmp_path / "a" / f"{name}.png", (192, 64)).with_suffix(".txt").write_text("x")
    rectangle(tmp_path / "m" / "black.png", (192, 64), (0, 0, 0, 0))
    rectangle(tmp_path / "m" / "cropped.png", (192, 64), (0, 0, 60, 64))  # the square in the middle is 64 … 128
    rectangle(tmp_path / "m" / "shown.png", (192, 64), (60, 0, 80, 64))
    report = masked(tmp_path)
    assert report.findings["empty_masks"] == ("a/black.png", "a/cropped.png")
    assert [p.name for p in report.images] == ["a/shown.png"]
    (tmp_path / "m" / "shown.png").unlink()
    (tmp_path / "a" / "shown.png").unlink()
    assert "none of 2 images" in masked(tmp_path).problems[0]


def test_alpha_masks_are_judged_too(tmp_path):
    noise(tmp_path / "a" / "opaque.png")
    Image.new("RGBA", (64, 64), (1, 2, 3, 0)).save(tmp_path / "a" / "clear.png")
    text = (
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nalpha_mask = true\nimage_dir = "{tmp_path.as_posix()}/a"'
    )
    (tmp_path / "d.toml").write_text(text)
    report = scan(from_toml(tmp_path / "d.toml"))
    assert (report.findings["empty_masks"], report.findings["without_alpha"]) == (("a/clear.png",), ("a/opaque.png",))


def test_coloured_masks_are_said(tmp_path):
    noise(tmp_path / "a" / "p.png")
    (tmp_path / "m").mkdir()
    Image.new("RGB", (64, 64), (128, 255, 0)).save(tmp_path / "m" / "p.png")
    assert masked(tmp_path).findings["coloured_masks"] == ("p.png",)


@pytest.mark.parametrize(
    ("size", "share"), [((4096, 256), "75%"), ((256, 4096), "75%"), ((512, 512), ""), ((640, 384), "")]
)
def test_an_image_that_its_bucket_cuts_is_said(size, share, tmp_path):
    noise(tmp_path / "1_x" / "a.png", size)
    report = scan(from_folders(tmp_path, defaults={"resolution": 512}))
    assert bool(report.findings.get("cut_off")) is bool(share)
    if share:
        assert f"{share} of {size[0]}×{size[1]} is cut off" in format_report(report)


def test_images_that_share_one_caption_are_said(tmp_path):
    for name in ("a.png", "a.webp", "b.png", "c.bmp", "c.png"):
        noise(tmp_path / "1_x" / name, seed=ord(name[0]) + len(name))
    for name in ("a", "b"):
        (tmp_path / "1_x" / f"{name}.txt").write_text(name)
    report = scan(from_folders(tmp_path, defaults={"resolution": 64}))
    assert report.findings["shared_captions"] == ("1_x/a.png = 1_x/a.webp",)


def test_duplicates_are_known_by_their_pixels(tmp_path):
    noise(tmp_path / "1_x" / "a.png")
    noise(tmp_path / "1_x" / "b.webp", lossless=True)
    noise(tmp_path / "1_x" / "c.bmp")
    noise(tmp_path / "1_x" / "d.png", seed=1)
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(tmp_path / "1_x" / "a.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "1_x" / "e.png", exif=exif)
    report = scan(from_folders(tmp_path, defaults={"resolution": 64}))
    assert report.findings["duplicates"] == ("1_x/a.png = 1_x/b.webp = 1_x/c.bmp = 1_x/e.png",)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_captions_are_read_in_what_editors_write_and_sd_scripts_is_not_given_them(encoding, tmp_path):
    noise(tmp_path / "1_x" / "a.png").with_suffix(".txt").write_bytes("gloss, Kätzchen".encode(encoding))
    config = from_folders(tmp_path, defaults={"resolution": 64})
    report = scan(config)
    assert report.images[0].caption == "gloss, Kätzchen"
    if encoding == "utf-8-sig":
        assert to_toml(config, report)
    else:
        assert report.findings["other_encodings"] == ("1_x/a.png",)
        with refuses("dataset.kohya", "1_x/a.png"):
            to_toml(config, report)


def test_a_caption_that_is_no_text_is_not_trained(tmp_path):
    noise(tmp_path / "1_x" / "a.png").with_suffix(".txt").write_bytes("Кот".encode("utf-16-le"))
    report = scan(from_folders(tmp_path, defaults={"resolution": 64}))
    assert (report.images[0].caption, len(report.findings["unreadable_captions"])) == ("x", 1)


def asked(root: Path, **keys: str) -> str:
    """What is answered to a data-set TOML in ``root`` that names these folders."""
    lines = "\n".join(f"{key} = {value!r}" for key, value in keys.items())
    (root / "d.toml").write_text(f"[[datasets]]\n[[datasets.subsets]]\n{lines}\n")
    try:
        config = configure(TaskOptions(dataset_config=str(root / "d.toml")), root)
    except DatasetError as error:
        said = str(error)
        return said.replace(keys.get("conditioning_data_dir", keys["image_dir"]), "X")
    return " ".join(str(folder) for folder in config.folders)


def test_a_toml_cannot_ask_which_folders_there_are(tmp_path, monkeypatch):
    root, outside = tmp_path / "input", tmp_path / "secret"
    for folder in (root / "a", root / "cwd", outside / "a"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(outside)  # a relative folder is the data set's, never the server's
    for there, not_there in (
        (str(outside), str(tmp_path / "nothing")),
        ("../secret", "../nothing"),
        ("a/../../secret/a", "a/../../secret/b"),
        ("/root", "/no-such-folder"),
    ):
        one, other = (asked(root, image_dir=value) for value in (there, not_there))
        assert one == other
        assert "is outside the folder 'input'" in one
        one, other = (asked(root, image_dir="a", conditioning_data_dir=value) for value in (there, not_there))
        assert one == other
        assert "is outside the folder 'input'" in one
    assert asked(root, image_dir="a") == str(root / "a")
    assert asked(root, image_dir=str(root / "a" / ".." / "cwd")) == str(root / "cwd")
    assert "is not a folder" in asked(root, image_dir="b")
    assert "is not a folder" in asked(root, image_dir="x" * 5000)


def test_nothing_outside_is_even_looked_at(tmp_path, monkeypatch):
    """No answer, and no time, can depend on what was never asked for."""
    import os

    (tmp_path / "input").mkdir()
    looked: list[str] = []
    stat = os.stat

    def watched(path, *args, **kwargs):
        looked.append(str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", watched)
    asked(tmp_path / "input", image_dir=str(tmp_path / "elsewhere"))
    assert not [path for path in looked if "elsewhere" in path]
