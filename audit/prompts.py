"""Prompt sets by file: which form a file has is seen from its columns, and what is skipped is counted.

Understood: I2P's CSV (prompt, sd_seed, categories, ...); lists of adversarial prompts as MMA-Diffusion (target_prompt,
adv_prompt), Ring-A-Bell and P4D have them; any CSV, TSV or JSON with a column called prompt or the like; plain text,
one prompt a line; and our own columns: prompt, concept, cell, style, seed, negative, start, mask, denoise.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..modular_lora.errors import GuardError
from ..modular_lora.files import texts as textfiles
from .options import AuditOptions
from .plan import Item

OWN = ("concept", "cell", "style", "seed", "negative", "start", "mask", "denoise")
I2P = ("sd_seed", "sd_guidance_scale", "nudity_percentage", "inappropriate_percentage", "lexica_url")
PLAIN = ("prompt", "prompts", "text", "caption", "sentence")
ADVERSARIAL = ("adv_prompt", "adversarial_prompt", "attack_prompt", "sensitive_prompt", "jailbreak_prompt")
SEEDS = ("seed", "sd_seed", "evaluation_seed")
CONCEPTS = ("concept", "categories", "category", "class")
NEGATIVES = ("negative", "negative_prompt")
SURPLUS = ","  # no name of a column
DENOISE = 0.7  # of a start whose row gives none
MAX_SEED = 2**64 - 1
CELL = re.compile(r"[a-z0-9][a-z0-9 _-]{0,39}(?<! )")  # files are named after it
CELLS = {"unsafe_prompts": "suppressed", "kept_prompts": "kept", "task_prompts": "task"}  # option -> cell


class PromptError(GuardError):
    """A file of prompts that cannot be used."""

    code = "prompts"


@dataclass(frozen=True)
class Prompt:
    """One row of a file, as it is used."""

    text: str
    cell: str
    concept: str = ""
    style: str = ""
    seed: int | None = None  # None: the audit's
    negative: str = ""  # "": the audit's
    attack: str = ""
    start: str = ""
    mask: str = ""
    denoise: float = 1.0


@dataclass(frozen=True)
class PromptSet:
    """What a file gave."""

    name: str
    form: str  # which form was recognised, in words
    prompts: tuple[Prompt, ...]
    skipped: Mapping[str, int]  # why -> rows

    def __str__(self) -> str:
        text = f"{self.name}: {self.form}, {len(self.prompts)} prompts"
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(self.skipped.items()))
        return f"{text}; skipped {sum(self.skipped.values())} rows ({why})" if why else text


def read_sets(options: AuditOptions, within: Path | None = None) -> tuple[PromptSet, ...]:
    """Every prompt file of ``options``; a prompt that an earlier file gave counts as a duplicate. PromptError.

    ``within``: as for `read_prompts`.
    """
    seen: set[Prompt] = set()
    sets = [
        read_prompts(Path(path), cell, seen, options.max_prompts, within)
        for name, cell in CELLS.items()
        for path in getattr(options, name)
    ]
    if not sets:
        raise PromptError(f"No prompts: give files with {', '.join(CELLS)}.")
    return tuple(sets)


def read_prompts(
    path: Path, cell: str, seen: set[Prompt] | None = None, limit: int = 0, within: Path | None = None
) -> PromptSet:
    """Prompts of a file for ``cell``; ``seen`` grows by them. Raises PromptError.

    Above ``limit`` (0: none) as many are taken as evenly as possible from the whole file, since lists go by concept.
    ``within``: the folder that start images and masks have to be in, known from their paths before any is looked at,
    so that rows of somebody else's cannot ask what else there is.
    """
    path, seen = Path(path), set() if seen is None else seen
    text = _text(path)
    rows = _lines(text) if path.suffix.lower() in (".txt", ".lst") else _table(path, text)
    form, skipped, found = _form(path, rows), Counter[str](), []
    for number, row in enumerate(rows, 1):
        try:
            prompt = _prompt(path, number, row, cell, within)
        except _Skip as skip:
            skipped[str(skip)] += 1
            continue
        if prompt in seen:
            skipped["duplicate"] += 1
        else:
            seen.add(prompt)
            found.append(prompt)
    if not found:
        why = f"all {len(rows)} rows were skipped ({dict(skipped)})" if rows else "the file is empty"
        raise PromptError(f"{path.name}: no prompts, {why}: give a file with one prompt a row.", code="prompts.none")
    if limit and len(found) > limit:
        skipped["above max_prompts"] = len(found) - limit
        found = [found[i * len(found) // limit] for i in range(limit)]
    return PromptSet(path.name, form, tuple(found), dict(skipped))


def items(sets: Iterable[PromptSet], options: AuditOptions) -> tuple[Item, ...]:
    """Prompts × seeds. Without seeds of their own, all prompts have different ones, so that no two share noise."""
    prompts = [prompt for found in sets for prompt in found.prompts]
    made = []
    for index, p in enumerate(prompts):
        first = options.seed + index * options.seeds if p.seed is None else p.seed
        for i in range(options.seeds):
            words = (p.text, (first + i) % (MAX_SEED + 1), p.cell, p.concept, p.style, p.negative or options.negative)
            made.append(Item(*words, p.attack, p.start, p.mask, p.denoise))
    return tuple(made)


def prompts_sha256(made: Sequence[Item]) -> str:
    """SHA-256 over the prompts as used: words, seeds, cells, and the contents of start images and masks."""
    said = [
        [i.prompt, i.seed, i.cell, i.concept, i.style, i.negative, i.attack, _sha(i.start), _sha(i.mask), i.denoise]
        for i in made
    ]
    return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


class _Skip(Exception):
    """Why a row is left out."""


def _text(path: Path) -> str:
    try:
        return textfiles.decode(path.read_bytes())
    except OSError as error:
        raise PromptError(
            f"{path}: cannot be read ({error.strerror}): check the path.", code="prompts.unreadable"
        ) from error
    except textfiles.TextError as error:
        raise PromptError(f"{path.name}: {error}: save it as UTF-8.", code="prompts.encoding") from error


def _lines(text: str) -> list[dict[str, Any]]:
    return [{"prompt": line} for line in re.split(r"\r\n|\n|\r", text.removesuffix("\n").removesuffix("\r"))]


def _table(path: Path, text: str) -> list[dict[str, Any]]:
    """Rows with normalised column names; a row with too many cells has them under SURPLUS."""
    if path.suffix.lower() in (".json", ".jsonl"):
        return _json(path, text)
    head = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = "\t" if "\t" in head and "," not in head else ";" if ";" in head and "," not in head else ","
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey=SURPLUS, strict=True))
    except csv.Error as error:
        raise PromptError(
            f"{path.name}: is not CSV ({error}): quote cells that hold quotes or line breaks.", code="prompts.no-csv"
        ) from error
    return [{_column(name): value for name, value in row.items()} for row in rows]


def _json(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        said = [json.loads(line) for line in lines] if path.suffix.lower() == ".jsonl" else json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"{path.name}: is not JSON ({error}): give a list of texts or of objects.", code="prompts.no-json"
        ) from error
    if isinstance(said, dict) and isinstance(said.get("prompts"), list):
        said = said["prompts"]
    if not isinstance(said, list) or not all(isinstance(row, str | dict) for row in said):
        raise PromptError(
            f"{path.name}: holds no list of texts or objects: write a list of prompts.", code="prompts.no-list"
        )
    return [{"prompt": row} if isinstance(row, str) else {_column(k): v for k, v in row.items()} for row in said]


def _column(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _form(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """The form in words. PromptError where no column holds prompts."""
    columns = {name for row in rows for name in row}
    if not columns:
        return "empty"
    named = next((name for name in (*ADVERSARIAL, *PLAIN) if name in columns), None)
    if named is None:
        shown = ", ".join(sorted(columns - {SURPLUS})[:8])
        raise PromptError(
            f"{path.name}: no column holds prompts (columns: {shown}): name one of them 'prompt'.",
            code="prompts.no-column",
        )
    if path.suffix.lower() in (".txt", ".lst"):
        return "one prompt a line"
    if "adv_prompt" in columns and "target_prompt" in columns:
        return "MMA-Diffusion's columns"
    if named in ADVERSARIAL:
        return f"a list of adversarial prompts (column {named})"
    if columns & set(I2P):
        return "I2P's columns (its guidance is not used)" if "sd_guidance_scale" in columns else "I2P's columns"
    return "our columns" if columns & set(OWN) else f"a list of prompts (column {named})"


def _prompt(path: Path, number: int, row: Mapping[str, Any], cell: str, within: Path | None) -> Prompt:
    """A row as a Prompt; _Skip where it cannot be used, PromptError where it names an image that is not there."""
    if row.get(SURPLUS):
        raise _Skip("with more cells than columns")
    adversarial = next((name for name in ADVERSARIAL if name in row), None)
    text = _cell(row, (adversarial,) if adversarial else PLAIN)
    if not text:
        raise _Skip("without a prompt")
    start, mask = (_image(path, number, _cell(row, (name,)), within) for name in ("start", "mask"))
    if mask and not start:
        raise _Skip("with a mask and no start")
    attack = "adversarial prompt" if adversarial else "inpaint" if mask else "img2img" if start else ""
    seed, denoise = _number(_cell(row, SEEDS), "seed"), _number(_cell(row, ("denoise",)), "denoise")
    if seed is not None and not (seed == int(seed) and 0 <= seed <= MAX_SEED):
        raise _Skip("with an invalid seed")
    if denoise is not None and not 0 < denoise <= 1:
        raise _Skip("with an invalid denoise")
    own = _cell(row, ("cell",)).lower()
    if own and not CELL.fullmatch(own):
        raise _Skip("with a cell that is not a plain name")
    return Prompt(
        text,
        own or cell,
        _cell(row, CONCEPTS),
        _cell(row, ("style",)),
        None if seed is None else int(seed),
        _cell(row, NEGATIVES),
        attack,
        start,
        mask,
        (DENOISE if denoise is None else denoise) if start else 1.0,
    )


def _cell(row: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of the columns that holds something."""
    values = (row.get(name) for name in names)
    texts = (", ".join(map(str, v)) if isinstance(v, list) else "" if v is None else str(v).strip() for v in values)
    text = next(filter(None, texts), "")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON can hold halves of a pair; no file or page can
        raise _Skip("with a broken character")
    return text


def _number(text: str, name: str) -> int | float | None:
    """Whole numbers exactly: a float would round large seeds."""
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        raise _Skip(f"with an invalid {name}") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise _Skip(f"with an invalid {name}")
    return number


def _image(path: Path, number: int, name: str, within: Path | None) -> str:
    """An image named in a row, relative to the file of prompts; '..' is taken out before anything is looked at."""
    if not name:
        return ""
    found = Path(os.path.abspath(path.parent / name))
    if within and not found.is_relative_to(os.path.abspath(within)):
        raise PromptError(
            f"{path.name} row {number}: image {name!r} is outside the folder {within.name!r}: put it there.",
            code="prompts.outside",
        )
    if not os.path.isfile(found):  # unlike Path.is_file, False for names that are too long
        raise PromptError(
            f"{path.name} row {number}: image {name!r} is not there: correct the path.", code="prompts.no-image"
        )
    return str(found)


def _sha(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
