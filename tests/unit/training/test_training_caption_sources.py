"""Captions of another captioner: a folder of their own, JSON files, sd-scripts' metadata; for both engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from modular_lora_guard.modular_lora.options import tomllib
from modular_lora_guard.training.data import dataset
from modular_lora_guard.training.data.config import from_toml
from modular_lora_guard.training.data.dataset import scan
from modular_lora_guard.training.data.export import to_toml
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.task.train import configure
from PIL import Image
from support.errors import refuses


@pytest.fixture
def place(tmp_path) -> Path:
    """Two numbered folders of images with no caption beside them, but for a stray one."""
    for folder in ("1_cat", "2_dog"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i, name in enumerate("ab"):
            Image.new("RGB", (64, 64), (40 * i, len(folder), ord(folder[2]))).save(
                tmp_path / "data" / folder / f"{name}.png"
            )
    return tmp_path


def read(place: Path, **options) -> dataset.DatasetReport:
    return scan(configure(TaskOptions(**({"train_data_dir": str(place / "data"), "resolution": 64} | options))))


def captions(report: dataset.DatasetReport) -> dict[str, str]:
    return {image.name: image.caption for image in report.images}


def test_a_folder_of_captions_may_have_the_folders_of_the_images(place):
    for folder in ("1_cat", "2_dog"):
        (place / "texts" / folder).mkdir(parents=True)
        (place / "texts" / folder / "a.txt").write_text(f"{folder[2:]} a")
    (place / "texts" / "1_cat" / "gone.txt").write_text("of no image")
    (place / "data" / "1_cat" / "b.txt").write_text("beside")
    report = read(place, caption_dir=str(place / "texts"))
    assert captions(report) == {
        "1_cat/a.png": "cat a",
        "1_cat/b.png": "cat",
        "2_dog/a.png": "dog a",
        "2_dog/b.png": "dog",
    }
    assert report.findings["without_caption"] == ("1_cat/b.png", "2_dog/b.png")
    assert report.findings["captions_alone"] == ("1_cat/gone.txt",)
    assert report.findings["other_captions"] == ("1_cat/b.txt",)


def test_a_folder_of_captions_may_be_one_for_all(place):
    (place / "texts").mkdir()
    for name in ("a", "b", "c"):
        (place / "texts" / f"{name}.wd.txt").write_text(f"tags of {name}")
    report = read(place, caption_dir=str(place / "texts"), caption_extension=".wd.txt")
    assert set(captions(report).values()) == {"tags of a", "tags of b"}
    assert report.findings["captions_alone"] == ("texts/c.wd.txt",)


def test_json_files_are_read_where_they_are_asked_for(place):
    folder = place / "data" / "1_cat"
    (folder / "a.json").write_text(json.dumps({"caption": "a cat\non a mat", "tags": ["cat", "mat"], "score": 1}))
    (folder / "b.json").write_text(json.dumps({"prompt": "a cat"}))
    plain = read(place)
    assert plain.findings["without_caption"][0] == "1_cat/a.png (there is a.json, caption_extension is .txt)"
    report = read(place, caption_extension=".json")
    assert captions(report)["1_cat/a.png"] == "a cat,cat, mat\non a mat,cat, mat"
    (unreadable,) = report.findings["unreadable_captions"]
    assert unreadable.startswith("1_cat/b.png")
    assert "caption" in unreadable


METADATA = {"a.png": {"caption": "one", "tags": "x, y"}, "b": {"tags": "z"}, "c.png": {"caption": "gone"}}


@pytest.mark.parametrize("lines", [False, True])
def test_sd_scripts_metadata_has_the_captions_of_a_plain_folder(lines, place):
    folder, file = place / "data" / "1_cat", place / f"meta.json{'l' * lines}"
    Image.new("RGB", (64, 64)).save(folder / "unnamed.png")
    rows = "\n".join(json.dumps({"image_path": key} | entry) for key, entry in METADATA.items())
    file.write_text(rows if lines else json.dumps(METADATA))
    report = read(place, train_data_dir=str(folder), in_json=str(file))
    assert captions(report) == {"1_cat/a.png": "one,x, y", "1_cat/b.png": "z"}
    assert report.findings["not_in_metadata"] == ("1_cat/unnamed.png",)
    assert report.findings["metadata_alone"] == ("c.png",)


def test_metadata_that_is_none_says_where(place):
    file = place / "meta.json"
    for text, code in (("{", "caption"), ("[1]", "caption"), ('{"a.png": {"size": 1}}', "caption")):
        file.write_text(text)
        with refuses(code, "a.png" if "size" in text else "meta.json"):
            read(place, train_data_dir=str(place / "data" / "1_cat"), in_json=str(file))
    with refuses("dataset.no-metadata", "none.json"):
        read(place, train_data_dir=str(place / "data" / "1_cat"), in_json=str(place / "none.json"))


TOML = """
[[datasets]]
resolution = 64
validation_split = 0.5
[[datasets.subsets]]
image_dir = "HERE/data/1_cat"
metadata_file = "HERE/meta.json"
"""


def toml(place: Path, text: str) -> Path:
    (place / "set.toml").write_text(text.replace("HERE", place.as_posix()), encoding="utf-8")
    return place / "set.toml"


def test_sd_scripts_gets_its_metadata_and_its_validation(place):
    (place / "meta.json").write_text(json.dumps({"a.png": {"caption": "one"}, "b.png": {"caption": "two"}}))
    config = from_toml(toml(place, TOML))
    report = scan(config)
    assert (len(report.images), len(report.held_out)) == (1, 1)
    (written,) = tomllib.loads(to_toml(config, report))["datasets"]
    assert (written["validation_split"], written["validation_seed"]) == (0.5, 0)
    (subset,) = written["subsets"]
    assert subset["metadata_file"] == (place / "meta.json").as_posix()
    assert not {"caption_extension", "class_tokens", "is_reg"} & set(subset)
    (place / "meta.json").write_text(json.dumps({"a": {"caption": "one"}, "b.png": {"caption": "two"}}))
    with refuses("dataset.kohya", "meta.json", "a"):
        to_toml(config, scan(config))


@pytest.mark.parametrize("options", [{"caption_dir": "data"}, {"caption_extension": ".json"}])
def test_sd_scripts_is_not_given_what_it_does_not_read(options, place):
    for folder in ("1_cat", "2_dog"):
        for name in "ab":
            (place / "data" / folder / f"{name}.json").write_text('{"caption": "x"}')
    chosen = {name: str(place / value) if name == "caption_dir" else value for name, value in options.items()}
    config = configure(TaskOptions(train_data_dir=str(place / "data"), resolution=64, **chosen))
    with refuses("dataset.captions"):
        to_toml(config, scan(config))


def test_metadata_does_not_mix_with_other_forms(place):
    (place / "meta.json").write_text("{}")
    with refuses("dataset.metadata", "caption_extension"):
        from_toml(toml(place, TOML + 'caption_extension = ".txt"\n'))
    with refuses("dataset.metadata", "1 of 2"):
        from_toml(toml(place, TOML + '[[datasets.subsets]]\nimage_dir = "HERE/data/2_dog"\n'))


def test_transparent_parts_count_nothing_where_they_are_asked_to(place):
    folder = place / "data" / "1_cat"
    glass = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    glass.paste((0, 0, 0, 0), (0, 0, 32, 64))
    glass.save(folder / "a.png")
    plain, masked = read(place), read(place, alpha_mask=True)
    assert dataset.load(plain.images[0])[1] is None
    mask = dataset.load(masked.images[0])[1]
    assert mask[:, :4].sum() == 0
    assert bool((mask[:, 4:] == 1).all())
    assert masked.findings["without_alpha"] == ("1_cat/b.png", "2_dog/a.png", "2_dog/b.png")
