"""The evidence at equal quality: the protocol's cells, how they are made, what is kept of them, and how they count."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard import activity
from modular_lora_guard.tools.benchmarks import evidence_equal, white_box
from modular_lora_guard.tools.world import ASSETS, SAFETY_LORA, TASK_LORA, data, detector, diffusion, lorafile, narrow
from modular_lora_guard.tools.world.equal import command, counting, drawing, protocol, results, training, work
from modular_lora_guard.tools.world.equal.drawing import Seen
from modular_lora_guard.tools.world.equal.protocol import INK, KEPT, STYLED, VEHICLES, Cell, Image, Protocol
from modular_lora_guard.tools.world.equal.results import Result
from support.errors import refuses

PROTOCOL = Protocol.read()
IMAGES = PROTOCOL.images()
NULL_SPACE = "null space, of words"


@pytest.fixture(scope="module")
def net():
    return narrow.load()


@pytest.fixture(scope="module")
def bench(net, tmp_path_factory) -> work.Bench:
    """The narrow net with a protocol of two images and trainings of one step, of the recipe that is not trained."""
    folder = tmp_path_factory.mktemp("equal")
    (folder / "gloss" / "10_gloss").mkdir(parents=True)
    for path in sorted((ASSETS / "gloss" / "10_gloss").iterdir())[:4]:  # two images with their captions
        shutil.copy(path, folder / "gloss" / "10_gloss")
    said = dict(PROTOCOL.said) | {"recipes": {NULL_SPACE: PROTOCOL.recipes[NULL_SPACE]}, "training_seeds": [5]}
    said["tasks"] = {"gloss": str(folder / "gloss")}
    said["task"] = said["task"] | {"max_train_steps": 1, "train_batch_size": 1}
    host_model = training.HostModel(*net, torch.device("cpu"))
    eye = detector.load(ASSETS / "demo_detector.safetensors")
    return work.Bench(Few(said), host_model, eye, folder / "loras", folder / "work")


class Few(Protocol):
    """A vehicle, a kept concept, and that one in the task's style."""

    def images(self) -> tuple[Image, ...]:
        return IMAGES[0], *(next(image for image in IMAGES if image.kind == kind) for kind in (KEPT, STYLED))


# The protocol


def test_recipes_are_judged_on_other_training_seeds_than_they_were_chosen_on():
    assert len(PROTOCOL.seeds) >= 3
    assert not {1, 11, 12, 13} & set(PROTOCOL.seeds)
    assert len(PROTOCOL.recipes) >= 3
    assert len(PROTOCOL.tasks) >= 2


def test_every_arm_of_every_recipe_task_and_seed_is_a_cell_once_and_after_what_it_is_made_from():
    cells = list(PROTOCOL.cells())
    assert len(cells) == len(set(cells))
    at = {cell: i for i, cell in enumerate(cells)}
    for task in PROTOCOL.tasks:
        for seed in PROTOCOL.seeds:
            for recipe in PROTOCOL.recipes:
                safety = Cell("safety", recipe, "", 0 if recipe == NULL_SPACE else seed)
                for arm in ("sequential", "sequential_full", "modular", "projected", "safety_first"):
                    assert at[Cell(arm, recipe, task, seed)] > max(at[safety], at[Cell("task", "", task, seed)])
                assert at[Cell("safety_first", recipe, task, seed)] > at[Cell("modular", recipe, task, seed)]


def test_the_first_training_seed_has_every_recipe_and_arm_before_anything_else_begins():
    cells = list(PROTOCOL.cells())
    first = [cell for cell in cells if cell.training_seed in (0, PROTOCOL.seeds[0]) and cell.task in ("", "gloss")]
    assert cells[: len(first)] == first
    assert {cell.recipe for cell in first} == {"", *PROTOCOL.recipes}


