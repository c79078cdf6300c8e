"""The training loop: exact resumption, interrupts, kill -9, projection, detachment; on a toy network."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard.build import SafetyLora
from modular_lora_guard.training.adapters import Spec, adapted
from modular_lora_guard.training.layers import select
from modular_lora_guard.training.loop import Job, fit
from modular_lora_guard.training.optim import ELSEWHERE
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.seeds import role_seed, step_generator
from modular_lora_guard.training.state import load_state
from modular_lora_guard.training.task.train import train_task
from PIL import Image
from safetensors.torch import load_file
from support.errors import refuses
from support.graphs import save_lora
from support.toys import Silent, ToyHostModel

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "data" / "3_thing"
    folder.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (64, 64), (40 * i, 90, 200 - 40 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing, number {i}", encoding="utf-8")
    return folder.parent


@pytest.fixture
def options(tmp_path, images) -> TaskOptions:
    return TaskOptions(
        output_dir=str(tmp_path / "out"),
        train_data_dir=str(images),
        resolution=64,
        network_dim=3,
        network_alpha=3.0,
        learning_rate=1e-2,
        max_train_steps=20,
        train_batch_size=2,
        save_precision="float",
        sample_size=64,
        sample_steps=2,
        sample_prompts=("thing",),
    )


def safety_lora(folder: Path) -> SafetyLora:
    info = ToyHostModel().infos[0]
    layers = {name: info.specs[key] for name, key in info.key_map.items() if "attn" in name}
    save_lora(folder / "safety.safetensors", layers, rank=2, seed=5)
    return SafetyLora(read_lora(folder / "safety.safetensors"), 1.0)


def train(options: TaskOptions, watch=None, safety=(), host_model=None) -> dict[str, torch.Tensor]:
    trained = train_task(host_model or ToyHostModel(), options, watch or Silent(), safety, engine="test")
    assert "a note" in trained.report
    return load_file(Path(options.output_dir) / f"{options.output_name}.safetensors")


def same(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer_type": "Adafactor", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0},
        {"network_dropout": 0.3, "gradient_accumulation_steps": 2, "min_snr_gamma": 5.0, "noise_offset": 0.05},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"dora_wd": True, "network_dropout": 0.3},  # previews between leave the dropout on
        {"algo": "lokr", "gradient_checkpointing": True},
        {"mixed_precision": "fp16"},
        {"optimizer_type": "Lion", "lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
        {"optimizer_type": "CAME", "lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 5},
        {
            "optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5,
            "mixed_precision": "bf16",
        },
        {
            "ema_decay": 0.9, "loss_type": "huber", "multires_noise_iterations": 4, "validation_split": 0.3,
            "network_dropout": 0.3, "mixed_precision": "bf16",
        },
    ],
)  # fmt: skip
def test_twenty_steps_are_ten_and_ten_more_bit_for_bit(changes, options, tmp_path):
    if (kind := changes.get("optimizer_type")) in ELSEWHERE:
        pytest.importorskip(ELSEWHERE[kind][0], reason=f"{ELSEWHERE[kind][1]} is not installed: an optional optimizer")
    options = replace(options, **changes)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.mixed_precision]
    host_model = lambda: ToyHostModel(dtype)  # noqa: E731
    whole = train(options, host_model=host_model())
    first = replace(options, output_dir=str(tmp_path / "first"), save_every_n_steps=10)
    with pytest.raises(KeyboardInterrupt):
        train(first, Silent(stop_at=10), host_model=host_model())
    state = tmp_path / "first" / "lora-step00000010-state"
    assert state.is_dir()
    torch.manual_seed(999)  # whatever happens in between
    assert same(whole, train(replace(first, resume=str(state), sample_every_n_steps=3), host_model=host_model()))


def test_another_run_is_not_gone_on_from(options, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(options, Silent(stop_at=4))
    state = str(next(Path(options.output_dir).glob("*-state")))
    with refuses("resume.changed", "learning_rate", "'0.01'", "'0.5'"):
        train(replace(options, resume=state, learning_rate=0.5))
    with refuses("resume.no-state"):
        train(replace(options, resume=str(tmp_path)))


def test_a_state_from_before_an_option_was_made_at_its_default(options):
    options = replace(options, max_train_steps=6)
    whole = train(options)
    with pytest.raises(KeyboardInterrupt):
        train(options, Silent(stop_at=4))
    folder = next(Path(options.output_dir).glob("*-state"))
    description = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for name in ("loss_type", "algo", "ema_decay", "timestep_density"):
        del description[name]
    (folder / "state.json").write_text(json.dumps(description), encoding="utf-8")
    tensors = torch.load(folder / "state.pt", weights_only=True)
    del tensors["validation"]
    torch.save(tensors, folder / "state.pt")
    options = replace(options, resume=str(folder))
    with refuses("resume.changed", "loss_type", "'l2'", "'l1'"):
        train(replace(options, loss_type="l1"))
    assert same(whole, train(options))


def test_layers_that_are_zero_as_saved_are_counted_on_the_report(options):
    options = replace(options, max_train_steps=1, target="conv", network_reg_lrs=(".*attn.*=1e-12",))
    options = replace(options, save_precision="fp16")
    trained = train_task(ToyHostModel(), options, Silent(), engine="test")
    names = ToyHostModel().unet_names.values()
    still = [name for name in names if "attn" in name]
    assert 0 < len(still) < len(names)
    assert not any(name in trained.lora.layers for name in still)
    assert f"{len(still)} of {len(names)} layers are zero as saved" in trained.report


def test_the_safety_lora_is_in_nothing_that_trains(options, tmp_path, monkeypatch):
    from modular_lora_guard.training import loop

    seen = []
    make = loop.make_optimizer
    monkeypatch.setattr(loop, "make_optimizer", lambda groups, o: seen.append(groups) or make(groups, o))
    safety = safety_lora(tmp_path)
    without = train(options)
    with_it = train(replace(options, sample_every_n_steps=5), safety=[safety])
    assert same(without, with_it)
    ours = {t.data_ptr() for layer in safety.lora.layers.values() for t in (layer.down, layer.up)}
    assert not any(t.requires_grad for layer in safety.lora.layers.values() for t in (layer.down, layer.up))
    trained = {p.data_ptr() for groups in seen for group in groups for p in group["params"]}
    assert trained
    assert not ours & trained
    metadata = read_lora(Path(options.output_dir) / "lora.safetensors").metadata
    assert metadata["modular_lora.safety_sha256"] == safety.lora.sha256


@pytest.mark.parametrize(
    ("changes", "released"),
    [
        ({}, True),
        ({"shuffle_caption": True}, False),
        ({"caption_dropout_rate": 0.5}, False),
        ({"sample_every_n_steps": 1}, None),
    ],
)
def test_what_no_step_asks_for_again_is_let_go_of(changes, released, options):
    host_model = ToyHostModel()
    train(replace(options, max_train_steps=2, **changes), host_model=host_model)
    assert getattr(host_model, "released", None) is released


def test_a_projected_lora_answers_nothing_to_the_safety_loras_inputs(options, tmp_path):
    safety = safety_lora(tmp_path)
    plain = train(options)
    made = train(replace(options, project=True), safety=[safety])
    shared = [name for name in safety.lora.layers if f"{name}.lora_down.weight" in made]
    assert len(shared) == 8
    for name in shared:
        rows = safety.lora.layers[name].down.flatten(1)
        down = made[f"{name}.lora_down.weight"].flatten(1)
        loose = plain[f"{name}.lora_down.weight"].flatten(1)
        assert (down @ rows.T).norm() < 1e-5 * down.norm() * rows.norm()
        assert (loose @ rows.T).norm() > 1e-2 * loose.norm() * rows.norm()
    with refuses("option.project"):
        train(replace(options, project=True))


def test_a_loss_that_is_not_finite_stops_before_it_is_learnt_from(options, tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    losses = lambda step, micro: weight.sum() * (float("nan") if step == 3 else 1.0)  # noqa: E731
    job = Job([([weight], 0.1)], losses, lambda *_: None, {})
    with refuses("train.loss-not-finite", "nan", "step 4"):
        fit(job, options, torch.device("cpu"), Silent())
    assert torch.isfinite(weight).all()
    (state,) = Path(options.output_dir).glob("*-state")
    assert state.name == "lora-step00000003-state"
    values, _ = load_state(state, {})
    assert torch.equal(values["values"][0], weight.detach())
    assert len(values["losses"]) == 3


def test_losses_are_logged_where_the_library_is_there(options):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: optional logs")
    train(replace(options, max_train_steps=2, log_with="tensorboard"))
    assert list((Path(options.output_dir) / "logs" / "lora").glob("events.out.tfevents.*"))
    if importlib.util.find_spec("wandb") is None:
        with refuses("option.log-with", "wandb"):
            train(replace(options, log_with="wandb"))


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"optimizer_args": ("weight_decay",)}, "option.optimizer-args", ("weight_decay",)),
        ({"optimizer_args": ("no_such=1",)}, "option.optimizer-args", ("no_such",)),
        ({"train_data_dir": ""}, "option.data-set", ("train_data_dir", "dataset_config")),
        ({"network_weights": "SAFETY"}, "start.safety-lora", ()),
        ({"network_weights": "TASK", "network_dim": 2}, "train.other-rank", ("network_dim", "network_alpha")),
        ({"network_weights": "TASK", "target": "attention"}, "train.other-layers", ("2 layers",)),
    ],
)
def test_what_cannot_be_trained_is_said_with_its_remedy(changes, code, named, options, tmp_path):
    safety = safety_lora(tmp_path)
    train(replace(options, max_train_steps=1, output_name="task"))
    files = {"SAFETY": safety.lora.path, "TASK": Path(options.output_dir) / "task.safetensors"}
    if "network_weights" in changes:
        changes = changes | {"network_weights": str(files[changes["network_weights"]])}
    with refuses(code, *named):
        train(replace(options, **changes), safety=[safety])


KILLED = """
import sys
sys.path[:0] = {paths!r}
import conftest, pathlib
from support.toys import Silent, ToyHostModel
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.task.train import train_task
train_task(ToyHostModel(), TaskOptions(**{values!r}), Silent(), engine="test")
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
@pytest.mark.slow
def test_a_killed_training_leaves_whole_files_to_go_on_from(options, tmp_path):
    out = tmp_path / "killed"
    killed = replace(options, output_dir=str(out), save_every_n_steps=1, max_train_steps=100_000)
    script = KILLED.format(paths=[str(ROOT / name) for name in ("importable", "tests")], values=vars(killed))
    child = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600  # a busy machine
    while not list(out.glob("*-step00000003.safetensors")):
        assert child.poll() is None, child.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert all(read_lora(path).layers for path in out.glob("*.safetensors"))
    states = [path for path in out.glob("lora-step*-state") if path.is_dir()]  # not one that it was writing
    step = max(int(path.name[9:17]) for path in states)
    state = str(next(path for path in states if f"{step:08d}" in path.name))
    watch = Silent(stop_at=step + 1)
    with pytest.raises(KeyboardInterrupt):
        train(replace(killed, resume=state), watch)
    assert watch.steps == step + 1


