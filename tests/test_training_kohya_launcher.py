"""The sd-scripts engine's launcher: arguments, checkout, and real child processes of the stand-in checkout."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.modular_lora.files import read_lora, sha256_file
from modular_lora_guard.modular_lora.guard import SafetyLora
from modular_lora_guard.training import kohya, kohya_arguments, kohya_checkout, kohya_process
from modular_lora_guard.training.options import OptionError, SafetyOptions, TaskOptions, tomllib
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("accelerate", reason="sd-scripts runs on accelerate, which comes with peft")
STUB = Path(__file__).parent / "sd_scripts_stub"


class Interrupted(Exception):
    pass


class Seen:
    """A host that remembers what it was told, and stops after ``stop`` steps."""

    def __init__(self, stop: int = 10**9):
        self.stop, self.stages, self.steps, self.samples, self.children = stop, [], [], [], []

    def check(self):
        if len(self.steps) >= self.stop:
            self.children = psutil.Process().children(recursive=True)
            raise Interrupted

    def stage(self, text, done, total):
        self.stages.append((text, done, total))

    def step(self, step, total, losses):
        self.steps.append((step, total, len(losses)))
        self.losses = losses

    def sample(self, step, pictures):
        self.samples += pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint of the stand-in, a safety LoRA, pictures."""
    folder = tmp_path_factory.mktemp("kohya")
    spec = importlib.util.spec_from_file_location("stub_models", STUB / "library" / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    save_file(models.random_weights(0), folder / "base.safetensors")
    name, generator = "lora_unet_attentions_0_transformer_blocks_0_attn2_to_k", torch.Generator().manual_seed(3)
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 10, generator=generator)}
    tensors |= {f"{name}.lora_up.weight": torch.randn(12, 2, generator=generator), f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, folder / "safety.safetensors", {"modular_lora.role": "safety"})
    lost = {key.replace("to_k", "to_x"): value for key, value in tensors.items()}
    save_file(lost, folder / "lost.safetensors")
    pictures = folder / "pictures" / "2_thing"
    pictures.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(pictures / "a.png")
    (pictures / "a.txt").write_text("a thing", encoding="utf-8")
    return folder


@pytest.fixture
def engine():
    return kohya_checkout.find_engine(str(STUB), sys.executable)


def base(place: Path, **changes) -> kohya.Base:
    return kohya.Base(place / "base.safetensors", "SD15", **changes)


def task_options(place: Path, output: Path, **changes) -> TaskOptions:
    fixed = {"output_name": "mine", "output_dir": str(output), "train_data_dir": str(place / "pictures")}
    fixed |= {"network_dim": 3, "network_alpha": 2.0, "max_train_steps": 4, "resolution": 64, "learning_rate": 0.01}
    return TaskOptions(**(fixed | changes))


def safety_options(output: Path, **changes) -> SafetyOptions:
    fixed = {"output_name": "erased", "output_dir": str(output), "objective": "leco", "concept": ('a "thing"',)}
    fixed |= {"network_dim": 3, "network_alpha": 3.0, "max_train_steps": 4, "preserve": ("a house",)}
    return SafetyOptions(**(fixed | changes))


@pytest.fixture
def direct(monkeypatch):
    """Without accelerate between: two seconds less for what does not depend on it."""
    launch = kohya._launch
    monkeypatch.setattr(kohya, "_launch", lambda *args: [launch(*args)[0], launch(*args)[-1]])


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
    assert "24 layers" in result.report
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


def test_an_interrupt_ends_every_process_and_leaves_no_file(place, engine, tmp_path):
    seen, before = Seen(stop=1), set(psutil.Process().children(recursive=True))
    with pytest.raises(Interrupted):
        kohya.train_task(engine, task_options(place, tmp_path), base(place), seen, extra=("--stub_sleep", "60"))
    family = set(seen.children) - before
    assert len(family) >= 2  # accelerate and the script
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    assert list(tmp_path.iterdir()) == []


def test_a_script_that_fails_says_its_last_words(place, engine, tmp_path):
    with pytest.raises(GuardError, match=r"(?s)exit code 1;.*stub failure at step 2: the device is on fire$"):
        kohya.train_task(engine, task_options(place, tmp_path), base(place), Seen(), extra=("--stub_fail_at", "2"))


