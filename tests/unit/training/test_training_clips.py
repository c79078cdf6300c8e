"""Clips of a data set: which frames are taken and their pixels, what the report says, what they share batches with."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from modular_lora_guard.modular_lora.files.images import ImageError
from modular_lora_guard.training.data import clips
from modular_lora_guard.training.data.batches import Plan
from modular_lora_guard.training.data.config import DatasetConfig, check_clips, from_toml
from modular_lora_guard.training.data.dataset import DatasetReport, format_report, load, scan, summary
from modular_lora_guard.training.data.export import record, to_toml
from modular_lora_guard.training.data.images import thumbnail
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.unused import unused
from PIL import Image
from support.errors import refuses

SIDE = 64
EVERY_FOURTH = {0: 0, 1: 1, 2: 5, 3: 9}  # latent frames -> frames of a VAE that makes four of one


def drawn(count: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """t h w 3: a gradient whose colour changes from frame to frame, so that each is another one."""
    x, y = np.meshgrid(np.linspace(0, 150, width), np.linspace(0, 150, height))
    frames = [np.stack([x + 9 * t, y + 5 * t, (x + y) / 2 + 100 - 9 * t], -1) for t in range(count)]
    return np.clip(frames, 0, 255).astype(np.uint8)


def film(path: Path, frames: np.ndarray, codec: str = "ffv1", pix_fmt: str = "bgr0", **stream_options) -> Path:
    """A video file; by default without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        turn = stream_options.pop("turn", 0)
        for name, value in stream_options.items():
            setattr(stream.codec_context, name, value)
        if turn and not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV reads how a video is turned and does not write it")
        if turn:
            stream.set_display_rotation(turn)
        for values in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode())
    return path


def animation(path: Path, frames: np.ndarray, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(values) for values in frames)
    first.save(path, save_all=True, append_images=rest, **how)
    return path


def configured(folder: Path, more: str = "clip_frames = 5\n", subset: str = "") -> DatasetConfig:
    text = f"[general]\nresolution = {SIDE}\n{more}[[datasets]]\n[[datasets.subsets]]\n{subset}"
    (folder / "d.toml").write_text(f"{text}image_dir = '{(folder / 'a').as_posix()}'\n", encoding="utf-8")
    return from_toml(folder / "d.toml")


def scanned(folder: Path, *how: str) -> DatasetReport:
    return scan(configured(folder, *how))


@pytest.mark.parametrize(("extraction", "taken"), [("head", (0, 1, 2, 3, 4)), ("spread", (0, 2, 4, 5, 7))])
@pytest.mark.parametrize("ending", [".mkv", ".webp", ".gif"])
def test_the_frames_that_are_asked_for_come_as_they_are_in_the_file(ending, extraction, taken, tmp_path):
    frames, path = drawn(8), tmp_path / "a" / f"c{ending}"
    if ending == ".mkv":
        film(path, frames)
    else:
        animation(path, frames, lossless=True) if ending == ".webp" else animation(path, frames)
        with Image.open(path) as image:  # of a GIF, its own colours
            seen = [np.asarray((image.seek(i), image.convert("RGB"))[1]) for i in range(image.n_frames)]
        frames = np.stack(seen)
    path.with_suffix(".txt").write_text("a word")
    report = scanned(tmp_path, f'clip_frames = 5\nclip_extraction = "{extraction}"\nflip_aug = true\n')
    (clip,) = report.images
    assert (clip.frames, clip.size, clip.caption, report.findings) == (taken, (SIDE, SIDE), "a word", {})
    wanted = torch.from_numpy(frames[list(taken)].copy()).float() / 255
    pixels, mask = load(clip)
    assert mask is None
    assert torch.equal(pixels, wanted)
    assert torch.equal(load(clip, flipped=True)[0], wanted.flip(2))


@pytest.mark.parametrize(
    ("ending", "codec"), [(".mp4", "mpeg4"), (".mov", "mpeg4"), (".webm", "libvpx-vp9"), (".MKV", "mpeg4")]
)
def test_every_form_of_video_is_read(ending, codec, tmp_path):
    frames = drawn(6, 96, 64)
    film(tmp_path / "a" / f"c{ending}", frames, codec, "yuv420p", bit_rate=8_000_000)
    (clip,) = scanned(tmp_path).images
    pixels = load(clip)[0]
    assert pixels.shape == (5, SIDE, SIDE, 3)
    error = (pixels - torch.from_numpy(frames[:5, :, 16:80].copy()).float() / 255).abs().mean((1, 2, 3))
    assert error.max() < 0.02, "and the next frame is 0.03 away"
    assert thumbnail(clip.path, 32).size == (32, 21)


