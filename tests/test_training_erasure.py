"""Erasure: sampling, targets, pools and the loss of a step, on a toy network whose every answer can be recomputed."""

from __future__ import annotations

import contextlib
import io
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.training import pool, sampling, targets
from modular_lora_guard.training.erasure import Average, Erasure
from modular_lora_guard.training.options import OptionError, SafetyOptions
from modular_lora_guard.training.targets import Prompts, Term
from modular_lora_guard.training.trainee import Cond, Schedule
from torch import nn

TOTAL, CHANNELS, SIDE = 100, 2, 2
ABAR = torch.cumprod(1 - torch.linspace(1e-3, 0.1, TOTAL, dtype=torch.float64), 0).float()
DISTURBED = torch.linspace(-1, 1, 64).view(16, 4)
PROMPTS = ("car", "bus", "cat", "dog", "thing", "nothing")


class Toy:
    """A Trainee of two linear maps; the adapter is a rank-4 change of the first, which can be turned off."""

    base_sha256, family, latent_channels, downscale = "toy", "SD15", CHANNELS, 8
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, prediction: str = "epsilon") -> None:
        g, n = torch.Generator().manual_seed(1), CHANNELS * SIDE * SIDE
        self.schedule = Schedule(ABAR, prediction)
        self.first, self.second = torch.randn(16, 2 * n + 1, generator=g) / 3, torch.randn(n, 16, generator=g) / 3
        self.words = {"": torch.zeros(n)} | {p: torch.randn(n, generator=g) for p in PROMPTS}
        self.down = nn.Parameter(torch.randn(4, 2 * n + 1, generator=g) / 3)
        self.up = nn.Parameter(torch.zeros(16, 4))
        self.on, self.calls = True, []

    def predict(self, x_t, t, cond):
        self.calls.append(SimpleNamespace(x_t=x_t, t=t, cond=cond, on=self.on, grad=torch.is_grad_enabled()))
        features = torch.cat([x_t.flatten(1), cond.cross[:, 0], t[:, None] / TOTAL], 1)
        weight = self.first + self.up @ self.down if self.on else self.first
        return (torch.tanh(features @ weight.T) @ self.second.T).view_as(x_t)

    def base(self, x_t, t, *prompts):
        """ε_0 of the plain network, computed apart from ``predict``."""
        features = torch.cat([x_t.flatten(1), torch.stack([self.words[p] for p in prompts]), t[:, None] / TOTAL], 1)
        return (torch.tanh(features @ self.first.T) @ self.second.T).view_as(x_t)

    def encode(self, prompts):
        return Cond(torch.stack([self.words[p] for p in prompts])[:, None])

    @contextlib.contextmanager
    def off(self):
        was, self.on = self.on, False
        try:
            yield
        finally:
            self.on = was

    @property
    def parameters(self):
        return [self.down, self.up]

    def disturb(self):
        """A LoRA that does something."""
        with torch.no_grad():
            self.up.copy_(DISTURBED)
        return self

    def names(self, cond):
        return [next(p for p, v in self.words.items() if torch.equal(v, row[0])) for row in cond.cross]

    def trained(self):
        """The call of the last loss: what the student was asked."""
        return next(call for call in reversed(self.calls) if call.grad)


def options(**changes) -> SafetyOptions:
    usual = {"objective": "esd-x", "concept": ("car",), "preserve": ("cat", "dog"), "denoising_steps": 5,
             "train_size": SIDE * 8, "train_batch_size": 6, "max_train_steps": 10}  # fmt: skip
    return SafetyOptions(**usual | changes)


def erasure(toy: Toy, relative: bool = False, **changes) -> Erasure:
    more = {name: changes.pop(name) for name in ("progress", "pool_file", "ema_decay") if name in changes}
    return Erasure(toy, options(**changes), toy.off, toy.parameters, relative=relative, **more)


