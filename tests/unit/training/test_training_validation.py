"""Validation loss, epochs, and what is saved where an average of the weights is kept; on a toy network."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modular_lora_guard.training import loop
from modular_lora_guard.training.data import dataset
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from modular_lora_guard.training.task import train as task
from modular_lora_guard.training.task import validation
from modular_lora_guard.training.task.denoising import Captions, Denoising, Latents
from PIL import Image
from safetensors.torch import load_file
from support.errors import refuses
from support.toys import Silent, ToyHostModel

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")


@pytest.fixture
def options(tmp_path) -> TaskOptions:
    for folder, count in (("2_thing", 5), ("1_other", 4)):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(count):
            colour = (40 * i, 90, 200 - 40 * i if folder == "2_thing" else i)
            Image.new("RGB", (64, 64), colour).save(tmp_path / "data" / folder / f"{i}.png")
            (tmp_path / "data" / folder / f"{i}.txt").write_text(f"{folder[2:]}, number {i}", encoding="utf-8")
    return TaskOptions(
        output_dir=str(tmp_path / "out"),
        train_data_dir=str(tmp_path / "data"),
        resolution=64,
        network_dim=2,
        network_alpha=2.0,
        learning_rate=1e-2,
        max_train_steps=4,
        train_batch_size=2,
        save_precision="float",
    )


def train(options: TaskOptions, watch=None, **host) -> tuple[dict[str, torch.Tensor], str]:
    made = task.train_task(ToyHostModel(**host), options, watch or Silent(), engine="test")
    return load_file(Path(options.output_dir) / f"{options.output_name}.safetensors"), made.report


def scan(options: TaskOptions) -> dataset.DatasetReport:
    return dataset.scan(task.configure(options))


def test_what_is_held_out_is_not_trained_on_and_a_share_of_every_folder(options):
    plain = scan(options)
    assert plain.held_out == ()
    found = scan(replace(options, validation_split=0.4))
    names = {p.name for p in found.images} | {p.name for p in found.held_out}
    assert names == {p.name for p in plain.images}
    assert len(found.images) + len(found.held_out) == 9
    assert [p.name.split("/")[0] for p in found.held_out] == ["1_other", "2_thing", "2_thing"]
    assert found.findings["held_out"] == tuple(p.name for p in found.held_out)
    assert found.draws == 2 * 3 + 3
    assert found.dataset_sha256 != plain.dataset_sha256
    other = scan(replace(options, validation_split=0.4, validation_seed=7))
    assert {p.name for p in other.held_out} != {p.name for p in found.held_out}
    assert scan(replace(options, validation_split=0.1)).problems


def test_the_choice_is_sd_scripts_own(options):
    found = scan(replace(options, validation_split=0.4, validation_seed=11))
    for folder, count in (("2_thing", 5), ("1_other", 4)):
        names = [f"{folder}/{i}.png" for i in range(count)]
        random.Random(11).shuffle(names)  # split_train_val of library/train_util.py
        kept = -(-count * 6 // 10)
        assert {p.name for p in found.images if p.name.startswith(folder)} == set(names[:kept])


def test_the_loss_of_held_out_images_is_the_mean_over_fixed_levels(options):
    options = replace(options, validation_split=0.4, shuffle_caption=True, flip_aug=True, train_batch_size=4)
    host_model, found = ToyHostModel(), scan(options)
    plan = task.Plan(task.configure(options), found, options.seed)
    loss = Denoising(host_model, options, plan, Latents(host_model, found, Silent()), Captions(host_model))
    measured = validation.Validation(loss, found, lambda: None)
    total = len(host_model.schedule)
    levels = torch.tensor([total * k // 5 for k in (1, 2, 3, 4)])
    expected = []
    for number, image in enumerate(found.held_out):
        pixels, _ = dataset.load(image)
        z = host_model.encode_images(pixels[None]).expand(4, -1, -1, -1)
        generator = validation.step_generator(options.validation_seed, "validation", number, int(levels[0]))
        eps = torch.randn(z.shape, generator=generator)
        seen = loss.latents.of([task_draw(found, number)] * 4)
        cond = host_model.encode([image.caption] * 4).of_images(seen.sizes, seen.references)
        said = host_model.predict(host_model.schedule.add_noise(z, levels, eps), levels, cond)
        expected.append((said - host_model.schedule.target(z, levels, eps)).square().mean())
    assert measured() == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert measured() == measured()


def task_draw(found: dataset.DatasetReport, number: int):
    return validation.Draw(len(found.images) + number, False, "", 1.0)


def test_it_is_taken_before_on_the_way_and_after_and_changes_nothing(options, tmp_path):
    options = replace(options, validation_split=0.4, network_dropout=0.3)
    watch = Silent()
    often, report = train(replace(options, validate_every_n_steps=1), watch)
    assert [step for step, _ in watch.validation] == [0, 1, 2, 3, 4]
    assert f"validation loss {watch.validation[0][1]:.4f} before" in report
    seldom, _ = train(
        replace(options, validate_every_n_steps=100, output_dir=str(tmp_path / "other")), other := Silent()
    )
    assert [step for step, _ in other.validation] == [0, 4]
    assert other.validation == [watch.validation[0], watch.validation[-1]]
    assert all(torch.equal(often[name], seldom[name]) for name in seldom)
    epochs = Silent()
    train(replace(options, output_dir=str(tmp_path / "epochs"), max_train_steps=11), epochs)
    assert [step for step, _ in epochs.validation] == [0, 5, 10, 11]  # 9 draws of one bucket in batches of 2


def test_a_stopped_training_goes_on_with_the_losses_it_had(options, tmp_path):
    options = replace(options, validation_split=0.4, validate_every_n_steps=2)
    whole = Silent()
    train(options, whole)
    options = replace(options, output_dir=str(tmp_path / "first"))
    with pytest.raises(KeyboardInterrupt):
        train(options, Silent(stop_at=2))
    (state,) = Path(options.output_dir).glob("*-state")
    rest = Silent()
    train(replace(options, resume=str(state)), rest)
    assert rest.validation == whole.validation


def test_a_loss_that_rises_again_is_said():
    assert "at step 5" in loop._validated([(0, 0.3), (5, 0.1), (9, 0.2)])
    assert "risen" in loop._validated([(0, 0.3), (5, 0.1), (9, 0.2)])
    assert "risen" not in loop._validated([(0, 0.3), (5, 0.2), (9, 0.1)])


def test_epochs_are_whole_steps(options, tmp_path):
    watch = Silent()
    _, report = train(replace(options, max_train_epochs=2, gradient_accumulation_steps=3, max_train_steps=99), watch)
    assert watch.steps == 2 * 3  # 14 draws in 7 batches: 3 steps of 3 micro-batches an epoch
    assert "max_train_epochs: 2 are 6 steps, and max_train_steps 99 has NO effect" in report
    (state,) = Path(options.output_dir).glob("*-state")
    further = Silent()
    train(replace(options, max_train_epochs=3, gradient_accumulation_steps=3, resume=str(state)), further)
    assert further.steps == 9


def factors(options: TaskOptions, **host) -> tuple[dict[str, torch.Tensor], list[list[torch.Tensor]], object]:
    """The file, the values after every step, and the optimizer."""
    seen, made = [], []

    class Watch(Silent):
        def step(self, step, total, losses):
            super().step(step, total, losses)
            seen.append([v.detach().clone() for group in made[0].param_groups for v in group["params"]])

    with pytest.MonkeyPatch.context() as patch:
        make = loop.make_optimizer
        patch.setattr(loop, "make_optimizer", lambda groups, o: made.append(make(groups, o)) or made[0])
        file, _ = train(options, Watch(), **host)
    return file, seen, made[0]


def saved(file: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Factors by their shapes and values, without alphas."""
    return [value for name, value in file.items() if not name.endswith("alpha")]


