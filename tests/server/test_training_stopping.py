"""However a training ends, the state of its last step is kept: signals, errors, the end of the process, its own end."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.training.loop import Job, fit, state_folder
from modular_lora_guard.training.options import TaskOptions, fingerprint
from modular_lora_guard.training.state import load_state
from support.errors import refuses
from support.toys import Silent
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
POSIX = pytest.mark.skipif(os.name == "nt", reason="os.kill ends a process on Windows, it sends no signal")


@pytest.fixture
def options(tmp_path) -> TaskOptions:
    return TaskOptions(output_dir=str(tmp_path / "out"), max_train_steps=20, learning_rate=0.1)


class Toy:
    """Three weights pulled to zero; ``events`` (step -> what is done in the middle of that step's loss)."""

    def __init__(self, options: TaskOptions, **events):
        self.weight, self.options, self.events = nn.Parameter(torch.ones(3)), options, events
        self.rates: list[float] = []
        self.written = 0

    def job(self) -> Job:
        return Job(
            groups=[([self.weight], self.options.learning_rate)],
            loss=self.loss,
            write=self.write,
            fingerprint=fingerprint(self.options),
        )

    def loss(self, step: int, micro: int) -> torch.Tensor:
        loss = (self.weight * (step + 1)).square().sum()
        self.events.get(f"at_{step}", lambda: None)()
        return loss

    def write(self, path: Path, step: int, masters) -> None:
        self.written = step

    def fit(self) -> list[float]:
        return fit(self.job(), self.options, CPU, Silent())


def states(options: TaskOptions) -> list[str]:
    return sorted(path.name for path in Path(options.output_dir).glob("*-state"))


def sends(*numbers: int):
    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # until the handler ran

    return send


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(number, options):
    handlers = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        Toy(options, at_4=sends(number)).fit()
    assert states(options) == ["lora-step00000005-state"]
    assert signal.getsignal(number) is handlers
    whole, resumed = Toy(options), Toy(replace(options, resume=str(state_folder(options, 5))))
    assert resumed.fit() == whole.fit()
    assert torch.equal(resumed.weight, whole.weight)


@POSIX
def test_a_second_signal_ends_the_step_at_once_and_keeps_the_one_before(options):
    after = []
    with pytest.raises(KeyboardInterrupt):
        Toy(options, at_4=lambda: (sends(signal.SIGINT, signal.SIGINT)(), after.append(1))).fit()
    assert after == []
    assert states(options) == ["lora-step00000004-state"]


@POSIX
def test_a_signal_in_the_first_step_loses_nothing_either(options):
    with pytest.raises(KeyboardInterrupt):
        Toy(options, at_0=sends(signal.SIGINT)).fit()
    assert states(options) == ["lora-step00000001-state"]


@POSIX
def test_signals_that_were_ignored_stay_ignored(options):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(Toy(options, at_4=sends(signal.SIGINT)).fit()) == 20
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_in_a_step_keeps_the_state_of_the_one_before(options, caplog):
    def fail():
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        Toy(options, at_7=fail).fit()
    assert states(options) == ["lora-step00000007-state"]
    assert str(state_folder(options, 7)) in caplog.text


def test_a_state_that_cannot_be_kept_is_said_and_the_error_is_the_first_one(options, caplog, tmp_path):
    (tmp_path / "out").write_text("no folder")

    def fail():
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        Toy(options, at_7=fail).fit()
    assert "the state of step 7 could not be kept" in caplog.text


def test_a_finished_training_is_gone_on_with(options):
    first = Toy(options)
    losses = first.fit()
    assert states(options) == ["lora-step00000020-state"]
    more = Toy(replace(options, max_train_steps=30, resume=str(state_folder(options, 20))))
    job = more.job()
    longer = fit(job, more.options, CPU, Silent())
    assert (longer[:20], len(longer), more.written) == (losses, 30, 30)
    assert more.weight.norm() < first.weight.norm()
    assert "gone on from step 20 of 20, to 30" in job.notes[0]
    state, steps = load_state(state_folder(options, 30), fingerprint(options))
    assert steps == "30"
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)  # the cosine of 30 steps ends