def noise(b: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


# -- sampling


@given(st.integers(1, 60), st.integers(60, 1000))
def test_timesteps_begin_at_the_noisiest_and_are_even(steps, total):
    grid = sampling.timesteps(total, steps)
    assert grid[0] == total - 1
    assert len(grid) == steps
    assert min(grid) >= 0
    gaps = {a - b for a, b in itertools.pairwise(grid)}
    assert gaps <= {total // steps, -(-total // steps)}


def test_more_sampling_steps_than_timesteps_are_an_error():
    with pytest.raises(ValueError, match="101 sampling steps"):
        sampling.timesteps(100, 101)


def gaussian(schedule: Schedule, mean: float, deviation: float):
    """Exact prediction for data N(mean, deviation²): E[x_0 | x_t] is linear in x_t."""

    def network(x_t, t, cond):
        abar = schedule.alphas_cumprod[t][:, None, None, None]
        variance = abar * deviation**2 + 1 - abar
        eps = (1 - abar).sqrt() * (x_t - abar.sqrt() * mean) / variance
        x0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
        return eps if schedule.prediction == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * x0

    return network


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("deviation", "steps", "tolerance"), [(0.0, 3, 1e-4), (0.5, TOTAL, 0.03)])
def test_ddim_solves_gaussian_data(prediction, deviation, steps, tolerance):
    """The probability flow of N(μ, s²) keeps (x_t − √ᾱ μ) / √(ᾱ s² + 1 − ᾱ); DDIM is exact at s = 0, else nearly."""
    schedule, mean = Schedule(ABAR, prediction), 1.5
    x, cond = noise(4), Cond(torch.zeros(4, 1, 1))
    found = sampling.sample(gaussian(schedule, mean, deviation), schedule, x, cond, None, 3.0, steps)
    last = ABAR[-1]
    z = (x - last.sqrt() * mean) / (last * deviation**2 + 1 - last).sqrt()
    assert torch.allclose(found, mean + deviation * z, atol=tolerance)


def test_guidance_is_applied_to_the_prediction():
    toy = Toy()
    x, t = noise(1), torch.tensor([TOTAL - 1])
    got = sampling.sample(toy.predict, toy.schedule, x, toy.encode(["car"]), toy.encode([""]), 3.0, 1)
    eps = toy.base(x, t, "") + 3 * (toy.base(x, t, "car") - toy.base(x, t, ""))
    assert torch.allclose(got, (x - (1 - ABAR[-1]).sqrt() * eps) / ABAR[-1].sqrt(), rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_guidance_of_v_is_guidance_of_epsilon(prediction):
    """The same denoiser told as ε or as v walks the same way under guidance."""
    toy, schedule = Toy(), Schedule(ABAR, prediction)

    def network(x_t, t, cond):
        eps = toy.predict(x_t, t, cond)
        x0 = (x_t - (1 - ABAR[t].view(-1, 1, 1, 1)).sqrt() * eps) / ABAR[t].view(-1, 1, 1, 1).sqrt()
        return schedule.target(x0, t, eps)

    cond, empty = toy.encode(["car", "cat"]), toy.encode(["", ""])
    got = sampling.sample(network, schedule, noise(2), cond, empty, 3.0, 7)
    expected = sampling.sample(toy.predict, toy.schedule, noise(2), cond, empty, 3.0, 7)
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_partial_lands_where_the_walk_passes_and_pays_for_no_row_that_has_arrived(guidance):
    toy, steps = Toy(), 5
    cond, empty = toy.encode(["car"] * steps), toy.encode([""] * steps)
    points = list(sampling.walk(toy.predict, toy.schedule, noise(steps), cond, empty, guidance, steps))
    assert [point.empty is None for point in points] == [guidance == 1] * steps
    toy.calls.clear()
    until = torch.tensor(sampling.timesteps(TOTAL, steps))
    x = sampling.partial(toy.predict, toy.schedule, noise(steps), cond, empty, guidance, steps, until)
    for i, point in enumerate(points):
        assert torch.allclose(x[i], point.x_t[i], atol=1e-5), i
    rows = sum(range(steps)) * (1 if guidance == 1 else 2)
    assert sum(len(call.t) for call in toy.calls) == rows


def test_partial_lands_between_grid_points():
    schedule = Schedule(ABAR, "epsilon")
    until = torch.tensor([97, 61, 3])
    cond = Cond(torch.zeros(3, 1, 1))
    x = noise(3)
    got = sampling.partial(gaussian(schedule, 2.0, 0.0), schedule, x, cond, None, 1.0, 5, until)
    abar = ABAR[until].view(-1, 1, 1, 1)
    eps = (x - ABAR[-1].sqrt() * 2.0) / (1 - ABAR[-1]).sqrt()
    assert torch.allclose(got, abar.sqrt() * 2.0 + (1 - abar).sqrt() * eps, atol=1e-4)


# -- targets


def known(toy: Toy, term: Term, x, t) -> torch.Tensor:
    prompts = Prompts(toy, ["", *PROMPTS])
    return targets.target(term, 0, targets.frozen(toy.predict, prompts, x, t, [term.needs], {}))


def test_esd_target_is_the_papers():
    toy = Toy()
    (term,) = targets.erased(options(negative_guidance=1.7))
    x, t = noise(1), torch.tensor([40])
    empty, cond = toy.base(x, t, ""), toy.base(x, t, "car")
    assert torch.allclose(known(toy, term, x, t), (empty - 1.7 * (cond - empty))[0], atol=1e-6)


@pytest.mark.parametrize(("action", "sign"), [("erase", -1), ("enhance", 1)])
def test_leco_target_is_lecos(action, sign):
    toy = Toy()
    (term,) = targets.erased(
        options(objective="leco", positive=("bus",), neutral="thing", unconditional="nothing", action=action)
    )
    x, t = noise(1), torch.tensor([40])
    eps = {p: toy.base(x, t, p) for p in PROMPTS}
    assert torch.allclose(known(toy, term, x, t), (eps["thing"] + sign * (eps["bus"] - eps["nothing"]))[0], atol=1e-6)
    assert sum(len(call.t) for call in toy.calls) == 3


def test_leco_asks_nothing_twice():
    toy = Toy()
    (term,) = targets.erased(options(objective="leco"))  # neutral = unconditional = '', positive = the concept
    known(toy, term, noise(1), torch.tensor([40]))
    assert toy.names(toy.calls[0].cond) == ["", "car"]


def test_synonyms_are_erased_like_the_concept():
    terms = targets.erased(options(concept=("car",), synonyms=("bus", "car"), negative_guidance=2.0))
    assert [(t.prompt, t.positive, t.scale) for t in terms] == [("car", "car", -2.0), ("bus", "bus", -2.0)]


def test_positives_go_with_the_concepts_and_synonyms_are_their_own():
    terms = targets.erased(options(objective="leco", concept=("car", "bus"), synonyms=("dog",), positive=("a", "b"),
                                   preserve=()))  # fmt: skip
    assert [t.positive for t in terms] == ["a", "b", "dog"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concept": ()}, "concept: a prompt is missing"),
        ({"synonyms": (" ",)}, "concept: a prompt is missing"),
        ({"preserve": ("car",)}, "'car' is both erased and preserved"),
        ({"objective": "leco", "positive": ("a", "b")}, "positive: 2 prompts for 1"),
        ({"denoising_steps": 0}, "denoising_steps: 0"),
        ({"denoising_steps": 101}, "denoising_steps: 101"),
        ({"train_size": 20}, "train_size: 20 is no multiple of 8"),
        ({"preserve_weight": -1.0}, "preserve_weight: -1.0"),
        ({"pool_size": -1}, "pool_size"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(OptionError, match=words):
        erasure(Toy(), **changes)


def test_layers_of_objectives():
    names = ["lora_unet_x_attn1_to_q", "lora_unet_x_attn2_to_q", "lora_unet_x_ff_net_2"]
    chosen = {o: [targets.layers_of(o)(name) for name in names] for o in ("esd-x", "esd-u", "sdd", "leco")}
    assert chosen == {
        "esd-x": [False, True, False],
        "esd-u": [True, False, True],
        "sdd": [False, True, False],
        "leco": [True] * 3,
    }


# -- pools


def test_pool_holds_the_targets_of_its_points_and_costs_two_rows_a_step():
    toy = Toy().disturb()  # the LoRA must not show in it
    run = erasure(toy, negative_guidance=1.3)
    run.prepare(0)
    erase, keep = run.pools["erase"], run.pools["keep"]
    names = {"erase": ["car"], "keep": ["cat", "dog"]}
    for role, part in run.pools.items():
        for i in range(len(part)):
            x, t, prompt = part.x_t[i : i + 1], part.t[i : i + 1], names[role][int(part.term[i])]
            cond, empty = toy.base(x, t, prompt), toy.base(x, t, "")
            wanted = empty - 1.3 * (cond - empty) if role == "erase" else cond
            assert torch.allclose(part.target[i], wanted[0], atol=1e-5)
            assert torch.allclose(part.empty[i], empty[0], atol=1e-5)
            assert torch.allclose(part.effect[i], (cond - empty).square().mean(), rtol=1e-3)
    assert run.counts == {"forward": 2 * (len(erase) + len(keep)), "pool": 2 * (len(erase) + len(keep))}
    assert sorted(set(erase.t.tolist())) == sorted(sampling.timesteps(TOTAL, 5))
    assert not any(call.on for call in toy.calls)


def test_pool_points_are_those_of_a_guided_walk_of_the_base():
    toy = Toy()
    run = erasure(toy, pool_size=1)
    run.prepare(0)
    part = run.pools["erase"]
    assert len(part) == 1
    plan = run._plans(0)["erase"]
    x = sampling.noise(toy, (16, 16), [pool.step_generator(plan.seed, "walk", 0)])
    until = part.t
    walked = sampling.partial(toy.predict, toy.schedule, x, toy.encode(["car"]), toy.encode([""]), 3.0, 5, until)
    assert torch.allclose(walked, part.x_t, atol=1e-5)


def test_pool_asks_only_for_what_guidance_has_not_told():
    run = erasure(Toy(), objective="leco", neutral="thing", preserve_weight=0.0)
    run.prepare(0)
    assert run.counts["forward"] == 3 * len(run.pools["erase"])  # the walk's two and 'thing'


def test_pool_without_guidance_asks_once_for_the_empty_prompt():
    run = erasure(Toy(), guidance_scale=1.0)
    run.prepare(0)
    assert run.counts["forward"] == 2 * sum(map(len, run.pools.values()))


@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 50))
def test_plan_covers_every_term_and_is_no_larger_than_needed(terms, examples, steps):
    plan = pool.Plan.of(terms, examples, steps, 0, 3.0, 64, 4)
    size = len(plan.terms) * plan.points
    assert set(plan.terms) == set(range(terms))
    assert size >= min(examples, len(plan.terms) * steps)
    assert size < examples + len(plan.terms)
    assert len(plan.terms) == terms or (len(plan.terms) - 1) * steps < examples


@pytest.mark.parametrize(("steps", "erase"), [(1, 3), (2, 5), (6, 5), (7, 10), (20, 15)])
def test_pool_is_as_large_as_rows_and_prompts_make_worthwhile(steps, erase):
    """One example a row at most, all of a prompt's walk if rows want it, and one for every four rows of a long run."""
    run = erasure(Toy(), max_train_steps=steps)
    run.prepare(0)
    assert len(run.pools["erase"]) == erase


def test_pool_size_bounds_the_memory_that_the_report_names():
    run = erasure(Toy(), pool_size=8)
    run.prepare(0)
    report = run.report()
    assert report.pool_examples == 8
    numbers = CHANNELS * SIDE * SIDE
    assert report.pool_bytes == 8 * (3 * 4 * numbers + 8 + 8 + 4)


def test_pool_keeps_predictions_in_the_networks_type():
    toy = Toy()
    toy.dtype = torch.bfloat16
    run = erasure(toy)
    run.prepare(0)
    part = run.pools["erase"]
    assert (part.x_t.dtype, part.target.dtype, part.empty.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    run.loss(0).backward()


def test_pool_is_renewed_on_time_and_with_other_noise():
    run = erasure(Toy(), pool_refresh_every=3)
    seen = []
    for step in range(7):
        run.loss(step)
        seen.append(run.pools["erase"].x_t)
    assert [torch.equal(seen[0], x) for x in seen] == [True] * 3 + [False] * 4
    assert [torch.equal(seen[3], x) for x in seen[3:]] == [True] * 3 + [False]


def test_interrupted_pool_leaves_nothing_and_can_be_built_again(tmp_path):
    class Stop(Exception):
        pass

    done = []

    def progress(n, total):
        done.append((n, total))
        if len(done) == 4:
            raise Stop

    run = erasure(Toy().disturb(), progress=progress, pool_file=tmp_path / "pool.safetensors")
    with pytest.raises(Stop):
        run.prepare(0)
    assert run.pools == {}
    assert not list(tmp_path.iterdir())
    assert run.trainee.on
    run.prepare(0)
    numbers, totals = zip(*done[4:], strict=True)
    assert list(numbers) == sorted(set(numbers))
    assert set(totals) == {numbers[-1]}


def test_pool_file_serves_a_run_with_the_same_prompts_and_no_other(tmp_path):
    file = tmp_path / "out" / "pool.safetensors"

    def rows(**changes):
        run = erasure(Toy(), pool_file=file, **changes)
        loss = run.loss(0).item()
        return run.counts["forward"], loss

    built, loss = rows()
    assert built > 0
    assert rows(learning_rate=3.0) == (0, loss)
    assert rows(negative_guidance=2.0)[0] == built
    assert rows()[0] == built  # the file is now the other run's
    file.write_bytes(b"broken")
    assert rows() == (built, loss)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# -- the loss of a step


def test_loss_is_erasure_plus_weighted_preservation():
    toy = Toy().disturb()
    run = erasure(toy, preserve_weight=0.5, negative_guidance=2.0)
    loss = run.loss(0)
    call = toy.trained()
    assert toy.names(call.cond)[::2] == ["car"] * 3
    kept = toy.names(call.cond)[1::2]
    assert set(kept[:2]) <= {"cat", "dog"}
    assert kept[2] == ""
    with torch.no_grad():
        student = toy.predict(call.x_t, call.t, call.cond)
    base, empty = toy.base(call.x_t, call.t, *toy.names(call.cond)), toy.base(call.x_t, call.t, *[""] * 6)
    wanted = base.clone()
    wanted[::2] = empty[::2] - 2.0 * (base[::2] - empty[::2])
    error = (student - wanted).square().mean((1, 2, 3))
    assert torch.allclose(loss, error[::2].mean() + 0.5 * error[1::2].mean(), rtol=1e-4)


def test_relative_loss_divides_by_the_prompts_effect_at_the_timestep():
    plain, relative = erasure(Toy().disturb(), train_batch_size=1), erasure(Toy().disturb(), True, train_batch_size=1)
    for step in range(4):
        small, large = plain.loss(step), relative.loss(step)
        t = relative.trainee.trained().t
        pools = relative.pools.values()
        effect = torch.cat([p.effect for p in pools])[torch.cat([p.t for p in pools]) == t].mean()
        assert torch.allclose(large, small / effect, rtol=1e-4)


def test_pooled_and_on_policy_take_the_same_target_at_the_same_point():
    toy = Toy()
    run = erasure(toy, on_policy=True, preserve_weight=0.0)
    loss = run.loss(0)  # untrained, the student is the base: the error is (1 + η)(ε_0(c) − ε_0(∅))
    call = toy.trained()
    effect = toy.base(call.x_t, call.t, *["car"] * 6) - toy.base(call.x_t, call.t, *[""] * 6)
    assert torch.allclose(loss, (2 * effect).square().mean(), rtol=1e-4)
    found = targets.frozen(toy.predict, run.prompts, call.x_t, call.t, [("car", "")] * 6, {})
    pooled = pool._frozen_parts(
        toy.predict, run.prompts, list(run.erased) * 6, call.x_t, call.t, dict(found), torch.float32
    )
    assert torch.allclose(pooled["target"], toy.base(call.x_t, call.t, *[""] * 6) - effect, atol=1e-5)


@pytest.mark.parametrize("objective", ["esd-x", "leco", "sdd"])
def test_on_policy_wastes_no_row(objective):
    toy = Toy()
    run = erasure(toy, objective=objective, on_policy=True, train_batch_size=12)
    run.prepare(0)
    assert run.counts["forward"] == 0
    run.loss(0)
    call, grid = toy.trained(), sampling.timesteps(TOTAL, 5)
    walked = sum(2 * sum(t > stop for t in grid) for stop in call.t.tolist())
    prompts = toy.names(call.cond)
    frozen = {"esd-x": 2, "leco": 2, "sdd": 1}[objective] * prompts.count("car") + 12 - prompts.count("car")
    assert run.counts == {"forward": walked + frozen, "gradient": 12}


def test_pooled_step_costs_its_gradient_rows_alone():
    run = erasure(Toy())
    run.prepare(0)
    before = run.counts["forward"]
    for step in range(3):
        run.loss(step)
    assert run.counts["forward"] == before
    assert run.report().gradient_rows == 18
    assert run.report().pool_rows == before


@pytest.mark.parametrize(("objective", "student"), [("esd-x", False), ("leco", True), ("sdd", True)])
def test_whose_latents_on_policy_trains_on(objective, student):
    toy = Toy().disturb()
    run = erasure(toy, objective=objective, on_policy=True, preserve_weight=0.0)
    run.loss(0)
    walk = toy.calls[0]
    assert len(walk.t) > 1
    assert walk.on is student


def test_teacher_is_the_plain_base_bit_for_bit():
    trained, plain = erasure(Toy().disturb()), erasure(Toy())
    for run in (trained, plain):
        run.prepare(0)
    for role, part in trained.pools.items():
        for name, tensor in part.parts().items():
            assert torch.equal(tensor, plain.pools[role].parts()[name]), (role, name)
    assert trained.trainee.on


@pytest.mark.parametrize("objective", ["esd-x", "leco", "sdd"])
def test_on_policy_leaves_the_adapter_on_and_its_teacher_had_it_off(objective):
    toy = Toy().disturb()
    run = erasure(toy, objective=objective, on_policy=True)
    run.loss(0)
    assert toy.on
    assert toy.trained().on
    assert any(not call.on for call in toy.calls)


def test_roles_of_rows_do_not_depend_on_batches():
    def rows(b, accumulation):
        run = erasure(Toy(), train_batch_size=b, gradient_accumulation_steps=accumulation)
        return [
            row for step in range(24 // (b * accumulation)) for m in range(accumulation) for row in run._rows(step, m)
        ]

    assert rows(1, 1) == rows(4, 2) == rows(12, 1)
    roles = [role for role, _ in rows(1, 1)]
    assert {role: roles.count(role) for role in roles} == {"erase": 12, "keep": 8, "empty": 4}
    for role in set(roles):
        assert [n for r, n in rows(1, 1) if r == role][:4] == [0, 1, 2, 3]


def test_every_example_is_used_before_one_is_used_again():
    run = erasure(Toy(), pool_size=20)
    run.prepare(0)
    n = len(run.pools["erase"])
    first = [run._pick("erase", i, n) for i in range(n)]
    second = [run._pick("erase", i, n) for i in range(n, 2 * n)]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second
    assert first != [run._pick("keep", i, n) for i in range(n)]


# -- SDD


def test_sdd_target_is_the_students_own_and_gives_no_gradient():
    toy = Toy().disturb()
    run = erasure(toy, objective="sdd", preserve_weight=0.0)
    run.loss(0).backward()
    found, call = toy.up.grad.clone(), toy.trained()
    with torch.no_grad():
        own = toy.predict(call.x_t, call.t, toy.encode([""] * 6))
    toy.up.grad = None
    ((toy.predict(call.x_t, call.t, call.cond) - own).square().mean()).backward()
    assert torch.allclose(found, toy.up.grad, rtol=1e-4)


def test_average_follows_the_parameters_and_is_what_is_saved():
    toy = Toy()
    run = erasure(toy, objective="sdd", ema_decay=0.9)
    expected, values = torch.zeros(16, 4), [0.5, -1.0, 2.0]
    for value in values:
        with torch.no_grad():
            toy.up.fill_(value)
        run.after_step()
        expected = 0.9 * expected + 0.1 * value
    seen = []

    def save():
        with run.saved_weights():
            seen.append(toy.up.clone())
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save()
    assert torch.allclose(seen[0], expected)
    assert torch.equal(toy.up, torch.full((16, 4), 2.0))


def test_other_objectives_save_the_parameters_themselves():
    toy = Toy().disturb()
    run = erasure(toy)
    run.after_step()
    with run.saved_weights():
        assert torch.equal(toy.up, DISTURBED)


def test_average_of_half_precision_parameters_is_float32():
    parameter, master = torch.zeros(3, dtype=torch.bfloat16), torch.full((3,), 1.0)
    average = Average([parameter], 0.999)
    average.update([master])
    assert torch.allclose(average.values[0], torch.full((3,), 0.001))
    with average.used():
        assert parameter.dtype == torch.bfloat16


def test_sdd_draws_latents_from_the_average():
    """A student whose average is still the base draws the base's latents, whatever the student itself is by now."""
    latents = []
    for disturbed in (False, True):
        toy = Toy()
        run = erasure(toy, objective="sdd", on_policy=True, preserve_weight=0.0)
        if disturbed:
            toy.disturb()
        run.loss(0)
        latents.append(toy.trained().x_t)
    assert torch.equal(*latents)


def test_sdd_pool_is_renewed_from_the_average_and_named_an_approximation():
    run = erasure(Toy(), objective="sdd", pool_refresh_every=2, ema_decay=0.0)
    run.loss(0)
    run.trainee.disturb()
    run.after_step()
    run.trainee.calls.clear()
    run.loss(2)
    assert {call.on for call in run.trainee.calls if not call.grad} == {True, False}  # own walks; kept ones off
    assert "pool renewed every 2 steps" in run.report().notes[0]


def test_sdd_without_preserved_prompts_holds_the_empty_prompt():
    toy = Toy()
    run = erasure(toy, objective="sdd", preserve=(), on_policy=True)
    run.loss(0)
    assert toy.names(toy.trained().cond) == ["car", ""] * 3


# -- training


def optimize(run: Erasure, toy: Toy, steps: int, rate: float = 0.03) -> None:
    optimizer = torch.optim.AdamW(toy.parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        run.loss(step).backward()
        optimizer.step()
        run.after_step()


def distance(toy: Toy, prompt: str, wanted) -> float:
    """Mean squared distance of the student's prediction to wanted(x, t) at random points."""
    x, t = noise(64, 5), torch.arange(64) + 30
    with torch.no_grad():
        found = toy.predict(x, t, toy.encode([prompt] * 64))
    return (found - wanted(x, t)).square().mean().item()


@pytest.mark.parametrize("objective", ["esd-x", "leco", "sdd"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_training_moves_the_concept_to_its_target(objective, on_policy):
    toy = Toy()
    towards = lambda x, t: toy.base(x, t, *[""] * 64)  # noqa: E731
    before = distance(toy, "car", towards)
    run = erasure(toy, objective=objective, on_policy=on_policy, negative_guidance=0.0, ema_decay=0.5)
    optimize(run, toy, 80)
    assert distance(toy, "car", towards) < 0.7 * before


@pytest.mark.parametrize("objective", ["esd-x", "leco", "sdd"])
def test_preservation_holds_kept_prompts_to_the_base(objective):
    moved = []
    for weight in (0.0, 5.0):
        toy = Toy()
        optimize(erasure(toy, objective=objective, preserve_weight=weight), toy, 60)
        moved.append(distance(toy, "cat", lambda x, t: toy.base(x, t, *["cat"] * 64)))  # noqa: B023
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"on_policy": True},
        {"objective": "leco", "on_policy": True},
        {"objective": "sdd", "pool_refresh_every": 4, "ema_decay": 0.5},
    ],
    ids=["esd", "esd on policy", "leco on policy", "sdd, renewed pool"],
)
def test_resumed_run_goes_on_bit_for_bit(changes):
    def losses(run, toy, steps):
        found = []
        for step in steps:
            loss = run.loss(step)
            found.append(loss.item())
            loss.backward()
            with torch.no_grad():
                for p in toy.parameters:
                    p -= 0.1 * p.grad
                    p.grad = None
            run.after_step()
        return found

    toy = Toy().disturb()
    run = erasure(toy, True, **changes)
    whole = losses(run, toy, range(6))
    kept = io.BytesIO()
    torch.save(([p.detach() for p in toy.parameters], run.state_dict()), kept)
    whole += losses(run, toy, range(6, 10))
    assert len(set(whole)) == 10
    again, first = Toy().disturb(), Toy().disturb()
    assert losses(erasure(first, True, **changes), first, range(10)) == whole
    kept.seek(0)
    values, state = torch.load(kept, weights_only=True)
    with torch.no_grad():
        for p, value in zip(again.parameters, values, strict=True):
            p.copy_(value)
    resumed = erasure(again, True, **changes)
    resumed.load_state_dict(state)
    assert losses(resumed, again, range(6, 10)) == whole[6:]


def test_other_seed_draws_other_latents():
    pools = []
    for seed in (1, 2):
        run = erasure(Toy(), seed=seed)
        run.prepare(0)
        pools.append(run.pools["erase"].x_t)
    assert not torch.equal(*pools)
    assert (pools[0] - pools[1]).abs().min() > 0
