"""Charts that nodes show."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from modular_lora_guard.comfy_host import charts
from modular_lora_guard.tools.bootstrap.paths import ROOT


def bar(figure) -> None:
    figure.add_subplot(title="safety $x_1 one.safetensors").bar((0, 1), (1, 2), color="#ff0000")


def shades(image) -> set[tuple[int, int, int]]:
    return {tuple(map(int, one)) for one in np.asarray(image).reshape(-1, 3)}


def test_a_chart_is_an_image_of_the_size_that_was_asked_for():
    image = charts.chart(320, 90, bar)
    assert (image.size, image.mode) == ((320, 90), "RGB")
    assert {(255, 0, 0), (250, 250, 248), (0, 0, 0)} <= shades(image)


def test_without_matplotlib_the_image_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = []
    monkeypatch.setattr(charts.ImageDraw.ImageDraw, "text", lambda self, place, text, **_: said.append(text))
    image = charts.chart(320, 90, lambda figure: pytest.fail("there is no figure to plot on"))
    assert image.size == (320, 90)
    assert said[0].endswith("pip install matplotlib.")


@pytest.mark.slow  # another interpreter imports PyTorch
def test_matplotlib_is_imported_with_the_first_chart_and_not_before():
    code = (
        "import importlib, sys; sys.path.append('importable')\n"
        "for name in ('comfy_host.charts', 'audit.page', 'audit.session'):\n"
        "    importlib.import_module(f'modular_lora_guard.{name}')\n"
        "sys.exit('matplotlib' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0
