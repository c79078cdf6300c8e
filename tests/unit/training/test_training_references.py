"""Reference images of a data set: which image has which, what is said of those without, and how they are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from modular_lora_guard.training.data import dataset
from modular_lora_guard.training.data.batches import Draw
from modular_lora_guard.training.data.config import from_toml
from modular_lora_guard.training.data.export import to_toml
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.task.denoising import Latents
from modular_lora_guard.training.task.kept import Kept
from modular_lora_guard.training.task.train import configure
from PIL import Image
from support.errors import refuses
from support.toys import Silent, ToyHostModel


def picture(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> None:
    values = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def place(tmp_path) -> Path:
    """Two images with a reference each, one of another shape."""
    for seed, name in enumerate("ab"):
        picture(tmp_path / "data" / "1_cat" / f"{name}.png", seed)
    picture(tmp_path / "before" / "a.png", 8)
    picture(tmp_path / "before" / "b.png", 9, (192, 64))
    return tmp_path


def options(place: Path, **more) -> TaskOptions:
    chosen = {"train_data_dir": str(place / "data"), "resolution": 64, "reference_dir": str(place / "before")}
    return TaskOptions(**chosen | more)


def read(place: Path, **more) -> dataset.DatasetReport:
    return dataset.scan(configure(options(place, **more)))


def test_an_image_has_the_reference_of_its_name_mirrored_as_it_is(place):
    found = read(place)
    assert [image.reference.path.name for image in found.images] == ["a.png", "b.png"]
    assert not found.findings.keys() & {"missing_references", "broken_references", "unused_references"}
    seen = torch.from_numpy(np.array(Image.open(place / "before" / "a.png"))).float() / 255
    assert torch.equal(dataset.load_reference(found.images[0]), seen)
    assert torch.equal(dataset.load_reference(found.images[0], flipped=True), seen.flip(1))
    assert dataset.load_reference(read(place, reference_dir="").images[0]) is None


def test_a_reference_goes_to_the_bucket_of_its_own_shape(place):
    buckets = "enable_bucket = true\nmin_bucket_reso = 64\nbucket_reso_steps = 64\nresolution = 128\n"
    folders = 'image_dir = "data/1_cat"\nreference_dir = "before"\n'
    (place / "set.toml").write_text(f"[[datasets]]\n{buckets}[[datasets.subsets]]\n{folders}")
    square, wide = (image.reference.fit.bucket for image in dataset.scan(from_toml(place / "set.toml")).images)
    assert square == (128, 128)
    assert wide == (192, 64)


def test_a_folder_of_references_may_have_the_folders_of_the_images(place):
    picture(place / "before" / "1_cat" / "a.png", 20)
    found = read(place)
    assert [image.name for image in found.images] == ["1_cat/a.png"]
    assert found.images[0].reference.path == place / "before" / "1_cat" / "a.png"
    assert found.findings["missing_references"] == ("1_cat/b.png",)


def test_an_image_without_a_usable_reference_is_left_out_and_said(place):
    (place / "before" / "a.png").write_bytes(b"no image")
    (place / "before" / "b.png").rename(place / "before" / "c.png")
    found = read(place)
    assert not found.images
    assert found.problems
    assert found.findings["broken_references"][0].startswith("1_cat/a.png: a.png")
    assert found.findings["missing_references"] == ("1_cat/b.png",)
    assert found.findings["unused_references"] == ("c.png",)


def test_regularisation_images_have_none(place):
    picture(place / "reg" / "1_cat" / "r.png", 4)
    found = read(place, reg_data_dir=str(place / "reg"))
    assert {image.name: image.reference is None for image in found.images} == {
        "1_cat/a.png": False,
        "1_cat/b.png": False,
        "1_cat/r.png": True,
    }


def test_references_are_part_of_what_was_trained_on(place):
    before, without = read(place).dataset_sha256, read(place, reference_dir="").dataset_sha256
    picture(place / "before" / "a.png", 30)
    assert len({before, without, read(place).dataset_sha256}) == 3


def test_a_reference_that_changes_meanwhile_stops(place):
    found = read(place)
    picture(place / "before" / "a.png", 30)
    with refuses("image.changed"):
        dataset.load_reference(found.images[0])


def test_a_data_set_toml_names_the_folder_beside_it(place):
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "data/1_cat"\nreference_dir = "before"\n'
    (place / "set.toml").write_text(text)
    config = from_toml(place / "set.toml", within=place)
    assert config.subsets[0].reference_dir == place / "before"
    with refuses("dataset.references"):
        to_toml(config, dataset.scan(config))
    (place / "set.toml").write_text(text.replace('"before"', '"../before"'))
    with refuses("dataset.outside"):
        from_toml(place / "set.toml", within=place)
    with refuses("dataset.no-folder"):
        configure(options(place, reference_dir=str(place / "gone")))


class EditToy(ToyHostModel):
    """A toy whose references are encoded as three times its images."""

    def encode_reference(self, image):
        return 3 * self.encode_images(image[None])


def test_references_are_encoded_once_and_kept_on_disk_under_a_name_of_their_own(place, tmp_path):
    found = read(place, flip_aug=True)
    plain = Latents(EditToy(), found, Silent())
    kept = [Latents(EditToy(), found, Silent(), Kept(tmp_path / "kept", "toy")) for _ in range(2)]
    assert (kept[0].disk.made, kept[1].disk.made, kept[1].disk.found) == (8, 0, 8)
    draws = [Draw(0, False, "", 1.0), Draw(0, True, "", 1.0)]
    batch = plain.of(draws)
    for other in kept:
        assert torch.equal(other.of(draws).latents, batch.latents)
        assert all(map(torch.equal, other.of(draws).references, batch.references))
    assert torch.allclose(batch.references[1], batch.references[0].flip(-1), atol=1e-5)
    assert [tuple(latent.shape) for latent in batch.references] == [(1, 4, 8, 8)] * 2


def test_an_image_that_is_its_own_reference_is_encoded_as_both(place, tmp_path):
    (place / "before" / "a.png").write_bytes((place / "data" / "1_cat" / "a.png").read_bytes())
    found = read(place)
    assert hashlib.sha256(found.images[0].reference.path.read_bytes()).hexdigest() == found.images[0].sha256
    batch = Latents(EditToy(), found, Silent(), Kept(tmp_path / "kept", "toy")).of([Draw(0, False, "", 1.0)])
    assert torch.allclose(batch.references[0], 3 * batch.latents)
