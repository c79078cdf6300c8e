"""The loss of a safety LoRA's training step: erase a concept given by prompts, hold everything else to the base.

| objective | x_t comes from | pooled |
|---|---|---|
| ESD (arXiv 2303.07345) | frozen base, guidance 3, 50 steps, random stop | the same distribution |
| LECO (p1atdev/LECO) | network with its LoRA on, guidance 3, 50 steps, random stop | frozen base: approximation |
| SDD (nannullna/safe-diffusion) | average of the student (decay 0.999), guidance 3, 50 steps, any t | as old as it |
| preservation | frozen base, prompt to keep | the same distribution |

Targets are in targets.py. The teacher ε_0 is the base with its adapters off, never a copy. The empty prompt is held as
well, at x_t of the preserved prompts (of the erased ones where there are none). SDD's code draws x_t with all concepts
in one prompt; here every prompt draws its own: the same for one concept, and long lists stay within 77 tokens.

Ours, not the papers': with ``relative``, squared errors are divided by d_t, the mean over x_t of |ε_0(x_t, c) −
ε_0(x_t, ∅)|² near t (of v or velocity where the network says that; the quotient is the same). At the noisiest steps,
where an image's content is decided, predictions for different prompts hardly differ, so the plain squared error hardly
counts there and the concept comes back.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..average import Average
from ..model import Cond, HostModel, per_row
from ..options import OptionError, SafetyOptions
from ..seeds import role_seed, step_generator
from . import pool, robust, sampling, targets
from .pool import FrozenPool, Plan, Pool, Progress
from .targets import EMPTY, Prompts, Term

Role = Literal["erase", "keep", "empty"]
REUSE = 4  # times that an example is trained on where pool_size is 0 and every prompt has its walk
WALKS = 8  # walks that measure d_t where no pool of the frozen base does


@dataclass(frozen=True, eq=False)
class Example:
    """One row of a micro-batch, without its weight."""

    x_t: Tensor  # c ...
    t: Tensor  # 0-dim
    prompt: str
    target: Tensor | None  # c ...; None: what the student says of the empty prompt, SDD's ε_θ(x_t, ∅)


@dataclass(frozen=True)
class Report:
    """What an erasure run did and cost."""

    erased: int  # prompts
    kept: int
    pool_examples: int
    pool_bytes: int
    pool_rows: int  # network rows spent on pools, part of forward_rows
    forward_rows: int  # rows through the network without gradients
    gradient_rows: int  # with forward and backward pass
    notes: tuple[str, ...]


class Erasure:
    """Loss of every micro-batch of a run; what it draws depends on seed and step alone, so it has little state.

    ``adapter_off()`` makes ``host_model`` the plain base; ``parameters`` are the adapters'. ``progress`` hears how far
    a pool is and may raise to interrupt. What of a pool comes from the frozen base is kept in ``pool_file`` where one
    is named, and read again by a run with the same base, prompts and seed.
    """

    def __init__(
        self,
        host_model: HostModel,
        options: SafetyOptions,
        adapter_off: Callable[[], AbstractContextManager[Any]],
        parameters: Sequence[Tensor],
        *,
        relative: bool = True,
        ema_decay: float = 0.999,
        progress: Progress | None = None,
        pool_file: Path | None = None,
    ) -> None:
        _check(host_model, options)
        self.host_model, self.options, self.adapter_off, self.relative = host_model, options, adapter_off, relative
        self.erased, self.kept = targets.erased(options), targets.kept(options) if options.preserve_weight else ()
        if options.objective == "sdd" and options.preserve_weight and not self.kept:
            self.kept = (Term(EMPTY),)  # nothing else asks the frozen base
        names = [name for term in (*self.erased, *self.kept) for name in (term.prompt, *term.needs)]
        self.prompts = Prompts(host_model, [EMPTY, *names])
        self._total = len(host_model.schedule)
        self.average = Average(parameters, ema_decay) if options.objective == "sdd" else None
        self.counts: Counter[str] = Counter()
        self.pools: dict[str, Pool] = {}
        self.profile: Tensor | None = None  # denoising_steps, d_t on the sampling grid
        self._progress, self._file = progress or _ignore, pool_file
        self._epoch = -1  # the pools' age
        self._saved: tuple[int, Pool] | None = None  # SDD: age and pool of a loaded state

    # -- what the training loop calls

    def prepare(self, step: int) -> None:
        """Build or read the pool that ``step`` needs, and measure d_t; nothing where they are there."""
        if self.relative and self.profile is None and (self.options.on_policy or self.average is not None):
            self.profile = self._measure_profile()
        every = self.options.pool_refresh_every
        epoch = step // every if every else 0
        if not self.options.on_policy and epoch != self._epoch:
            self.pools, self._epoch = self._renewed(epoch), epoch
            if self.relative and self.average is None:
                self.profile = pool.profile(list(self.pools.values()), self._total, self.options.denoising_steps)

    def loss(self, step: int, micro: int = 0) -> Tensor:
        """Loss of one micro-batch (scalar): erasure + preserve_weight × preservation, in expectation."""
        self.prepare(step)
        rows = self._rows(step, micro)
        x_t, t, names, wanted, weight = self._batch(rows)
        cond = self.prompts(names)
        if self.options.robust_steps:
            cond = self._attacked(x_t, t, cond, [i for i, (role, _) in enumerate(rows) if role == "erase"])
        error = per_row((self.network(x_t, t, cond) - wanted).square())  # b
        if self.profile is not None:
            error = error / self.profile.to(t.device)[pool.place(t, self._total, self.options.denoising_steps)]
        return (weight * error).mean()

    def _attacked(self, x_t: Tensor, t: Tensor, cond: Cond, erased: list[int]) -> Cond:
        """``cond`` with the rows ``erased`` moved to where they bring the concept back most (robust.py)."""
        if not erased:
            return cond
        x, at, own = x_t[erased], t[erased], cond[erased]
        with self.adapter_off(), torch.no_grad():
            brought = self.network(x, at, own)
        o = self.options
        found = robust.attacked(self.network, x, at, own, brought, o.robust_steps, o.robust_size)
        rows = dict(zip(erased, found.rows, strict=True))
        return Cond(tuple(rows.get(i, row) for i, row in enumerate(cond.rows)))

    def after_step(self, values: Sequence[Tensor] | None = None) -> None:
        """After every optimizer step; ``values`` as for :meth:`Average.update`."""
        if self.average is not None:
            self.average.update(values)

    def saved_weights(self) -> AbstractContextManager[None]:
        """Inside, the adapters are what is to be saved and previewed: SDD's average, else what they are."""
        return contextlib.nullcontext() if self.average is None else self.average.used()

    def state_dict(self) -> dict[str, Any]:
        """Counts and, for SDD, the average and what of the pool came from it."""
        state: dict[str, Any] = {"counts": dict(self.counts)}
        if self.average is not None:
            state["average"] = self.average.values
            if self._epoch > 0:
                state["pool"] = (self._epoch, self.pools["erase"].parts())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = Counter(state["counts"])
        if self.average is not None:
            torch._foreach_copy_(self.average.values, state["average"])
            if "pool" in state:
                self._saved = (state["pool"][0], Pool.of(state["pool"][1]))

    def report(self) -> Report:
        o, pools = self.options, self.pools.values()
        notes = []
        if not o.on_policy and o.objective == "leco":
            notes.append("x_t come from the frozen base; LECO draws them with the LoRA on (on_policy).")
        if not o.on_policy and o.objective == "sdd":
            age = f"renewed every {o.pool_refresh_every} steps" if o.pool_refresh_every else "of the untrained student"
            notes.append(f"x_t come from a pool {age}; SDD draws them anew from the student's average (on_policy).")
        if self.relative:
            notes.append("Errors count relative to the prompts' effect at each timestep; the papers use plain MSE.")
        return Report(
            erased=len(self.erased),
            kept=len(self.kept),
            pool_examples=sum(map(len, pools)),
            pool_bytes=sum(p.bytes for p in pools),
            pool_rows=self.counts["pool"],
            forward_rows=self.counts["forward"],
            gradient_rows=self.counts["gradient"],
            notes=tuple(notes),
        )

    def network(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The host model, its rows counted."""
        self.counts["gradient" if torch.is_grad_enabled() else "forward"] += len(t)
        return self.host_model.predict(x_t, t, cond)

    # -- which rows a micro-batch has

    def _rows(self, step: int, micro: int) -> list[tuple[Role, int]]:
        """Roles of a micro-batch's rows, each with its running number within the role."""
        b = self.options.train_batch_size
        first = (step * self.options.gradient_accumulation_steps + micro) * b
        return [self._role(i) for i in range(first, first + b)]

    def _role(self, i: int) -> tuple[Role, int]:
        """The role of row i of the whole run, and its number within the role.

        With preservation half the rows erase, and a third of the others is the empty prompt; all of them are where no
        other prompt is kept.

        | i mod 6 | 0 | 1 | 2 | 3 | 4 | 5 |
        |---|---|---|---|---|---|---|
        | role | erase | keep | erase | keep | erase | empty |
        """
        if not self.options.preserve_weight:
            return "erase", i
        if i % 2 == 0:
            return "erase", i // 2
        held = i // 2  # number among the rows that do not erase
        if not any(term.prompt for term in self.kept):
            return "empty", held
        return ("empty", held // 3) if held % 3 == 2 else ("keep", held - held // 3)

    def _batch(self, rows: list[tuple[Role, int]]) -> tuple[Tensor, Tensor, list[str], Tensor, Tensor]:
        """x_t (b c ...), t (b), prompts, targets (b c ...) and weights (b) of rows."""
        examples = self._drawn(rows) if self.options.on_policy else [self._pooled(*row) for row in rows]
        device = self.host_model.device
        x_t = torch.stack([example.x_t for example in examples]).to(device)
        t = torch.stack([example.t for example in examples]).to(device)
        lacking = [i for i, example in enumerate(examples) if example.target is None]
        found = {i: example.target for i, example in enumerate(examples) if example.target is not None}
        if lacking:
            with torch.no_grad():
                predicted = self.network(x_t[lacking], t[lacking], self.prompts([EMPTY] * len(lacking)))
            found |= zip(lacking, predicted, strict=True)
        wanted = torch.stack([found[i].to(device, torch.float32) for i in range(len(examples))])
        weight = [self._weight(role) for role, _ in rows]
        return x_t, t, [example.prompt for example in examples], wanted, torch.tensor(weight, device=device)

    def _weight(self, role: Role) -> float:
        """Of a row, so that the mean over all is erasure + preserve_weight × preservation, half of the rows each."""
        preserve = self.options.preserve_weight
        if not preserve:
            return 1.0
        return 2.0 if role == "erase" else 2 * preserve

    # -- x_t from the pool

    def _pooled(self, role: Role, number: int) -> Example:
        if role == "empty":
            source = self.pools["keep"] if "keep" in self.pools else self.pools["erase"]
            assert isinstance(source, FrozenPool), "a student's pool is beside one of what is kept, which is frozen"
            i = self._pick(role, number, len(source))
            return Example(source.x_t[i], source.t[i], EMPTY, source.empty[i])
        source, terms = self.pools[role], self.erased if role == "erase" else self.kept
        i = self._pick(role, number, len(source))
        wanted = source.target[i] if isinstance(source, FrozenPool) else None
        return Example(source.x_t[i], source.t[i], terms[int(source.term[i])].prompt, wanted)

    def _renewed(self, epoch: int) -> dict[str, Pool]:
        """Pools of age ``epoch``: read, taken from a loaded state, or built."""
        before = self.counts["forward"]
        plans = self._plans(epoch)
        pools: dict[str, Pool] = {}
        if self.average is not None and epoch > 0:  # the untrained student is the base
            if self._saved is not None and self._saved[0] == epoch:
                pools["erase"] = self._saved[1]
            else:
                with self.average.used():
                    pools |= self._build({"erase": plans["erase"]})
            del plans["erase"]
        fingerprint = self._fingerprint(plans)
        found = pool.load(self._file, fingerprint) if self._file else None
        if found is None:
            with self.adapter_off():
                found = self._build(plans)
            if self._file:
                pool.save(found, self._file, fingerprint)
        self.counts["pool"] += self.counts["forward"] - before
        return found | pools

    def _build(self, plans: dict[str, Plan]) -> dict[str, Pool]:
        done, total = 0, sum(plan.steps_in_all for plan in plans.values())
        pools: dict[str, Pool] = {}
        for role, plan in plans.items():
            terms, progress = self.erased if role == "erase" else self.kept, partial(self._shifted, done, total)
            pools[role] = pool.build(self.host_model, self.network, self.prompts, terms, plan, progress)
            done += plan.steps_in_all
        return pools

    def _shifted(self, before: int, total: int, done: int, _: int) -> None:
        self._progress(before + done, total)

    def _plans(self, epoch: int) -> dict[str, Plan]:
        o = self.options
        roles = {"erase": self.erased, "keep": self.kept} if self.kept else {"erase": self.erased}
        steps = min(o.pool_refresh_every or o.max_train_steps, o.max_train_steps)
        rows = steps * o.train_batch_size * o.gradient_accumulation_steps // len(roles)
        plans = {}
        for role, terms in roles.items():
            walks = max(len(terms), -(-rows // (REUSE * o.denoising_steps)))
            examples = max(1, o.pool_size // len(roles)) if o.pool_size else min(rows, walks * o.denoising_steps)
            plans[role] = self._plan(role, len(terms), examples, epoch)
        return plans

    def _plan(self, role: str, terms: int, examples: int, epoch: int) -> Plan:
        o, seed = self.options, role_seed(self.options.seed, f"pool {role} {epoch}")
        return Plan.of(terms, examples, o.denoising_steps, seed, o.guidance_scale, o.train_size, 2 * o.train_batch_size)

    def _fingerprint(self, plans: dict[str, Plan]) -> str:
        """Of all that frozen pools depend on."""
        what = (self.host_model.base_sha256, str(self.host_model.dtype), self.erased, self.kept, plans)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    # -- x_t drawn anew

    def _drawn(self, rows: list[tuple[Role, int]]) -> list[Example]:
        """In the order of the rows; LECO and SDD draw what is erased from the student."""
        examples: dict[int, Example] = {}
        own = [i for i, (role, _) in enumerate(rows) if role == "erase" and self.options.objective in ("leco", "sdd")]
        for some, student in ((own, True), ([i for i in range(len(rows)) if i not in own], False)):
            if some:
                examples |= zip(some, self._draw([rows[i] for i in some], student), strict=True)
        return [examples[i] for i in range(len(rows))]

    def _term(self, role: Role, number: int) -> Term:
        terms = self.erased if role == "erase" or not self.kept else self.kept
        return terms[self._pick(role, number, len(terms))]

    def _draw(self, rows: list[tuple[Role, int]], student: bool) -> list[Example]:
        """Examples of rows, x_t from the student (SDD: its average) or from the frozen base."""
        o, device = self.options, self.host_model.device
        terms = [self._term(*row) for row in rows]
        generators = [step_generator(o.seed, f"x_t {role}", number) for role, number in rows]
        x = sampling.noise(self.host_model, (o.train_size, o.train_size), generators)
        t = torch.tensor([self._stop(g) for g in generators], device=device)
        cond, empty = self.prompts.pair([term.prompt for term in terms])
        with self.saved_weights() if student else self.adapter_off():
            network, schedule = self.network, self.host_model.schedule
            x = sampling.partial(network, schedule, x, cond, empty, o.guidance_scale, o.denoising_steps, t)
        names = [EMPTY if role == "empty" else term.prompt for (role, _), term in zip(rows, terms, strict=True)]
        asked = [(EMPTY,) if role == "empty" else term.needs for (role, _), term in zip(rows, terms, strict=True)]
        with self.adapter_off():
            known = targets.frozen(self.network, self.prompts, x, t, asked, {})
        found = [
            known[i, EMPTY] if role == "empty" else None if term.student else targets.target(term, i, known)
            for i, ((role, _), term) in enumerate(zip(rows, terms, strict=True))
        ]
        return [Example(*one) for one in zip(x, t, names, found, strict=True)]

    def _stop(self, generator: torch.Generator) -> int:
        """A timestep to stop at: on the sampling grid, for SDD anywhere."""
        if self.options.objective == "sdd":
            return int(torch.randint(self._total, (), generator=generator))
        grid = sampling.timesteps(self._total, self.options.denoising_steps)
        return grid[int(torch.randint(len(grid), (), generator=generator))]

    def _measure_profile(self) -> Tensor:
        """d_t from a few walks of the frozen base, where its pool of erased prompts does not tell."""
        o, terms = self.options, [Term(term.prompt) for term in self.erased[:WALKS]]
        plan = self._plan("profile", len(terms), WALKS * o.denoising_steps, 0)
        with self.adapter_off():
            walks = pool.build(self.host_model, self.network, self.prompts, terms, plan, self._progress)
        return pool.profile([walks], self._total, o.denoising_steps)

    # -- order

    def _pick(self, role: str, number: int, n: int) -> int:
        """Item ``number`` of an endless series of shuffled passes over n things."""
        return _shuffled(self.options.seed, role, number // n, n)[number % n]


@lru_cache(maxsize=8)
def _shuffled(seed: int, role: str, number: int, n: int) -> list[int]:
    return torch.randperm(n, generator=step_generator(seed, f"order {role}", number)).tolist()


def _ignore(done: int, total: int) -> None:
    """Progress that nobody asked for."""


def _check(host_model: HostModel, options: SafetyOptions) -> None:
    total = len(host_model.schedule)
    if not 1 <= options.denoising_steps <= total:
        raise OptionError(
            f"denoising_steps: {options.denoising_steps} is not within 1 and {total}: 50 is usual.",
            code="option.denoising-steps",
        )
    if options.train_size < host_model.downscale or options.train_size % host_model.downscale:
        raise OptionError(
            f"train_size: {options.train_size} is not a multiple of {host_model.downscale}: choose one.",
            code="option.train-size",
        )
