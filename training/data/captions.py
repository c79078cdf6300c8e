"""What a draw of an image makes of its caption, after the options of sd-scripts' data-set TOML.

Everything random comes from the ``random.Random`` given, so a draw is a function of caption, rules and seed. Two
things differ from sd-scripts: prefix and suffix go to the line that was drawn of a caption of several (there, to the
first and the last line), and ``keep_tokens_separator`` never reaches the text encoder, shuffled or not.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...modular_lora.errors import GuardError
from ...modular_lora.files import texts

WILDCARD = re.compile(r"\{\{|\}\}|\{((?:[^{}]|\{\{|\}\})+)\}")


class CaptionError(GuardError):
    """A caption file that is no text."""

    code = "caption"


@dataclass(frozen=True)
class CaptionRules:
    """sd-scripts' caption options of a subset, under its names."""

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0  # the first tags that stay where they are; without keep_tokens_separator in the caption
    keep_tokens_separator: str | None = None  # 'kept ||| shuffled ||| kept'
    secondary_separator: str | None = None  # inside one tag; caption_separator in the end
    enable_wildcard: bool = False  # {a|b}, {{ and }} for braces; one line of several
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0  # probability of the empty caption
    caption_dropout_every_n_epochs: int = 0  # empty captions in epochs n, 2n, ..., counted from 1; 0: never
    caption_tag_dropout_rate: float = 0.0  # probability that a tag that is not kept is left out
    token_warmup_min: int = 1  # tags that are not kept at step 0
    token_warmup_step: float = 0.0  # step at which all are there; below 1: share of all steps


def draw(
    caption: str, rules: CaptionRules, rng: random.Random, *, epoch: int = 0, step: int = 0, max_train_steps: int = 0
) -> str:
    """The caption of one draw; ``epoch`` and the optimizer's ``step`` count from 0.

    Order: dropout of the whole, line, prefix and suffix, wildcards, token warm-up, shuffle, dropout of tags, secondary
    separator. Tags are joined by ', '.
    """
    if _dropped(rules, rng, epoch):
        return ""
    lines = caption.splitlines() or [""]
    line = rng.choice(lines) if rules.enable_wildcard and len(lines) > 1 else lines[0]
    text = " ".join(part for part in (rules.caption_prefix, line, rules.caption_suffix) if part)
    if rules.enable_wildcard:
        text = _wildcards(text, rng)
    text = _tags(text, rules, rng, step, max_train_steps)
    if rules.secondary_separator:
        text = text.replace(rules.secondary_separator, rules.caption_separator)
    return text


def settled(rules: CaptionRules) -> CaptionRules:
    """The same without what drops or reorders parts of a caption; wildcards still draw."""
    return replace(
        rules,
        shuffle_caption=False,
        token_warmup_step=0.0,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
    )


def varies(rules: CaptionRules) -> bool:
    """Whether two draws of one caption can differ."""
    rates = rules.caption_dropout_rate, rules.caption_dropout_every_n_epochs, rules.caption_tag_dropout_rate
    return rules.shuffle_caption or rules.enable_wildcard or any(rates) or rules.token_warmup_step > 0


def read(path: Path) -> str:
    """Lines of a caption file that are not blank, stripped, joined by newlines; '' where there is none.

    In the encodings of `textfiles.decode`; CaptionError for anything else.
    """
    return "\n".join(line.strip() for line in _decoded(path).splitlines() if line.strip())


def read_json(path: Path, rules: CaptionRules) -> str:
    """The caption in another captioner's JSON file of one image: its "caption" and "tags"; CaptionError for neither."""
    return of_record(_json(path.name, _decoded(path)), rules, path.name)


def of_record(record: Any, rules: CaptionRules, name: str) -> str:
    """The caption of an entry {"caption": text, "tags": text or texts}, tags behind each line, as in sd-scripts."""
    if not isinstance(record, Mapping) or not {"caption", "tags"} & set(record):
        raise CaptionError(f'{name}: has neither "caption" nor "tags": write {{"caption": "..."}}.')
    text, found = record.get("caption") or "", record.get("tags") or ""
    if isinstance(found, list) and all(isinstance(tag, str) for tag in found):
        found = f"{rules.caption_separator} ".join(found)
    if not isinstance(text, str) or not isinstance(found, str):
        raise CaptionError(f'{name}: "caption" or "tags" is not text: write {{"caption": "..."}}.')
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = rules.caption_separator.join(found.split("\n")).strip()
    if found:
        lines = [f"{line}{rules.caption_separator}{found}" for line in lines] or [found]
    return "\n".join(lines)


def metadata(path: Path) -> dict[str, Any]:
    """sd-scripts' metadata by the images' names: an object of a .json, or a line with "image_path" each of a .jsonl.

    CaptionError where it is neither.
    """
    text = _decoded(path)
    if path.suffix.lower() == ".jsonl":
        rows = [_json(f"{path.name}, line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not all(isinstance(row, dict) and isinstance(row.get("image_path"), str) for row in rows):
            raise CaptionError(f'{path.name}: a line has no "image_path": write {{"image_path": ..., "caption": ...}}.')
        return {row["image_path"]: row for row in rows}
    found = _json(path.name, text)
    if not isinstance(found, dict):
        raise CaptionError(f'{path.name}: is not an object of images: write {{"a.png": {{"caption": "..."}}}}.')
    return found


def _decoded(path: Path) -> str:
    try:
        return texts.decode(path.read_bytes())
    except texts.TextError as error:
        raise CaptionError(f"{path.name}: {error}: save it as UTF-8.") from error


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"{name}: is not JSON ({error}): mend it.") from error


def tags(text: str, separator: str = ",") -> list[str]:
    """Tags of a caption, stripped, without the empty ones."""
    return [tag.strip() for tag in text.split(separator) if tag.strip()]


def _dropped(rules: CaptionRules, rng: random.Random, epoch: int) -> bool:
    every = rules.caption_dropout_every_n_epochs
    by_chance = rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate
    return by_chance or (every > 0 and (epoch + 1) % every == 0)


def _wildcards(text: str, rng: random.Random) -> str:
    def replace(match: re.Match) -> str:
        if match[1] is None:
            return match[0][0]
        return rng.choice(match[1].split("|")).replace("{{", "{").replace("}}", "}")

    return WILDCARD.sub(replace, text)


def _tags(text: str, rules: CaptionRules, rng: random.Random, step: int, max_train_steps: int) -> str:
    separator = rules.keep_tokens_separator or ""
    separated = bool(separator) and separator in text
    warm = warmup_steps(rules, max_train_steps)
    if not (separated or rules.shuffle_caption or warm > 0 or rules.caption_tag_dropout_rate > 0):
        return text
    if separated:
        parts = text.split(separator, 2)
        head, free, *tail = (tags(part, rules.caption_separator) for part in parts)
    else:
        every, tail = tags(text, rules.caption_separator), []
        head, free = every[: rules.keep_tokens], every[rules.keep_tokens :]
    if step < warm:
        least = rules.token_warmup_min
        free = free[: least + int(step * max(len(free) - least, 0) / warm)]
    if rules.shuffle_caption:
        rng.shuffle(free)
    if rules.caption_tag_dropout_rate > 0:
        free = [tag for tag in free if rng.random() >= rules.caption_tag_dropout_rate]
    return ", ".join([*head, *free, *(tag for part in tail for tag in part)])


def warmup_steps(rules: CaptionRules, max_train_steps: int) -> int:
    """Optimizer step from which every tag is there; ``token_warmup_step`` below 1 is a share of all steps."""
    steps = rules.token_warmup_step
    return int(steps if steps >= 1 else steps * max_train_steps)
