"""What erasure objectives pull predictions towards: one formula of frozen predictions, and the prompts it needs.

target = ε_0(x_t, neutral) + s (ε_0(x_t, positive) − ε_0(x_t, unconditional)), ε_0 the base without adapters.

Whatever a network says instead of ε (v, the velocity of a flow, x_0) is affine in ε at a given x_t: F = p x_t + q ε
with p and q of t alone (model.py: ε = ``noise_of_x`` x_t + ``noise_of_said`` F). The coefficients above sum to 1, so
p x_t comes out once on either side, and the formula for F is the formula for ε: for flow matching, with v = ε − x_0,

    v_θ(x_t, c) ← v_0(x_t, ∅) − η (v_0(x_t, c) − v_0(x_t, ∅))        (ESD)
    v_θ(x_t, c) ← v_θ(x_t, ∅), without gradient                      (SDD)
    v_θ(x_t, c) ← v_0(x_t, n) − g (v_0(x_t, p) − v_0(x_t, u))        (LECO)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Cond, HostModel
from ..options import OptionError, SafetyOptions
from .sampling import Network

Known = dict[tuple[int, str], Tensor]  # (row, prompt) -> frozen prediction c ...
EMPTY = ""


@dataclass(frozen=True)
class Term:
    """A prompt and its target; x_t is drawn with the same prompt."""

    prompt: str
    neutral: str = EMPTY
    positive: str = EMPTY
    unconditional: str = EMPTY
    scale: float = 0.0
    student: bool = False  # SDD: the target is the student's own prediction for the empty prompt

    @property
    def needs(self) -> tuple[str, ...]:
        """Prompts whose frozen predictions the target is made of, each once."""
        if self.student:
            return ()
        names = (self.neutral, self.positive, self.unconditional) if self.scale else (self.neutral,)
        return tuple(dict.fromkeys(names))


class Prompts:
    """Conditioning of all prompts of a run, encoded together (so to one length) and once."""

    def __init__(self, host_model: HostModel, prompts: Sequence[str]) -> None:
        self.rows: Mapping[str, int] = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        with torch.no_grad():
            self.cond = host_model.encode(list(self.rows))

    def __call__(self, prompts: Sequence[str]) -> Cond:
        return self.cond[[self.rows[prompt] for prompt in prompts]]

    def pair(self, prompts: Sequence[str]) -> tuple[Cond, Cond | None]:
        """Conditioning for guidance: of ``prompts`` and of as many empty ones; None where all are empty already."""
        return self(prompts), self([EMPTY] * len(prompts)) if any(prompts) else None


def erased(options: SafetyOptions) -> tuple[Term, ...]:
    """Terms of concept and synonyms.

    ESD (arXiv 2303.07345, eq. 5): ε_0(∅) − η (ε_0(c) − ε_0(∅)). The public code differs: its first term is ε_0(c).
    SDD (Kim et al., ICML 2023 workshop; nannullna/safe-diffusion): the student's own ε_θ(∅), without gradient.
    LECO (p1atdev/LECO): ε_0(neutral) − g (ε_0(positive) − ε_0(unconditional)), with + to enhance; ``positive`` goes
    with the concept's prompts in order, one for all where there is one, and synonyms without one are their own.
    """
    prompts = [*options.concept, *options.synonyms]
    if not options.concept or not all(prompt.strip() for prompt in prompts):
        raise OptionError(
            "concept: a prompt is missing or blank: name what is to be erased, for example 'a vehicle'.",
            code="option.no-concept",
        )
    both = next((prompt for prompt in prompts if prompt in options.preserve), None)
    if both is not None:
        raise OptionError(
            f"Prompt {both!r} is both erased and preserved: take it out of one of the lists.", code="option.both-lists"
        )
    eta, positives = options.negative_guidance, _positives(options, prompts)
    if options.objective == "sdd":
        terms = [Term(prompt, student=True) for prompt in prompts]
    elif options.objective == "leco":
        scale = -eta if options.action == "erase" else eta
        names = (options.neutral, options.unconditional)
        terms = [Term(p, names[0], pos, names[1], scale) for p, pos in zip(prompts, positives, strict=True)]
    else:
        terms = [Term(prompt, positive=prompt, scale=-eta) for prompt in prompts]
    return tuple(dict.fromkeys(terms))


def _positives(options: SafetyOptions, prompts: list[str]) -> list[str]:
    given = options.positive
    if len(given) == 1:
        return [given[0]] * len(prompts)
    if len(given) not in (0, len(options.concept)):
        raise OptionError(
            f"positive: {len(given)} prompts for the {len(options.concept)} of the concept: give none, one, or as many "
            "as those.",
            code="option.positive",
        )
    return [*given, *prompts[len(given) :]]


def kept(options: SafetyOptions) -> tuple[Term, ...]:
    """Preservation: ε_θ(x_t, p) is held to ε_0(x_t, p)."""
    return tuple(Term(prompt, neutral=prompt) for prompt in dict.fromkeys(options.preserve) if prompt.strip())


@torch.no_grad()
def frozen(
    network: Network, prompts: Prompts, x_t: Tensor, t: Tensor, needs: Sequence[Sequence[str]], known: Known
) -> Known:
    """``known`` and what row i of x_t (b c ...) still lacks of needs[i], in one call of the base for all rows."""
    wanted = [(i, prompt) for i, row in enumerate(needs) for prompt in dict.fromkeys(row) if (i, prompt) not in known]
    if not wanted:
        return known
    rows = torch.tensor([i for i, _ in wanted], device=x_t.device)
    found = network(x_t[rows], t[rows], prompts([prompt for _, prompt in wanted]))
    return known | dict(zip(wanted, found, strict=True))


def target(term: Term, row: int, known: Known) -> Tensor:
    """neutral + s (positive − unconditional), c ...."""
    neutral = known[row, term.neutral]
    if not term.scale:
        return neutral
    return neutral + term.scale * (known[row, term.positive] - known[row, term.unconditional])
