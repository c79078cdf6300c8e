"""A pool of noisy latents x_t with their targets, so that a training step need not draw its own.

Where x_t comes from the frozen base, x_t and every frozen prediction are constants. A guided walk of n steps asks the
base for ε_0(x_t, c) and ε_0(x_t, ∅) at n points anyway, so n examples cost 2 n network rows; drawn
anew, each one costs about n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...modular_lora.util import atomic
from ..model import HostModel, per_row
from ..seeds import step_generator
from . import sampling
from .sampling import Network, Point
from .targets import EMPTY, Known, Prompts, Term, frozen, target

Progress = Callable[[int, int], None]  # called with sampling steps done and in all; may raise to interrupt


@dataclass(frozen=True, eq=False)
class Pool:
    """n examples on the CPU, x_t in float32."""

    x_t: Tensor  # n c ...
    t: Tensor  # n
    term: Tensor  # n, index into the terms it was built for

    @staticmethod
    def of(parts: Mapping[str, Tensor]) -> Pool:
        """The pool that has these `parts`."""
        return FrozenPool(**parts) if "target" in parts else Pool(**parts)

    def __len__(self) -> int:
        return len(self.t)

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, eq=False)
class FrozenPool(Pool):
    """With what the frozen base predicts there, in its own type; SDD's teacher is the student, and has no such pool."""

    target: Tensor  # n c ...
    empty: Tensor  # n c ..., ε_0(x_t, ∅)
    effect: Tensor  # n, mean |ε_0(x_t, c) − ε_0(x_t, ∅)|² over all but n


@dataclass(frozen=True)
class Plan:
    """How a pool is drawn."""

    terms: tuple[int, ...]  # index of the term of every walk
    points: int  # of a walk that are kept, at random
    steps: int
    seed: int
    guidance: float
    size: int  # pixels
    rows: int  # walks at a time

    @staticmethod
    def of(terms: int, examples: int, steps: int, seed: int, guidance: float, size: int, rows: int) -> Plan:
        """At least one walk for each of ``terms``, more where ``examples`` want them, in turn."""
        walks = max(terms, -(-examples // steps))
        points = max(1, min(steps, -(-examples // walks)))
        return Plan(tuple(i % terms for i in range(walks)), points, steps, seed, guidance, size, rows)

    @property
    def steps_in_all(self) -> int:
        return len(self.terms) * self.steps


def build(
    host_model: HostModel, network: Network, prompts: Prompts, terms: Sequence[Term], plan: Plan, progress: Progress
) -> Pool:
    """Walks of ``network``, which must be what x_t and targets are to come from, collected into a Pool.

    The same plan gives the same pool on the same machine. ``progress`` is called after every sampling step.
    """
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(plan.terms), plan.rows):
        these = range(start, min(start + plan.rows, len(plan.terms)))
        batch = [terms[plan.terms[i]] for i in these]
        generators = [step_generator(plan.seed, "walk", i) for i in these]
        x = sampling.noise(host_model, (plan.size, plan.size), generators)
        keep = torch.stack([_chosen(plan, g) for g in generators])  # rows steps
        cond, empty = prompts.pair([term.prompt for term in batch])
        walk = sampling.walk(network, host_model.schedule, x, cond, empty, plan.guidance, plan.steps)
        for i, point in enumerate(walk):
            rows = keep[:, i].nonzero()[:, 0]
            if len(rows):
                index = torch.tensor([plan.terms[start + int(row)] for row in rows])
                parts.append(_examples(network, prompts, batch, point, rows, host_model.dtype) | {"term": index})
            progress(start * plan.steps + (i + 1) * len(batch), plan.steps_in_all)
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Pool.of(columns)


def _chosen(plan: Plan, generator: torch.Generator) -> Tensor:
    """Which of a walk's points are kept (steps, bool)."""
    keep = torch.zeros(plan.steps, dtype=torch.bool)
    keep[torch.randperm(plan.steps, generator=generator)[: plan.points]] = True
    return keep


def _examples(
    network: Network, prompts: Prompts, batch: list[Term], point: Point, rows: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Examples of the walks ``rows`` at a point; what guidance has already asked is not asked again."""
    terms, at = [batch[int(row)] for row in rows], rows.to(point.t.device)
    x, t = point.x_t[at], point.t[at]
    found = {"x_t": x, "t": t}
    if not terms[0].student:
        known: Known = {(i, terms[i].prompt): point.cond[int(row)] for i, row in enumerate(rows)}
        if point.empty is not None:
            known |= {(i, EMPTY): point.empty[int(row)] for i, row in enumerate(rows)}
        found |= _frozen_parts(network, prompts, terms, x, t, known, dtype)
    return {name: part.cpu() for name, part in found.items()}


def _frozen_parts(
    network: Network, prompts: Prompts, terms: list[Term], x_t: Tensor, t: Tensor, known: Known, dtype: torch.dtype
) -> dict[str, Tensor]:
    known = frozen(network, prompts, x_t, t, [(*term.needs, EMPTY) for term in terms], known)
    empty = torch.stack([known[i, EMPTY] for i in range(len(terms))])
    cond = torch.stack([known[i, term.prompt] for i, term in enumerate(terms)])
    targets = torch.stack([target(term, i, known) for i, term in enumerate(terms)])
    effect = per_row((cond - empty).square())
    return {"target": targets.to(dtype), "empty": empty.to(dtype), "effect": effect}


def place(t: Tensor, total: int, steps: int) -> Tensor:
    """Nearest step (b, 0 the noisiest) of the sampling grid to timesteps t (b)."""
    return (((total - 1 - t) * steps + total // 2) // total).clamp(max=steps - 1)


def profile(pools: Sequence[Pool], total: int, steps: int) -> Tensor:
    """d_t = mean of |ε_0(x_t, c) − ε_0(x_t, ∅)|² on the sampling grid (steps), from pools of the frozen base."""
    frozen = [p for p in pools if isinstance(p, FrozenPool)]
    effect = torch.cat([p.effect for p in frozen])
    where = place(torch.cat([p.t for p in frozen]), total, steps)
    sums = torch.zeros(steps).index_add_(0, where, effect)
    counts = torch.zeros(steps).index_add_(0, where, torch.ones_like(effect))
    full = counts.nonzero()[:, 0]
    nearest = full[(torch.arange(steps)[:, None] - full).abs().argmin(1)]  # a small pool may miss a step
    return (sums[nearest] / counts[nearest]).clamp(min=torch.finfo(torch.float32).tiny)


def save(pools: dict[str, Pool], path: Path, fingerprint: str) -> None:
    """Write pools with the fingerprint of what they were built from."""
    tensors = {f"{name}.{part}": tensor for name, pool in pools.items() for part, tensor in pool.parts().items()}
    with atomic.replacing(path, parents=True) as part:
        save_file(tensors, part, metadata={"fingerprint": fingerprint})


def load(path: Path, fingerprint: str) -> dict[str, Pool] | None:
    """Pools of a file that :func:`save` wrote for the same fingerprint; None for any other file, or none."""
    columns: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            for key in file.keys():  # noqa: SIM118, not a dict
                name, part = key.split(".")
                columns.setdefault(name, {})[part] = file.get_tensor(key)
    except (OSError, SafetensorError):
        return None
    return {name: Pool.of(parts) for name, parts in columns.items()}
