"""Erasure: sampling walks, targets and pools, on a toy network."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.training import layers
from modular_lora_guard.training.model import Cond, Schedule
from modular_lora_guard.training.safety import pool, sampling, targets
from modular_lora_guard.training.safety.targets import Prompts, Term
from support.erasure_toys import ABAR, CHANNELS, PROMPTS, SIDE, TOTAL, Toy, erasure, noise, options
from support.errors import refuses

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
        abar = ABAR[t][:, None, None, None]
        variance = abar * deviation**2 + 1 - abar
        eps = (1 - abar).sqrt() * (x_t - abar.sqrt() * mean) / variance
        x0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
        return eps if schedule.prediction == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * x0

    return network


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("deviation", "steps", "tolerance"), [(0.0, 3, 1e-4), (0.5, TOTAL, 0.03)])
def test_ddim_solves_gaussian_data(prediction, deviation, steps, tolerance):
    """The probability flow of N(μ, s²) keeps (x_t − √ᾱ μ) / √(ᾱ s² + 1 − ᾱ); DDIM is exact at s = 0, else nearly."""
    schedule, mean = Schedule.ddpm(ABAR, prediction), 1.5
    x, cond = noise(4), Cond.of(torch.zeros(4, 1, 1))
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
    toy, schedule = Toy(), Schedule.ddpm(ABAR, prediction)

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
    schedule = Schedule.ddpm(ABAR, "epsilon")
    until = torch.tensor([97, 61, 3])
    cond = Cond.of(torch.zeros(3, 1, 1))
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
    ("changes", "code", "named"),
    [
        ({"concept": ()}, "option.no-concept", ("concept",)),
        ({"synonyms": (" ",)}, "option.no-concept", ("concept",)),
        ({"preserve": ("car",)}, "option.both-lists", ("'car'",)),
        ({"objective": "leco", "positive": ("a", "b")}, "option.positive", ("2 ", "1 ")),
        ({"denoising_steps": 0}, "option.denoising-steps", ("0",)),
        ({"denoising_steps": 101}, "option.denoising-steps", ("101",)),
        ({"train_size": 20}, "option.train-size", ("20", "8")),
        ({"preserve_weight": -1.0}, "option.wrong-value", ("preserve_weight", "-1.0")),
        ({"pool_size": -1}, "option.wrong-value", ("pool_size", "-1")),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, code, named):
    with refuses(code, *named):
        erasure(Toy(), **changes)


def test_layers_of_objectives():
    paths = [f"middle_block.1.transformer_blocks.0.{part}" for part in ("attn1.to_q", "attn2.to_q", "ff.net.2")]
    first, cross, last = names = dict(zip(paths, ("a", "b", "c"), strict=True))
    chosen = {o: list(layers.erasing(names, "linear", o)) for o in ("esd-x", "esd-u", "sdd", "leco")}
    assert chosen == {"esd-x": [cross], "esd-u": [first, last], "sdd": [cross], "leco": paths}


def test_layers_of_objectives_in_a_joint_attention_and_in_one_without_a_text_of_its_own():
    joint = ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv", "double_blocks.0.txt_mlp.0", "txt_in"]
    names = {path: path for path in joint}
    assert list(layers.erasing(names, "linear", "esd-x")) == joint[1:2]
    assert list(layers.erasing(names, "linear", "esd-u")) == [joint[0], joint[2]]
    assert list(layers.select(names, "conv")) == joint
    single = {path: path for path in ("layers.0.attention.qkv", "layers.0.feed_forward.w1", "x_embedder")}
    assert not layers.tells_text_apart(single)
    assert list(layers.erasing(single, "linear", "sdd")) == ["layers.0.attention.qkv"]
    video = {f"blocks.0.{part}": part for part in ("q", "k", "v", "attn_out", "ff_proj", "norm1.linear")}
    assert list(layers.erasing(video, "linear", "esd-x").values()) == ["q", "k", "v", "attn_out"]
    whole = [f"visual_transformer_blocks.0.{part}.to_key" for part in ("self_attention", "cross_attention")]
    assert list(layers.select(dict(zip(whole, whole, strict=True)), "attention")) == whole
    assert list(layers.erasing(dict(zip(whole, whole, strict=True)), "linear", "esd-x")) == whole[1:]
    o1 = ["language_model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv"]  # the latter reads reference images
    assert list(layers.select(dict(zip(o1, o1, strict=True)), "linear")) == o1[:1]


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
    assert run.host_model.on
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
