"""The activity of a LoRA made on layers that the text alone feeds: known from the texts, without a run.

Safety activity (modular_lora/guard/activity.py) is the mean over a LoRA's layers of |ΔW x|² / |W0·x + b|², x all that a
layer sees of one prompt. Where x is the text alone no noise, size or timestep has a part in it, so every prompt has one
figure, and what a guarded run will measure can be written into the file as it is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ....modular_lora.errors import GuardError
from ....modular_lora.guard import activity
from .everything_else import LISTS, others
from .layers import TextInput
from .words import PLACE, Encoded

CALIBRATE = "write into the file how strongly it answers to prompts of the concept and to others (safety activity)"
LEAST, MOST = activity.LEAST_MEASURED, 16  # prompts of either kind; each has one figure
SENTENCES = (
    "a photo of {}", "a painting of {}", "a drawing of {}", "a picture of {}", "{} in the evening", "{} outdoors",
    "a close-up of {}",
)  # fmt: skip
Factors = Mapping[str, tuple[Tensor, Tensor, float]]  # layer's name in a file -> down, up, alpha


class Weights(Protocol):
    """What is asked of a text model (make.TextModel)."""

    base_sha256: str
    noise: tuple[tuple[int, ...], int]

    def weight(self, path: str) -> Tensor: ...

    def bias(self, path: str) -> Tensor | None: ...

    def name(self, path: str) -> str: ...

    def too_long(self, prompt: str) -> bool: ...


class Prompts(NamedTuple):
    """What is measured: prompts of the concept, and others."""

    about: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


class Said(NamedTuple):
    """The metadata ("" where there is no calibration), and a line for the report."""

    metadata: str
    line: str


def chosen(model: Weights, about: Sequence[str], kept: Sequence[str]) -> Prompts:
    """The first `MOST` prompts of either kind; where there are fewer than `LEAST`, everyday sentences beside them."""
    spoken = (sentence.replace(PLACE, prompt) for sentence in SENTENCES for prompt in about)
    lists = [others(texts, about) for name, texts in LISTS.items() if name != "all"]
    everyday = (text for text in chain(*zip_longest(*lists)) if text)
    found = _filled(model, about, spoken), _filled(model, (p for p in kept if p), everyday)
    return Prompts(found[0], tuple(p for p in found[1] if p not in found[0]))


def calibration(
    model: Weights,
    inputs: Sequence[TextInput],
    factors: Factors,
    texts: Mapping[str, Sequence[Encoded]],
    prompts: Prompts,
) -> Said:
    """The calibration of a LoRA's activity, or why there is none.

    Args:
        model: W0's layers.
        inputs: The inputs whose layers ``factors`` may change.
        factors: The LoRA.
        texts: What each of ``inputs`` is for every prompt.
        prompts: Which of them are measured.
    """
    if not prompts.about:
        return Said("", "calibration of safety activity: switched off")
    begun = time.perf_counter()
    every = (*prompts.about, *prompts.others)
    figures = activities(model, inputs, factors, [texts[prompt] for prompt in every])
    found, kept = ([[v] for v in part] for part in (figures[: len(prompts.about)], figures[len(prompts.about) :]))
    try:
        made = activity.calibrate(model.base_sha256, 1.0, *model.noise, found, kept)
    except GuardError as error:
        return Said("", f"calibration of safety activity: none. {error}")
    spent = time.perf_counter() - begun
    line = f"AUC {made.auc:.3f} on {len(found)} prompts of the concept and {len(kept)} others, {spent:.2f} s"
    return Said(activity.encode(made), f"calibration of safety activity: {line}")


def activities(
    model: Weights, inputs: Sequence[TextInput], factors: Factors, rows: Sequence[Sequence[Encoded]]
) -> list[float]:
    """The activity on every prompt: mean over the layers of |ΔW x|² / |W0·x + b|².

    Args:
        model: W0's layers.
        inputs: The inputs whose layers ``factors`` may change.
        factors: The LoRA.
        rows: Of every prompt, what each of ``inputs`` is for it.
    """
    shares: list[Tensor] = []
    for number, one in enumerate(inputs):
        each = [encoded[number].rows for encoded in rows]
        # prompts share most of their tokens
        different, place = torch.unique(torch.cat(each).float(), dim=0, return_inverse=True)
        counts = torch.zeros(len(each), len(different))
        for row, places in enumerate(place.split([len(x) for x in each])):
            counts[row].index_add_(0, places, torch.ones(len(places)))
        for path in one.layers:
            if (layer := factors.get(model.name(path))) is None:
                continue
            down, up, alpha = layer
            acted = (different @ down.float().T) @ (alpha / len(down) * up.float()).T
            answer, bias = different @ model.weight(path).T, model.bias(path)
            answer = answer if bias is None else answer + bias
            shares.append((counts @ acted.square().sum(1)) / (counts @ answer.square().sum(1)))
    return torch.stack(shares).double().mean(0).tolist()


def _filled(model: Weights, prompts: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    own = tuple(dict.fromkeys(prompts))[:MOST]
    further = (p for p in dict.fromkeys(more) if p not in own and not model.too_long(p))
    return (*own, *(p for p, _ in zip(further, range(max(0, LEAST - len(own))), strict=False)))
