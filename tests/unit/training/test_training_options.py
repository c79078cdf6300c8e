"""Options that would do nothing: each works, or is refused, or is said; and texts that an encoder would cut."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.training.data import texts
from modular_lora_guard.training.optim import ELSEWHERE, make_optimizer, make_scheduler
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from modular_lora_guard.training.safety.train import train_safety
from modular_lora_guard.training.task import train as task
from modular_lora_guard.training.unused import unused, unused_by_kohya
from PIL import Image
from support.errors import refuses
from support.toys import Silent, ToyHostModel

STEPS, RATE = 60, 0.1
CONCEPT = {"concept": ("a car",)}
PREVIEWS = {"sample_every_n_steps": 5, "sample_prompts": ("a",)}


def rates(**changes) -> list[float]:
    """The learning rate of every step."""
    options = TaskOptions(max_train_steps=STEPS, learning_rate=RATE, **changes)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([{"params": [weight], "lr": RATE}], options)
    schedule, found = make_scheduler(optimizer, options), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@given(st.integers(2, 6))
def test_restarts_restart(cycles):
    found = rates(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=cycles)
    expected = [RATE * (1 + math.cos(math.pi * (n * cycles / STEPS % 1))) / 2 for n in range(STEPS)]
    assert found == pytest.approx(expected, abs=1e-9)
    assert sum(later > before for before, later in pairwise(found)) == cycles - 1


@given(st.floats(1.5, 4))
def test_a_polynomial_is_no_line(power):
    found = rates(lr_scheduler="polynomial", lr_scheduler_power=power)
    assert found == pytest.approx([(RATE - 1e-7) * (1 - n / STEPS) ** power + 1e-7 for n in range(STEPS)])
    assert max(abs(a - b) for a, b in zip(found, rates(lr_scheduler="linear"), strict=True)) > 0.01 * RATE


def test_a_cosine_may_end_above_nothing():
    found = rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.2)
    expected = [RATE * (0.2 + 0.8 * (1 + math.cos(math.pi * n / STEPS)) / 2) for n in range(STEPS)]
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_stable_rate_is_warmed_up_and_decays_in_its_last_steps():
    decay = {"lr_decay_steps": 20, "lr_scheduler_min_lr_ratio": 0.1}
    found = rates(lr_scheduler="warmup_stable_decay", lr_warmup_steps=10, **decay)
    assert found[10:40] == pytest.approx([RATE] * 30)
    expected = [RATE * (0.1 + 0.9 * (1 + math.cos(math.pi * n / 20)) / 2) for n in range(20)]
    assert found[40:] == pytest.approx(expected, abs=1e-9)
    assert found[:10] == sorted(found[:10])
    with refuses("option.scheduler", "lr_decay_steps", "60"):
        rates(lr_scheduler="warmup_stable_decay", lr_warmup_steps=10, lr_decay_steps=55)


def test_an_inverse_root_has_a_time_of_its_own():
    found = rates(lr_scheduler="inverse_sqrt", lr_scheduler_timescale=9)
    assert found == pytest.approx([RATE / math.sqrt((n + 9) / 9) for n in range(STEPS)])


@pytest.mark.parametrize("optimizer", ["CAME", "Lion", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_an_optimizer_that_is_not_installed_is_named_with_its_package(optimizer, monkeypatch):
    module, package, _ = ELSEWHERE[optimizer]
    monkeypatch.setitem(sys.modules, module, None)
    with refuses("option.optimizer-missing", optimizer, package):
        rates(optimizer_type=optimizer, lr_scheduler="constant")


def test_lion_steps_by_signs():
    pytest.importorskip("lion_pytorch", reason="lion-pytorch is not installed: an optional optimizer")
    options = TaskOptions(optimizer_type="Lion", optimizer_args=("weight_decay=0.1",))
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = make_optimizer([{"params": [weight], "lr": 0.01}], options)
    expected, momentum = weight.detach().clone(), torch.zeros(3)
    for step in range(4):
        gradient = torch.tensor([0.3, -0.1, 0.2 - 0.2 * step])
        weight.grad = gradient.clone()
        optimizer.step()
        update = (0.9 * momentum + 0.1 * gradient).sign()  # arXiv 2302.06675, program 1
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
        momentum = 0.99 * momentum + 0.01 * gradient
    assert torch.allclose(weight.detach(), expected, atol=1e-6)


def test_came_scales_its_steps_by_their_confidence():
    pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed: an optional optimizer")
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    optimizer = make_optimizer([{"params": [weight], "lr": 0.01}], TaskOptions(optimizer_type="CAME"))
    expected = weight.detach().clone()
    row, column, m = torch.zeros(2), torch.zeros(3), torch.zeros(2, 3)
    sure_row, sure_column = torch.zeros(2), torch.zeros(3)
    for step in range(3):
        g = torch.tensor([[0.3, -0.1, 0.2], [1.0, 0.5, -0.4]]) * (1 + step)
        weight.grad = g.clone()
        optimizer.step()
        square = g.square() + 1e-30  # arXiv 2307.02047, algorithm 2
        row, column = 0.999 * row + 0.001 * square.mean(1), 0.999 * column + 0.001 * square.mean(0)
        u = g / (torch.outer(row, column) / row.mean()).sqrt()
        u = u / max(1.0, float(u.norm() / math.sqrt(6)))
        m = 0.9 * m + 0.1 * u
        unsure = (u - m).square() + 1e-16
        sure_row, sure_column = (
            0.9999 * sure_row + 0.0001 * unsure.mean(1),
            0.9999 * sure_column + 0.0001 * unsure.mean(0),
        )
        expected = expected - 0.01 * m / (torch.outer(sure_row, sure_column) / sure_row.mean()).sqrt()
    assert torch.allclose(weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_every_schedule_differs_from_every_other():
    kinds = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt")
    found = {kind: tuple(round(rate, 9) for rate in rates(lr_scheduler=kind)) for kind in kinds}
    found["constant_with_warmup"] = tuple(rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=5))
    found["inverse_sqrt, warm"] = tuple(rates(lr_scheduler="inverse_sqrt", lr_warmup_steps=5))
    assert len(set(found.values())) == len(found)


WRONG = "option.wrong-value"


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 1},
            "option.scheduler",
            "lr_scheduler_num_cycles",
        ),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "option.scheduler", "constant_with_warmup"),
        ({"lr_scheduler": "constant_with_warmup"}, "option.scheduler", "lr_warmup_steps"),
        ({"sample_every_n_steps": 5}, "option.sampling", "sample_prompts"),
        ({"sample_size": 100}, WRONG, "sample_size"),
        ({"optimizer_type": "Prodigy"}, "option.prodigy", "1"),
        ({"optimizer_type": "Prodigy", "learning_rate": 100.0}, "option.prodigy", "100"),
        (
            {"optimizer_type": "Prodigy", "learning_rate": 1.0, "network_train_text_encoder": True},
            "option.prodigy",
            "text_encoder_lr",
        ),
        ({"network_train_text_encoder": True, "text_encoder_lr": 0.0}, "option.text-encoder-rate", "text_encoder_lr"),
        ({"learning_rate": 0.0}, WRONG, "learning_rate"),
        ({"clip_skip": 0}, WRONG, "clip_skip"),
        ({"max_grad_norm": -1.0}, WRONG, "max_grad_norm"),
        ({"min_snr_gamma": -5.0}, WRONG, "min_snr_gamma"),
        ({"save_every_n_steps": -1}, WRONG, "save_every_n_steps"),
        ({"network_dropout": 1.0}, WRONG, "network_dropout"),
        ({"reg_data_dir": "reg", "dataset_config": "set.toml"}, "option.data-set", "reg_data_dir"),
        ({"resume": "state", "network_weights": "lora.safetensors"}, "option.resume", "network_weights"),
    ],
)
def test_what_cannot_act_as_it_says_is_refused(changes, code, named):
    with refuses(code, named):
        TaskOptions(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"objective": "esd-x", "action": "enhance"}, "action"),
        ({"objective": "sdd", "neutral": "a tree"}, "neutral"),
        ({"objective": "esd-u", "positive": ("a tree",)}, "positive"),
        ({"objective": "esd-x", "unconditional": "a tree"}, "unconditional"),
        ({"objective": "esd-u", "target": "cross-attention"}, "target"),
    ],
)
def test_what_an_objective_does_not_take_is_refused(changes, named):
    with refuses("option.objective", named):
        SafetyOptions(**CONCEPT, **changes)


@pytest.mark.parametrize("args", [("relative_step=True",), ("betas=(2.0, 0.9)",), ("lr=0.5",)])
def test_an_optimizer_that_takes_no_such_values_says_so(args):
    kind = "Adafactor" if "relative" in args[0] else "AdamW"
    with refuses("option.optimizer-args", "optimizer_args"):
        make_optimizer(
            [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1}],
            TaskOptions(optimizer_type=kind, optimizer_args=args),
        )


def test_a_rate_below_the_end_of_a_polynomial_is_refused():
    options = TaskOptions(lr_scheduler="polynomial", learning_rate=1e-8)
    optimizer = make_optimizer([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1e-8}], options)
    with refuses("option.scheduler", "learning_rate"):
        make_scheduler(optimizer, options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (TaskOptions(), set()),
        (TaskOptions(**PREVIEWS), set()),
        (TaskOptions(sample_prompts=("a",), sample_cfg=3.0), {"sample_prompts", "sample_cfg"}),
        (TaskOptions(**PREVIEWS | {"sample_every_n_steps": 2000}), {"sample_every_n_steps"}),
        (TaskOptions(save_every_n_steps=1000), {"save_every_n_steps"}),
        (
            TaskOptions(lr_scheduler_num_cycles=5, lr_scheduler_power=3.0),
            {"lr_scheduler_num_cycles", "lr_scheduler_power"},
        ),
        (TaskOptions(lr_scheduler="polynomial", lr_scheduler_power=3.0), set()),
        (TaskOptions(text_encoder_lr=1e-5), {"text_encoder_lr"}),
        (TaskOptions(lr_warmup_steps=20, max_train_steps=20), {"learning_rate"}),
        (TaskOptions(huber_c=0.3), {"huber_c"}),
        (TaskOptions(huber_c=0.3, huber_scale=2.0, loss_type="huber"), {"huber_scale"}),
        (TaskOptions(multires_noise_discount=0.5, validation_seed=2), {"multires_noise_discount", "validation_seed"}),
        (TaskOptions(lr_decay_steps=5, lr_scheduler_timescale=5), {"lr_decay_steps", "lr_scheduler_timescale"}),
        (TaskOptions(keep_tokens=1), {"keep_tokens"}),
        (TaskOptions(keep_tokens=1, shuffle_caption=True), set()),
        (TaskOptions(prior_loss_weight=0.5), {"prior_loss_weight"}),
        (TaskOptions(safety_strength=0.5), {"safety_strength"}),
        (TaskOptions(safety_strength=0.5, safety_lora="x", **PREVIEWS), set()),
        (SafetyOptions(**CONCEPT), set()),
        (SafetyOptions(**CONCEPT, target="conv"), {"target"}),
        (SafetyOptions(**CONCEPT, target="conv", objective="leco"), set()),
        (SafetyOptions(**CONCEPT, objective="sdd", negative_guidance=3.0), {"negative_guidance"}),
        (SafetyOptions(**CONCEPT, preserve=("a",), preserve_weight=0.0), {"preserve"}),
        (SafetyOptions(**CONCEPT, on_policy=True, pool_size=9), {"pool_size"}),
        (SafetyOptions(**CONCEPT, pool_refresh_every=1000), {"pool_refresh_every"}),
    ],
)
def test_what_has_no_effect_is_said(options, names):
    assert {line.split()[0] for line in unused(options, regularisation=0)} == names


def test_what_sd_scripts_does_not_read_is_said():
    given = TaskOptions(clip_skip=2, min_snr_gamma=5.0)
    assert unused_by_kohya(given, "SD15") == []
    assert {line.split()[0] for line in unused_by_kohya(given, "Flux")} == {"clip_skip", "min_snr_gamma"}
    assert {line.split()[0] for line in unused_by_kohya(given, "SDXL")} == {"clip_skip"}
    noise = TaskOptions(multires_noise_iterations=6, debiased_estimation_loss=True)
    assert {line.split()[0] for line in unused_by_kohya(noise, "SD3")} == {
        "multires_noise_iterations",
        "debiased_estimation_loss",
    }
    assert unused_by_kohya(noise, "SDXL") == []
    plain = SafetyOptions(**CONCEPT, objective="leco", relative_error=False, on_policy=True)
    assert unused_by_kohya(plain, "SD15") == []
    assert len(unused_by_kohya(SafetyOptions(**CONCEPT, objective="leco"), "SD15")) == 2


@pytest.fixture
def options(tmp_path) -> TaskOptions:
    folder = tmp_path / "data" / "1_thing"
    folder.mkdir(parents=True)
    for name, text in (("short", "a thing"), ("long", "a thing, " * 20)):
        Image.new("RGB", (64, 64), (len(text), 90, 10)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return TaskOptions(
        output_dir=str(tmp_path / "out"), train_data_dir=str(folder.parent), resolution=64, max_train_steps=1
    )


class Heard(Silent):
    """Whether something was said before the first step."""

    def step(self, step, total, losses):
        assert self.said
        super().step(step, total, losses)


def test_findings_and_cut_captions_are_said_before_the_first_step_and_in_the_report(options):
    pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")
    watch = Heard()
    trained = task.train_task(ToyHostModel(), options, watch, engine="test")
    for text in (watch.said, trained.report):
        assert "1 of 2 captions have more than 75 tokens, the rest is CUT OFF" in text
        assert "1_thing/long.png" in text
        assert "2 images, 2 draws" in text


@pytest.mark.parametrize(
    ("rules", "cut"),
    [
        ("", 0),
        ("caption_prefix = 'PREFIX'", 1),
        ("caption_suffix = 'SUFFIX'", 1),
        ("caption_dropout_rate = 1.0\ncaption_suffix = 'SUFFIX'", 1),
        ("enable_wildcard = true", 1),
    ],
)
def test_captions_count_as_they_are_drawn(rules, cut, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "a.txt").write_text("x" * 60 + ("\n" + "y" * 90 if "wildcard" in rules else ""), encoding="utf-8")
    rules = rules.replace("PREFIX", "p" * 30).replace("SUFFIX", "s" * 30)
    path = tmp_path / "set.toml"
    path.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = {str(folder)!r}\n{rules}")
    options = TaskOptions(dataset_config=str(path))
    found = task.dataset.scan(task.configure(options))
    assert len(texts.cut_captions(options, found.images, lambda text: len(text) > 75)) == cut


def test_options_that_the_data_sets_file_overrides_are_said(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    path = tmp_path / "set.toml"
    path.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = {str(folder)!r}\n")
    options = TaskOptions(dataset_config=str(path), resolution=128, flip_aug=True)
    assert [line.split()[0] for line in task.overridden(options, task.configure(options))] == ["resolution"]


LONG = "a car " * 20


@pytest.mark.parametrize(
    "changes",
    [
        {"concept": (LONG,)},
        {"concept": ("a car",), "synonyms": ("a bus", LONG)},
        {"concept": ("a car",), "preserve": (LONG,)},
        {"concept": ("a car",), "objective": "leco", "neutral": LONG},
        {"concept": ("a car",), "objective": "leco", "positive": (LONG,)},
        {"concept": ("a car",), "objective": "leco", "unconditional": LONG},
    ],
)
def test_a_prompt_of_an_erasure_that_is_cut_is_an_error(changes, tmp_path):
    with refuses("option.too-many-tokens", "75"):
        train_safety(ToyHostModel(), SafetyOptions(output_dir=str(tmp_path), **changes), Silent(), engine="test")


def test_preview_prompts_that_are_cut_are_counted():
    options = SafetyOptions(**CONCEPT, sample_every_n_steps=1, sample_prompts=("short", LONG))
    (line,) = texts.cut_previews(options, ToyHostModel().too_long)
    assert line.startswith("1 of 2 preview prompts")


@pytest.mark.parametrize("train", ["task", "safety"])
def test_an_output_folder_that_cannot_be_written_to_is_found_out_first(train, options, tmp_path):
    (tmp_path / "file").write_text("no folder")
    where = str(tmp_path / "file" / "out")
    erasure = SafetyOptions(output_dir=where, **CONCEPT)
    run = {
        "task": lambda: task.prepare(replace(options, output_dir=where), ()),
        "safety": lambda: train_safety(ToyHostModel(), erasure, Silent(), engine="test"),
    }
    with refuses("place.not-writable", "output_dir"):
        run[train]()
    assert not Path(where).exists()
