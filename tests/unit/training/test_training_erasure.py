"""Erasure: the loss of a step, its teachers, SDD's average and exact resumption, on a toy network."""

from __future__ import annotations

import io

import pytest
import torch
from modular_lora_guard.training.safety import pool, sampling, targets
from modular_lora_guard.training.safety.erasure import Average, Erasure
from support.erasure_toys import DISTURBED, TOTAL, Toy, erasure, noise

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
        t = relative.host_model.trained().t
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
    assert trained.host_model.on


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
    run.host_model.disturb()
    run.after_step()
    run.host_model.calls.clear()
    run.loss(2)
    assert {call.on for call in run.host_model.calls if not call.grad} == {True, False}  # own walks; kept ones off
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
