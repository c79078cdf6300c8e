"""Weights under a policy, in the real ComfyUI: none from a folder that requests write to, and bases by their files."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.graphs import GraphError, guarded_graph
from support.helper_nodes import ANY
from support.operator_graphs import required, stopped

NONE_REQUIRED = "[guard]\nrequired = []\n"
LOADERS = {  # what core reads weights with (0.3.75 and 0.33.0): node type -> inputs, and the folder of models
    "CheckpointLoader": {"ckpt_name": "checkpoints", "config_name": "configs"},
    "CheckpointLoaderSimple": {"ckpt_name": "checkpoints"},
    "unCLIPCheckpointLoader": {"ckpt_name": "checkpoints"},
    "ImageOnlyCheckpointLoader": {"ckpt_name": "checkpoints"},
    "CreateHookModelAsLora": {"ckpt_name": "checkpoints"},
    "CreateHookModelAsLoraModelOnly": {"ckpt_name": "checkpoints"},
    "DiffusersLoader": {"model_path": "diffusers"},
    "UNETLoader": {"unet_name": "diffusion_models"},
    "CLIPLoader": {"clip_name": "text_encoders"},
    "DualCLIPLoader": {f"clip_name{i}": "text_encoders" for i in (1, 2)},
    "TripleCLIPLoader": {f"clip_name{i}": "text_encoders" for i in (1, 2, 3)},
    "QuadrupleCLIPLoader": {f"clip_name{i}": "text_encoders" for i in (1, 2, 3, 4)},
    "VAELoader": {"vae_name": "vae"},
    "LoraLoader": {"lora_name": "loras"},
    "LoraLoaderModelOnly": {"lora_name": "loras"},
    "CreateHookLora": {"lora_name": "loras"},
    "CreateHookLoraModelOnly": {"lora_name": "loras"},
    "TrainLoraNode": {"existing_lora": "loras"},
    "ControlNetLoader": {"control_net_name": "controlnet"},
    "DiffControlNetLoader": {"control_net_name": "controlnet"},
    "StyleModelLoader": {"style_model_name": "style_models"},
    "CLIPVisionLoader": {"clip_name": "clip_vision"},
    "GLIGENLoader": {"gligen_name": "gligen"},
    "HypernetworkLoader": {"hypernetwork_name": "hypernetworks"},
    "LatentUpscaleModelLoader": {"model_name": "latent_upscale_models"},
    "ModelPatchLoader": {"name": "model_patches"},
    "PhotoMakerLoader": {"photomaker_model_name": "photomaker"},
    "UpscaleModelLoader": {"model_name": "upscale_models"},
    "AudioEncoderLoader": {"audio_encoder_name": "audio_encoders"},
    "ModularLoraGuard": {"lora_name": "safety_loras"},
    "ModularLoraLoadSafety": {"lora_name": "safety_loras"},
    "ModularLoraLoadTask": {"lora_name": "loras"},
}
NEWER = {  # what 0.33.0 has besides
    "FrameInterpolationModelLoader": {"model_name": "frame_interpolation"},
    "LTXAVTextEncoderLoader": {"text_encoder": "text_encoders", "ckpt_name": "checkpoints"},
    "LTXVAudioVAELoader": {"ckpt_name": "checkpoints"},
    "LoadBackgroundRemovalModel": {"bg_removal_name": "background_removal"},
    "LoadDA3Model": {"model_name": "geometry_estimation"},
    "LoadMediaPipeFaceLandmarker": {"model_name": "detection"},
    "LoadMoGeModel": {"model_name": "geometry_estimation"},
    "LoraLoaderBypass": {"lora_name": "loras"},
    "LoraLoaderBypassModelOnly": {"lora_name": "loras"},
    "OpticalFlowLoader": {"model_name": "optical_flow"},
}
ELSEWHERE = {
    "ModularLoraAudit",
    "ModularLoraTaskTrainingOptions",
    "ModularLoraSafetyTrainingOptions",
    "ModularLoraGateSettings",
}
BASES = ("CheckpointLoader", "CheckpointLoaderSimple", "unCLIPCheckpointLoader", "ImageOnlyCheckpointLoader")
BASES += ("UNETLoader", "CLIPLoader", "VAELoader", "DiffusersLoader")
SEVERAL = ("DualCLIPLoader", "TripleCLIPLoader", "QuadrupleCLIPLoader")
GIVEN = {"MODEL": ["ckpt", 0], "CLIP": ["ckpt", 1], "VAE": ["ckpt", 2], "CONDITIONING": ["pos", 0]}
GIVEN |= {"LATENT": ["latent", 0]}
SHOWN = {  # a loader runs where an output needs it, and weights themselves are not shown
    "count": {"class_type": "Swallow", "inputs": {"value": ["loader", 0]}},
    "show": {"class_type": "PreviewAny", "inputs": {"source": ["count", 0]}},
}


class Swallow:
    """Takes anything and gives a number."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY,)}}

    def run(self, value):
        return (1,)


