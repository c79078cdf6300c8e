"""What tests of several trainings start from."""

from __future__ import annotations

import shutil

import pytest
from modular_lora_guard.tools.bootstrap.paths import ROOT
from support.families import Family

IMAGES = ROOT / "tools" / "world" / "assets" / "gloss" / "10_gloss"


@pytest.fixture
def data(tmp_path):
    """Two captioned images of one size."""
    folder = tmp_path / "data" / "1_x"
    folder.mkdir(parents=True)
    for stem in ("crown", "balloon"):
        for ending in (".png", ".txt"):
            shutil.copy(IMAGES / f"{stem}{ending}", folder)
    return tmp_path / "data"


@pytest.fixture
def known(matrix):
    """Skips a family that this ComfyUI does not know, which the table says."""

    def check(family: Family, file: str, row: str) -> None:
        from comfy import supported_models

        if not hasattr(supported_models, family.config):
            matrix(file, row, "untested")
            pytest.skip(f"this ComfyUI has no {family.config}")

    return check