def test_a_clip_is_shown_as_a_player_shows_it(tmp_path):
    frames = drawn(5, 48, 96)
    film(tmp_path / "a" / "turned.mp4", frames, "mpeg4", "yuv420p", bit_rate=8_000_000, turn=90)
    film(tmp_path / "a" / "wide.mp4", drawn(5, 48, 96), "mpeg4", "yuv420p", sample_aspect_ratio=Fraction(2))
    report = scanned(tmp_path)
    turned, wide = report.images
    assert (turned.size, wide.size) == ((96, 48), (96, 96))
    assert report.findings["turned"] == ("a/turned.mp4",)
    upright = np.rot90(frames[0])  # counter-clockwise
    first = next(clips.read(turned.path.read_bytes(), ".mp4", [0]))
    assert np.abs(np.asarray(first).astype(float) - upright).mean() < 4


def test_a_clip_that_cannot_be_trained_on_is_left_out_by_name(tmp_path):
    folder = tmp_path / "a"
    good = film(folder / "good.mkv", drawn(5))
    film(folder / "short.mkv", drawn(4))
    animation(folder / "still.gif", drawn(1))
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.webm").write_bytes(b"")
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{good.as_posix()}\n")
    (folder / "cut.mkv").write_bytes(film(folder / "long.mkv", drawn(9)).read_bytes()[:1200])
    (folder / "twin.mkv").write_bytes(good.read_bytes())
    report = scanned(tmp_path, "clip_frames = 5\n", "class_tokens = 'x'\n")
    assert [clip.path.stem for clip in report.images] == ["good", "long", "twin"]
    assert report.findings["short_clips"] == ("a/short.mkv: 4", "a/still.gif: 1")
    assert [line.split(":")[0] for line in report.findings["broken"]] == [
        f"a/{name}" for name in ("cut.mkv", "empty.webm", "list.mp4", "text.mp4")
    ]
    assert report.findings["duplicates"] == ("a/good.mkv = a/twin.mkv",)
    assert "bucket 64×64: 3 clips of 5 frames, 3 draws" in format_report(report)
    assert "3 images (3 of them clips)" in summary(report)
    assert record(report).clip_frames == (5,)
    good.write_bytes(good.read_bytes() + b"x")
    with refuses("image.changed", "good.mkv"):
        load(report.images[0])


