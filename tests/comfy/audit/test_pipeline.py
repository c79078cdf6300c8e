"""The audit's pipeline in the real ComfyUI: stock images bit for bit, LoRAs whole, W0 untouched."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from modular_lora_guard.audit.plan import Arm, Item, Part, Sampling
from PIL import Image
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.graphs import base_graph, guarded_graph, sampler, save_lora

ROOT = Path(__file__).resolve().parents[3]
SAMPLING = Sampling(steps=2, cfg=2.0, width=64, height=64)
LONG = "a long prompt, " * 30 + "cat"
NEAR = 1.0  # of 255: mean difference that rounding of another order of sums makes


def item(prompt: str = "gloss, cat", seed: int = 1, **more) -> Item:
    return Item(prompt, seed, "kept", **more)


@pytest.fixture(scope="session")
def drawing(comfy):
    return importlib.import_module("modular_lora_guard.comfy_host.pipeline")


@pytest.fixture(scope="session")
def pipeline(drawing, loaded, loras):
    return drawing.ComfyPipeline(*loaded)


@pytest.fixture(scope="session")
def part(loras):
    def make(role: str, name: str, strength: float = 1.0) -> Part:
        path = loras.folder / name
        return Part(role, str(path), hashlib.sha256(path.read_bytes()).hexdigest(), strength)

    return make


@pytest.fixture(scope="session")
def arms(part) -> dict[str, Arm]:
    safety, task = part("safety", "safety_te.safetensors"), part("task", "task_te.safetensors", 0.7)
    minus = part("safety", "safety_te.safetensors", -1.0), part("task", "task_te.safetensors", -0.7)
    return {
        arm.name: arm
        for arm in (
            Arm("base"),
            Arm("safety", (safety,)),
            Arm("modular", (safety, task)),
            Arm("minus_safety", (minus[0],)),
            Arm("safety_minus_sequential", (safety, minus[1])),
        )
    }


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Start images and a mask, of the sampling's size."""
    folder = tmp_path_factory.mktemp("starts")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "start.png")
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(folder / "mask.png")
    return folder


