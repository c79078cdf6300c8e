"""The sd-scripts engine's launcher: real child processes of the stand-in checkout, their progress and their end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.files.reader import read_lora, sha256_file
from modular_lora_guard.modular_lora.guard.build import SafetyLora
from modular_lora_guard.modular_lora.util import atomic
from modular_lora_guard.training.kohya import checkout as kohya_checkout
from modular_lora_guard.training.kohya import engine as kohya
from modular_lora_guard.training.kohya import process as kohya_process
from PIL import Image
from safetensors.torch import save_file
from support.errors import refuses
from support.kohya_toys import STUB, Interrupted, Seen, safety_options, task_options

ROOT = Path(__file__).resolve().parents[3]
pytest.importorskip("accelerate", reason="sd-scripts runs on accelerate, which comes with peft")


@pytest.fixture
def engine():
    return kohya_checkout.find_engine(str(STUB), sys.executable)


def base(place: Path, **changes) -> kohya.Base:
    return kohya.Base(place / "base.safetensors", "SD15", **changes)


@pytest.fixture
def direct(monkeypatch):
    """Without accelerate between: two seconds less for what does not depend on it."""
    launch = kohya._launch
    monkeypatch.setattr(kohya, "_launch", lambda *args: [launch(*args)[0], launch(*args)[-1]])


@pytest.mark.slow
def test_a_task_lora_by_way_of_accelerate(place, engine, tmp_path):
    seen, safety = Seen(), [SafetyLora(read_lora(place / "safety.safetensors"), 0.7)]
    options = task_options(
        place,
        tmp_path,
        project=True,
        sample_every_n_steps=2,
        sample_prompts=("a cat",),
        save_every_n_steps=2,
        network_train_text_encoder=True,
        no_dataset_metadata=True,
    )
    result = kohya.train_task(engine, options, base(place, sha256="ab"), seen, safety)
    assert result.argv[1:3] == ("-m", "accelerate.commands.launch")
    assert seen.steps == [(step, 4, step) for step in (1, 2, 3, 4)]
    assert len(set(seen.losses)) == 4
    assert tuple(seen.losses) == result.losses
    assert any(text == "caching" for text, _, _ in seen.stages)
    assert [path.name for path in seen.samples] == ["mine_000002_00_42.png", "mine_000004_00_42.png"]
    assert result.previews == tuple(seen.samples)
    assert result.norm > 0
    assert result.lora.path == tmp_path / "mine.safetensors"
    assert len(result.lora.layers) == 24
    for text in ("24 layers", f"modular_lora.safety_sha256: {safety[0].lora.sha256}", "residual", "1 image"):
        assert text in result.report
    found = result.lora.metadata
    assert found["modular_lora.role"] == "task"
    assert found["modular_lora.base_sha256"] == "ab"
    assert found["modular_lora.safety_sha256"] == safety[0].lora.sha256
    assert found["ss_new_sd_model_hash"] == sha256_file(place / "base.safetensors")
    assert float(found["modular_lora.projected"].removeprefix("residual ")) < 1e-3
    assert len(found["modular_lora.dataset_sha256"]) == 64
    assert "secret" not in json.dumps(found)
    assert str(place) not in json.dumps(found)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "mine-step00000002.safetensors",
        "mine-step00000004.safetensors",
        "mine.safetensors",
    ]
    assert json.loads((tmp_path / "mine-step00000002-state" / "modular_lora.json").read_text())["role"] == "task"


@pytest.mark.slow
def test_a_safety_lora_by_leco(place, engine, tmp_path, direct):
    seen = Seen()
    result = kohya.train_safety(engine, safety_options(tmp_path, target="cross-attention"), base(place), seen)
    assert [step for step, _, _ in seen.steps] == [1, 2, 3, 4]
    assert all("_attn2_" in name for name in result.lora.layers)
    found = result.lora.metadata
    assert (found["modular_lora.role"], found["modular_lora.concept"]) == ("safety", 'a "thing"')
    assert found["modular_lora.initialisation"] == "safety:42"
    assert (found["ss_base_model_version"], found["ss_leco_prompt_count"]) == ("sd_v1", "2")
    assert list(tmp_path.iterdir()) == [tmp_path / "erased.safetensors"]


@pytest.mark.slow
def test_an_interrupt_ends_every_process_and_leaves_no_file(place, engine, tmp_path):
    seen, before = Seen(stop=1), set(psutil.Process().children(recursive=True))
    with pytest.raises(Interrupted):
        kohya.train_task(engine, task_options(place, tmp_path), base(place), seen, extra=("--stub_sleep", "60"))
    family = set(seen.children) - before
    assert len(family) >= 2  # accelerate and the script
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    assert list(tmp_path.iterdir()) == []


class Once(Seen):
    """Interrupts once, as ComfyUI's button does."""

    def check(self):
        if len(self.steps) >= self.stop:
            self.stop = 10**9
            raise Interrupted


