"""Names, tooltips and help pages in other languages: complete, of today's English, and nothing left over."""

from __future__ import annotations

import json
import re

import pytest
from modular_lora_guard.tools.bootstrap.paths import ROOT
from modular_lora_guard.tools.locales import cli, pages, texts
from modular_lora_guard.tools.locales.texts import LANGUAGES, TEXTS, english, leaves, load, problems, translated

KEPT = load(TEXTS / "kept.json")
LOADER = "From Load Safety LoRA."
TREES = {
    "main.json": {"nodeCategories": {"load": "load"}},
    "nodeDefs.json": {
        "A": {
            "display_name": "Load Safety LoRA",
            "inputs": {"lora_name": {"name": "lora_name", "tooltip": LOADER}, "cfg": {"name": "cfg"}},
            "outputs": {"0": {"name": "model", "tooltip": "A file of models/loras as LORA_STACK (W0), or as a JSON."}},
        }
    },
}
GERMAN = {
    "load": "laden",
    "Load Safety LoRA": "Sicherheits-LoRA laden",
    "lora_name": "LoRA-Name",
    LOADER: "Aus „Sicherheits-LoRA laden“.",
    "model": "Modell",
    "A file of models/loras as LORA_STACK (W0), or as a JSON.": "Datei aus models/loras als LORA_STACK (W0) oder JSON.",
}


def told(**changed: str) -> list[str]:
    """What is said of the German texts with some of them changed; an empty key stands for the loader's tooltip."""
    return problems(
        GERMAN | {LOADER if key == "tooltip" else key: said for key, said in changed.items()}, TREES, ["cfg"]
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_text_of_today_and_no_other(language: str) -> None:
    assert cli.check(language, write=False) == []


def test_no_language_folder_is_left_over() -> None:
    assert {path.name for path in (ROOT / "locales").iterdir()} == {"en", *LANGUAGES}
    assert {path.stem for path in TEXTS.iterdir()} == {"kept", *LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_the_keys_of_english_and_other_words(language: str) -> None:
    for name, tree in english().items():
        there = load(ROOT / "locales" / language / name)
        assert keys(there) == keys(tree)
        same = [
            text for text, said in zip(leaves(tree), leaves(there), strict=True) if text == said and text.endswith(".")
        ]
        assert set(same) <= set(KEPT)


@pytest.mark.parametrize(
    ("node", "command"),
    [
        ("ModularLoraTaskTrainingOptions", "train-task"),
        ("ModularLoraSafetyTrainingOptions", "train-safety"),
        ("ModularLoraMakeSafety", "make-safety"),
        ("ModularLoraCombineSafety", "combine-safety"),
    ],
)
def test_a_nodes_tooltip_names_its_own_command_in_every_language(node: str, command: str) -> None:
    for language in ("en", *LANGUAGES):
        inputs = load(ROOT / "locales" / language / "nodeDefs.json")[node]["inputs"]
        assert re.findall(r"python\S* .*--help", inputs["more_options"]["tooltip"]) == [
            f"python3 run.py lora {command} --help"
        ], language


def keys(tree: dict) -> list:
    return [(key, keys(value) if isinstance(value, dict) else None) for key, value in tree.items()]


def test_whole_texts_are_fine() -> None:
    assert told() == []


def test_what_is_missing_empty_or_left_over_is_named() -> None:
    assert problems({}, TREES, ["cfg"]) == [f"missing: {text}" for text in GERMAN]
    assert told(model=" ") == ["empty: model"]
    assert told(old="alt") == ["left over: old"]
    assert "missing: cfg" in problems(GERMAN, TREES, [])


def test_a_changed_english_text_is_missing_until_it_is_translated_again() -> None:
    changed = json.loads(json.dumps(TREES).replace("From Load", "It comes from Load"))
    found = problems(GERMAN, changed, ["cfg"])
    assert found == ["missing: It comes from Load Safety LoRA.", f"left over: {LOADER}"]


@pytest.mark.parametrize("lost", ["models/loras", "LORA_STACK", "W0", "JSON"])
def test_what_no_language_translates_must_stand_in_the_sentence(lost: str) -> None:
    english_text = list(GERMAN)[-1]
    found = problems(GERMAN | {english_text: GERMAN[english_text].replace(lost, "...")}, TREES, ["cfg"])
    assert len(found) == 1
    assert found[0].startswith(f"without {lost}: ")


def test_a_sentence_names_a_node_as_the_language_calls_it() -> None:
    assert told(tooltip="Aus „LoRA laden“.") == ["without the node Sicherheits-LoRA laden: Aus „LoRA laden“."]


def test_signs_that_the_front_end_would_interpret_are_refused() -> None:
    assert told(model="Modell {n}") == ["{} would be interpreted: Modell {n}"]


def test_a_text_without_translation_is_left_out_so_that_english_is_shown() -> None:
    made = translated(TREES["nodeDefs.json"], {"model": "Modell"}, ["cfg"])
    assert made == {"A": {"inputs": {"cfg": {"name": "cfg"}}, "outputs": {"0": {"name": "Modell"}}}}


def test_writing_puts_in_what_is_missing_and_drops_what_is_left_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.setattr(cli, "TEXTS", tmp_path / "texts")
    monkeypatch.setattr(cli, "english", lambda: TREES)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "kept.json").write_text('["cfg"]')
    kept = {text: said for text, said in GERMAN.items() if text != "model"}
    (tmp_path / "texts" / "de.json").write_text(json.dumps(kept | {"old": "alt"}))
    assert cli.check("de", write=True) == ["de: empty: model"]
    assert load(tmp_path / "texts" / "de.json") == GERMAN | {"model": ""}
    (tmp_path / "texts" / "de.json").write_text(texts.as_file(GERMAN))
    assert [line for line in cli.check("de", write=False) if "not of today's texts" in line]
    assert cli.check("de", write=True) == []
    assert load(tmp_path / "locales" / "de" / "nodeDefs.json")["A"]["inputs"]["lora_name"]["name"] == "LoRA-Name"


def test_every_help_page_is_there_in_every_language_of_pages() -> None:
    assert pages.problems(english()["nodeDefs.json"]) == []


def test_a_help_page_that_lacks_an_input_or_its_shown_name_is_told(tmp_path, monkeypatch) -> None:
    node = TREES["nodeDefs.json"]["A"]
    page = tmp_path / "A" / "de.md"
    page.parent.mkdir()
    said = "# Load Safety LoRA\n\n## Inputs\n\n| `lora_name` | The file. |\n| `cfg` | The scale. |\n"
    good = "# Sicherheits-LoRA laden\n\n## Eingänge\n\n| `lora_name` (LoRA-Name) | Die Datei. |\n| `cfg` | Skala. |\n"

    def compared(text: str) -> list[str]:
        page.write_text(text, encoding="utf-8")
        return pages._compared(page, said, node, GERMAN | {"cfg": "cfg"}, TREES["nodeDefs.json"])

    assert compared(good) == []
    assert compared(good.replace("| `cfg` | Skala. |\n", "")) != []
    assert compared(good.replace(" (LoRA-Name)", "")) != []
    assert compared(good.replace("Sicherheits-LoRA laden", "LoRA laden")) != []
    assert compared(good.replace("## Eingänge", "Eingänge")) != []