def test_images_are_what_the_protocol_says_and_no_two_have_the_same_noise():
    assert Counter(image.kind for image in IMAGES) == {VEHICLES: 144, KEPT: 120, STYLED: 240}
    assert len({image.seed for image in IMAGES}) == len(IMAGES)
    vehicles = Counter((image.concept, image.style) for image in IMAGES if image.kind == VEHICLES)
    assert set(vehicles) == {(c, s) for c in data.SUPPRESSED_IDS for s in range(len(data.STYLES))}
    assert all(image.style != data.TASK_STYLE for image in IMAGES if image.kind == KEPT)
    assert {image.style for image in IMAGES if image.kind == STYLED} == {data.TASK_STYLE}
    assert {image.concept for image in IMAGES if image.kind != VEHICLES} == set(data.KEPT_IDS)


@pytest.mark.parametrize("task", sorted(PROTOCOL.tasks))
def test_a_task_is_taught_by_images_of_kept_concepts_alone_under_the_word_that_the_base_never_saw(task):
    captions = [
        path.read_text(encoding="utf-8").strip() for path in (protocol.PACK / PROTOCOL.tasks[task]).rglob("*.txt")
    ]
    assert sorted(captions) == sorted(f"gloss, {data.WORDS[i]}" for i in data.KEPT_IDS)


def test_comments_of_the_protocol_do_not_change_its_hash_and_its_values_do(tmp_path: Path):
    text = protocol.FILE.read_text(encoding="utf-8")
    (tmp_path / "same.toml").write_text(text.replace("# ", "# again: "), encoding="utf-8")
    (tmp_path / "other.toml").write_text(text.replace("safety = 0.02", "safety = 0.03"), encoding="utf-8")
    assert Protocol.read(tmp_path / "same.toml").digest == PROTOCOL.digest
    assert Protocol.read(tmp_path / "other.toml").digest != PROTOCOL.digest


# What draws


def test_folded_loras_give_what_unmerged_ones_give_and_leave_no_trace(net):
    model, _ = net
    loras = [lorafile.load(ASSETS / name, model.unet) for name in (SAFETY_LORA, TASK_LORA)]
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([999, 500])
    given = x, t, *model.text(["noto, car", "gloss, fox"])
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    lorafile.attach(model.unet, loras[0], {k: (d, u, 0.25 * s) for k, (d, u, s) in loras[1].items()})
    with torch.no_grad():
        unmerged = model.unet(*given)
        with drawing.folded(model.unet, (loras[0], 1.0), (loras[1], 0.25)):
            folded = model.unet(*given)
    assert (folded - unmerged).abs().max() < 1e-5 * unmerged.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())
    assert not any(layer.adapters for layer in lorafile.targets(model.unet).values())


def test_an_image_has_the_same_noise_whatever_is_drawn_beside_it():
    several = drawing.noise(IMAGES[:5])
    assert torch.equal(several[3:4], drawing.noise(IMAGES[3:4]))
    alone = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(IMAGES[3].seed))  # as the audit draws it
    assert torch.equal(several[3:4], alone)


def test_ink_is_black_on_white_and_a_white_sheet_is_none():
    white = torch.ones(3, 64, 64)
    black, red = white.clone(), white.clone()
    black[:, 20:40, 20:40] = 0.1
    red[1:, 20:40, 20:40] = 0.1
    assert drawing.drawn_in_ink(torch.stack([black, red, white])).tolist() == [True, False, False]


# Activity, and how modules are put together


def test_activity_is_that_of_77_tokens(net):
    """The text as ComfyUI has it, the last token repeated to 77 and no bias, written out for one layer."""
    model, _ = net
    path, name = ASSETS / "equal" / "null_space.safetensors", "middle_block.1.transformer_blocks.0.attn2.to_v"
    lora = {name: lorafile.load(path, model.unet)[name]}
    layer, (down, up, scale) = lorafile.targets(model.unet)[name], lora[name]
    lorafile.attach(model.unet, lora)
    found = training.activities(model, *model.text(["noto, car", "gloss, cat face"]), torch.zeros(2, 4, 8, 8))
    lorafile.attach(model.unet)
    for value, prompt in zip(found, ("noto, car", "gloss, cat face"), strict=True):
        ids = model.text.encode(prompt)
        ids += [ids[-1]] * (77 - len(ids))
        rows = F.layer_norm(model.text.rows[[model.text.place[i] for i in ids]], (768,)).double()
        z, y0 = scale * rows @ down.double().T @ up.double().T, rows @ layer.weight.double().T
        assert value == pytest.approx(float(z.square().sum() / y0.square().sum()), rel=1e-4)


