"""Charts that nodes show."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from modular_lora_guard.comfy_host import charts
from modular_lora_guard.tools.bootstrap.paths import ROOT
from PIL import Image


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


def test_a_tables_figures_end_at_the_same_place_and_fit(monkeypatch):
    drawn, write = [], charts.ImageDraw.ImageDraw.text

    def text(self, place, said, fill=None, font=None):
        drawn.append((said, place, place[0] + self.textlength(said, font)))
        write(self, place, said, fill=fill, font=font)

    monkeypatch.setattr(charts.ImageDraw.ImageDraw, "text", text)
    rows = [("arm", "hits", "Wilson"), ("base", "12 / 40", "17.6% … 45.4%"), ("safety", "0 / 40", "0.0% … 8.8%")]
    image = charts.table(640, rows)
    assert [said for said, *_ in drawn] == [said for row in rows for said in row]
    lines = [drawn[i : i + 3] for i in (0, 3, 6)]
    assert {line[0][1][0] for line in lines} == {charts.EDGE}
    assert {round(line[2][2]) for line in lines} == {640 - charts.EDGE}
    assert len({round(line[1][2]) for line in lines}) == 1
    assert image.width == 640
    long = charts.table(320, [("arm", "rate"), ("a name that is " + "very " * 20 + "long", "1.0%")])
    assert long.width == 320
    assert drawn[-2][0].startswith("…")
    assert charts.below(image, charts.table(640, rows[:1])).height > image.height


def test_a_label_says_where_not_all_of_a_row_is_shown(monkeypatch):
    said = []
    monkeypatch.setattr(charts.ImageDraw.ImageDraw, "text", lambda self, place, text, **_: said.append(text))
    images = [Image.new("RGB", (8, 8), "red")] * 6
    sheet = charts.rows_of_images(640, [("step 3", images), ("without", images[:2])])
    assert said == ["step 3 (the first 4 of 6)", "without"]
    assert sheet.width == 640


@pytest.mark.slow  # another interpreter imports PyTorch
def test_matplotlib_is_imported_with_the_first_chart_and_not_before():
    code = (
        "import importlib, sys; sys.path.append('importable')\n"
        "for name in ('comfy_host.charts', 'audit.page', 'audit.session'):\n"
        "    importlib.import_module(f'modular_lora_guard.{name}')\n"
        "sys.exit('matplotlib' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0
