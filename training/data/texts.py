"""Texts against the number of tokens that is encoded: what is behind it would be cut off."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from ...modular_lora.files.images import named
from ..options import OptionError, Options, SafetyOptions
from . import captions
from .dataset import TrainingImage

TooLong = Callable[[str], bool]
ERASURE = ("concept", "synonyms", "positive", "neutral", "unconditional", "preserve")
DRAWS = 4  # of a caption whose wildcards differ in length


def check_prompts(options: SafetyOptions, too_long: TooLong) -> None:
    """OptionError for a prompt of an erasure that is cut: the rest of it would count as erased, or kept, and is not."""
    for name in ERASURE:
        value = getattr(options, name)
        for prompt in (value,) if isinstance(value, str) else value:
            if too_long(prompt):
                raise OptionError(
                    f"{name}: {_shown(prompt)!r} has more than {options.max_token_length} tokens, and what is behind "
                    f"them would not be trained: {_remedy(options)}.",
                    code="option.too-many-tokens",
                )


def cut_previews(options: Options, too_long: TooLong) -> list[str]:
    """A line where preview prompts are cut."""
    cut = [prompt for prompt in options.sample_prompts if too_long(prompt)] if options.sample_every_n_steps else []
    return [_line(options, cut, len(options.sample_prompts), "preview prompts")] if cut else []


def cut_captions(options: Options, images: Sequence[TrainingImage], too_long: TooLong) -> list[str]:
    """A line where captions are cut, as they are drawn: with prefix and suffix, and any of their lines."""
    cut = [image.name for image in images if any(map(too_long, _drawn(image)))]
    return [_line(options, cut, len(images), "captions")] if cut else []


def _drawn(image: TrainingImage) -> Iterator[str]:
    rules, text = captions.settled(image.subset.rules), image.caption
    for line in text.splitlines() if rules.enable_wildcard else text.splitlines()[:1]:
        for seed in range(DRAWS if rules.enable_wildcard else 1):
            yield captions.draw(line, rules, random.Random(seed))


def _line(options: Options, cut: Sequence[str], total: int, what: str) -> str:
    return (
        f"{len(cut)} of {total} {what} have more than {options.max_token_length} tokens, the rest is CUT OFF "
        f"({_remedy(options)}): {named([*map(_shown, cut)])}"
    )


def _remedy(options: Options) -> str:
    return "shorten it" if options.max_token_length == 225 else "shorten it, or raise max_token_length"


def _shown(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"