def test_the_first_further_step_has_the_longer_schedules_rate(options, monkeypatch):
    from modular_lora_guard.training import loop

    Toy(options).fit()
    rates, make = [], loop.make_optimizer

    def recording(groups, made):
        optimizer = make(groups, made)
        optimizer.register_step_pre_hook(lambda it, args, kwargs: rates.append(it.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", recording)
    Toy(replace(options, max_train_steps=30, resume=str(state_folder(options, 20)))).fit()
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * n / 30)) / 2 for n in range(20, 30)])


def test_a_finished_training_without_further_steps_says_so(options):
    Toy(options).fit()
    again = Toy(replace(options, resume=str(state_folder(options, 20))))
    job = again.job()
    fit(job, again.options, CPU, Silent())
    assert again.written == 20
    assert "NO further step was trained" in job.notes[0]
    with refuses("resume.past-end", "20", "10"):
        Toy(replace(again.options, max_train_steps=10)).fit()


ENDING = """
import sys, threading, time
sys.path[:0] = {paths!r}
import conftest, pathlib
import test_training_stopping as t
from modular_lora_guard.training.options import TaskOptions
begun = threading.Event()
toy = t.Toy(TaskOptions(**{values!r}), at_4=lambda: (begun.set(), time.sleep(1)))
threading.Thread(target=toy.fit, daemon=True).start()
begun.wait()
"""


@pytest.mark.slow
def test_the_end_of_the_hosts_process_waits_for_the_step_in_another_thread(options, tmp_path):
    """ComfyUI trains in a daemon thread; Ctrl+C ends its main thread."""
    script = ENDING.format(
        paths=[str(ROOT / name) for name in ("importable", "tests", "tests/server")], values=vars(options)
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL, timeout=600)
    assert states(options) == ["lora-step00000005-state"]


