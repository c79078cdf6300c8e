"""Which images a step draws, and what sd-scripts is told of a data set."""

from __future__ import annotations

import ast
import os
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.training.data import config as dataset_config
from modular_lora_guard.training.data.batches import Plan
from modular_lora_guard.training.data.config import from_folders, from_toml
from modular_lora_guard.training.data.dataset import TrainingImage, regularisation_draws, scan
from modular_lora_guard.training.data.export import record, to_toml
from PIL import Image
from support.errors import refuses

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SIZES = ((64, 64), (128, 64), (64, 128), (100, 90), (70, 200))
CHANCE = {"flip_aug": True, "shuffle_caption": True, "caption_dropout_rate": 0.2}


def paint(folder: Path, count: int, caption: str = "a, b, c", start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        Image.new("RGB", SIZES[index % len(SIZES)], (index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"{caption}, {index}")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("data")
    paint(base / "train" / "3_x", 7)
    paint(base / "train" / "1_y", 5, start=7)
    paint(base / "reg" / "2_thing", 4, "thing")
    return base


def plan(folders: Path, reg: bool = False, seed: int = 1, **options) -> Plan:
    own = {"max_train_steps": 100, "prior_loss_weight": 0.5, "accumulation": options.pop("accumulation", 1)}
    defaults = {"resolution": 64, "batch_size": 2, "min_bucket_reso": 32, "bucket_reso_steps": 16} | CHANCE | options
    config = from_folders(folders / "train", folders / "reg" if reg else None, defaults)
    return Plan(config, scan(config), seed, **own)


def epoch(found: Plan, number: int = 0) -> list:
    batches = found.report.batches
    return [found.batch(step) for step in range(number * batches, (number + 1) * batches)]


def bucket(image: TrainingImage) -> tuple:
    return image.dataset, image.fit.bucket


@pytest.mark.parametrize("reg", [False, True])
def test_an_epoch_draws_every_image_as_often_as_its_repeats(folders, reg):
    found = plan(folders, reg)
    for number in range(3):
        drawn = Counter(draw.image for batch in epoch(found, number) for draw in batch)
        assert drawn == {index: image.draws for index, image in enumerate(found.report.images)}
    training = [image for image in found.report.images if not image.is_reg]
    assert [image.draws for image in training] == [1] * 5 + [3] * 7


def test_a_batch_has_images_of_one_bucket_and_no_more_than_its_size(folders):
    found = plan(folders, batch_size=3)
    images = found.report.images
    batches = epoch(found)
    assert len({bucket(image) for image in images}) > 2
    assert all(len({bucket(images[draw.image]) for draw in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) == 3
    assert sum(image.draws for image in images) == sum(map(len, batches)) == found.report.draws
    assert sum(count for count, _ in found.report.buckets.values()) == len(images)


def test_regularisation_images_pair_with_the_training_images_and_have_their_weight(folders):
    found = plan(folders, reg=True)
    images = found.report.images
    weights = Counter(draw.weight for batch in epoch(found) for draw in batch)
    assert weights == {1.0: 26, 0.5: 26}
    assert all((draw.weight == 0.5) == images[draw.image].is_reg for batch in epoch(found) for draw in batch)


@settings(deadline=None)
@given(st.integers(0, 60), st.lists(st.integers(1, 5), max_size=9))
def test_regularisation_draws_are_enough_and_even(wanted, repeats):
    draws = regularisation_draws(wanted, repeats)
    assert len(draws) == len(repeats)
    if repeats:
        assert wanted <= sum(draws) < wanted + max(repeats)
    if sum(repeats) <= wanted:
        extra = [draw - count for draw, count in zip(draws, repeats, strict=True)]
        assert extra == sorted(extra, reverse=True)
        assert not extra or extra[0] - extra[-1] <= 1


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 200))
def test_going_on_at_a_step_equals_having_come_from_the_first(folders, seed, step):
    found = plan(folders)
    whole, resumed = (Plan(found.config, found.report, seed, max_train_steps=100) for _ in range(2))
    for earlier in range(0, step, 7):
        whole.batch(earlier)
    assert whole.batch(step) == resumed.batch(step)


def test_an_epoch_mixes_buckets_and_the_images_within(folders):
    found = plan(folders)
    first, second = ([tuple(draw.image for draw in batch) for batch in epoch(found, number)] for number in range(2))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    order = [bucket(found.report.images[batch[0]]) for batch in first]
    assert sum(a != b for a, b in pairwise(order)) >= len(set(order))


def test_epochs_and_seeds_differ_in_order_mirroring_and_captions(folders):
    found = plan(folders)
    assert epoch(found, 0) != epoch(found, 1)
    assert epoch(found) != epoch(plan(folders, seed=2))
    draws = [draw for number in range(4) for batch in epoch(found, number) for draw in batch]
    assert 0.35 < sum(draw.flipped for draw in draws) / len(draws) < 0.65
    assert 0.05 < sum(draw.caption == "" for draw in draws) / len(draws) < 0.4
    assert len({draw.caption for draw in draws if draw.image == draws[0].image}) > 2
    still = plan(folders, flip_aug=False, shuffle_caption=False, caption_dropout_rate=0.0)
    assert not any(draw.flipped for batch in epoch(still) for draw in batch)
    assert len({draw.caption for batch in epoch(still) for draw in batch}) == still.report.distinct_captions


def test_micro_batches_follow_each_other_and_token_warmup_counts_optimizer_steps(folders):
    warm = {"token_warmup_step": 10.0, "token_warmup_min": 0, "shuffle_caption": False, "caption_dropout_rate": 0.0}
    one, four = plan(folders, **warm), plan(folders, accumulation=4, **warm)
    for step in range(6):
        for micro in range(4):
            there, here = one.batch(step * 4 + micro), four.batch(step, micro)
            assert [draw.image for draw in there] == [draw.image for draw in here]
            assert all(draw.caption == ", ".join("abc"[: step * 4 // 10]) for draw in here)


def test_sd_scripts_gets_the_same_data_set_as_toml(folders, tmp_path):
    config = from_folders(
        folders / "train", folders / "reg", {"resolution": [64, 96], "min_bucket_reso": 64, "keep_tokens": 1}
    )
    report = scan(config)
    text = to_toml(config, report)
    subset = tomllib.loads(text)["datasets"][0]["subsets"][0]
    assert (subset["caption_extension"], subset["class_tokens"], subset["num_repeats"]) == (".txt", "y", 1)
    assert Path(subset["image_dir"]).is_absolute()
    path = tmp_path / "again.toml"
    path.write_text(text, encoding="utf-8")
    assert scan(from_toml(path)).dataset_sha256 == report.dataset_sha256


def test_texts_survive_the_toml(folders, tmp_path):
    odd = 'a "b" \\ \x7f \n ü 猫'
    config = from_folders(folders / "train", defaults={"caption_prefix": odd})
    path = tmp_path / "again.toml"
    path.write_text(to_toml(config, scan(config)), encoding="utf-8", newline="")
    assert from_toml(path).datasets[0].subsets[0].rules.caption_prefix == odd


def test_sd_scripts_is_not_given_what_it_would_stop_at_or_miss(tmp_path):
    folder = paint(tmp_path / "1_x", 2)
    (folder / "1.txt").rename(folder / "1.caption")
    config = from_folders(tmp_path)
    with refuses("dataset.captions", "1_x", ".caption", ".txt"):
        to_toml(config, scan(config))
    (folder / "1.png").write_bytes(b"")
    with refuses("dataset.kohya", "1.png"):
        to_toml(config, scan(config))


def test_the_record_counts_repeats_tags_and_folders(folders):
    found = record(plan(folders, reg=True).report)
    assert (found.images, found.reg_images, found.dirs["3_x"]) == (26, 26, {"n_repeats": 3, "img_count": 7})
    assert found.tag_frequency["3_x"]["a"] == 7
    assert found.tag_frequency["2_thing"] == {"thing": 4, "0": 1, "1": 1, "2": 1, "3": 1}
    assert len(found.sha256) == 64


def sd_scripts_keys() -> dict[str, set[str]]:
    """Keys of the schemas in a real checkout's library/config_util.py."""
    checkout = os.environ.get("SD_SCRIPTS_PATH")
    if not checkout:
        pytest.skip("SD_SCRIPTS_PATH names no sd-scripts checkout to compare with")
    tree = ast.parse((Path(checkout) / "library" / "config_util.py").read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if getattr(node, "name", None) == "ConfigSanitizer")
    schemas = {}
    for node in cls.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            keys = [key.args[0] if isinstance(key, ast.Call) else key for key in node.value.keys]
            schemas[node.targets[0].id] = {key.value for key in keys}
    return schemas


def test_every_key_is_one_of_sd_scripts_at_the_same_level():
    theirs = sd_scripts_keys()
    ascending = (
        theirs["SUBSET_ASCENDABLE_SCHEMA"]
        | theirs["DB_SUBSET_ASCENDABLE_SCHEMA"]
        | theirs["DO_SUBSET_ASCENDABLE_SCHEMA"]
    )
    own = (
        theirs["DB_SUBSET_DISTINCT_SCHEMA"] | theirs["CN_SUBSET_DISTINCT_SCHEMA"] | theirs["FT_SUBSET_DISTINCT_SCHEMA"]
    )
    expected = {
        dataset_config.GENERAL: ascending | theirs["DATASET_ASCENDABLE_SCHEMA"],
        dataset_config.DATASET: ascending | theirs["DATASET_ASCENDABLE_SCHEMA"],
        dataset_config.SUBSET: ascending | own,
    }
    for level, keys in expected.items():
        refused = {key for key, (levels, _, _) in dataset_config.REFUSED.items() if level in levels}
        assert dataset_config.LEVELS[level].keys() | refused == keys
        assert not dataset_config.LEVELS[level].keys() & refused