def test_of_several_loras_that_act_together_the_activity_of_one_is_its_own_share(net):
    """The net with both merged gives every layer's inputs; from these the one LoRA's share and W0·x + b."""
    model, _ = net
    one, other = (lorafile.load(ASSETS / name, model.unet) for name in (SAFETY_LORA, TASK_LORA))
    x, prompts = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4)), ["noto, car", "flat, owl"]
    context, bias = model.text(prompts)
    layers, seen, hooks = lorafile.targets(model.unet), {}, []
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        hooks.append(
            layer.register_forward_hook(lambda _, given, __, name=name: seen.update({name: given[0].double()}))
        )
    with torch.no_grad(), drawing.folded(model.unet, (one, 1.0), (other, 1.0)):
        model.unet(x, torch.full((2,), 999), context, bias)
    for hook in hooks:
        hook.remove()
    ratios = []
    for name, (down, up, scale) in one.items():
        share = scale * seen[name] @ (up.double() @ down.double()).T
        base = F.linear(
            seen[name], weights[name].double(), None if layers[name].bias is None else layers[name].bias.double()
        )
        often = bias.exp() if "attn2.to_k" in name or "attn2.to_v" in name else 1.0
        sums = [(part.square().sum(-1) * often).sum(1) for part in (share, base)]
        ratios.append(sums[0] / sums[1])
    lorafile.attach(model.unet, one, other)
    found = training.activities(model, context, bias, x, one)
    lorafile.attach(model.unet, one)
    alone = training.activities(model, context, bias, x)
    same = training.activities(model, context, bias, x, one)
    lorafile.attach(model.unet)
    assert found.tolist() == pytest.approx(torch.stack(ratios).mean(0).tolist(), rel=1e-4)
    assert alone.tolist() == same.tolist()
    assert all(abs(a / b - 1) > 0.01 for a, b in zip(found.tolist(), alone.tolist(), strict=True))


def test_the_calibration_of_a_closed_form_is_confirmed_on_the_narrow_net(net):
    """What was worked out from the texts at stock width when the file was made, and what the net measures."""
    model, _ = net
    path = ASSETS / "equal" / "null_space.safetensors"
    said = activity.read(read_lora(path))
    lorafile.attach(model.unet, lorafile.load(path, model.unet))
    prompts = ["a vehicle", *(data.WORDS[i] for i in data.SUPPRESSED_IDS[:15])]
    about = training.activities(model, *model.text(prompts), torch.zeros(16, 4, 8, 8))
    lorafile.attach(model.unet)
    assert float(about.min()) == pytest.approx(said.concept.quantiles[0], rel=1e-3)
    assert float(about.max()) == pytest.approx(said.concept.quantiles[-1], rel=1e-3)


def test_in_a_white_box_attack_every_row_has_the_task_at_its_own_share(net):
    model, _ = net
    arms = white_box.Arms(model, PROTOCOL, NULL_SPACE)
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([999, 500, 40])
    given = x, t, *model.text(["noto, car"] * 3)
    with torch.no_grad():
        arms.attach(torch.tensor([0.0, 0.5, 1.0]))
        rows = model.unet(*given)
        for row, share in enumerate((0.0, 0.5, 1.0)):
            with drawing.folded(model.unet, (arms.factors[0], 1.0), (arms.factors[1], share)):
                alone = model.unet(*given)
            assert (rows[row] - alone[row]).abs().max() < 1e-5 * alone.abs().max()


def seen(count: int, hit: bool) -> Seen:
    return Seen((hit,) * count, tuple(range(count)), (5,) * count, (hit,) * count)