@pytest.fixture(scope="module")
def core(comfy, loras) -> Iterator[dict]:
    """Every node of core, and a folder of every kind of model below the output folder, as main.py adds five."""
    mapping, kinds = comfy.nodes.NODE_CLASS_MAPPINGS, comfy.folder_paths.folder_names_and_paths
    before, paths = dict(mapping), {kind: list(held) for kind, (held, _) in kinds.items()}

    async def load() -> None:
        for file in sorted((Path(comfy.nodes.__file__).parent / "comfy_extras").glob("nodes_*.py")):
            await comfy.nodes.load_custom_node(str(file), module_parent="comfy_extras")

    asyncio.run(load())
    mapping["Swallow"] = Swallow
    for kind, (held, endings) in kinds.items():
        folder = comfy.output / kind
        held.append(str(folder))
        name = mark(kind, endings)
        (folder / name if kind == "diffusers" else folder).mkdir(parents=True, exist_ok=True)
        if kind == "diffusers":
            for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
                file = folder / name / f"{part}.safetensors"
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(b"x")
            (folder / name / "model_index.json").write_text("{}", encoding="utf-8")
        else:
            (folder / name).write_bytes(b"x")
    comfy.folder_paths.filename_list_cache.clear()
    yield mapping
    mapping.clear()
    mapping.update(before)
    for kind, held in paths.items():
        kinds[kind][0][:] = held
        shutil.rmtree(comfy.output / kind, ignore_errors=True)
    comfy.folder_paths.filename_list_cache.clear()


def mark(kind: str, endings) -> str:
    """A file's name that stands in the list of this kind of model alone."""
    ending = (
        "" if kind == "diffusers" else ".safetensors" if ".safetensors" in endings else next(iter(sorted(endings)), "")
    )
    return f"mark_{kind}{ending}"


def choices(spec) -> list:
    return spec[0] if isinstance(spec[0], list) else (spec[1].get("options") or ()) if len(spec) > 1 else ()


def inputs_of(cls, parts=("required", "optional")) -> dict:
    said = cls.INPUT_TYPES()
    return {name: spec for part in parts for name, spec in said.get(part, {}).items()}


def filled(kind: str, core: dict, files: dict[str, str]) -> dict:
    """A graph that runs a node, its files and whatever else it asks for."""
    values = {}
    for name, spec in inputs_of(core[kind], ("required",)).items():
        if name in files:
            values[name] = files[name]
        elif isinstance(spec[0], str) and spec[0] in GIVEN:
            values[name] = GIVEN[spec[0]]
        else:
            default = spec[1].get("default") if len(spec) > 1 else None
            values[name] = default if default is not None else next(iter(choices(spec)), 1)
    graph = {name: node for name, node in guarded_graph().items() if name in ("ckpt", "pos", "latent")}
    graph["loader"] = {"class_type": kind, "inputs": values}
    return graph | SHOWN