def test_without_clip_frames_clips_are_named_and_not_read(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("c.mp4", "c.MOV"):
        (tmp_path / "a" / name).write_bytes(b"anything")
    (tmp_path / "a" / "c.gif").write_bytes(b"anything")
    animation(tmp_path / "a" / "moving.webp", drawn(5))
    report = scanned(tmp_path, "")
    assert report.findings["unread_clips"] == ("a/c.MOV", "a/c.mp4")
    assert report.findings["unsupported"] == ("a/c.gif",)
    assert report.findings["animated"] == ("a/moving.webp",)
    assert report.images[0].frames == ()
    assert load(report.images[0])[0].shape == (SIDE, SIDE, 3)


def test_clips_and_images_are_batched_apart_and_the_largest_batch_is_theirs(tmp_path):
    for i in range(3):
        film(tmp_path / "a" / f"c{i}.mkv", drawn(5 + i))
        Image.fromarray(drawn(1 + i)[i]).save(tmp_path / "a" / f"p{i}.png")
    animation(tmp_path / "a" / "still.webp", drawn(1))
    config = configured(tmp_path, "clip_frames = 5\nbatch_size = 2\n", "class_tokens = 'x'\n")
    report = scan(config)
    assert report.buckets == {(SIDE, SIDE, 1): (4, 4), (SIDE, SIDE, 5): (3, 3)}
    assert "7 images (3 of them clips), 7 draws in 4 batches" in format_report(report)
    plan = Plan(config, report, seed=1)
    for step in range(4):
        assert len({len(report.images[draw.image].frames) for draw in plan.batch(step)}) == 1
    assert [len(report.images[draw.image].frames) for draw in plan.largest()] == [5, 5]


def test_a_clip_of_one_frame_is_an_image(tmp_path):
    film(tmp_path / "a" / "c.mkv", drawn(5))
    Image.fromarray(drawn(1)[0]).save(tmp_path / "a" / "p.png")
    report = scanned(tmp_path, "clip_frames = 1\n", "class_tokens = 'x'\n")
    assert report.buckets == {(SIDE, SIDE, 1): (2, 2)}
    assert torch.equal(load(report.images[0])[0], load(report.images[1])[0])


def test_a_mask_counts_for_every_frame_and_alpha_does_not(tmp_path):
    film(tmp_path / "a" / "c.mkv", drawn(5))
    clear = np.concatenate([drawn(5), np.full((5, SIDE, SIDE, 1), 128, np.uint8)], -1)
    animation(tmp_path / "a" / "clear.webp", clear, lossless=True)
    (tmp_path / "m").mkdir()
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste("white", (32, 0, SIDE, SIDE))
    mask.save(tmp_path / "m" / "c.png")
    report = scanned(tmp_path, "clip_frames = 5\n", f"conditioning_data_dir = '{(tmp_path / 'm').as_posix()}'\n")
    assert report.findings["missing_masks"] == report.findings["transparent"] == ("a/clear.webp",)
    assert load(report.images[0])[1].tolist() == [[0.0] * 4 + [1.0] * 4] * 8
    on_white = torch.from_numpy(drawn(5)).float() / 255 * (128 / 255) + 127 / 255
    assert (load(report.images[1])[0] - on_white).abs().max() < 1.5 / 255
    report = scanned(tmp_path, "clip_frames = 5\n", "alpha_mask = true\n")
    assert report.findings["without_alpha"] == ("a/c.mkv", "a/clear.webp")
    assert load(report.images[1])[1] is None


def test_the_digest_and_the_held_out_part_are_of_clips_too(tmp_path):
    for i in range(4):
        film(tmp_path / "a" / f"c{i}.mkv", drawn(6)[i // 2 :])
    found = [
        scanned(tmp_path, more).dataset_sha256
        for more in (
            "clip_frames = 3\n",
            "clip_frames = 4\n",
            'clip_frames = 4\nclip_extraction = "spread"\n',
            "clip_frames = 4\n",
        )
    ]
    assert len(set(found)) == 3
    assert found[1] == found[3]
    report = scanned(tmp_path, "clip_frames = 4\nvalidation_split = 0.5\n")
    assert [len(clip.frames) for clip in (*report.images, *report.held_out)] == [4] * 4
    assert len(report.held_out) == 2


@pytest.mark.parametrize(("wanted", "takes"), [(0, True), (1, True), (5, True), (9, True), (6, False), (2, False)])
def test_a_number_of_frames_that_the_vae_cannot_take_is_refused_with_those_that_it_can(wanted, takes, tmp_path):
    config = configured(tmp_path, f"clip_frames = {wanted}\n")
    frames_of = EVERY_FOURTH.__getitem__
    if takes:
        check_clips(config, "Toy", frames_of)
    else:
        below, above = (5, 9) if wanted == 6 else (1, 5)
        with refuses("dataset.clip-frames", wanted, "Toy", "1, 5, 9", f"{below} or {above}"):
            check_clips(config, "Toy", frames_of)
    if wanted > 1:
        with refuses("dataset.clip-frames", wanted, "Toy", "still"):
            check_clips(config, "Toy", lambda latent: 0)


def test_clips_are_refused_by_name_where_they_cannot_be_had(tmp_path, monkeypatch):
    film(tmp_path / "a" / "c.mkv", drawn(5))
    config = configured(tmp_path)
    with refuses("dataset.kohya", "clip_frames"):
        to_toml(config, scan(config))
    with refuses("dataset.wrong-value", "clip_extraction", "middle"):
        configured(tmp_path, 'clip_frames = 5\nclip_extraction = "middle"\n')
    (line,) = [one for one in unused(TaskOptions(clip_extraction="spread")) if "clip" in one]
    assert "NO effect" in line
    monkeypatch.setitem(sys.modules, "av", None)
    with refuses("train.no-av", "pip install av"):
        scan(config)


def test_a_clip_that_ends_early_is_no_clip(tmp_path):
    data = film(tmp_path / "c.mkv", drawn(3)).read_bytes()
    with pytest.raises(ImageError, match="ends 1 frames before"):
        list(clips.read(data, ".mkv", (0, 2, 4)))