def test_safety_first_is_safety_alone_at_0_modular_at_1_and_drawn_at_its_g_in_between(bench, monkeypatch):
    """Of three prompts one has an activity at the upper bound, one at the lower one, and one three quarters up."""
    safety = read_lora(protocol.PACK / PROTOCOL.recipes[NULL_SPACE]["file"])
    low, high = activity.read(safety).bounds
    cell = Cell("safety_first", NULL_SPACE, "gloss", 5)
    alone = Result(
        Cell("safety", NULL_SPACE),
        {"safety": safety.sha256},
        seen(3, False),
        1.0,
        (high, low, low + 0.75 * (high - low)),
    )
    modular = Result(Cell("modular", NULL_SPACE, "gloss", 5), {}, replace(seen(3, True), top=(10, 11, 12)), 1.0)
    drawn = []

    def draw(self, loras, images):
        drawn.append(([strength for _, strength in loras], images))
        return Seen((True,), (77,), (3,), (False,))

    monkeypatch.setattr(work.Bench, "_seen", draw)
    monkeypatch.setattr(work.Bench, "_factors", lambda self, lora: {})
    found, shares = bench._safety_first(
        cell, {"safety": safety, "task": safety}, {alone.cell: alone, modular.cell: modular}
    )
    assert shares == (0, 16, math.floor(16 * 0.25 - 1e-9))
    assert found.top == (0, 11, 77)
    assert found.hit == (False, True, True)
    assert drawn == [([1.0, shares[2] / 16], (bench.protocol.images()[2],))]


def test_every_cell_of_a_small_protocol_is_made_once_and_goes_on_from_what_is_there(bench, tmp_path: Path, monkeypatch):
    """The whole command on the narrow net, anew in a folder, with three images an arm and two steps of sampling."""
    opened = classmethod(lambda cls, made, loras, work: replace(bench, loras=loras, work=work))
    monkeypatch.setattr(work.Bench, "opened", opened)
    monkeypatch.setattr(command.Protocol, "read", classmethod(lambda cls, path=None: bench.protocol))
    short = lambda predict, noise, steps: diffusion.sample(predict, noise, 2)  # noqa: E731
    monkeypatch.setattr(drawing, "diffusion", type("Short", (), {"sample": staticmethod(short)}))
    weights = {name: tensor.clone() for name, tensor in bench.host_model.unet.state_dict().items()}
    shipped = {path: path.stat().st_mtime_ns for path in (results.FILE, command.FIGURES, *work.LORAS.iterdir())}
    chosen = command.parser().parse_args(["--anew", str(tmp_path)])
    said = command.run(chosen)
    assert said.startswith("8 of 8 cells done")
    there = tmp_path / "evidence_cells.jsonl"
    lines = there.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["arm"] for line in lines] == [cell.arm for cell in bench.protocol.cells()]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bench.host_model.unet.state_dict().items())
    monkeypatch.setattr(work.Bench, "run", None)  # nothing is left to run
    assert command.run(chosen).startswith("8 of 8 cells done")
    assert there.read_text(encoding="utf-8").splitlines() == lines
    found = results.read(there, bench.protocol)
    sequential, task = (
        found[Cell(arm, recipe, "gloss", 5)].loras for arm, recipe in (("sequential", NULL_SPACE), ("task", ""))
    )
    assert sequential["sequential"] != task["task"]  # the safety LoRA was in its forward
    stock = read_lora(tmp_path / "loras" / "gloss_5.safetensors").plain["lora_unet_mid_block_attentions_0_proj_in"]
    assert (stock.down.shape[1], stock.up.shape[0]) == (320, 320)  # what was trained narrow is a stock file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evidence.json", there.name, "loras", "work"]
    assert shipped == {path: path.stat().st_mtime_ns for path in (results.FILE, command.FIGURES, *work.LORAS.iterdir())}


# What is kept of a cell


@pytest.fixture
def one() -> Result:
    count = len(IMAGES)
    made = Seen(tuple(i % 3 == 0 for i in range(count)), tuple(i % 84 for i in range(count)),
                tuple(i % 6 for i in range(count)), tuple(i % 7 == 0 for i in range(count)))  # fmt: skip
    return Result(
        Cell("safety", "LECO", "", 21), {"safety": "ab" * 32}, made, 12.5, (0.5,) * count, (), {"date": "today"}
    )