def test_roles_start_from_row_spaces_of_their_own():
    host_model, downs = ToyHostModel(), {}
    names = select(host_model.unet_names, "linear")
    for role in ("task", "safety"):
        with adapted(host_model.unet, host_model.text_encoder, Spec(names, {}, 2, 2.0, 0.0, 42, role)) as adapters:
            downs[role] = {n: p.detach().clone() for n, p in adapters.downs().items()}
    for name, down in downs["task"].items():
        assert not torch.allclose(down, downs["safety"][name])
    assert role_seed(42, "task") != role_seed(42, "safety")


def test_the_network_is_the_very_one_it_was_and_bit_identical_with_adapters_off():
    host_model = ToyHostModel()
    before = dict(host_model.unet.named_modules())
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), host_model.encode(["a", "b"])
    plain = host_model.predict(x, t, cond)
    with adapted(
        host_model.unet, host_model.text_encoder, Spec(host_model.unet_names, {}, 2, 2.0, 0.0, 1, "task")
    ) as adapters:
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.add_(0.1)
        assert not torch.equal(host_model.predict(x, t, cond), plain)
        with adapters.off():
            assert torch.equal(host_model.predict(x, t, cond), plain)
        assert not torch.equal(host_model.predict(x, t, cond), plain)
    after = dict(host_model.unet.named_modules())
    assert list(before) == list(after)
    assert all(before[path] is after[path] for path in before)
    assert vars(host_model.unet).keys() == vars(ToyHostModel().unet).keys()
    assert torch.equal(host_model.predict(x, t, cond), plain)


def test_targets_are_sd_scripts_own():
    names = ToyHostModel().unet_names
    counts = {target: len(select(names, target)) for target in ("cross-attention", "attention", "linear", "conv")}
    assert counts == {"cross-attention": 4, "attention": 8, "linear": 10, "conv": 12}


@given(st.integers(0, 999), st.floats(0.5, 20))
@settings(max_examples=50, deadline=None)
def test_min_snr_weights_never_count_more_than_one(t, gamma):
    at, schedules = torch.tensor([t]), [ToyHostModel(prediction=kind).schedule for kind in ("epsilon", "v_prediction")]
    snr = schedules[0].snr(at).item()
    epsilon, v = (schedule.min_snr(at, gamma).item() for schedule in schedules)
    assert epsilon == pytest.approx(min(snr, gamma) / snr, rel=1e-4)
    assert epsilon <= 1 + 1e-6
    assert v == pytest.approx(min(snr, gamma) / (snr + 1), rel=1e-4)
    assert schedules[0].min_snr(at, 0.0).item() == 1


def test_every_step_has_noise_of_its_own():
    draws = {
        torch.randn(3, generator=step_generator(1, "noise", s, m)).sum().item() for s in range(5) for m in range(3)
    }
    assert len(draws) == 15
