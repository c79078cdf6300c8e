"""Words in, a safety LoRA out: concept, guide and kept prompts on the inputs that the text alone fixes.

No training and no image: one solve an input. What comes out is measured on the LoRA as it is saved: how far the layers'
answers to kept and to erased tokens moved.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ....modular_lora.errors import GuardError
from ....modular_lora.files.reader import LoraFile
from ....modular_lora.guard import activity
from ....modular_lora.places import check_writable
from ... import contamination, output
from ...model import Prediction
from ..metadata import safety_metadata
from .activity import Prompts, Said, calibration, chosen
from .edit import Edit
from .layers import TextInput, TextLayers, named
from .null_space import alpha_edit, null_space, quiet_space, speed
from .options import MakeOptions, OptionError
from .rece import rece
from .uce import LAMBDA, uce
from .words import EMPTY, PLACE, Encoded, distinct, held, pair

RIDGE = 0.01  # of the concept's mean energy that the kept prompts leave
LEAST = 0.01  # share of the concept's energy that has to be left
DROPPED = 1e-8  # share of a column's energy below which nothing of it is left
SAMPLED = 8  # layers of an input whose answers are compared
TINY = 1e-12
SHOWN = 12  # kept prompts in the report
LIMITS = (
    "Not claimed: that images show what these numbers say (audit them); that a prompt with other words for the concept "
    "is answered otherwise (name synonyms); that an embedding found with access to the weights does not bring the "
    "concept back: closed forms are weak there."
)


class TextModel(Protocol):
    """A loaded model as far as its text goes; comfy_host/text_inputs.py offers it for what ComfyUI has loaded."""

    family: str
    base_sha256: str
    prediction: Prediction
    found: TextLayers
    noise: tuple[tuple[int, ...], int]  # latent that `encode` evaluates the network with: its shape, its noise's seed

    def encode(self, prompts: Sequence[str], inputs: Sequence[TextInput]) -> list[list[Encoded]]:
        """What each of the inputs is for each of the prompts."""

    def weight(self, path: str) -> Tensor:
        """W0 of a layer, out in, float32 on the CPU."""

    def bias(self, path: str) -> Tensor | None:
        """Its bias, out, float32 on the CPU; None where it has none."""

    def name(self, path: str) -> str:
        """The layer's name in a LoRA file."""

    def too_long(self, prompt: str) -> bool:
        """Whether the encoder does not take a prompt in one piece."""


@dataclass(frozen=True)
class Part:
    """What one input came to."""

    width: int
    layers: int
    columns: int  # of the concept
    rank: int
    kept_rank: int
    left: float  # share of the concept's energy outside what the kept prompts use
    exact: bool  # whether kept prompts are kept exactly
    energy: float  # of the change, kept at this rank
    kept: Mapping[str, float]  # prompt -> largest ‖ΔW k‖ / ‖W k‖ over tokens and layers
    erased: Mapping[str, float]  # prompt -> mean share of the way to the guide that its tokens went


@dataclass(frozen=True, eq=False)
class Made:
    """A safety LoRA that was made, and what is to be said of it.

    Attributes:
        lora: The file as read back.
        parts: What each input came to.
        seconds: Of the solves and of writing, without encoding the texts.
        report: All that is said of it.
        calibrated: The line of the report on its calibration.
    """

    lora: LoraFile
    parts: tuple[Part, ...]
    seconds: float
    report: str
    calibrated: str


