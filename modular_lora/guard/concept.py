"""Concept prompts: what a safety LoRA is for, as texts in its file's metadata, read strictly and written into a copy.

The key is `PROMPTS_KEY`, its value a JSON list of 1 to `MOST` strings, each of 1 to `LONGEST` characters. Both safety
trainers write it; `write_copy` puts it into a copy of a file from elsewhere, whose tensors stay the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import GuardError, LoraFileError, plain, shown, writing
from ..files.reader import ENDINGS, LoraFile, read_lora
from ..util import atomic

PROMPTS_KEY = "modular_lora.concept_prompts"
MOST, LONGEST = 32, 500  # prompts; characters of one
TEXT_LIMIT = MOST * (LONGEST * 12 + 4)  # characters of the JSON: every character as a pair of \uXXXX
_REMEDY = f"write 1 to {MOST} prompts of at most {LONGEST} characters into a copy with Write Concept Prompts"
_ALIGNMENT = 8  # bytes that a header is padded to, as safetensors itself writes it


def read(lora: LoraFile) -> tuple[str, ...]:
    """The concept prompts of a file, each once, in its order; () where it has none.

    Raises LoraFileError, naming the file, for a value that is not a list of such texts.
    """
    text = lora.metadata.get(PROMPTS_KEY)
    if text is None:
        return ()
    if len(text) > TEXT_LIMIT:
        what = f"{PROMPTS_KEY} has {len(text)} characters"
        raise LoraFileError(f"{lora.name}: {what}: {_REMEDY}", code="file.concept-prompts")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(
            f"{lora.name}: {PROMPTS_KEY} is not JSON: {_REMEDY}", code="file.concept-prompts"
        ) from error
    if not isinstance(found, list):
        raise LoraFileError(
            f"{lora.name}: {PROMPTS_KEY} is {shown(found)}, no list of texts: {_REMEDY}", code="file.concept-prompts"
        )
    if problem := _problem(found):
        raise LoraFileError(f"{lora.name}: {PROMPTS_KEY} {problem}: {_REMEDY}", code="file.concept-prompts")
    return tuple(dict.fromkeys(found))


def encode(prompts: Iterable[str]) -> str:
    """The value of `PROMPTS_KEY`; raises GuardError for prompts that `read` would refuse."""
    found = list(dict.fromkeys(prompts))
    if problem := _problem(found):
        raise GuardError(
            f"Concept prompts: the list {problem}: give 1 to {MOST} prompts of at most {LONGEST} characters.",
            code="concept.prompts",
        )
    return json.dumps(found)


def trained(prompts: Sequence[str]) -> str:
    """The value of `PROMPTS_KEY` for prompts that a safety LoRA was trained on: the first that fit; "" for none."""
    fit = [prompt for prompt in dict.fromkeys(prompts) if _problem([prompt]) is None][:MOST]
    return encode(fit) if fit else ""


def copy_with(source: Path, target: Path, key: str, value: str, expected_sha256: str | None = None) -> LoraFile:
    """Write ``source`` with this entry of metadata, in the place of any it had, to the new file ``target``.

    Every tensor keeps its bytes and its place, and all other metadata its value. The copy is whole or not there at
    all. No file is written over; one that is this very copy already is left as it is.

    Returns:
        The copy as read back.

    Raises:
        LoraFileError: ``source`` cannot be read as a LoRA.
        GuardError: ``target`` is there already, or it cannot be written.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() not in ENDINGS:
        raise GuardError(
            f"{target.name}: is not the name of a LoRA file: let it end in {ENDINGS[0]}.", code="concept.name"
        )
    before = read_lora(source, expected_sha256=expected_sha256)
    with writing(target):
        data = source.read_bytes()
        if hashlib.sha256(data).hexdigest() != before.sha256:
            raise GuardError(
                f"{before.name} was written over while it was copied: write the copy again.", code="concept.changed"
            )
        copy = _with(data, key, value)
        try:
            with atomic.creating(target, ending=f"-{target.name}", sync=True) as part:  # it is read back as a LoRA file
                part.write_bytes(copy)
                read_lora(part)
        except FileExistsError:
            if not target.is_file() or target.read_bytes() != copy:
                what = f"{target.name} is another file already and is not written over"
                raise GuardError(f"{what}: give the copy another name.", code="concept.name-taken") from None
    return read_lora(target, expected_sha256=hashlib.sha256(copy).hexdigest())


def write_copy(source: Path, target: Path, prompts: Iterable[str], expected_sha256: str | None = None) -> LoraFile:
    """Write ``source`` with these concept prompts, in the place of any it had, to the new file ``target``.

    See `copy_with`, which raises for file and place.

    Returns:
        The copy as read back.

    Raises:
        GuardError: the prompts are refused.
    """
    return copy_with(source, target, PROMPTS_KEY, encode(prompts), expected_sha256)


def written(lora: LoraFile, place: str | Path) -> str:
    """What is said of a copy that was written; ``place``: what people know it by."""
    return f"{place}: {len(read(lora))} concept prompts, tensors as they were, SHA-256 {lora.sha256}"


def _with(data: bytes, key: str, value: str) -> bytes:
    """A safetensors file with one more entry of metadata, or another one; the bytes of the tensors are as they were."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = {"__metadata__": {**header.get("__metadata__", {}), key: value}} | {
        name: entry for name, entry in header.items() if name != "__metadata__"
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _problem(prompts: list) -> str | None:
    """What is wrong with a list of prompts, or None."""
    if not prompts:
        return "is empty"
    if len(prompts) > MOST:
        return f"has {len(prompts)} prompts"
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            return f"has {shown(prompt)} as number {number}, which is not text"
        if not prompt.strip():
            return f"has a blank text as number {number}"
        if len(prompt) > LONGEST:
            return f"has {len(prompt)} characters in number {number} ({plain(prompt)[:40]!r} ...)"
        if any("\ud800" <= c <= "\udfff" or (c < " " and c not in "\t\n") for c in prompt):
            return f"has characters in number {number} that no text holds"
    return None
