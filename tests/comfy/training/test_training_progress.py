"""A training node shows the loss curve while it runs, and below it the newest previews, with and without safety."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from PIL import Image

RED, BLUE, GREEN = (220, 20, 20), (20, 20, 220), (20, 200, 20)


@pytest.fixture
def shown(comfy, monkeypatch):
    """A node's watch that is always due, and the pictures that it puts on the node, as the front end gets them."""
    progress = importlib.import_module("modular_lora_guard.comfy_host.progress")
    monkeypatch.setattr(progress, "show_progress", lambda *_: None)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    watch, pictures = progress.NodeWatch(None), []

    def hook(value, total, preview, node_id=None):
        if preview is not None:
            _, image, largest = preview
            assert largest == max(image.size), "ComfyUI would make it smaller"
            pictures.append(image)

    watch._bar.hook = hook
    return watch, pictures, progress


def painted(folder, name: str, *colours: tuple[int, int, int]) -> list:
    paths = []
    for i, colour in enumerate(colours):
        paths.append(folder / f"{name}{i}.png")
        Image.new("RGB", (64, 64), colour).save(paths[-1])
    return paths


def places(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """left, top, right, bottom of what has a colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(2))
    return (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else None


def test_the_curve_and_the_newest_previews_are_shown_together(shown, tmp_path):
    watch, pictures, progress = shown
    watch.step(1, 10, [1.0])
    assert pictures[-1].size == (progress.WIDTH, progress.HEIGHT)
    watch.sample(1, painted(tmp_path, "first", GREEN))
    assert places(pictures[-1], GREEN)
    watch.sample(2, painted(tmp_path, "with", RED, RED), painted(tmp_path, "without", BLUE, BLUE))
    for step in (3, 4):  # however many steps follow
        watch.step(step, 10, [1.0] * step)
        picture = pictures[-1]
        above, below = places(picture, RED), places(picture, BLUE)
        assert progress.HEIGHT < above[1] < above[3] < below[1] < below[3] < picture.height
        assert above[::2] == below[::2], "the same prompt stands below itself"
        assert places(picture, GREEN) is None
        curve = np.asarray(progress.loss_curve([1.0] * step))
        assert np.array_equal(np.asarray(picture)[: progress.HEIGHT], curve)


def test_previews_of_the_base_that_were_drawn_once_stay(shown, tmp_path):
    watch, pictures, _ = shown
    watch.sample(1, painted(tmp_path, "a", RED), painted(tmp_path, "base", BLUE))
    watch.sample(2, painted(tmp_path, "b", GREEN))
    assert places(pictures[-1], GREEN)
    assert places(pictures[-1], BLUE)
    assert places(pictures[-1], RED) is None