def stock(graph: dict, run_graph) -> np.ndarray:
    """h w 3 uint8 of the graph's image, rounded as Save Image does."""
    graph["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["ckpt", 2]}}
    graph["save"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    return to_bytes(run_graph(graph)["decode"][0])


def to_bytes(image: torch.Tensor) -> np.ndarray:
    return np.clip(255.0 * image[0].cpu().numpy(), 0, 255).astype(np.uint8)


def stock_merge(run_graph, *loras: tuple[str, float]) -> np.ndarray:
    """The image of a chain of stock LoRA loaders."""
    graph, model, clip = base_graph(), ["ckpt", 0], ["ckpt", 1]
    for i, (name, strength) in enumerate(loras):
        inputs = {"model": model, "clip": clip, "lora_name": name}
        inputs |= {"strength_model": strength, "strength_clip": strength}
        graph[f"lora{i}"] = {"class_type": "LoraLoader", "inputs": inputs}
        model, clip = [f"lora{i}", 0], [f"lora{i}", 1]
    graph["pos"]["inputs"]["clip"] = graph["neg"]["inputs"]["clip"] = clip
    graph["sample"] = sampler(model)
    return stock(graph, run_graph)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize(("bounds", "same"), [((1e-12, 2e-12), "safety"), ((1e6, 2e6), "modular")])
def test_the_arm_in_which_task_loras_give_way_is_safety_alone_or_modular(bounds, same, comfy, pipeline, loras, loaded):
    from support.giving_way import calibrated

    read = lambda name: comfy.host_files.read_lora(loras.folder / name)  # noqa: E731
    sha256, target = comfy.anatomy.model_sha256(loaded[0]), loras.folder / f"arm_{same}.safetensors"
    told = calibrated(read("safety_te.safetensors"), target, *bounds, sha256)
    task = read("task.safetensors")
    parts = Part("safety", str(told.path), told.sha256), Part("task", str(task.path), task.sha256, 0.7)
    ours = pipeline.draw(Arm("safety_first", parts, combine="safety first"), [item(), item("dog", 2)], SAMPLING)
    other = pipeline.draw(Arm(same, parts[:1] if same == "safety" else parts), [item(), item("dog", 2)], SAMPLING)
    assert np.abs(ours.astype(int) - other.astype(int)).max() <= 1
    left = pipeline.draw(Arm(same, parts if same == "safety" else parts[:1]), [item(), item("dog", 2)], SAMPLING)
    assert distance(ours, left) > NEAR


@pytest.mark.parametrize("prompt", ["gloss, cat", "gloss, (cat:1.4) [dog]", LONG])
def test_the_base_arm_is_the_stock_graph_bit_for_bit(prompt, pipeline, arms, run_graph):
    graph = base_graph()
    graph["pos"]["inputs"]["text"], graph["neg"]["inputs"]["text"] = prompt, "blurry"
    graph["sample"] = sampler(["ckpt", 0])
    ours = pipeline.draw(arms["base"], [item(prompt, negative="blurry")], SAMPLING)
    assert np.array_equal(ours[0], stock(graph, run_graph))


def test_the_modular_arm_is_the_guarded_nodes_to_rounding(pipeline, arms, run_graph):
    """An arm is one sum of LoRAs at any strength; the guard adds the safety LoRA's share first, by itself."""
    graph = guarded_graph("safety_te.safetensors", "task_te.safetensors", clip=True)
    theirs = run_graph(graph)["decode"][0]
    ours = pipeline.draw(arms["modular"], [item()], SAMPLING)[0]
    assert np.abs(ours.astype(int) - to_bytes(theirs)).max() <= 1


@pytest.mark.parametrize(
    ("arm", "chain"),
    [
        ("modular", (("safety_te.safetensors", 1.0), ("task_te.safetensors", 0.7))),
        ("minus_safety", (("safety_te.safetensors", -1.0),)),
        ("safety_minus_sequential", (("safety_te.safetensors", 1.0), ("task_te.safetensors", -0.7))),
    ],
)
def test_an_arm_is_the_stock_merge_of_its_loras_within_rounding(arm, chain, pipeline, arms, run_graph):
    ours, merged = pipeline.draw(arms[arm], [item()], SAMPLING)[0], stock_merge(run_graph, *chain)
    base = pipeline.draw(arms["base"], [item()], SAMPLING)[0]
    assert distance(merged, base) > 5
    assert distance(ours, merged) < NEAR


def test_img2img_and_inpainting_are_the_stock_nodes_bit_for_bit(pipeline, arms, images, run_graph, comfy):
    folder = Path(comfy.folder_paths.get_input_directory())
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("start.png", "mask.png"):
        (folder / name).write_bytes((images / name).read_bytes())
    graph = base_graph()
    graph["start"] = {"class_type": "LoadImage", "inputs": {"image": "start.png"}}
    graph["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["start", 0], "vae": ["ckpt", 2]}}
    graph["sample"] = sampler(["ckpt", 0], latent_image=["encode", 0], denoise=0.6)
    start, mask = str(images / "start.png"), str(images / "mask.png")
    ours = pipeline.draw(arms["base"], [item(start=start, denoise=0.6)], SAMPLING)
    assert np.array_equal(ours[0], stock(graph, run_graph))

    graph["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": "mask.png", "channel": "red"}}
    graph["masked"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["encode", 0], "mask": ["mask", 0]}}
    graph["sample"]["inputs"]["latent_image"] = ["masked", 0]
    ours = pipeline.draw(arms["base"], [item(start=start, mask=mask, denoise=0.6)], SAMPLING)
    assert np.array_equal(ours[0], stock(graph, run_graph))


def test_a_mixed_unit_comes_back_in_order_and_each_image_is_its_own(pipeline, arms, images):
    start, mask = str(images / "start.png"), str(images / "mask.png")
    items = [
        item(),
        item(start=start, denoise=0.6),
        item(LONG, seed=2),
        item(seed=3, negative=LONG),
        item(start=start, mask=mask, denoise=0.6),
        item("gloss, dog", seed=4),
    ]
    drawn = pipeline.draw(arms["safety"], items, SAMPLING)
    alone = [pipeline.draw(arms["safety"], [one], SAMPLING)[0] for one in items]
    assert all(distance(a, b) < NEAR for a, b in zip(drawn, alone, strict=True))
    assert min(distance(a, b) for i, a in enumerate(alone) for b in alone[:i]) > 5


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "ddpm"])
def test_a_sampler_with_noise_of_its_own_gives_the_stock_image_whoever_shares_the_unit(name, pipeline, arms, run_graph):
    graph = base_graph()
    graph["sample"] = sampler(["ckpt", 0], sampler_name=name)
    by = Sampling(2, 2.0, name, "normal", 64, 64)
    drawn = pipeline.draw(arms["base"], [item(seed=5), item()], by)
    assert np.array_equal(drawn[1], stock(graph, run_graph))


