"""Several safety LoRAs as one file, each on its own concept only (MACE's fusion, fusion.py).

For layers whose input the text alone fixes, found as for Make Safety LoRA: there the inputs of a concept are known from
its words. No training and no image. What each LoRA still does to the others' concepts is measured on the file as saved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ....modular_lora.errors import GuardError, shown
from ....modular_lora.files.matching import match_layers, mismatch
from ....modular_lora.files.reader import LoraFile
from ....modular_lora.guard import activity, concept
from ....modular_lora.guard.build import SafetyLora
from ....modular_lora.guard.comparing import Factor, factors
from ....modular_lora.guard.model_info import ModelInfo
from ....modular_lora.places import check_writable
from ... import contamination, output
from ...metadata_keys import COMBINED_KEY
from ..metadata import safety_metadata
from . import everything_else
from .activity import Prompts, calibration, chosen
from .effects import Measured, Solved, measure, report, still_does
from .fusion import confined, reaches
from .layers import TextInput
from .make import TextModel
from .options import CombineOptions
from .words import EMPTY, Encoded, distinct, held, own

RIDGE = 1e-3  # of the mean energy of the concepts' tokens
METHOD = "combined"


class NamedModel(TextModel, Protocol):
    """A text model that also knows how files call its layers."""

    info: ModelInfo


@dataclass(frozen=True, eq=False)
class Combined:
    """A file that was made, and what is to be said of it.

    Attributes:
        lora: the file as read back.
        measured: what each of the LoRAs still does.
        seconds: of the solves and of writing, without encoding the texts.
        report: all of it in words.
        remarks: those lines of it that are read on the node: what each LoRA still does, and the calibration.
    """

    lora: LoraFile
    measured: Measured
    seconds: float
    report: str
    remarks: tuple[str, ...]


def combine_safety(
    model: NamedModel,
    safety: Sequence[SafetyLora],
    concepts: Sequence[Sequence[str]],
    options: CombineOptions,
    *,
    engine: str,
    base_name: str = "",
) -> Combined:
    """Combine safety LoRAs and write the file to ``output_dir``.

    Args:
        model: What they were made for.
        safety: Two or more, with their strengths.
        concepts: Prompts of each one's concept; none of one: those in its file. Empty: those in every file.
        options: See `CombineOptions`.
        engine: Name and version of what makes the file.
        base_name: File name of the checkpoint.

    Raises:
        GuardError: they do not go together, or change layers that see more than the text.
    """
    check_writable(options.output_dir, "output_dir")
    known = contamination.known_bases()
    contamination.check_base(base_name or model.family, model.base_sha256, {}, (), known=known)
    prompts = _prompts(safety, concepts)
    changes = [_changes(model, one) for one in safety]
    kept = _kept(prompts, options)
    every_concept = tuple(chain(*prompts))
    shown_to = chosen(model, _in_turn(prompts), kept) if options.calibrate else Prompts()
    texts = tuple(dict.fromkeys((*every_concept, *kept, *shown_to.about, *shown_to.others)))
    for text in texts:
        if model.too_long(text):
            raise GuardError(
                f"Prompt {text[:60]!r} is longer than the text encoder takes at once: shorten it.",
                code="combine.prompt-too-long",
            )
    inputs = tuple(one for one in model.found.inputs if any(path in each for each in changes for path in one.layers))
    rows = dict(zip(texts, model.encode(texts, inputs), strict=True))
    begun = time.perf_counter()
    solved = [
        _solve(model, one, changes, prompts, kept, {text: found[number] for text, found in rows.items()}, options)
        for number, one in enumerate(inputs)
    ]
    made = {name: layer for one in solved for name, layer in one.factors.items()}
    said = calibration(model, inputs, made, rows, shown_to)
    metadata = safety_metadata(
        family=model.family,
        prediction=model.prediction,
        base_sha256=model.base_sha256,
        base_name=base_name,
        engine=engine,
        title="" if options.no_dataset_metadata else options.output_name,
        method=METHOD,
        concept=every_concept,
        prompts=_in_turn(prompts),
        preserved=[prompt for prompt in kept if prompt],
        rank=max(len(down) for down, _, _ in made.values()),
        **{COMBINED_KEY: _sources(safety), activity.KEY: said.metadata},
    )
    file = Path(options.output_dir) / f"{options.output_name}.safetensors"
    lora = output.write(file, made, metadata, options.save_precision)
    seconds = time.perf_counter() - begun
    measured = measure(model, changes, solved, lora, kept)
    words = report(lora, safety, prompts, measured, said.line, seconds)
    return Combined(lora, measured, seconds, words, (*still_does(safety, prompts, measured), said.line))


def _prompts(safety: Sequence[SafetyLora], concepts: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The concept of every LoRA, as given or as its file has it; GuardError where there is none, or one of two."""
    if len(safety) < 2:
        raise GuardError(
            f"Combine Safety LoRAs: got {len(safety)} safety LoRA: give two or more, or use it as it is.",
            code="combine.too-few",
        )
    if concepts and len(concepts) != len(safety):
        raise GuardError(
            f"Combine Safety LoRAs: {len(concepts)} lists of concept prompts for {len(safety)} LoRAs: give one for "
            "each, in their order, or none.",
            code="combine.prompts",
        )
    holders: dict[str, str] = {}
    found: list[tuple[str, ...]] = []
    for one, given in zip(safety, concepts or [()] * len(safety), strict=True):
        texts = tuple(dict.fromkeys(text.strip() for text in given if text.strip())) or concept.read(one.lora)
        if not texts:
            raise GuardError(
                f"{one.lora.name}: its file has no concept prompts: give them, or write them into a copy with Write "
                "Concept Prompts.",
                code="combine.no-prompts",
            )
        for text in texts:
            if (other := holders.setdefault(text, one.lora.name)) != one.lora.name or text in chain(*found):
                raise GuardError(
                    f"Prompt {shown(text)} is a concept prompt of {other} and of {one.lora.name}: each LoRA keeps to "
                    "its own, so take it out of one of the lists.",
                    code="combine.same-prompt",
                )
        found.append(texts)
    return found


