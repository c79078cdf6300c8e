"""English and its translations: what is missing, left over or changed, and the files that ComfyUI reads.

``locales/en/`` is the source. ``tools/locales/texts/<language>.json`` holds every English text once, with its
translation, so a changed English sentence is a missing one until somebody translates it anew. ``kept.json`` lists the
texts that stay as they are in every language: names of sd-scripts' options above all. ``locales/<language>/`` is made
of these, in the layout of https://docs.comfy.org/custom-nodes/i18n.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..bootstrap.paths import ROOT

LANGUAGES = ("zh", "zh-TW", "ja", "ko", "fr", "de", "es", "ru", "pt-BR")
FILES = ("nodeDefs.json", "main.json")
TEXTS = Path(__file__).parent / "texts"
INTERPRETED = re.compile(r"[{}@|]")  # the front end's message format takes these for its own
IDENTIFIER = re.compile(r"[a-z0-9_]+")
CODE = re.compile(r"[A-Za-z0-9_²×./'-]*(?:\d|[a-z][_/][a-z]|[A-Z][a-z-]*[A-Z])[A-Za-z0-9_²×./-]*")

Json = dict[str, Any]


def load(path: Path) -> Any:
    """A JSON file; an empty mapping where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def english() -> dict[str, Json]:
    """File name -> the English texts, nested as ComfyUI reads them."""
    return {name: load(ROOT / "locales" / "en" / name) for name in FILES}


def leaves(tree: Json) -> Iterator[str]:
    """Every text of a nested mapping, in order."""
    for value in tree.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


def wanted(trees: dict[str, Json], kept: Iterable[str]) -> list[str]:
    """The English texts that need a translation, each once, in the order of the nodes."""
    fixed = set(kept)
    return [text for text in dict.fromkeys(t for tree in trees.values() for t in leaves(tree)) if text not in fixed]


def node_names(tree: Json) -> list[str]:
    """Display names of several words, longest first: a sentence that has one means the node."""
    names = (node["display_name"] for node in tree.values())
    return sorted((name for name in names if " " in name), key=len, reverse=True)


def codes(text: str) -> set[str]:
    """What a sentence names and no language translates: ``W0``, ``LORA_STACK``, ``.safetensors``, ``SHA-256``, LoRA.

    A text that is nothing but the name of an input, such as ``lora_name``, is translated whole.
    """
    if IDENTIFIER.fullmatch(text):
        return set()
    found = {match.group().strip("'./-") for match in CODE.finditer(text)}
    return {re.sub(r"(?:'s|(?<=[A-Z])s)$", "", word) for word in found} - {""}


def named(text: str, names: list[str]) -> tuple[list[str], str]:
    """The nodes that a sentence names, and the rest of it; a name inside a longer one does not count twice."""
    found = []
    for name in names:
        if name in text:
            found.append(name)
            text = text.replace(name, "")
    return found, text


def problems(texts: dict[str, str], trees: dict[str, Json], kept: Iterable[str]) -> list[str]:
    """What is wrong with one language's texts, a line each.

    Args:
        texts: English -> translation.
        trees: ``english()``.
        kept: Texts that stay English everywhere.
    """
    needed, names = wanted(trees, kept), node_names(trees["nodeDefs.json"])
    found = [f"missing: {text}" for text in needed if text not in texts]
    found += [f"left over: {text}" for text in texts if text not in set(needed)]
    for text in needed:
        said = texts.get(text)
        if said is None:
            continue
        if not said.strip():
            found.append(f"empty: {text}")
            continue
        if signs := INTERPRETED.findall(said):
            found.append(f"{''.join(signs)} would be interpreted: {said}")
        mentioned, rest = named(text, names)
        lost = [code for code in sorted(codes(rest)) if code not in said]
        lost += [f"the node {texts[n]}" for n in mentioned if n != text and texts.get(n, "") not in said]
        if lost:
            found.append(f"without {', '.join(lost)}: {said}")
    return found


def translated(tree: Json, texts: dict[str, str], kept: Iterable[str]) -> Json:
    """The tree with every text replaced; a text without a translation is left out, and the front end shows English."""
    fixed, made = {text: text for text in kept}, {}
    for key, value in tree.items():
        said = translated(value, texts, kept) if isinstance(value, dict) else (texts | fixed).get(value)
        if said:
            made[key] = said
    return made


def as_file(tree: Any) -> str:
    """How every file of this kind is written."""
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