def make_safety(model: TextModel, options: MakeOptions, *, engine: str, base_name: str = "") -> Made:
    """Make a safety LoRA and write it to ``output_dir``; raises GuardError or OptionError."""
    check_writable(options.output_dir, "output_dir")
    known = contamination.known_bases()
    contamination.check_base(base_name or model.family, model.base_sha256, {}, (), known=known)
    found = named(model.found, options.layers)
    onto = {
        template.replace(PLACE, prompt): template.replace(PLACE, guide) if guide else EMPTY
        for prompt, guide in zip(options.erased, options.guides, strict=True)
        for template in options.templates
    }
    kept = tuple(dict.fromkeys((EMPTY, *onto.values(), *options.kept)))
    for prompt in (*onto, *kept):
        if model.too_long(prompt):
            raise OptionError(
                f"Prompt {prompt[:60]!r} is longer than the text encoder takes at once: shorten it.",
                code="option.too-long",
            )
    measured = chosen(model, tuple(onto), kept) if options.calibrate else Prompts()
    every = tuple(dict.fromkeys((*onto, *kept, *measured.about, *measured.others)))
    texts = dict(zip(every, model.encode(every, found.inputs), strict=True))
    started = time.perf_counter()
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    solved: list[_Solved] = []
    for number, one in enumerate(found.inputs):
        rows = {prompt: encoded[number] for prompt, encoded in texts.items()}
        solved.append(_solve(model, one, options, rows, onto, kept))
        for path in one.layers:
            down, up = solved[-1].edit.factors(model.weight(path))
            factors[model.name(path)] = (down.float(), up.float(), float(solved[-1].edit.rank))
    said = calibration(model, found.inputs, factors, texts, measured)
    metadata = safety_metadata(
        family=model.family,
        prediction=model.prediction,
        base_sha256=model.base_sha256,
        base_name=base_name,
        engine=engine,
        title="" if options.no_dataset_metadata else options.output_name,
        method=options.method,
        concept=options.concept,
        prompts=tuple(onto),
        preserved=[prompt for prompt in kept if prompt],
        rank=max(one.edit.rank for one in solved),
        **{activity.KEY: said.metadata},
    )
    file = Path(options.output_dir) / f"{options.output_name}.safetensors"
    lora = output.write(file, factors, metadata, options.save_precision)
    seconds = time.perf_counter() - started
    parts = tuple(_measured(model, one, lora, onto, kept) for one in solved)
    words = report(lora, options, found, parts, said, seconds, base_name or model.family)
    return Made(lora, parts, seconds, words, said.line)


@dataclass(frozen=True, eq=False)
class _Solved:
    """The edit of one input."""

    input: TextInput
    rows: Mapping[str, Encoded]
    edit: Edit
    columns: int
    kept_rank: int
    left: float
    exact: bool
    energy: float


def _solve(
    model: TextModel,
    one: TextInput,
    options: MakeOptions,
    rows: Mapping[str, Encoded],
    onto: Mapping[str, str],
    kept: Sequence[str],
) -> _Solved:
    """The edit of one input, of the largest rank at most."""
    pairs = [pair(rows[prompt], rows[guide], options.tokens) for prompt, guide in onto.items()]
    C, G = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
    K = torch.cat([held(rows[prompt], options.tokens) for prompt in kept], 1)
    every = torch.cat([rows[prompt].rows.T for prompt in kept], 1)  # the null space keeps whole prompts
    if not bool(C.any()):
        raise GuardError(
            f"The tokens of the concept are zero at {one.layers[0]} and {len(one.layers) - 1} more layers, so no edit "
            "of these layers can move them: name the other layers in layers, or write the concept in other words.",
            code="make.no-input",
        )
    columns = distinct(C, G)
    C, G, K, every = C[:, columns], G[:, columns], K[:, distinct(K)], every[:, distinct(every)]
    P, kept_rank = null_space(every)
    left, exact = _left(C, P), options.method in ("null-space", "alphaedit")
    if exact and left < LEAST:
        exact = False
        if options.threshold:
            P = quiet_space(every, options.threshold)
            left = _left(C, P)
        if left < LEAST:
            raise GuardError(_no_room(one, kept_rank, left, len(kept), options.threshold), code="make.no-room")
    if options.method in ("null-space", "alphaedit"):
        there = (P @ C).square().sum(0) > DROPPED * C.square().sum(0)
        C, G = C[:, there], G[:, there]
        ridge = options.ridge or RIDGE * float((P @ C).square().sum(0).mean())
        first = rows[EMPTY].rows.T
        edit = (
            speed(C, G, P, first, ridge)
            if options.method == "null-space"
            else alpha_edit(C, G - C, P, torch.zeros_like(C[:, :0]), ridge)
        )
    elif options.method == "uce":
        edit = uce(C, G, K, options.ridge or LAMBDA)
    else:
        edit = rece(C, G, K, _gram(model, one), options.rounds, uce_lambda=options.ridge or LAMBDA)
    edit, energy = edit.reduced(options.network_dim or edit.rank)
    return _Solved(one, rows, edit, C.shape[1], kept_rank, left, exact, energy)


def _left(C: Tensor, P: Tensor) -> float:
    """‖P C‖² / ‖C‖²: the share of the concept's energy where the kept prompts are silent."""
    return float((P @ C).square().sum() / C.square().sum())


def _no_room(one: TextInput, kept_rank: int, left: float, kept: int, threshold: float) -> str:
    told = f"with threshold {threshold:g}" if threshold else "and threshold is 0"
    return (
        f"The {kept} kept prompts use {kept_rank} of {one.width} dimensions and leave {100 * left:.2g} % of the "
        "concept's "
        f"energy ({told}; at least {100 * LEAST:g} % is needed): preserve fewer prompts, use tokens 'subject', raise "
        "threshold, or use method uce, which holds them as far as it can."
    )