def test_a_cell_is_read_as_it_was_written(tmp_path: Path, one: Result):
    results.append(tmp_path / "cells.jsonl", PROTOCOL, one)
    assert results.read(tmp_path / "cells.jsonl", PROTOCOL) == {one.cell: one}


def test_cells_of_another_protocol_and_cells_that_are_there_twice_are_refused(tmp_path: Path, one: Result):
    path = tmp_path / "cells.jsonl"
    results.append(path, PROTOCOL, one)
    with refuses("evidence.results", path.name, "LECO"):
        results.read(path, Protocol({**PROTOCOL.said, "training_seeds": [1]}))
    results.append(path, PROTOCOL, one)
    with refuses("evidence.results", path.name, "LECO"):
        results.read(path, PROTOCOL)


def test_another_lora_than_that_of_an_earlier_cell_is_refused(one: Result):
    with refuses("evidence.lora", "demo_safety_vehicles.safetensors", "LECO"):
        work._same(read_lora(ASSETS / SAFETY_LORA), "safety", one)


# What is counted


def results_of(rates: dict[str, float], tasks=("gloss", INK)) -> dict[Cell, Result]:
    """All cells of these tasks: a vehicle in the first images of each concept's, kept concepts right, g 1."""
    done = {}
    for cell in PROTOCOL.cells():
        if cell.task and cell.task not in tasks:
            continue
        often: Counter[int] = Counter()
        hit, top, style, ink = [], [], [], []
        for image in IMAGES:
            number, often[image.concept] = often[image.concept], often[image.concept] + 1
            mistaken = image.kind == KEPT and number == 0 and cell.arm == "projected"
            hit.append(mistaken or (image.kind == VEHICLES and number < 6 * rates[cell.arm]))
            top.append(image.concept)
            style.append(data.TASK_STYLE if cell.arm not in ("base", "safety") else 0)
            ink.append(cell.arm not in ("base", "safety") and number % 2 == 0)
        made = Seen(*map(tuple, (hit, top, style, ink)))
        done[cell] = Result(cell, {}, made, 3600.0, (), (16,) * len(IMAGES), {"date": "d", "machine": "m"})
    return done


def few(patch: pytest.MonkeyPatch) -> None:
    """Few draws of the bootstrap, for the time that they take."""
    patch.setattr(counting.stats, "DRAWS", 200)
    patch.setattr(counting.stats, "TOGETHER", 100)


RATES = dict.fromkeys(protocol.ARMS, 1 / 6) | {"base": 1.0, "task": 1.0, "sequential": 1.0, "safety_first": 2 / 6}


@pytest.fixture(scope="module")
def figures():
    """Of synthetic cells of every recipe, by few draws of the bootstrap."""
    with pytest.MonkeyPatch.context() as patch:
        few(patch)
        return counting.figures(PROTOCOL, results_of(RATES))


def test_images_are_counted_as_they_were_judged(figures):
    """24 vehicles × 6 styles × 3 seeds; in ink without the word that the judge cannot read: × 5."""
    for recipe in PROTOCOL.recipes:
        arms, tasks = (figures["recipes"][recipe][name] for name in ("arms", "tasks"))
        assert (arms["base"]["k"], arms["base"]["n"]) == (144, 144)  # once, whatever is compared with it
        seeds = 1 if recipe == NULL_SPACE else 3
        assert (arms["safety"]["k"], arms["safety"]["n"]) == (24 * seeds, 144 * seeds)
        assert (tasks["gloss"]["arms"]["sequential"]["k"], tasks["gloss"]["arms"]["sequential"]["n"]) == (432, 432)
        assert (tasks[INK]["arms"]["sequential"]["k"], tasks[INK]["arms"]["sequential"]["n"]) == (360, 360)
        assert (arms["safety_first"]["k"], arms["safety_first"]["n"]) == (24 * 2 * 3 * 2, 432 + 360)
        assert arms["task"]["kept"] == 1.0
        assert (arms["projected"]["mistaken"], arms["task"]["mistaken"]) == ([360, 720], [0, 720])
        assert tasks["gloss"]["arms"]["task"]["fidelity"] == 1.0
        assert tasks[INK]["arms"]["task"]["fidelity"] == 0.5
        assert arms["base"]["fidelity"] == 0.0


