"""The sd-scripts engine's arguments, environment and checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard.build import SafetyLora
from modular_lora_guard.modular_lora.options import tomllib
from modular_lora_guard.training import cli
from modular_lora_guard.training.kohya import arguments as kohya_arguments
from modular_lora_guard.training.kohya import checkout
from modular_lora_guard.training.kohya import engine as kohya
from modular_lora_guard.training.options import SafetyOptions, TaskOptions
from support.errors import refuses
from support.graphs import save_lora
from support.kohya_toys import STUB, Seen, safety_options, task_options, value


@pytest.fixture
def engine():
    return checkout.find_engine(str(STUB), sys.executable)


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
def test_arguments_that_contaminate_or_collide_are_refused(tmp_path, extra):
    with refuses("option.kohya-argument", "--"):
        argv(task_options(tmp_path, tmp_path), extra=extra)


@pytest.mark.parametrize(
    "text", ["base_weights = ['x']", "[network]\nnetwork_module = 'y'", "dim_from_weights = true", "?"]
)
def test_a_config_file_is_looked_through(tmp_path, text):
    path = tmp_path / "more.toml"
    path.write_text(text, encoding="utf-8")
    for argument in (("--config_file", str(path)), (f"--config_file={path.with_suffix('')}",)):
        with refuses("option.kohya-config", "more.toml"):
            argv(task_options(tmp_path, tmp_path), extra=argument)
    path.write_text("[other]\nv_pred_like_loss = 1.0", encoding="utf-8")
    assert str(path) in argv(task_options(tmp_path, tmp_path), extra=("--config_file", str(path)))


def run_of(**changes) -> kohya_arguments.Run:
    fixed = {"checkpoint": Path("/base.safetensors"), "family": kohya_arguments.FAMILIES["SD15"]}
    return kohya_arguments.Run(**(fixed | {"engine": "sd-scripts", "base_file_sha256": "cd"} | changes))


def argv(options: TaskOptions, safety=(), extra=(), **changes) -> list[str]:
    return kohya_arguments.task_arguments(options, run_of(**changes), safety, extra)


def test_arguments_of_a_task(tmp_path):
    options = task_options(tmp_path, tmp_path, seed=0, max_grad_norm=0.0, target="conv", optimizer_args=("a=1", "b=2"))
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


def test_adapters_that_sd_scripts_has_are_passed_on_and_others_refused(tmp_path):
    made = lambda **changes: task_options(tmp_path, tmp_path, **changes)  # noqa: E731
    found = argv(made(target="conv", conv_dim=5, conv_alpha=2.5))
    assert {"conv_dim=5", "conv_alpha=2.5"} <= set(found)
    patterns = {"network_reg_dims": ("lora_unet_double.*=4", ".*mlp.*=8"), "network_reg_lrs": ("lora_te1_.*=1e-5",)}
    flux = argv(made(**patterns), family=kohya_arguments.FAMILIES["Flux"])  # it searches, so the ends are said
    assert "network_reg_dims=^(?:lora_unet_double.*)$=4,^(?:.*mlp.*)$=8" in flux
    assert "network_reg_lrs=^(?:lora_te1_.*)$=1e-05" in flux
    anima = argv(made(**patterns), family=kohya_arguments.FAMILIES["Anima"])  # it matches whole paths
    assert "network_reg_dims=lora_unet_double.*=4,.*mlp.*=8" in anima
    for changes, named in (
        (patterns, "network_reg_dims"),
        ({"algo": "loha"}, "algo loha"),
        ({"dora_wd": True}, "dora_wd"),
    ):
        with refuses("option.kohya-adapter", named):
            argv(made(**changes))
    with refuses("option.kohya-adapter", "'a{1,2}'"):
        argv(made(network_reg_dims=("a{1,2}=4",)), family=kohya_arguments.FAMILIES["Flux"])


def test_memory_goes_by_sd_scripts_names_where_its_script_has_it(tmp_path):
    made = lambda **changes: task_options(tmp_path, tmp_path, **{"mixed_precision": "bf16"} | changes)  # noqa: E731
    both = {"fp8_base_unet": True, "blocks_to_swap": 4}
    found = argv(made(**both), family=kohya_arguments.FAMILIES["Flux"])
    assert (value(found, "--blocks_to_swap"), found.count("--fp8_base_unet")) == ("4", 1)
    assert "--fp8_base" in argv(made(), extra=("--fp8_base",))
    for family, changes, named in (
        ("SD15", {"blocks_to_swap": 4}, "blocks_to_swap"),
        ("Anima", {"fp8_base_unet": True}, "anima_train_network.py"),
        ("SDXL", {"fp8_base_unet": True, "mixed_precision": "no"}, "mixed_precision"),
    ):
        with refuses("option.kohya", named):
            argv(made(**changes), family=kohya_arguments.FAMILIES[family])
    for name, changed in both.items():
        options = safety_options(tmp_path, **{"objective": "leco", name: changed})
        with refuses("option.leco", name):
            kohya_arguments.safety_arguments(options, run_of(), ())


def test_losses_schedules_and_optimizers_go_by_sd_scripts_names(tmp_path):
    changes = {"loss_type": "huber", "huber_schedule": "constant", "multires_noise_iterations": 6}
    changes |= {"debiased_estimation_loss": True, "max_train_epochs": 3, "validate_every_n_steps": 5}
    changes |= {"optimizer_type": "CAME", "lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 2}
    found = argv(task_options(tmp_path, tmp_path, **changes))
    wanted = {"loss_type": "huber", "huber_schedule": "constant", "huber_c": "0.1", "huber_scale": "1.0"}
    wanted |= {"multires_noise_iterations": "6", "multires_noise_discount": "0.3", "max_train_epochs": "3"}
    wanted |= {"validate_every_n_steps": "5", "optimizer_type": "pytorch_optimizer.CAME", "lr_decay_steps": "2"}
    wanted |= {"lr_scheduler_min_lr_ratio": "0.0"}
    assert {name: value(found, f"--{name}") for name in wanted} == wanted
    assert "--debiased_estimation_loss" in found
    plain = argv(task_options(tmp_path, tmp_path))
    assert not {f"--{name}" for name in {*wanted, "optimizer_args"} - {"optimizer_type"}} & set(plain)
    adafactor = argv(task_options(tmp_path, tmp_path, optimizer_type="Adafactor"))
    given = adafactor[adafactor.index("--optimizer_args") + 1 :][:3]
    assert given == ["scale_parameter=False", "relative_step=False", "warmup_init=False"]
    free = {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 7}
    found = argv(task_options(tmp_path, tmp_path, **free))
    assert value(found, "--optimizer_args") == "warmup_steps=7"
    assert "--lr_warmup_steps" not in found


def test_what_sd_scripts_has_not_is_refused(tmp_path):
    with refuses("option.kohya", "ema_decay"):
        argv(task_options(tmp_path, tmp_path, ema_decay=0.99))
    smooth, flux = task_options(tmp_path, tmp_path, loss_type="smooth_l1"), kohya_arguments.FAMILIES["Flux"]
    assert value(argv(smooth), "--huber_schedule") == "snr"
    with refuses("option.kohya", "huber_schedule"):
        argv(smooth, family=flux)
    free = {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant"}
    with refuses("option.leco", "AdamWScheduleFree"):
        kohya_arguments.safety_arguments(safety_options(tmp_path, **free), run_of(), ())


@pytest.mark.parametrize("scale", ["refuse", "tensors", "metadata"])
def test_the_chosen_scale_of_each_safety_lora_is_handed_on(tmp_path, scale):
    save_lora(tmp_path / "safety.safetensors", {"a": LayerSpec("a", (4, 4))}, 2, 0)
    other = SafetyLora(read_lora(tmp_path / "safety.safetensors", scale="tensors"), 1.0)
    chosen = SafetyLora(read_lora(tmp_path / "safety.safetensors", scale=scale), 1.0)
    options = task_options(tmp_path, tmp_path)
    assert f"safety_scale={scale}" in argv(options, safety=[chosen])
    assert f"safety_scale={scale},tensors" in argv(options, safety=[chosen, other])


@pytest.mark.parametrize("changes", [{"objective": "esd-x"}, {"pool_size": 8}, {"resume": "x"}])
def test_what_leco_lacks_is_refused(tmp_path, changes):
    with refuses("option.leco"):
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


def test_previews_have_seeds_of_their_own(tmp_path):
    options = task_options(tmp_path, tmp_path, sample_prompts=("--n not an option", "ü"), seed=5, sample_cfg=4.0)
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
    with refuses("kohya.tokenizer", "merges.txt"):
        kohya._tokenizers(kohya.Base(tmp_path, "SD15", tokenizer=str(source)), tmp_path / "again")


def test_the_child_is_offline_and_another_interpreter_gets_none_of_our_packages(engine, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "x")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    own = kohya._environment(engine)
    assert (own["HF_HUB_OFFLINE"], own["TRANSFORMERS_OFFLINE"], own["OMP_WAIT_POLICY"]) == ("1", "1", "ACTIVE")
    assert own["PYTHONPATH"] == "x"
    assert "PYTHONPATH" not in kohya._environment(checkout.Engine(STUB, "/elsewhere/python"))


def test_accelerates_own_configuration_replaces_ours(tmp_path, engine):
    config = tmp_path / "accelerate.yaml"
    config.write_text("num_processes: 2\n", encoding="utf-8")
    found = kohya._launch(checkout.find_engine(str(STUB), "", str(config)), TaskOptions())
    assert value(found, "--config_file") == str(config)
    assert "--num_processes" not in found
    assert value(kohya._launch(engine, TaskOptions(mixed_precision="bf16")), "--mixed_precision") == "bf16"
    with refuses("kohya.no-accelerate"):
        checkout.find_engine(str(STUB), "", str(tmp_path / "none.yaml"))


def test_finding_the_checkout(tmp_path, monkeypatch):
    for name in ("SD_SCRIPTS_PATH", "SD_SCRIPTS_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    with refuses("kohya.no-checkout", "SD_SCRIPTS_PATH"):
        checkout.find_engine()
    with refuses("kohya.no-checkout", "train_network.py"):
        checkout.find_engine(str(tmp_path))
    inner = tmp_path / "sd-scripts"
    for name in checkout.NEEDED:
        (inner / name).parent.mkdir(parents=True, exist_ok=True)
        (inner / name).touch()
    with refuses("kohya.no-checkout", inner):
        checkout.find_engine(str(tmp_path))
    monkeypatch.setenv("SD_SCRIPTS_PATH", str(inner))
    assert checkout.find_engine().python == sys.executable
    venv = inner / "venv" / "bin" / "python"
    venv.parent.mkdir(parents=True)
    venv.touch()
    found = checkout.find_engine()
    assert (found.checkout, found.python, str(found)) == (inner, str(venv), "sd-scripts")
    history = "- **Version 0.10.3 (2026-04-02):**\n- **Version 0.10.2 (2026-03-30):**\n"
    (inner / "README.md").write_text(history, encoding="utf-8")
    assert str(checkout.find_engine()) == "sd-scripts 0.10.3+"
    with refuses("kohya.no-script", "train_leco.py", "0.10.2"):
        found.script("train_leco.py")
    with refuses("kohya.no-python", "python"):
        checkout.find_engine(python=str(tmp_path / "python"))


def test_commit_and_tag_are_read_without_git(tmp_path):
    if subprocess.run(["git", "--version"], capture_output=True).returncode:
        pytest.skip("git is not installed, so there is no repository to read")
    env = os.environ | {f"GIT_{who}_{what}": "t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert checkout.read_commit(tmp_path) == ("", "")
    git("init", "-q")
    assert checkout.read_commit(tmp_path) == ("", "")
    git("commit", "-q", "--allow-empty", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert checkout.read_commit(tmp_path) == (commit, "")
    git("tag", "v1")
    assert checkout.read_commit(tmp_path) == (commit, "v1")
    git("tag", "-d", "v1")
    git("tag", "-a", "v2", "-m", "two")
    git("pack-refs", "--all")
    assert checkout.read_commit(tmp_path) == (commit, "v2")
    git("checkout", "-q", "--detach")
    assert checkout.read_commit(tmp_path)[0] == commit
    worktree = tmp_path / "tree"
    git("worktree", "add", "-q", str(worktree))
    assert checkout.read_commit(worktree) == (commit, "v2")


@pytest.mark.parametrize(
    ("text", "machine"),
    [
        ("machine_rank: 1\nnum_machines: 2", 1),
        ('{"num_machines": 2,\n "machine_rank": "3"}', 3),
        ("num_machines: 1", 0),
    ],
)
def test_a_machine_that_is_not_the_first_looks_for_no_file(place, tmp_path, monkeypatch, text, machine):
    config = tmp_path / "accelerate.yaml"
    config.write_text(text, encoding="utf-8")
    engine = checkout.find_engine(str(STUB), sys.executable, str(config))
    assert engine.machine == machine
    monkeypatch.setattr(kohya.process, "run", lambda *args: kohya.process.Progress(losses=[1.0, 1.0]))
    options, base = task_options(place, tmp_path / "out"), kohya.Base(place / "base.safetensors", "SD15")
    if not machine:
        with refuses("kohya.no-file"):
            kohya.train_task(engine, options, base, Seen())
        return
    assert f"machine {machine}: its share of 2 steps" in kohya.train_task(engine, options, base, Seen()).report


def test_files_of_the_model_reach_sd_scripts_under_its_own_names(tmp_path):
    chosen = {"text_encoder": [], "clip_type": "", "vae": tmp_path / "vae.safetensors", "extra": ["--t5xxl", "t5"]}
    assert cli._kohya_files(chosen | {"family": "SD15"}) == ({}, ["--t5xxl", "t5", "--vae", str(chosen["vae"])])
    parts, extra = cli._kohya_files(chosen | {"family": "SD3"})
    assert (parts, extra) == ({"vae": str(chosen["vae"])}, ["--t5xxl", "t5"])
    hunyuan = {"family": "HunyuanImage21", "text_encoder": [Path("qwen.safetensors")], "extra": ["--byt5", "b"]}
    parts, extra = cli._kohya_files(chosen | hunyuan)
    kohya_arguments.check_parts("HunyuanImage21", kohya_arguments.FAMILIES["HunyuanImage21"], parts, extra)
    assert parts["text_encoder"] == "qwen.safetensors"
    flux = chosen | {"family": "Flux", "text_encoder": [Path("l"), Path("t5")]}
    with refuses("option.kohya-files", "text_encoder", "--clip_l"):
        cli._kohya_files(flux)
    with refuses("option.kohya-files", "clip_type"):
        cli._kohya_files(flux | {"clip_type": "flux"})
    parts, extra = cli._kohya_files(flux | {"text_encoder": [Path("t5")]})
    with refuses("option.kohya-files", "text_encoder", "clip_l, t5xxl, ae"):
        kohya_arguments.check_parts("Flux", kohya_arguments.FAMILIES["Flux"], parts, extra)