def test_the_guards_own_refusal_comes_through_as_one_line(place, engine, tmp_path, direct):
    safety = [SafetyLora(read_lora(place / "lost.safetensors"), 1.0)]
    with pytest.raises(GuardError, match=r"^lost\.safetensors: 1 of 1 layers are not in the model .*kohya's names\.$"):
        kohya.train_task(engine, task_options(place, tmp_path), base(place), Seen(), safety)


def test_a_truncated_file_is_no_result(place, engine, tmp_path, direct):
    with pytest.raises(GuardError, match="damaged"):
        kohya.train_task(engine, task_options(place, tmp_path), base(place), Seen(), extra=("--stub_truncate",))


def test_a_file_of_an_earlier_run_is_no_result(place):
    path = place / "safety.safetensors"
    with pytest.raises(GuardError, match="did not write it"):
        kohya._check(path, kohya._stamp(path))
    with pytest.raises(GuardError, match="did not write it"):
        kohya._check(place / "none.safetensors", None)


def test_layers_are_counted(place, tmp_path):
    path = tmp_path / "mine.safetensors"
    whole = read_lora(place / "safety.safetensors")
    tensors = {f"{n}.lora_{k}.weight": t for n, x in whole.layers.items() for k, t in (("down", x.down), ("up", x.up))}
    save_file(tensors, path, {"modular_lora.layers": "2"})
    with pytest.raises(GuardError, match="holds 1 layers, 2 were trained"):
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


@pytest.mark.parametrize(
    "extra",
    [
        ("--base_weights", "x.safetensors"),
        ("--base_w", "x.safetensors"),
        ("--base_weights=x.safetensors",),
        ("--network_module", "networks.lora"),
        ("--network_modu", "networks.lora"),
        ("--dim_from_weights",),
        ("--no_metadata",),
        ("--save_model_as", "ckpt"),
        ("--network_weights", "x.safetensors"),
        ("--learning_rate", "1"),
        ("--learning_r", "1"),
        ("--network_args", "conv_dim=4", "safety=x.safetensors"),
        ("--network_args", "role=safety"),
    ],
)
def test_arguments_that_contaminate_or_collide_are_refused(place, tmp_path, extra):
    with pytest.raises(OptionError, match=r"^--\w+"):
        argv(task_options(place, tmp_path), extra=extra)


@pytest.mark.parametrize(
    "text", ["base_weights = ['x']", "[network]\nnetwork_module = 'y'", "dim_from_weights = true", "?"]
)
def test_a_config_file_is_looked_through(place, tmp_path, text):
    path = tmp_path / "more.toml"
    path.write_text(text, encoding="utf-8")
    for argument in (("--config_file", str(path)), (f"--config_file={path.with_suffix('')}",)):
        with pytest.raises(OptionError, match=r"more\.toml"):
            argv(task_options(place, tmp_path), extra=argument)
    path.write_text("[other]\nv_pred_like_loss = 1.0", encoding="utf-8")
    assert str(path) in argv(task_options(place, tmp_path), extra=("--config_file", str(path)))


def run_of(**changes) -> kohya_arguments.Run:
    fixed = {"checkpoint": Path("/base.safetensors"), "family": kohya_arguments.FAMILIES["SD15"]}
    return kohya_arguments.Run(**(fixed | {"engine": "sd-scripts", "base_file_sha256": "cd"} | changes))


def argv(options: TaskOptions, safety=(), extra=(), **changes) -> list[str]:
    return kohya_arguments.task_arguments(options, run_of(**changes), safety, extra)