def test_the_same_unit_twice_is_the_same_bytes_and_no_weight_changes(pipeline, arms, loaded):
    before = [weights(p) for p in (loaded[0], loaded[1].patcher)]
    items = [item(seed=seed) for seed in (1, 2)]
    first = {name: pipeline.draw(arm, items, SAMPLING) for name, arm in arms.items()}
    second = {name: pipeline.draw(arm, items, SAMPLING) for name, arm in reversed(arms.items())}
    assert all(np.array_equal(first[name], second[name]) for name in arms)
    assert [weights(p) for p in (loaded[0], loaded[1].patcher)] == before
    assert_no_branches(loaded)


def weights(patcher) -> dict[str, str]:
    plain = {k: v.contiguous().view(torch.uint8) for k, v in patcher.model.state_dict().items() if v.dim()}
    return {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in plain.items()}


def assert_no_branches(loaded) -> None:
    modules = [*loaded[0].model.modules(), *loaded[1].cond_stage_model.modules()]
    assert not any("forward" in m.__dict__ or "_modular_lora_attachment" in m.__dict__ for m in modules)


def test_a_guard_on_the_same_checkpoint_neither_acts_on_the_base_arm_nor_is_lost(pipeline, arms, run_graph, comfy):
    base = pipeline.draw(arms["base"], [item()], SAMPLING)
    graph = guarded_graph("safety_te.safetensors", None, clip=True)
    guarded = run_graph(graph)["decode"][0]
    graph["sample"]["inputs"]["seed"] = 2
    run_graph(graph)
    assert np.array_equal(pipeline.draw(arms["base"], [item()], SAMPLING), base)
    graph["sample"]["inputs"]["seed"] = 1
    assert torch.equal(run_graph(graph)["decode"][0], guarded)


@pytest.mark.parametrize("role", ["safety", "task"])
def test_a_lora_that_does_not_apply_whole_stops_the_arm(role, pipeline, loras, part, comfy):
    layers = dict(list(loras.unet.items())[:3])
    spec = next(iter(layers.values()))
    save_lora(comfy.loras / "half.safetensors", layers | {"lora_unet_no_such_layer": spec}, 2, 9)
    with refuses("audit.not-whole", "half.safetensors", "no_such_layer"):
        pipeline.draw(Arm(role, (part(role, "half.safetensors"),)), [item()], SAMPLING)


def test_a_safety_lora_with_a_dead_layer_stops_the_arm(pipeline, loras, part, comfy):
    save_lora(comfy.loras / "live.safetensors", dict(list(loras.unet.items())[:2]), 2, 9)
    tensors = load_file(comfy.loras / "live.safetensors")
    dead = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file(tensors | {dead: torch.zeros_like(tensors[dead])}, comfy.loras / "dead.safetensors")
    with refuses("lora.zero-layer", "dead.safetensors"):
        pipeline.draw(Arm("safety", (part("safety", "dead.safetensors", -1.0),)), [item()], SAMPLING)


def test_a_file_that_changed_since_the_audit_was_planned_stops_the_arm(pipeline, loras, comfy):
    changed = Part("task", str(loras.folder / "task.safetensors"), "0" * 64)
    with refuses("file.other-sha256", "task.safetensors"):
        pipeline.draw(Arm("task", (changed,)), [item()], SAMPLING)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampler": "no_such"}, "no_such"),
        ({"scheduler": "no_such"}, "no_such"),
        ({"width": 60}, "60×64"),
        ({"steps": 0}, "0 "),
    ],
)
def test_settings_that_comfyui_would_quietly_replace_are_refused(change, named, pipeline, arms, comfy):
    by = Sampling(**{"steps": 2, "cfg": 2.0, "width": 64, "height": 64} | change)
    with refuses("audit.sampling", named):
        pipeline.draw(arms["base"], [item()], by)


def test_items_that_cannot_be_drawn_are_refused(pipeline, arms, images, comfy):
    text = images / "text.png"
    text.write_text("no image")
    start = str(images / "start.png")
    for wrong, code in (
        ({"start": str(text)}, "audit.image-unreadable"),
        ({"start": str(images / "none.png")}, "audit.image-unreadable"),
        ({"mask": start}, "audit.item"),
        ({"start": start, "denoise": 0.0}, "audit.item"),
    ):
        with refuses(code):
            pipeline.draw(arms["base"], [item(**wrong)], SAMPLING)