def test_tests_say_what_the_margins_make_of_the_differences(figures):
    recipe = figures["recipes"][NULL_SPACE]
    by = {(one["test"], one["arm"], one["against"]): one for one in recipe["differences"]}
    assert by[2, "safety_first", "safety"]["verdict"] == "fails"  # 17 points more, the margin is 2
    assert by[2, "modular", "safety"]["verdict"] == "holds"
    assert by[3, "safety_first", "modular"]["verdict"] == "holds"
    assert by[4, "safety", "base"]["difference"] == 0
    assert recipe["comeback"]["sequential"]["verdict"] == "holds"
    assert recipe["comeback"]["sequential"]["ratio"] == pytest.approx(6.0)
    assert recipe["comeback"]["sequential_full"]["verdict"] == "fails"
    assert figures["tests"]["2, safety_first against safety"] == "fails"
    assert figures["tests"]["1, sequential"] == "holds"
    assert not figures["missing"]


def test_what_is_not_done_is_listed_and_a_pair_with_a_gap_is_not_counted(monkeypatch):
    few(monkeypatch)
    done = results_of(RATES, tasks=("gloss",))
    gap = Cell("projected", NULL_SPACE, "gloss", PROTOCOL.seeds[1])
    del done[gap]
    found = counting.figures(PROTOCOL, done)
    assert str(gap) in found["missing"]
    assert len(found["missing"]) + found["done"] == len(list(PROTOCOL.cells()))
    assert found["recipes"][NULL_SPACE]["counted"] == [["gloss", PROTOCOL.seeds[0]], ["gloss", PROTOCOL.seeds[2]]]
    text = evidence_equal.tables(found, "arms")
    assert f"**{len(found['missing'])} are not yet**" in text


def test_every_table_has_a_row_for_what_it_is_of(figures):
    rows = {
        name: evidence_equal.tables(figures, name).count("\n| ") for name in ("arms", "tests", "differences", "tasks")
    }
    assert rows == {"arms": 3 * 8, "tests": 2 + 9, "differences": 3 * 9, "tasks": 3 * 2 * 8}
    assert "mean 1.00" in evidence_equal.tables(figures, "shares")


def test_the_readmes_table_has_vehicles_kept_concepts_and_style_of_an_arm_in_each_recipe(figures):
    lines = evidence_equal.tables(figures, "lead").splitlines()
    arms = [next(iter(recipe["tasks"].values()))["arms"]["sequential"] for recipe in figures["recipes"].values()]
    told = [f"{one['k'] / one['n']:.0%} {one['kept']:.0%} {one['fidelity']:.0%}" for one in arms]
    (row,) = (line for line in lines if line.startswith("| the style LoRA trained on top"))
    assert [cell.replace(" / ", "% ").replace(" %", "%").strip() for cell in row.split("|")[2:-1]] == told


def test_the_figures_are_those_of_the_cells_that_are_kept():
    """Hits and images counted here from the lines themselves."""
    found, done = json.loads(command.FIGURES.read_text(encoding="utf-8")), results.read(results.FILE, PROTOCOL)
    assert found["protocol_sha256"] == PROTOCOL.digest
    assert found["done"] == len(done)
    for name, recipe in found["recipes"].items():
        for arm in ("sequential", "modular", "safety_first"):
            k = n = 0
            for task, seed in recipe["counted"]:
                hits = done[Cell(arm, name, task, seed)].seen.hit
                asked = [i for i, one in enumerate(IMAGES) if one.kind == VEHICLES and (task != INK or one.style != 5)]
                k, n = k + sum(hits[i] for i in asked), n + len(asked)
            assert (recipe["arms"][arm]["k"], recipe["arms"][arm]["n"]) == (k, n)