@pytest.mark.slow
def test_an_interrupt_keeps_the_state_of_the_last_step(place, engine, tmp_path):
    seen, options = Once(stop=2), task_options(place, tmp_path, max_train_steps=6)
    with pytest.raises(Interrupted):
        kohya.train_task(engine, options, base(place), seen, extra=("--stub_sleep", "0.5"))
    (state,) = tmp_path.iterdir()
    steps = len(seen.steps)
    assert 2 <= steps < 6
    assert state.name == f"mine-step{steps:08d}-state"
    assert json.loads((state / "train_state.json").read_text())["current_step"] == steps
    assert json.loads((state / "modular_lora.json").read_text())["role"] == "task"
    again = Seen()
    result = kohya.train_task(engine, dataclasses.replace(options, resume=str(state)), base(place), again)
    assert again.steps[-1] == (6 - steps, 6 - steps, 6 - steps)  # sd-scripts counts what is left
    assert result.norm > 0


@pytest.mark.slow
def test_a_finished_training_is_gone_on_with(place, engine, tmp_path, direct):
    options = task_options(place, tmp_path, max_train_steps=2)
    kohya.train_task(engine, options, base(place), Seen())
    more = dataclasses.replace(options, max_train_steps=3, resume=str(tmp_path / "mine-state"))
    seen = Seen()
    kohya.train_task(engine, more, base(place), seen)
    assert seen.steps == [(1, 1, 1)]


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM is POSIX")
@pytest.mark.slow
def test_sigterm_leaves_a_state_and_no_process(place, tmp_path):
    """The command itself, ended as a service is ended."""
    command = [sys.executable, "-m", "training", "train-task", "--engine", "kohya", "--sd_scripts", str(STUB)]
    command += ["--sd_scripts_python", sys.executable, "--checkpoint", str(place / "base.safetensors")]
    values = {"output_dir": tmp_path, "output_name": "mine", "train_data_dir": place / "pictures", "network_dim": 3}
    values |= {"max_train_steps": 600, "resolution": 64, "stub_sleep": 0.2}
    command += [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    while b"step 10 of 600" not in log.read_bytes():
        assert child.poll() is None, log.read_text()[-2000:]
        time.sleep(0.05)
    family = psutil.Process(child.pid).children(recursive=True)
    assert family
    child.terminate()
    assert child.wait() == 130
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    (state,) = tmp_path.glob("mine-step*-state")
    assert json.loads((state / "train_state.json").read_text())["current_step"] >= 10
    assert f"resume from {state}" in log.read_text()


@pytest.mark.slow
def test_a_script_that_fails_says_its_last_words(place, engine, tmp_path):
    with refuses("kohya.failed", "exit code 1", "stub failure at step 2: the device is on fire"):
        kohya.train_task(engine, task_options(place, tmp_path), base(place), Seen(), extra=("--stub_fail_at", "2"))


@pytest.mark.slow
def test_what_a_killed_process_left_half_written_goes(place, engine, tmp_path):
    mine, other = (atomic.temporary(tmp_path, f"-{name}.safetensors") for name in ("mine-step00000001", "other"))
    mine.write_bytes(b"half"), other.write_bytes(b"half")
    with refuses("kohya.failed", "the device is on fire"):
        kohya.train_task(engine, task_options(place, tmp_path), base(place), Seen(), extra=("--stub_fail_at", "2"))
    assert (mine.exists(), other.exists()) == (False, True)


@pytest.mark.slow
def test_the_guards_own_refusal_comes_through_as_one_line(place, engine, tmp_path, direct):
    safety = [SafetyLora(read_lora(place / "lost.safetensors"), 1.0)]
    with refuses("kohya.failed", "lost.safetensors", "1 of 1"):
        kohya.train_task(engine, task_options(place, tmp_path), base(place), Seen(), safety)


@pytest.mark.slow
def test_a_truncated_file_is_no_result(place, engine, tmp_path, direct):
    with refuses("file.tensor", "mine.safetensors"):
        kohya.train_task(engine, task_options(place, tmp_path), base(place), Seen(), extra=("--stub_truncate",))


def test_a_file_of_an_earlier_run_is_no_result(place):
    path = place / "safety.safetensors"
    with refuses("kohya.no-file", "safety.safetensors"):
        kohya._check(path, kohya.find_file_state(path))
    with refuses("kohya.no-file", "none.safetensors"):
        kohya._check(place / "none.safetensors", None)


def test_layers_are_counted(place, tmp_path):
    path = tmp_path / "mine.safetensors"
    whole = read_lora(place / "safety.safetensors")
    tensors = {f"{n}.lora_{k}.weight": t for n, x in whole.layers.items() for k, t in (("down", x.down), ("up", x.up))}
    save_file(tensors, path, {"modular_lora.layers": "2"})
    with refuses("kohya.other-layers", "1 layers", "2 "):
        kohya._check(path, None)
    save_file(tensors, path, {"modular_lora.layers": "1"})
    lora, size = kohya._check(path, None)
    layer = next(iter(lora.layers.values()))
    assert math.isclose(size, float((layer.up @ layer.down).norm()), rel_tol=1e-4)


def test_bars_become_steps_with_their_own_loss():
    progress, seen = kohya_process.Progress(), Seen()
    bar = "steps:  {p}%|██▌       | {n}/4 [00:04<00:12,  4.15s/it{loss}]"
    for p, n, loss in [
        (0, 0, ""),
        (25, 1, ""),
        (25, 1, ", avr_loss=0.5"),
        (50, 2, ", avr_loss=0.5"),  # drawn by update(), before its own loss is set
        (50, 2, ", avr_loss=0.25"),
        (75, 3, ", avr_loss=nan"),
        (100, 4, ", avr_loss=nan"),
    ]:
        progress.read(bar.format(p=p, n=n, loss=loss), seen)
    progress.read("  50%|█████     | 5/10 [00:00<00:00]", seen)
    progress.read("RuntimeError: out of memory", seen)
    progress.flush(seen)
    assert seen.steps == [(1, 4, 1), (2, 4, 2), (3, 4, 3), (4, 4, 4)]
    assert progress.losses[:2] == [0.5, 0.25]
    assert all(map(math.isnan, progress.losses[2:]))
    assert seen.stages == [("preparing", 5, 10)]
    assert list(progress.tail) == ["RuntimeError: out of memory"]


@given(st.lists(st.text(alphabet="steps: 0123456789%|/[]<,.avr_los=enif█\t", max_size=80), max_size=8))
def test_no_line_stops_the_reader(lines):
    progress, seen = kohya_process.Progress(), Seen()
    for line in lines:
        progress.read(line, seen)
    progress.flush(seen)
    assert all(step == count for step, _, count in seen.steps)


@pytest.mark.slow
def test_a_real_checkout_trains_a_task_lora(tmp_path):
    """Two steps of a full-width SD1.5 checkpoint, with projection and a preview: minutes, and 7 GB."""
    names = ("SD_SCRIPTS_PATH", "MODULAR_LORA_FULL_CHECKPOINT", "MODULAR_LORA_COMFYUI")
    checkout, checkpoint, comfyui = map(os.environ.get, names)
    if not (checkout and checkpoint and comfyui):
        pytest.skip(f"{', '.join(names[:2])} are not set: a real checkout and a full SD1.5 checkpoint are needed")
    images = tmp_path / "pictures" / "1_thing"
    images.mkdir(parents=True)
    Image.new("RGB", (256, 256), "red").save(images / "a.png")
    (images / "a.txt").write_text("a thing", encoding="utf-8")
    options = task_options(
        tmp_path,
        tmp_path,
        resolution=256,
        max_train_steps=2,
        sample_every_n_steps=2,
        sample_prompts=("a",),
        sample_size=64,
    )
    where = kohya.Base(Path(checkpoint), "SD15", tokenizer=f"{comfyui}/comfy/sd1_tokenizer")
    seen = Seen()
    result = kohya.train_task(kohya_checkout.find_engine(), options, where, seen)
    assert len(result.lora.layers) == 192
    assert [step for step, _, _ in seen.steps] == [1, 2]
    assert len(seen.samples) == 1