def test_every_node_that_chooses_weights_is_known_here(core):
    """A loader that a newer ComfyUI brings fails here: add it to the table, and so to the tests below."""
    found = {}
    for kind, cls in core.items():
        marks = {
            name: str(one) for name, spec in inputs_of(cls).items() for one in choices(spec) if "mark_" in str(one)
        }
        if marks and kind not in ELSEWHERE:
            found[kind] = {name: one.partition("mark_")[2].partition(".")[0] for name, one in marks.items()}
    for kind in ("ModularLoraGuard", "ModularLoraLoadSafety"):
        found[kind] = {"lora_name": "safety_loras"}  # they list two folders
    there = {kind: inputs for kind, inputs in (LOADERS | NEWER).items() if kind in core}
    assert found == there
    assert len(there.keys() & LOADERS.keys()) >= len(LOADERS) - 1  # those of sound need a package that may be missing


@pytest.mark.parametrize("kind", LOADERS | NEWER)
def test_no_loader_reads_weights_that_a_request_can_have_written(kind, core, comfy, operator):
    if kind not in core:
        pytest.skip(f"this ComfyUI has no {kind}, or could not load it")
    operator.write(NONE_REQUIRED)
    kinds = comfy.folder_paths.folder_names_and_paths
    files = {name: mark(folder, kinds[folder][1]) for name, folder in (LOADERS | NEWER)[kind].items()}
    graph = filled(kind, core, files)
    refused = operator.queue(graph)
    assert "(policy: weights)" in refused["loader"]
    if kind == "TrainLoraNode":
        return  # it asks for its file late, when it has trained for a step
    assert stopped(operator, graph, "refused.weights").node_type == kind


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def files(comfy, core) -> Iterator[dict[str, dict[str, str]]]:
    """The demo world's checkpoint taken apart, for every loader of bases: its inputs."""
    models = comfy.base / "models"
    tensors = load_file(models / "checkpoints" / "world.safetensors")

    def part(prefix: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {k.removeprefix(prefix): v.contiguous() for k, v in tensors.items() if k.startswith(prefix)}
        save_file(named, path)

    unet, text, vae = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."
    kinds = comfy.folder_paths.folder_names_and_paths
    where = {kind: comfy.base / "own" / kind for kind in ("diffusion_models", "text_encoders", "vae", "diffusers")}
    for kind, folder in where.items():
        kinds[kind][0].insert(0, str(folder))
    part(unet, where["diffusion_models"] / "own_unet.safetensors")
    part(text, where["text_encoders"] / "own_text.safetensors")
    part(vae, where["vae"] / "own_vae.safetensors")
    diffusers = where["diffusers"] / "own"
    part(unet, diffusers / "unet" / "diffusion_pytorch_model.safetensors")
    part(text, diffusers / "text_encoder" / "model.safetensors")
    part(vae, diffusers / "vae" / "diffusion_pytorch_model.safetensors")
    (diffusers / "model_index.json").write_text("{}", encoding="utf-8")
    (models / "configs").mkdir(exist_ok=True)
    shutil.copy(Path(comfy.nodes.__file__).parent / "models/configs/v1-inference.yaml", models / "configs")
    for i in range(4):
        (where["text_encoders"] / f"part{i}.safetensors").write_bytes(
            (where["text_encoders"] / "own_text.safetensors").read_bytes()
        )
    comfy.folder_paths.filename_list_cache.clear()
    yield where
    for kind, folder in where.items():
        kinds[kind][0].remove(str(folder))
    shutil.rmtree(comfy.base / "own")
    comfy.folder_paths.filename_list_cache.clear()


def chosen(kind: str, comfy, where: dict[str, Path]) -> tuple[dict[str, str], list[Path]]:
    """A base loader's inputs, and the files that it reads."""
    checkpoint = comfy.base / "models/checkpoints/world.safetensors"
    one = {"UNETLoader": ("unet_name", "diffusion_models", "own_unet.safetensors")}
    one |= {"CLIPLoader": ("clip_name", "text_encoders", "own_text.safetensors")}
    one |= {"VAELoader": ("vae_name", "vae", "own_vae.safetensors")}
    if kind in one:
        name, folder, file = one[kind]
        return {name: file}, [where[folder] / file]
    if kind == "DiffusersLoader":
        return {"model_path": "own"}, sorted((where["diffusers"] / "own").rglob("*.safetensors"))
    more = {"config_name": "v1-inference.yaml"} if kind == "CheckpointLoader" else {}
    return {"ckpt_name": "world.safetensors", **more}, [checkpoint]


def base_policy(*paths: Path) -> str:
    return NONE_REQUIRED + f"[base]\nallow = [{', '.join(f'{chr(34)}{sha256(path)}{chr(34)}' for path in paths)}]\n"


@pytest.mark.parametrize("kind", BASES)
def test_every_loader_of_a_base_carries_its_files(kind, core, comfy, operator, files):
    values, read = chosen(kind, comfy, files)
    graph = {"loader": {"class_type": kind, "inputs": filled(kind, core, values)["loader"]["inputs"]}}
    graph |= SHOWN
    operator.write(base_policy(*read))
    operator.run(graph)
    for missing in read:
        operator.write(base_policy(*(path for path in read if path != missing), comfy.loras / "task.safetensors"))
        comfy.executor.reset()
        assert missing.name in str(stopped(operator, graph, "refused.base.allow"))
        comfy.executor.reset()


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_text_encoder_of_several_files_needs_them_all(kind, core, comfy, operator, files, loaded, monkeypatch):
    import comfy.sd as sd

    names = {name: f"part{i}.safetensors" for i, name in enumerate(LOADERS[kind])}
    for i, name in enumerate(names.values()):  # of other bytes each
        tensors = load_file(files["text_encoders"] / "own_text.safetensors")
        save_file(tensors, files["text_encoders"] / name, {"part": str(i)})

    def made(*args, **kwargs):
        clip = loaded[1].clone()
        clip.cond_stage_model = copy.deepcopy(clip.cond_stage_model)  # toys of such sizes do not exist
        return clip

    monkeypatch.setattr(sd, "load_text_encoder_state_dicts", made)
    graph = filled(kind, core, names)
    graph = {name: graph[name] for name in ("loader", *SHOWN)}
    paths = [files["text_encoders"] / name for name in names.values()]
    operator.write(base_policy(*paths))
    operator.run(graph)
    comfy.executor.reset()
    operator.write(base_policy(*paths[:-1]))
    stopped(operator, graph, "refused.base.allow")


def test_a_base_made_for_the_purpose_is_refused_and_the_named_one_is_in_the_record(comfy, operator, loras, core):
    """W0 minus what the safety LoRA adds, under a name in the folder of checkpoints."""
    checkpoints = comfy.base / "models/checkpoints"
    tensors = load_file(checkpoints / "world.safetensors")
    key = next(k for k in tensors if k.startswith("model.diffusion_model.") and k.endswith("to_q.weight"))
    save_file(tensors | {key: tensors[key] * 0.99}, checkpoints / "less.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    allow = f'[base]\nallow = ["{sha256(checkpoints / "world.safetensors")}"]\n'
    operator.write(required(sha256(comfy.loras / "safety.safetensors")) + allow)
    graph = guarded_graph()
    graph["ckpt"]["inputs"]["ckpt_name"] = "less.safetensors"
    with pytest.raises(GraphError, match=r"less.safetensors .*policy: base.allow"):
        operator.run(graph)
    graph["ckpt"]["inputs"]["ckpt_name"] = "world.safetensors"
    operator.run(graph)
    run = next(line for line in reversed(operator.record()) if line["kind"] == "run")
    assert run["base_files"] == [sha256(checkpoints / "world.safetensors")]
    graph["other"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "less.safetensors"}}
    for name, input, slot in (("decode", "vae", 2), ("pos", "clip", 1)):
        changed = copy.deepcopy(graph)
        changed[name]["inputs"][input] = ["other", slot]
        assert "less.safetensors" in str(stopped(operator, changed, "refused.base.allow"))


def test_models_that_were_loaded_before_the_policy_or_of_a_changed_file_are_not_taken(comfy, operator, loaded, core):
    import comfy.utils as utils

    checkpoint = comfy.base / "models/checkpoints/world.safetensors"
    operator.write(base_policy(checkpoint))
    weights = importlib.import_module("modular_lora_guard.comfy_host.enforcement.weights")
    policy = operator.policies.current()
    for value in loaded:
        with refuses("refused.base.allow"):
            weights.check_base(policy, fresh(value))
    with weights.reading() as read:
        utils.load_torch_file(str(checkpoint))
    assert list(read) == [Path(os.path.realpath(checkpoint))]
    made = fresh(loaded[0])
    weights.end(policy, read, [[made]])
    os.link(checkpoint, comfy.base / "link.safetensors")  # changes the entry, not the contents
    weights.check_base(policy, made)
    os.utime(checkpoint)
    with refuses("refused.base.allow", "world.safetensors"):
        weights.check_base(policy, made)


def fresh(value):
    """The same with weights of its own."""
    copied = copy.copy(value)
    for name in ("model", "cond_stage_model", "first_stage_model"):
        if hasattr(copied, name):
            setattr(copied, name, copy.copy(getattr(copied, name)))
    return copied


@pytest.mark.parametrize("way", ["link in models", "link in output", "folder that is a link"])
def test_links_are_followed(way, comfy, operator, core, tmp_path):
    folder = comfy.base / "models/loras"
    if way == "link in models":
        (comfy.output / "hidden.safetensors").write_bytes((folder / "task.safetensors").read_bytes())
        (folder / "linked.safetensors").symlink_to(comfy.output / "hidden.safetensors")
    elif way == "link in output":
        (comfy.output / "way").symlink_to(folder, target_is_directory=True)  # an upload to "way" writes into models
        shutil.copyfile(folder / "task.safetensors", folder / "linked.safetensors")
    else:
        (tmp_path / "linked.safetensors").write_bytes((folder / "task.safetensors").read_bytes())
        (comfy.output / "more").symlink_to(tmp_path, target_is_directory=True)
        comfy.folder_paths.folder_names_and_paths["loras"][0].append(str(tmp_path))
    comfy.folder_paths.filename_list_cache.clear()
    try:
        operator.write(required(sha256(comfy.loras / "safety.safetensors")))
        graph = guarded_graph(task="linked.safetensors")
        stopped(operator, graph, "refused.weights")
    finally:
        for path in (folder / "linked.safetensors", comfy.output / "way", comfy.output / "more"):
            path.unlink(missing_ok=True)
        kept = comfy.folder_paths.folder_names_and_paths["loras"][0]
        kept[:] = [path for path in kept if path != str(tmp_path)]
        comfy.folder_paths.filename_list_cache.clear()


def test_a_textual_inversion_and_a_stack_from_the_output_folder_are_refused(comfy, operator, core, loras):
    import torch

    operator.write(required(sha256(comfy.loras / "safety.safetensors")))
    save_file({"emb_params": torch.randn(2, 768)}, comfy.output / "embeddings" / "sent.safetensors")
    graph = guarded_graph()
    graph["pos"]["inputs"]["text"] = "a cat, embedding:sent"
    comfy.executor.reset()
    clip = comfy.nodes.CheckpointLoaderSimple().load_checkpoint("world.safetensors")[1]
    clip.tokenizer.clip_l.embedding_directory = str(comfy.output / "embeddings")
    with refuses("refused.weights"):
        clip.tokenize("a cat, embedding:sent")
    operator.remove()
    clip.tokenize("a cat, embedding:sent")


def test_of_a_name_that_stands_in_both_places_the_one_that_is_read_counts(comfy, operator, core, loras):
    shutil.copyfile(comfy.loras / "task.safetensors", comfy.output / "loras" / "task.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    operator.write(required(sha256(comfy.loras / "safety.safetensors")))
    operator.run(guarded_graph())
    (comfy.output / "loras" / "task.safetensors").unlink()
