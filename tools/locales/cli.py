"""The command: check the languages, write ``locales/``, take the English texts from a running ComfyUI."""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bootstrap.paths import ROOT
from . import pages
from .texts import FILES, LANGUAGES, TEXTS, as_file, english, load, problems, translated, wanted

PREFIX = "ModularLora"


def main(arguments: Sequence[str]) -> int:
    """1 while something is missing, empty, left over or out of date; every such text is printed."""
    parser = argparse.ArgumentParser(prog="python -m tools.locales", description=main.__doc__)
    parser.add_argument(
        "--write",
        action="store_true",
        help='put missing texts into tools/locales/texts/*.json as "", drop those left over, and write locales/',
    )
    parser.add_argument(
        "--english",
        metavar="URL",
        help="first write locales/en/nodeDefs.json from the schemas of a running ComfyUI, e.g. http://127.0.0.1:8188",
    )
    options = parser.parse_args(arguments)
    if options.english:
        with urllib.request.urlopen(f"{options.english.rstrip('/')}/object_info", timeout=60) as answer:
            named = from_schemas(json.load(answer))
        _write(ROOT / "locales" / "en" / "nodeDefs.json", as_file(named))
    found = [line for language in LANGUAGES for line in check(language, options.write)]
    found += pages.problems(english()["nodeDefs.json"])
    for line in found:
        print(line)
    print(f"{len(LANGUAGES)} languages, {len(found)} texts to see to")
    return 1 if found else 0


def check(language: str, write: bool) -> list[str]:
    """What one language lacks, after its files were written if that was asked for."""
    trees, kept, source = english(), load(TEXTS / "kept.json"), TEXTS / f"{language}.json"
    texts = load(source)
    made = {ROOT / "locales" / language / name: as_file(translated(trees[name], texts, kept)) for name in FILES}
    if write:
        texts = {text: texts.get(text, "") for text in wanted(trees, kept)}
        for path, content in {source: as_file(texts), **made}.items():
            _write(path, content)
    found = problems(texts, trees, kept)
    found += [
        f"not of today's texts (python -m tools.locales --write): locales/{language}/{path.name}"
        for path, content in made.items()
        if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    return [f"{language}: {line}" for line in found]


def from_schemas(object_info: dict[str, Any]) -> dict[str, Any]:
    """What ``/object_info`` says of the pack's nodes, as ``nodeDefs.json`` has it."""
    return {name: _node(schema) for name, schema in object_info.items() if name.startswith(PREFIX)}


def _node(schema: dict[str, Any]) -> dict[str, Any]:
    inputs = {k: v[1] for kind in ("required", "optional") for k, v in schema["input"].get(kind, {}).items()}
    entry: dict[str, Any] = {"display_name": schema["display_name"], "description": schema["description"]}
    entry["inputs"] = {name: {"name": name, "tooltip": options["tooltip"]} for name, options in inputs.items()}
    outputs = zip(schema["output_name"], schema["output_tooltips"], strict=True)
    if made := {str(i): {"name": name, "tooltip": said} for i, (name, said) in enumerate(outputs)}:
        entry["outputs"] = made
    return entry


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", newline="\n")