def _gram(model: TextModel, one: TextInput) -> Tensor:
    """S = Σ WᵀW over the input's layers (d d)."""
    S = torch.zeros(one.width, one.width, dtype=torch.float64)
    for path in one.layers:
        W = model.weight(path)
        S += (W.T @ W).double()
    return S


def _measured(model: TextModel, solved: _Solved, lora: LoraFile, onto: Mapping[str, str], kept: Sequence[str]) -> Part:
    """How far at most eight layers' answers to kept and erased prompts moved, by the file's own factors."""
    one, rows = solved.input, solved.rows
    some = []
    for path in one.layers[:: max(1, -(-len(one.layers) // SAMPLED))]:
        factors, W = lora.plain.get(model.name(path)), model.weight(path).double()
        if factors is None:  # it was zero, and left out
            some.append((W, W))
        else:
            some.append((W, W + factors.scale * factors.up.double() @ factors.down.double()))
    every = torch.cat([rows[prompt].rows for prompt in kept])
    columns, place = torch.unique(every, dim=0, return_inverse=True)  # prompts share most of their tokens
    x = columns.T
    moved = [((edited - W) @ x).norm(dim=0) / (W @ x).norm(dim=0).clamp_min(TINY) for W, edited in some]
    largest = torch.stack(moved).amax(0)[place].split([len(rows[prompt].rows) for prompt in kept])
    stay = {prompt: float(each.max()) for prompt, each in zip(kept, largest, strict=True)}
    gone: dict[str, float] = {}
    for prompt, guide in onto.items():
        C, G = pair(rows[prompt], rows[guide], "subject" if rows[prompt].spans and rows[guide].spans else "all")
        away = sum(float((W @ (C - G)).square().sum()) for W, _ in some)
        rest = sum(float((edited @ C - W @ G).square().sum()) for W, edited in some)
        gone[prompt] = 1.0 - (rest / max(away, TINY)) ** 0.5
    return Part(
        one.width, len(one.layers), solved.columns, solved.edit.rank, solved.kept_rank, solved.left, solved.exact,
        solved.energy, stay, gone,
    )  # fmt: skip


def report(
    lora: LoraFile,
    options: MakeOptions,
    found: TextLayers,
    parts: Sequence[Part],
    said: Said,
    seconds: float,
    base: str,
) -> str:
    """What came out, and what is not claimed."""
    lines = [
        f"{lora.name}: {options.method}, {len(lora.layers)} layers, rank {max(p.rank for p in parts)}, made in "
        f"{seconds:.2f} s for {base}; file SHA-256 {lora.sha256}",
        f"{100 * found.share:.0f} % of what a text changes in a prediction passes through these layers",
    ]
    if found.share < 0.9:
        lines.append("WARNING: the rest of the text's effect passes by other layers, which no closed form can change")
    if found.mixed:
        lines.append(
            f"left out, since they see text mixed with the image or the timestep: {len(found.mixed)} layers (first: "
            f"{found.mixed[0]})"
        )
    lines += [line for part in parts for line in _lines(part, options)]
    return "\n".join([*lines, said.line, LIMITS])


def _lines(part: Part, options: MakeOptions) -> list[str]:
    kept = sorted(part.kept.items(), key=lambda item: -item[1])
    erased = sorted(part.erased.items(), key=lambda item: item[1])
    mean = sum(part.erased.values()) / len(part.erased)
    how = (
        "kept exactly, up to rounding"
        if part.exact
        else f"no room to keep exactly: directions used less than {options.threshold:g} were given up"
        if options.method in ("null-space", "alphaedit")
        else "kept as far as the regression can"
    )
    lines = [
        f"input of {part.width} dimensions, {part.layers} layers: {part.columns} concept tokens, rank {part.rank} "
        f"({100 * part.energy:.4g} % of the change); the kept prompts span {part.kept_rank} of {part.width} dimensions "
        f"and leave {100 * part.left:.3g} % of the concept's energy; {how}",
        f"  kept tokens moved by at most {kept[0][1]:.1e} of their answer ({kept[0][0]!r})",
        f"  erased words went {100 * mean:.1f} % of the way to the guide, at least {100 * erased[0][1]:.1f} % "
        f"({erased[0][0]!r})",
    ]
    if not part.exact:
        lines.append("  change of kept prompts: " + ", ".join(f"{p!r} {v:.1e}" for p, v in kept[:SHOWN]))
        if len(kept) > SHOWN:
            lines[-1] += f" and {len(kept) - SHOWN} that changed less"
    return lines