def same(file: dict[str, torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-6) -> bool:
    """Whether each saved factor is one of the expected."""
    pool = [value.flatten() for value in expected]
    return all(
        any(v.numel() == e.numel() and torch.allclose(v.flatten(), e, atol=tolerance) for e in pool)
        for v in saved(file)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_file_is_the_running_mean_and_training_goes_on_without_it(dtype, options, tmp_path):
    precision = "no" if dtype == torch.float32 else "bf16"
    options = replace(options, mixed_precision=precision, max_train_steps=3)
    _, plain, _ = factors(replace(options, output_dir=str(tmp_path / "plain")), dtype=dtype)
    file, values, _ = factors(replace(options, ema_decay=0.3, save_every_n_steps=1), dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(values[-1], plain[-1], strict=True))
    mean = before_training(options, dtype)
    for n, now in enumerate(values, 1):
        decay = min(0.3, (1 + n) / (10 + n))
        mean = [decay * old + (1 - decay) * new for old, new in zip(mean, now, strict=True)]
    assert same(file, mean)
    assert not same(file, values[-1])


def before_training(options: TaskOptions, dtype: torch.dtype) -> list[torch.Tensor]:
    """The adapters as they begin."""
    host_model = ToyHostModel(dtype)
    with task.adapted(host_model.unet, host_model.text_encoder, task._spec(host_model, options)) as adapters:
        return [p.detach().float().clone() for p in adapters.parameters(task._spec(host_model, options).unet.values())]


def test_a_schedule_free_optimizer_saves_its_average(options):
    pytest.importorskip("schedulefree", reason="schedulefree is not installed: an optional optimizer")
    options = replace(options, optimizer_type="AdamWScheduleFree", lr_scheduler="constant", save_every_n_steps=2)
    file, values, optimizer = factors(options)
    z = [optimizer.state[p]["z"] for group in optimizer.param_groups for p in group["params"]]
    average = [(y - 0.1 * w) / 0.9 for y, w in zip(values[-1], z, strict=True)]  # y = (1 − β1) z + β1 x
    assert same(file, average, 1e-5)
    assert not same(file, values[-1], 1e-5)


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"optimizer_type": "AdamWScheduleFree"}, "option.schedule-free", "lr_scheduler cosine"),
        (
            {"optimizer_type": "RAdamScheduleFree", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
            "option.schedule-free",
            "constant_with_warmup",
        ),
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant", "ema_decay": 0.9},
            "option.schedule-free",
            "ema_decay",
        ),
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant", "project": True},
            "option.schedule-free",
            "project",
        ),
        ({"lr_scheduler": "cosine_with_min_lr"}, "option.scheduler", "lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "warmup_stable_decay"}, "option.scheduler", "lr_decay_steps"),
        ({"in_json": "a.json", "dataset_config": "a.toml"}, "option.data-set", "dataset_config"),
        ({"in_json": "a.json", "caption_dir": "texts"}, "option.data-set", "caption_dir"),
        ({"validation_split": 1.0}, "option.wrong-value", "validation_split"),
        ({"ema_decay": 1.0}, "option.wrong-value", "ema_decay"),
    ],
)
def test_what_contradicts_itself_is_refused(changes, code, named):
    with refuses(code, named):
        TaskOptions(**changes)


def test_sdd_keeps_the_mean_that_it_has():
    with refuses("option.objective", "ema_decay"):
        SafetyOptions(concept=("a car",), objective="sdd", ema_decay=0.9)