def value(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_arguments_of_a_task(place, tmp_path):
    options = task_options(place, tmp_path, seed=0, max_grad_norm=0.0, target="conv", optimizer_args=("a=1", "b=2"))
    found = argv(options, extra=("--network_args", "loraplus_lr_ratio=4", "--ip_noise_gamma", "0.1"))
    assert value(found, "--seed") == "0"
    assert value(found, "--max_grad_norm") == "0.0"
    assert found[found.index("--optimizer_args") + 1 :][:2] == ["a=1", "b=2"]
    assert value(found, "--ip_noise_gamma") == "0.1"
    network = found[found.index("--network_args") + 1 :]
    assert {"role=task", "target=conv", "conv_dim=3", "conv_alpha=2.0", "loraplus_lr_ratio=4"} <= set(network)
    assert "--network_train_unet_only" in found
    assert "--save_state" not in found
    assert all(isinstance(text, str) and text for text in found)
    assert found.count("--network_args") == 1
    assert value(argv(options, extra=("--max_data_loader_n_workers", "4")), "--max_data_loader_n_workers") == "4"
    vpred = argv(options, family=kohya_arguments.FAMILIES["SD20"], v_prediction=True)
    assert {"--v2", "--v_parameterization", "base_version=sd_v2_v"} <= set(vpred)


@pytest.mark.parametrize("changes", [{"objective": "esd-x"}, {"pool_size": 8}, {"resume": "x"}])
def test_what_leco_lacks_is_refused(tmp_path, changes):
    with pytest.raises(OptionError, match="use the embedded engine"):
        kohya_arguments.safety_arguments(safety_options(tmp_path, **changes), run_of(), ())


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=3, unique=True), st.text())
def test_leco_prompts_come_through(concepts, neutral):
    try:
        " ".join([*concepts, neutral]).encode()
    except UnicodeEncodeError:
        return  # a lone surrogate is no text
    options = SafetyOptions(objective="leco", concept=tuple(concepts), neutral=neutral, preserve=("a house §",))
    entries = tomllib.loads(kohya_arguments.leco_prompts(options))["prompts"]
    assert [entry["target"] for entry in entries] == [*concepts, "a house §"]
    assert {entry["neutral"] for entry in entries[:-1]} == {neutral}
    kept = entries[-1]
    assert (kept["neutral"], kept["positive"]) == ("a house §", kept["unconditional"])
    assert all(entry["action"] == "erase" and entry["guidance_scale"] == 1.0 for entry in entries[:-1])


def test_previews_have_seeds_of_their_own(place, tmp_path):
    options = task_options(place, tmp_path, sample_prompts=("--n not an option", "ü"), seed=5, sample_cfg=4.0)
    found = json.loads(kohya_arguments.sample_prompts(options))
    assert [(p["prompt"], p["seed"], p["scale"]) for p in found] == [("--n not an option", 5, 4.0), ("ü", 6, 4.0)]