def test_a_start_of_another_size_is_cut_to_the_sampling(pipeline, arms, tmp_path):
    Image.new("RGB", (200, 100), (200, 30, 30)).save(tmp_path / "wide.png")
    start = str(tmp_path / "wide.png")
    assert pipeline.draw(arms["base"], [item(start=start, denoise=0.5)], SAMPLING).shape == (1, 64, 64, 3)


def test_models_that_the_record_could_not_tell_from_the_checkpoint_are_refused(drawing, loaded, loras, comfy, part):
    model, clip, vae = loaded
    merge = comfy.nodes.LoraLoader().load_lora(model, clip, "task_te.safetensors", 1.0, 1.0)
    skipped = comfy.nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    patched = model.clone()
    patched.set_model_sampler_cfg_function(lambda args: args["uncond"])
    guard, files = comfy.host_guard, comfy.host_files
    safety = guard.SafetyLora(files.read_lora(loras.folder / "safety.safetensors"), 1.0)
    handle, _ = comfy.host.guard(model, None, (safety,), (), False, guard.GuardLimits())
    for given, code in (
        ((merge[0], clip), "model.merged"),
        ((model, merge[1]), "model.merged"),
        ((model, skipped), "audit.changed-model"),
        ((patched, clip), "audit.changed-model"),
        ((handle, clip), "input.wrong-type"),
        ((model, None), "audit.no-clip"),
    ):
        with refuses(code):
            drawing.ComfyPipeline(*given, vae)


def test_an_interrupt_stops_the_drawing_and_leaves_no_branch(pipeline, arms, loaded):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        pipeline.draw(arms["modular"], [item()], SAMPLING)
    assert_no_branches(loaded)


WORKER = """
import sys
sys.path[:] = [p for p in sys.path if p]
class Blocked:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("av", "comfy_api", "nodes", "server"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
root, checkpoint, out = sys.argv[1:]
sys.path += [root + "/importable", root + "/tests"]
from modular_lora_guard.audit.plan import Arm, Item, Sampling
from modular_lora_guard.comfy_host.standalone import start
from modular_lora_guard.comfy_host.standalone_pipeline import open_pipeline
from support import small_world
start(None, True)
small_world.accept()  # as the tests' own ComfyUI
with open_pipeline(checkpoint, "", True) as pipeline:
    pictures = pipeline.draw(Arm("base"), [Item("gloss, cat", 1, "kept")], Sampling(2, 2.0, width=64, height=64))
    open(out, "wb").write(pipeline.base_sha256.encode() + pictures.tobytes())
    assert (pipeline.dtype, pipeline.device.split()[0]) == ("float32", "cpu")
"""


def test_a_worker_without_av_and_the_server_draws_the_same_image(pipeline, arms, comfy, tmp_path):
    checkpoint = comfy.base / "models" / "checkpoints" / "world.safetensors"
    arguments = [sys.executable, "-c", WORKER, str(ROOT), str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    ours = pipeline.draw(arms["base"], [item()], SAMPLING)
    assert (tmp_path / "out").read_bytes() == pipeline.base_sha256.encode() + ours.tobytes()


def test_the_base_is_known_by_network_text_encoder_and_vae(drawing, pipeline, loaded, comfy):
    model, clip, vae = loaded
    other = comfy.nodes.CheckpointLoaderSimple().load_checkpoint("world.safetensors")
    assert drawing.ComfyPipeline(*other).base_sha256 == pipeline.base_sha256
    with torch.inference_mode():
        for part in (other[0].model, other[1].cond_stage_model, other[2].first_stage_model):
            next(part.parameters()).add_(1)
            drawing.introspection._weights.pop(part, None)  # remembered while loaded
    for changed in ((other[0], clip, vae), (model, other[1], vae), (model, clip, other[2])):
        assert drawing.ComfyPipeline(*changed).base_sha256 != pipeline.base_sha256


def test_a_checkpoint_that_is_not_there_is_said_in_one_line(comfy, drawing, tmp_path):
    pipeline = importlib.import_module("modular_lora_guard.comfy_host.standalone_pipeline")
    with refuses("train.no-checkpoint", "none.safetensors"):
        with pipeline.open_pipeline(str(tmp_path / "none.safetensors"), cpu=True):
            pass
