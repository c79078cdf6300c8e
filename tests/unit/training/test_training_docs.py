"""Docs, figures and recipes of the trainers agree with each other and with the options."""

from __future__ import annotations

import json
import re

import pytest
from modular_lora_guard.audit.options import AuditOptions
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard import activity, concept
from modular_lora_guard.tools.benchmarks import tables
from modular_lora_guard.tools.bootstrap.paths import ROOT
from modular_lora_guard.tools.world import EQUAL, data
from modular_lora_guard.training import cli, options
from modular_lora_guard.training.kohya.arguments import FAMILIES
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from modular_lora_guard.training.safety.closed.options import MakeOptions

WANTED = (
    "erased concept rate / base rate",
    "kept concepts accuracy drop (points)",
    "step cpu-s / sd-scripts, fp32",
    "step cpu-s / ComfyUI's trainer, fp32",
    "step cpu-s / bare step, small convolutions as products, fp32",
    "erasure run / on-policy ESD",
)


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_tables_are_what_the_figures_say(path):
    text = path.read_text(encoding="utf-8")
    assert tables.drawn(text) == text, "run python -m tools.benchmarks.tables"


def test_every_figure_has_its_command_date_and_machine():
    rows = json.loads((ROOT / "docs" / "figures" / "training.json").read_text(encoding="utf-8"))["rows"]
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))
    assert set(WANTED) <= set(names)
    for row in rows:
        assert set(row) == {"name", "value", "command", "date", "machine"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])


@pytest.mark.parametrize(("name", "cls"), [("task", TaskOptions), ("safety", SafetyOptions)])
def test_recipes_are_options_and_name_files_that_are_there(name, cls):
    found = options.load(cls, ROOT / "tools" / "world" / "recipes" / f"{name}.toml")
    if isinstance(found, TaskOptions):
        assert (ROOT / found.train_data_dir).is_dir()
        assert (ROOT / found.safety_lora).is_file()
    else:
        assert not set(found.preserve) & {*found.concept, *found.synonyms}


def test_the_page_names_only_options_that_exist():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (commands,) = (one.choices for one in cli.parser()._actions if isinstance(one.choices, dict))
    known = {name for command in commands.values() for one in command._actions for name in one.option_strings}
    given = set(re.findall(r"--[a-z]+_[a-z0-9_]+", text))
    assert given
    theirs = {f"--{part}" for family in FAMILIES.values() for part, _ in family.parts}
    assert given <= known | theirs | {f"--{name}" for name in cli.MEMORY}


def test_the_recipe_of_words_names_every_concept_of_the_demo_world_once():
    """Every vehicle is erased and every other concept is kept, as the demo world's captions call them."""
    found = options.load(MakeOptions, ROOT / "tools" / "world" / "recipes" / "make_safety.toml")
    words = {data.WORDS[i] for i in data.SUPPRESSED_IDS}
    assert set(found.erased) == words | {"a vehicle"}
    kept = {data.WORDS[i] for i in data.KEPT_IDS}
    assert kept - set(found.kept) == set(found.guide) == {"heart"}
    assert {text.partition(",")[0] for text in found.kept if "," in text} == set(data.STYLES)
    assert set(found.guides) == {"heart"}


def test_the_audit_of_words_has_the_file_that_the_recipe_makes():
    """The shipped file in closed form erases what the recipe names; its calibration lets safety first be audited."""
    found = options.load(AuditOptions, ROOT / "tools" / "world" / "audit_words.toml")
    (path,) = found.safety
    lora = read_lora(ROOT / path)
    recipe = options.load(MakeOptions, ROOT / "tools" / "world" / "recipes" / "make_safety.toml")
    assert lora.metadata["modular_lora.method"].startswith(recipe.method)
    assert set(concept.read(lora)) <= set(recipe.erased)
    assert isinstance(activity.read(lora), activity.Calibration)
    assert "safety_first" in found.arms
    assert all((ROOT / name).is_file() for name in (*found.task, *found.unsafe_prompts, *found.kept_prompts))
    assert path.endswith(EQUAL["words"])