def test_tokenizers_get_clips_length(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (source / name).write_text("{}", encoding="utf-8")
    (source / "tokenizer_config.json").write_text('{"model_max_length": 8192}', encoding="utf-8")
    found = Path(kohya._tokenizers(kohya.Base(tmp_path, "SDXL", tokenizer=str(source)), tmp_path / "made"))
    names = {"openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"}
    assert {path.name for path in found.iterdir()} == names
    for name in names:
        assert json.loads((found / name / "tokenizer_config.json").read_text())["model_max_length"] == 77
    assert kohya._tokenizers(kohya.Base(tmp_path, "SDXL"), tmp_path / "none") == ""
    (source / "merges.txt").unlink()
    with pytest.raises(GuardError, match=r"has no merges\.txt"):
        kohya._tokenizers(kohya.Base(tmp_path, "SD15", tokenizer=str(source)), tmp_path / "again")


def test_the_child_is_offline_and_another_interpreter_gets_none_of_our_packages(engine, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "x")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    own = kohya._environment(engine)
    assert (own["HF_HUB_OFFLINE"], own["TRANSFORMERS_OFFLINE"], own["OMP_WAIT_POLICY"]) == ("1", "1", "ACTIVE")
    assert own["PYTHONPATH"] == "x"
    assert "PYTHONPATH" not in kohya._environment(kohya_checkout.Engine(STUB, "/elsewhere/python"))


def test_accelerates_own_configuration_replaces_ours(tmp_path, engine):
    config = tmp_path / "accelerate.yaml"
    config.write_text("num_processes: 2\n", encoding="utf-8")
    found = kohya._launch(kohya_checkout.find_engine(str(STUB), "", str(config)), TaskOptions())
    assert value(found, "--config_file") == str(config)
    assert "--num_processes" not in found
    assert value(kohya._launch(engine, TaskOptions(mixed_precision="bf16")), "--mixed_precision") == "bf16"
    with pytest.raises(GuardError, match="accelerate config"):
        kohya_checkout.find_engine(str(STUB), "", str(tmp_path / "none.yaml"))


def test_finding_the_checkout(tmp_path, monkeypatch):
    for name in ("SD_SCRIPTS_PATH", "SD_SCRIPTS_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(GuardError, match="SD_SCRIPTS_PATH"):
        kohya_checkout.find_engine()
    with pytest.raises(GuardError, match=r"is no sd-scripts checkout, train_network\.py"):
        kohya_checkout.find_engine(str(tmp_path))
    inner = tmp_path / "sd-scripts"
    for name in kohya_checkout.NEEDED:
        (inner / name).parent.mkdir(parents=True, exist_ok=True)
        (inner / name).touch()
    with pytest.raises(GuardError, match=r"it is in .*sd-scripts"):
        kohya_checkout.find_engine(str(tmp_path))
    monkeypatch.setenv("SD_SCRIPTS_PATH", str(inner))
    assert kohya_checkout.find_engine().python == sys.executable
    venv = inner / "venv" / "bin" / "python"
    venv.parent.mkdir(parents=True)
    venv.touch()
    found = kohya_checkout.find_engine()
    assert (found.checkout, found.python, str(found)) == (inner, str(venv), "sd-scripts")
    history = "- **Version 0.10.3 (2026-04-02):**\n- **Version 0.10.2 (2026-03-30):**\n"
    (inner / "README.md").write_text(history, encoding="utf-8")
    assert str(kohya_checkout.find_engine()) == "sd-scripts 0.10.3+"
    with pytest.raises(GuardError, match=r"no train_leco\.py: LECO came with 0\.10\.2"):
        found.script("train_leco.py")
    with pytest.raises(GuardError, match="no such file"):
        kohya_checkout.find_engine(python=str(tmp_path / "python"))


def test_commit_and_tag_are_read_without_git(tmp_path):
    if subprocess.run(["git", "--version"], capture_output=True).returncode:
        pytest.skip("git is not installed, so there is no repository to read")
    env = os.environ | {f"GIT_{who}_{what}": "t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert kohya_checkout.read_commit(tmp_path) == ("", "")
    git("init", "-q")
    assert kohya_checkout.read_commit(tmp_path) == ("", "")
    git("commit", "-q", "--allow-empty", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert kohya_checkout.read_commit(tmp_path) == (commit, "")
    git("tag", "v1")
    assert kohya_checkout.read_commit(tmp_path) == (commit, "v1")
    git("tag", "-d", "v1")
    git("tag", "-a", "v2", "-m", "two")
    git("pack-refs", "--all")
    assert kohya_checkout.read_commit(tmp_path) == (commit, "v2")
    git("checkout", "-q", "--detach")
    assert kohya_checkout.read_commit(tmp_path)[0] == commit
    worktree = tmp_path / "tree"
    git("worktree", "add", "-q", str(worktree))
    assert kohya_checkout.read_commit(worktree) == (commit, "v2")


@pytest.mark.slow
def test_a_real_checkout_trains_a_task_lora(tmp_path):
    """Two steps of a full-width SD1.5 checkpoint, with projection and a preview: minutes, and 7 GB."""
    names = ("SD_SCRIPTS_PATH", "MODULAR_LORA_FULL_CHECKPOINT", "MODULAR_LORA_COMFYUI")
    checkout, checkpoint, comfyui = map(os.environ.get, names)
    if not (checkout and checkpoint and comfyui):
        pytest.skip(f"{', '.join(names[:2])} are not set: a real checkout and a full SD1.5 checkpoint are needed")
    pictures = tmp_path / "pictures" / "1_thing"
    pictures.mkdir(parents=True)
    Image.new("RGB", (256, 256), "red").save(pictures / "a.png")
    (pictures / "a.txt").write_text("a thing", encoding="utf-8")
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