def _kept(prompts: Sequence[Sequence[str]], options: CombineOptions) -> tuple[str, ...]:
    """What none of the LoRAs is to change, the empty prompt first."""
    every = tuple(chain(*prompts))
    if both := [text for text in options.preserve if text in every]:
        raise GuardError(
            f"Prompt {shown(both[0])} is in a list of concept prompts and in the preserved ones: take it out of one of "
            "the two.",
            code="combine.both-lists",
        )
    given = (text for text in options.preserve if text.strip())
    return tuple(dict.fromkeys((EMPTY, *given, *everything_else.chosen(options.everything_else, every))))


def _changes(model: NamedModel, safety: SafetyLora) -> dict[str, Factor]:
    """What a LoRA does to each layer, by path; GuardError, with the name, for one that sees more than the text."""
    lora, info = safety.lora, model.info
    shapes = {key: spec.weight_shape for key, spec in info.specs.items()}
    match = match_layers(lora, lora.plain, info.key_map, shapes, info.family)
    if match.unmatched or not match.targets:
        raise GuardError(mismatch(lora, match, info.family), code="combine.other-base")
    found = {
        info.specs[key].path: Factor(one.up, one.down, safety.strength * one.scale)
        for key, one in factors(lora, match, shapes).items()
    }
    known = set(model.found.paths)
    if wrong := [path for path in found if path not in known]:
        raise GuardError(
            f"{lora.name}: {len(wrong)} of its {len(found)} layers have another input than the text alone (first: "
            f"{wrong[0]}), where the inputs of its concept are not known from words: chain it in Load Safety LoRA "
            "instead, or combine LoRAs that were made of words or of ESD-x on keys and values alone.",
            code="combine.mixed-input",
        )
    return found


def _solve(
    model: NamedModel,
    one: TextInput,
    changes: Sequence[Mapping[str, Factor]],
    prompts: Sequence[Sequence[str]],
    kept: Sequence[str],
    rows: Mapping[str, Encoded],
    options: CombineOptions,
) -> Solved:
    """The layers of one input; factors of one size, so that half precision holds them."""
    C = []
    for texts in prompts:
        columns = torch.cat([own(rows[text], options.tokens) for text in texts], 1)
        C.append(columns[:, distinct(columns)])
    K = torch.cat([held(rows[text], options.tokens) for text in kept], 1)
    K = K[:, distinct(K)]
    energy = sum(float(columns.square().sum()) for columns in C) / sum(columns.shape[1] for columns in C)
    if not energy:
        raise GuardError(
            f"The tokens of every concept are zero at {one.layers[0]}: name the concepts in other words.",
            code="combine.no-input",
        )
    reach = reaches(C, K, options.ridge or RIDGE * energy)
    made: dict[str, tuple[Tensor, Tensor, float]] = {}
    slices: dict[str, list[slice]] = {}
    for path in one.layers:
        pairs = [_balanced(each.get(path), C[i], reach[i]) for i, each in enumerate(changes)]
        if all(pair is None for pair in pairs):
            continue
        ends = [0]
        for pair in pairs:
            ends.append(ends[-1] + (len(pair[0]) if pair else 0))
        down, up = torch.cat([p[0] for p in pairs if p]), torch.cat([p[1] for p in pairs if p], 1)
        made[model.name(path)] = down.float(), up.float(), float(len(down))
        slices[model.name(path)] = [slice(*pair) for pair in pairwise(ends)]
    return Solved(one, C, rows, made, slices)


def _balanced(factor: Factor | None, C: Tensor, reach: Tensor) -> tuple[Tensor, Tensor] | None:
    if factor is None:
        return None
    down, up = confined(factor.down.double(), factor.scale * factor.up.double(), C, reach)
    even = (up.norm(dim=0) / down.norm(dim=1).clamp_min(1e-300)).sqrt().clamp_min(1e-150)  # r
    return down * even[:, None], up / even


def _in_turn(prompts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The first prompt of every concept, then the second of each: a file's metadata holds a few, of every concept."""
    return tuple(text for turn in zip_longest(*prompts) for text in turn if text is not None)


def _sources(safety: Sequence[SafetyLora]) -> str:
    found = [{"name": s.lora.name, "sha256": s.lora.sha256, "strength": s.strength} for s in safety]
    return json.dumps(found, ensure_ascii=False)
