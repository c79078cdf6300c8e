"""Attacks that need no outside weights: synonyms, and starts from images that show the concept.

Each makes items of plain ones of the suppressed cell, with ``attack`` set; they are rows of their own in the report.
Sweeps of strengths are arms, see arms.py.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..modular_lora.errors import GuardError
from ..modular_lora.files import texts
from . import images
from .options import AuditOptions
from .plan import Item, Sampling
from .results import Drawn

CELL = "suppressed"
MASKED = 0.6  # of width and height: inpainting draws the middle anew, where an image's subject mostly is


def synonym_items(options: AuditOptions, items: Sequence[Item]) -> list[Item]:
    """Every plain suppressed prompt with each of its words' synonyms, one word at a time. Raises GuardError."""
    if not options.synonyms:
        return []
    known = read_synonyms(Path(options.synonyms))
    made = [
        replace(item, prompt=prompt, attack="synonym")
        for item in _plain(items)
        for prompt in substitutions(item.prompt, known)
    ]
    if not made:
        raise GuardError(
            f"{Path(options.synonyms).name}: no word of it is in a suppressed prompt: name words of them.",
            code="audit.synonyms-unused",
        )
    return made


def read_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """``word = other, other`` a line, ``#`` before a remark; or JSON {word: [other, ...]}. Raises GuardError."""
    try:
        text = texts.decode(path.read_bytes())
    except (OSError, texts.TextError) as error:
        raise GuardError(
            f"{path}: cannot be read ({error}): give UTF-8 text.", code="audit.synonyms-unreadable"
        ) from error
    said = _json(path, text) if path.suffix.lower() == ".json" else _lines(path, text)
    known = {word.strip().lower(): tuple(dict.fromkeys(o.strip() for o in others)) for word, others in said.items()}
    if not known or not all(word and others and all(others) for word, others in known.items()):
        raise GuardError(
            f"{path.name}: has a word without synonyms, or no word: write 'word = other, other' on each line.",
            code="audit.synonyms-empty",
        )
    return known


def substitutions(prompt: str, known: Mapping[str, Sequence[str]]) -> list[str]:
    """The prompt with one word exchanged wherever it stands whole, its case kept; longer words first."""
    either = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    pattern = re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)
    present = dict.fromkeys(match[0].lower() for match in pattern.finditer(prompt))
    changed = [_exchanged(pattern, prompt, word, other) for word in present for other in known.get(word, ())]
    return [text for text in dict.fromkeys(changed) if text != prompt]


def start_items(options: AuditOptions, items: Sequence[Item], drawn: Iterable[Drawn], folder: Path) -> list[Item]:
    """img2img and inpainting from images that show the concept.

    Starts are the user's (``start_pictures``, in turn), else the base arm's own hits: the same prompt goes on from
    what the base drew of it. ``folder`` takes the mask. Raises GuardError where there is no start.
    """
    if not (options.img2img or options.inpaint):
        return []
    starts = _starts(options, _plain(items), drawn)
    mask = str(middle_mask(options.sampling, folder)) if options.inpaint else ""
    ways = [("img2img", "", d) for d in options.img2img] + [("inpaint", mask, d) for d in options.inpaint]
    return [
        replace(item, attack=f"{way} {denoise:g}", start=start, mask=mask, denoise=denoise)
        for way, mask, denoise in ways
        for item, start in starts
    ]


def middle_mask(sampling: Sampling, folder: Path) -> Path:
    """The inpainting mask: white in the middle, `MASKED` of each side."""
    width, height = sampling.width, sampling.height
    mask = Image.new("L", (width, height), 0)
    size = round(width * MASKED), round(height * MASKED)
    mask.paste(255, ((width - size[0]) // 2, (height - size[1]) // 2, (width + size[0]) // 2, (height + size[1]) // 2))
    file, path = io.BytesIO(), folder / f"middle-{width}x{height}.png"
    mask.save(file, "PNG")
    images.write(path, file.getvalue())
    return path.absolute()


def _plain(items: Iterable[Item]) -> list[Item]:
    return [item for item in items if item.cell == CELL and not item.attack]


def _starts(options: AuditOptions, plain: Sequence[Item], drawn: Iterable[Drawn]) -> list[tuple[Item, str]]:
    if options.start_pictures:
        found = [str(path.absolute()) for path in images.find(options.start_pictures)]
        return [(item, found[i % len(found)]) for i, item in enumerate(plain)]
    hits = {d.item: str(d.path) for d in drawn if d.arm.name == "base" and d.verdict.hit}
    starts = [(item, hits[item]) for item in plain if item in hits]
    if not starts:
        raise GuardError(
            "img2img, inpaint: the base arm drew nothing that the detector calls a hit, so there is nothing to start "
            "from: give start_pictures, add the base arm, or leave the attack out.",
            code="audit.nothing-to-start-from",
        )
    return starts


def _exchanged(pattern: re.Pattern[str], prompt: str, word: str, other: str) -> str:
    return pattern.sub(lambda match: _like(match[0], other) if match[0].lower() == word else match[0], prompt)


def _like(sample: str, word: str) -> str:
    """The word in the sample's case: CAR, Car or car."""
    if len(sample) > 1 and sample.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if sample[:1].isupper() else word


def _lines(path: Path, text: str) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, equals, others = line.partition("=")
        if not equals:
            raise GuardError(
                f"{path.name} line {number}: {line.strip()[:40]!r} has no '=': write 'word = other, other'.",
                code="audit.synonyms-form",
            )
        known.setdefault(word.strip().lower(), []).extend(others.split(","))
    return known


def _json(path: Path, text: str) -> dict[str, list[str]]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GuardError(
            f"{path.name}: is not JSON ({error}): write {{word: [other, ...]}}.", code="audit.synonyms-form"
        ) from error
    lists = said.values() if isinstance(said, dict) else ()
    if not lists or not all(isinstance(o, list) and all(isinstance(w, str) for w in o) for o in lists):
        raise GuardError(
            f"{path.name}: does not map words to lists of words: write {{word: [other, ...]}}.",
            code="audit.synonyms-form",
        )
    return said
