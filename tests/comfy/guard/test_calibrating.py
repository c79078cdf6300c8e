"""Safety activity in the real ComfyUI: the demo world's prompts are told apart, by image, and files tell nothing."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modular_lora_guard.modular_lora.guard import activity
from modular_lora_guard.modular_lora.guard.build import SafetyLora
from modular_lora_guard.tools.world import ASSETS, SAFETY_LORA, TASK_LORA
from modular_lora_guard.training import cli
from modular_lora_guard.training.adapters import Spec, adapted
from modular_lora_guard.training.options import SafetyOptions, load
from modular_lora_guard.training.safety.calibrating import calibration
from modular_lora_guard.training.safety.erasure import Erasure
from PIL import Image
from support.errors import refuses
from support.gate_graphs import install_stub, settings
from support.graphs import guarded_graph, node, sampler

CKPT = "demo_calibrating.safetensors"
CONCEPT = ("noto, car", "blob, taxi", "twemoji, bus", "flat, fire engine", "noto, locomotive", "emojione, sailboat")
KEPT = ("noto, owl", "blob, skull", "twemoji, mushroom", "flat, apple", "noto, heart", "emojione, gift")
OTHERS = {"concept": ("twemoji, tractor", "blob, truck"), "kept": ("flat, fox", "noto, grapes")}  # not calibrated on


@pytest.fixture(scope="module")
def world(comfy, loras) -> SimpleNamespace:
    """The demo world itself, its safety LoRA under two names (the second calibrated by the node) and its task LoRA."""
    path = comfy.base / "models" / "checkpoints" / CKPT
    shutil.copyfile(Path(os.environ["MODULAR_LORA_WORLD"]) / "demo_world_sd15.safetensors", path)
    for source, name in ((SAFETY_LORA, "plain.safetensors"), (TASK_LORA, "gloss.safetensors")):
        shutil.copyfile(ASSETS / source, loras.folder / name)
    yield SimpleNamespace(folder=loras.folder, path=path)
    path.unlink()


def calibrating(**changes) -> dict:
    graph = guarded_graph("plain.safetensors", None)
    graph = {name: graph[name] for name in ("ckpt", "safety", "latent")}
    graph["ckpt"]["inputs"]["ckpt_name"] = CKPT
    inputs = {
        "model": ["ckpt", 0],
        "clip": ["ckpt", 1],
        "safety_lora": ["safety", 0],
        "latent_image": ["latent", 0],
        "concept_prompts": "\n".join(CONCEPT),
        "preserved_prompts": "\n".join(KEPT),
        "noises": 2,
        "seed": 5,
        "output_name": "calibrated",
    }
    graph["calibrate"] = node("ModularLoraCalibrateSafety", **inputs | changes)
    return graph


@pytest.fixture(scope="module")
def host(comfy):
    return importlib.import_module("modular_lora_guard.comfy_host.calibrating")


class Silent:
    """Nobody watches."""

    def check(self) -> None:
        pass

    def stage(self, text: str, done: int, total: int) -> None:
        pass


@pytest.fixture(scope="module")
def calibrated(world, comfy, host):
    """A calibrated copy, and what it says."""
    model, clip, _ = comfy.nodes.CheckpointLoaderSimple().load_checkpoint(CKPT)
    safety = SafetyLora(comfy.host_files.read_lora(world.folder / "plain.safetensors"), 1.0)
    latent = host.latent_of(model, 64)
    found = host.calibrated(model, clip, safety, CONCEPT, KEPT, latent, 2, 5, Silent())
    made = activity.write_copy(safety.lora, world.folder / "told.safetensors", found)
    return SimpleNamespace(model=model, clip=clip, lora=made, found=found, plain=safety)


def drawing(safety: str, prompt: str, **sampler) -> dict:
    graph = guarded_graph(safety, "gloss.safetensors", clip=True)
    graph["ckpt"]["inputs"]["ckpt_name"] = CKPT
    graph["pos"]["inputs"]["text"] = prompt
    graph["sample"]["inputs"] |= sampler
    return graph


def test_the_demo_worlds_prompts_are_told_apart_with_nothing_trained_for_it(calibrated):
    """Small numbers: 6 and 6 prompts, two noises each, CPU."""
    assert calibrated.found.auc == 1.0
    assert (calibrated.found.concept.measured, calibrated.found.preserved.measured) == (12, 12)
    assert calibrated.found.preserved.at(1.0) < calibrated.found.concept.at(0.0)
    assert calibrated.found.latent == (4, 8, 8)


def test_the_node_writes_the_same_calibration_into_a_copy(world, comfy, calibrated, run_graph):
    _, report = run_graph(calibrating())["calibrate"]
    file = comfy.host_files.read_lora(comfy.base / "models" / "safety_loras" / "calibrated.safetensors")
    assert activity.read(file) == calibrated.found
    assert report.startswith("A calibrated copy was written, AUC 1.000.")
    assert file.sha256 in report
    shown = comfy.server.texts["calibrate"].splitlines()
    assert shown[:2] == [report.splitlines()[0], "saved as calibrated.safetensors in safety_loras"]
    assert shown[2].startswith("a prompt is about the concept from ")
    assert all((file.plain[name].up == calibrated.plain.lora.plain[name].up).all() for name in file.plain)


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"concept_prompts": ""}, "activity.prompts", ("0", "concept")),
        ({"preserved_prompts": "a\nb"}, "activity.prompts", ("2", "preserved")),
        ({"preserved_prompts": "\n".join(CONCEPT)}, "activity.both-lists", ("blob, taxi",)),
        ({"concept_prompts": "\n".join(KEPT), "preserved_prompts": "\n".join(CONCEPT)}, "activity.not-told-apart", ()),
        ({"output_name": "../up"}, "name.not-plain", ("../up",)),
    ],
)
def test_the_node_refuses_what_gives_no_verdict(world, run_graph, changes, code, named):
    with refuses(code, *named):
        run_graph(calibrating(**changes))


def test_every_image_of_a_batch_has_a_verdict_of_its_own(world, comfy, calibrated):
    """Other prompts than it was calibrated on, with a task LoRA, in one batch, whatever the negative prompt says."""
    tasks = (comfy.host_guard.TaskLora(comfy.host_files.read_lora(world.folder / "gloss.safetensors"), 1.0, 1.0),)
    safety = (SafetyLora(calibrated.lora, 1.0),)
    guarded, clip = comfy.host.guard(
        calibrated.model, calibrated.clip, safety, tasks, False, comfy.host_guard.GuardLimits()
    )
    patcher = comfy.host.unwrap(guarded)
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    prompts = [encode(text)[0] for text in (OTHERS["kept"][0], OTHERS["concept"][0], OTHERS["kept"][1])]
    positive = [[torch.cat([cross for cross, _ in prompts]), prompts[0][1]]]
    latent = {"samples": torch.zeros(3, 4, 8, 8)}
    for denoise, negative in ((1.0, ""), (1.0, OTHERS["concept"][1]), (0.5, "")):
        out = comfy.host.common_ksampler(
            patcher, 3, 4, 2.0, "euler", "normal", positive, encode(negative), latent, denoise=denoise
        )
        runs = comfy.ledger.latent_runs(out["samples"])
        each = [run.activity[calibrated.lora.sha256] for run in runs]
        if denoise == 1.0:
            assert [one.prompt for one in each] == ["kept", "concept", "kept"]
            assert "acted strongly on image 2: its prompt is about the concept" in activity.in_words(runs)
        else:
            assert all(one.prompt == "" and "started later" in one.why for one in each)
        assert each[1].value > 1.3 * max(each[0].value, each[2].value)
        assert len({one.value for one in each}) == 3


def test_the_samplers_and_the_decode_say_it_and_no_file_does_unless_the_policy_asks(
    world, comfy, calibrated, run_graph, operator, sha256
):
    graph = drawing("told.safetensors", OTHERS["concept"][0])
    graph["save"]["inputs"]["filename_prefix"] = "quiet"
    results = run_graph(graph)
    words = "the safety LoRA acted strongly on the image: its prompt is about the concept"
    assert words in results["sample"][1]
    assert words in results["decode"][1]
    assert "activity" not in results["decode"][1].splitlines()[0]
    (verdict,) = shown(comfy, "save")["modular_lora"]
    (lora,) = verdict["run"]["safety_loras"]
    assert lora["activity"]["prompt"] == "concept"
    assert lora["activity"]["value"] > calibrated.found.bounds[1]
    said = record(comfy, "quiet")
    assert said["activity"] == said["acted_share"] == {}

    required = f'[guard]\nrequired = [{{sha256 = "{sha256("told.safetensors")}"}}]\n[open]\nunattested = true\n'
    operator.write(required + "[record]\nactivity = true\n[history]\nverdict = 'brief'\n")
    graph["save"]["inputs"]["filename_prefix"] = "told"
    graph["sample"]["inputs"]["seed"] = 2  # else the decode's answer is kept from before
    run_graph(graph)
    (one,) = record(comfy, "told")["activity"].values()
    assert one["prompt"] == "concept"
    for answered in (shown(comfy, "decode"), shown(comfy, "save")):
        assert "concept" not in json.dumps(answered["text"])
        assert all("run" not in one for one in answered["modular_lora"])


def test_under_safety_first_the_task_lora_gives_way_on_the_concept_and_files_do_not_tell(
    world, comfy, calibrated, run_graph
):
    shares = {}
    for kind in ("concept", "kept"):
        graph = drawing("told.safetensors", OTHERS[kind][0])
        graph["guard"]["inputs"]["combine"] = "safety first"
        graph["save"]["inputs"]["filename_prefix"] = f"first_{kind}"
        report = run_graph(graph)["sample"][1]
        assert "1 task LoRA, safety first." in report.splitlines()[0]
        assert ("the task LoRAs do not act on the image" in report) == (kind == "concept")
        (verdict,) = shown(comfy, "save")["modular_lora"]
        shares[kind] = verdict["run"]["task_share"]
        said = record(comfy, f"first_{kind}")
        assert (verdict["run"]["combine"], said["combine"]) == ("safety first", "safety first")
        assert (said["task_share"], said["muted_evaluations"]) == (None, 1)
    assert shares["concept"] == 0.0
    assert shares["kept"] > 0.5


def test_a_gate_acts_on_the_verdict_where_it_is_told_to_and_the_record_says_so_where_it_may(
    world, comfy, calibrated, run_graph, operator, monkeypatch
):
    install_stub(comfy, monkeypatch).score = lambda image: 0.1  # the detector finds nothing
    answers = {}
    for kind in ("concept", "kept"):
        graph = drawing("told.safetensors", OTHERS[kind][0])
        del graph["save"]
        for what in ("ignore", "review"):
            graph |= {f"set {what}": settings(activity=what)}
            graph |= {f"gate {what}": node("ModularLoraGate", images=["decode", 0], gate=[f"set {what}", 0])}
            graph |= {f"show {what}": node("PreviewAny", source=[f"gate {what}", 4])}
        results = run_graph(graph)
        for what in ("ignore", "review"):
            (found,) = json.loads(results[f"gate {what}"][3])["pictures"]
            answers[kind, what] = found["answer"]
        covered = bool((results["gate review"][0] != results["decode"][0]).any())
        assert covered == (kind == "concept")
    assert answers == {
        ("concept", "ignore"): "pass",
        ("concept", "review"): "review",
        ("kept", "ignore"): "pass",
        ("kept", "review"): "pass",
    }
    graph = {name: one for name, one in graph.items() if not name.endswith("ignore")}
    policy = '[guard]\nrequired = []\n[gate]\nactivity = "block"\n'
    operator.write(policy)
    graph["sample"]["inputs"]["seed"] += 1  # else the gate's answer is kept from before
    with refuses("refused.gate.activity", "review", "block"):
        run_graph(graph)
    graph["set review"]["inputs"]["activity"] = "block"
    for told, expected in ((False, None), (True, ["kept"])):
        operator.write(policy + "[record]\nactivity = true\n" * told)
        graph["sample"]["inputs"]["seed"] += 1
        run_graph(graph)
        (*_, line) = (one for one in operator.record() if one["kind"] == "gate")
        assert line.get("activity") == expected


def test_an_image_that_is_flagged_for_its_prompt_is_drawn_again_and_covered(
    world, comfy, calibrated, run_graph, monkeypatch
):
    install_stub(comfy, monkeypatch).score = lambda image: 0.1
    graph = drawing("told.safetensors", OTHERS["concept"][0])
    for name in ("sample", "decode", "save"):
        del graph[name]
    graph["set"] = settings(activity="review", action="box")
    graph["gate"] = sampler(["guard", 0], "ModularLoraSampleAndGate", vae=["ckpt", 2], max_tries=2, gate=["set", 0])
    graph["show"] = node("PreviewAny", source=["gate", 4])
    images, flagged, _, _, report, _ = run_graph(graph)["gate"]
    assert flagged
    assert "image 1 still flagged at try 2" in report
    assert "about the safety LoRA's concept in 1 images" in report
    assert not images.any()


def test_without_a_calibration_there_is_a_figure_and_no_verdict(world, comfy, calibrated, run_graph):
    report = run_graph(drawing("plain.safetensors", OTHERS["kept"][0]))["sample"][1]
    assert "the safety LoRA acted on the image, without a verdict: its file has no calibration (activity 0.0" in report


def shown(comfy, node: str) -> dict:
    return next(d["output"] for e, d in comfy.server.messages if e == "executed" and d["node"] == node)


def record(comfy, prefix: str) -> dict:
    (file,) = comfy.output.glob(f"{prefix}*.png")
    return json.loads(Image.open(file).text["modular_lora_attestation"])


def test_the_command_writes_what_the_node_writes(world, comfy, calibrated, tmp_path, capsys):
    (tmp_path / "about.txt").write_text("\n".join(CONCEPT[1:]), encoding="utf-8")
    (tmp_path / "keep.txt").write_text("\n".join(KEPT), encoding="utf-8")
    made = tmp_path / "by_command.safetensors"
    arguments = [
        *("calibrate-safety", world.folder / "plain.safetensors", "--checkpoint", world.path, "--cpu"),
        *("--comfyui", os.environ["MODULAR_LORA_COMFYUI"], "--size", "64", "--seed", "5", "--output", made),
        *("--prompt", CONCEPT[0], "--prompts_file", tmp_path / "about.txt", "--preserve_file", tmp_path / "keep.txt"),
    ]
    assert cli.main(list(map(str, arguments))) == 0
    assert "AUC 1.000" in capsys.readouterr().out
    found = activity.read(comfy.host_files.read_lora(made))
    assert found == calibrated.found


def test_the_trainer_measures_what_the_guard_measures(world, comfy, calibrated, host):
    """By other means: hooks on the adapters of the training, with the shipped LoRA's values in them."""
    pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")
    trainer = importlib.import_module("modular_lora_guard.comfy_host.trainer_model")
    given = {"concept": list(CONCEPT), "preserve": list(KEPT), "preserve_weight": 2.0, "train_size": 64, "seed": 5}
    options = load(SafetyOptions, None, given | {"mixed_precision": "no"})
    loaded = comfy.nodes.CheckpointLoaderSimple().load_checkpoint(CKPT)
    file = calibrated.plain.lora
    with trainer.opened(*loaded, options) as opened:
        layers = {path: name for path, name in opened.unet_names.items() if name in file.layers}
        first = file.plain[next(iter(layers.values()))]
        spec = Spec(layers, {}, first.rank, first.alpha, 0.0, 5, "safety")
        with adapted(opened.unet, opened.text_encoder, spec) as adapters:
            adapters.load(file)
            erasure = Erasure(opened, options, adapters.off, adapters.parameters(), relative=False)
            made = calibration(opened, options, adapters, erasure)
    assert "AUC 1.000" in made.line
    said = json.loads(made.metadata)
    latent = host.latent_of(calibrated.model, 64)
    other = host.calibrated(
        calibrated.model, calibrated.clip, calibrated.plain, CONCEPT, KEPT, latent, 2, said["seed"], Silent()
    )
    expected = json.loads(activity.encode(other))
    for name in ("concept", "preserved"):
        assert said[name].pop("quantiles") == pytest.approx(expected[name].pop("quantiles"), rel=1e-2)
    assert said == expected