UNWOUND = """
import sys, threading, time
sys.path[:0] = {paths!r}
import conftest, pathlib, torch
import test_training_stopping as t
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.stopping import unwound
begun, asked = threading.Event(), threading.Event()

def trained():
    if {trains!r}:
        t.Toy(TaskOptions(**{values!r}), at_4=lambda: (begun.set(), time.sleep(1))).fit()
    else:  # still getting ready: only what is asked ends it
        begun.set()
        assert asked.wait(300)

def run():
    with unwound(asked.set):
        try:
            trained()
        finally:
            time.sleep(1)
            pathlib.Path({mark!r}).write_text("put back")
    while True:  # beside the interpreter's end this ends in an abort, soon or late
        torch.ones(100_000).square().sum()

threading.Thread(target=run, daemon=True).start()
begun.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False], ids=["in a step", "before the first step"])
def test_the_end_of_the_hosts_process_waits_until_everything_is_put_back(trains, options, tmp_path):
    """And the thread does nothing more, which PyTorch would answer with an abort of the process."""
    mark = tmp_path / "mark"
    paths = [str(ROOT / name) for name in ("importable", "tests", "tests/server")]
    script = UNWOUND.format(paths=paths, values=vars(options), mark=str(mark), trains=trains)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    assert mark.read_text() == "put back"
    assert states(options) == (["lora-step00000005-state"] if trains else [])


def test_in_another_thread_no_handler_is_touched(options):
    before, found = signal.getsignal(signal.SIGINT), []
    toy = Toy(options, at_3=lambda: found.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=toy.fit)
    thread.start()
    thread.join()
    assert found == [before]
    assert toy.written == 20


@POSIX
@pytest.mark.slow
def test_the_command_keeps_a_state_goes_on_and_goes_further(comfy, tmp_path):
    """The real ComfyUI in a real process, without --cpu: a machine without a GPU is found out."""
    pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")
    world = ROOT / "tools" / "world" / "assets"
    command = [sys.executable, "-m", "training", "train-task", "--checkpoint"]
    command += [str(Path(os.environ["MODULAR_LORA_WORLD"]) / "demo_world_sd15.safetensors")]
    images = sorted((world / "gloss" / "10_gloss").glob("*.png"))[:8]
    folder = tmp_path / "pictures" / "10_gloss"
    folder.mkdir(parents=True)
    for image in images:
        shutil.copy(image, folder)
        shutil.copy(image.with_suffix(".txt"), folder)
    values = {"train_data_dir": tmp_path / "pictures", "resolution": 64, "network_dim": 4, "max_train_steps": 3000}
    values |= {"output_dir": tmp_path, "output_name": "made", "target": "cross-attention"}

    def words(**changes) -> list[str]:
        return command + [str(part) for name, value in (values | changes).items() for part in (f"--{name}", value)]

    log = tmp_path / "log"
    with log.open("wb") as file:
        child = subprocess.Popen(words(), cwd=ROOT, stdout=file, stderr=file)
    while b"step 10 of 3000" not in log.read_bytes():
        assert child.poll() is None, log.read_text()[-2000:]
        time.sleep(0.05)
    assert log.read_bytes().index(b"8 images") < log.read_bytes().index(b"step 10 of")
    child.send_signal(signal.SIGINT)
    assert child.wait() == 130
    (state,) = tmp_path.glob("made-step*-state")
    assert f"resume from {state}" in log.read_text()
    assert "Traceback" not in log.read_text()
    steps = int(state.name.split("step")[1][:8])
    more = words(resume=state, max_train_steps=steps + 2)
    done = subprocess.run(more, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"gone on from step {steps} of 3000, to {steps + 2}" in done.stdout
    assert read_lora(tmp_path / "made.safetensors").metadata["ss_steps"] == str(steps + 2)


@POSIX
@pytest.mark.server
@pytest.mark.slow
def test_the_stop_button_and_the_end_of_a_real_server_keep_a_state(tmp_path):
    """Over HTTP: a training is stopped by /interrupt, gone on with, and then the server gets Ctrl+C."""
    from modular_lora_guard.tools.demo import base
    from modular_lora_guard.tools.demo.client import Client
    from modular_lora_guard.tools.demo.server import Server
    from modular_lora_guard.tools.demo.settings import DemoWorld

    comfyui, world = os.environ.get("MODULAR_LORA_COMFYUI"), os.environ.get("MODULAR_LORA_WORLD")
    if not comfyui or not world:
        pytest.skip("MODULAR_LORA_COMFYUI and MODULAR_LORA_WORLD are not set: run the tests with `python3 run.py test`")
    demo, folder = DemoWorld.at(Path(world)), tmp_path / "base"
    base.prepare(folder, checkpoint=demo.checkpoint, loras=demo.loras, safety=demo.safety)
    place = folder / "output" / "modular_lora" / "long"

    def last() -> int:
        return max([int(path.name.split("step")[1][:8]) for path in place.glob("long-step*-state")], default=0)

    def wait_for(condition) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            server.check()
            assert time.monotonic() < deadline, server.log.read_text()[-2000:]
            time.sleep(0.1)

    with Server(Path(comfyui), sys.executable, folder, log=tmp_path / "log", cpu=True) as server:
        client = Client(server.url)
        asked = client.get_json("/object_info/ModularLoraTrainTask")["ModularLoraTrainTask"]["input"]
        values = {k: v[-1]["default"] for part in asked.values() for k, v in part.items() if "default" in v[-1]}
        values |= {"data_set": "gloss", "output_name": "long", "max_train_steps": 5000, "resolution": 64}
        values |= {"sample_every_n_steps": 1, "sample_prompts": "gloss, cat", "network_dim": 4}
        values |= {"more_options": "sample_size = 64\nsample_steps = 1", "target": "cross-attention"}
        values |= {"model": ["ckpt", 0], "clip": ["ckpt", 1], "vae": ["ckpt", 2]}
        graph = {
            "ckpt": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": demo.checkpoint.name}},
            "train": {"class_type": "ModularLoraTrainTask", "inputs": values},
        }
        client.submit(graph)
        wait_for(lambda: len(list((place / "sample").glob("*.png"))) >= 3)
        client.interrupt()
        wait_for(last)
        stopped = last()
        assert stopped >= 3
        assert list(place.glob("*.safetensors")) == []
        values["resume"] = True
        client.submit(graph)
        wait_for(lambda: (place / "sample" / f"long_{stopped + 2:06d}_00.png").exists())
        server._child.send_signal(signal.SIGINT)
        server.wait()
    assert last() >= stopped + 2
    assert [path.name for path in place.glob(".part-*")] == []
