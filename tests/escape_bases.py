"""Attempts of the catalogue (escapes.py) with what the guard is built on: bases, uploaded weights, pending LoRAs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
from escape_actions import copied
from escape_ground import Ground
from escapes import CKPT, Graph, attempt, guarded
from graphs import node
from modular_lora_guard.modular_lora.files import sha256_file

SAFETY, TASK = "safety.safetensors", "task.safetensors"
LOADERS = """[nodes]
patching = ["LoraLoader", "LoraLoaderModelOnly", "ModelMergeSimple", "CLIPMergeSimple"]
"""


# Weights from folders that requests write to


@contextmanager
def sent(ground: Ground, source: Path, kind: str, name: str = "sent.safetensors") -> Iterator[str]:
    """A file uploaded to a folder of models below the output folder, which main.py adds for five kinds.

    What is in it matters only where it would be read: an upload is of 100 MB at most.
    """
    folder_paths = ground.comfy.folder_paths
    folder, kind = ground.base / "output" / kind, folder_paths.map_legacy(kind)
    folder_paths.add_model_folder_path(kind, str(folder))
    data = aiohttp.FormData({"type": "output", "subfolder": folder.name, "overwrite": "true"})
    data.add_field("image", source.read_bytes(), filename=name)
    status, _ = ground.request("POST", "/upload/image", data=data)
    assert status == 200
    folder_paths.filename_list_cache.clear()
    try:
        yield name
    finally:
        (folder / name).unlink()
        folder_paths.folder_names_and_paths[kind][0].remove(str(folder))
        folder_paths.filename_list_cache.clear()


def checkpoint(ground: Ground) -> Path:
    return ground.base / "models" / "checkpoints" / "world.safetensors"


def part(ground: Ground, prefix: str) -> Path:
    """A part of the checkpoint as a file of its own, outside of ComfyUI's folders."""
    from safetensors.torch import load_file, save_file

    path = ground.base / f"{prefix.partition('.')[0]}.part"
    tensors = load_file(checkpoint(ground))
    save_file({k.removeprefix(prefix): v.contiguous() for k, v in tensors.items() if k.startswith(prefix)}, path)
    return path


@attempt("a U-Net made for the purpose is uploaded into the folder of diffusion models")
def _(ground):
    with sent(ground, part(ground, "model.diffusion_model."), "diffusion_models") as name:
        made = guarded()
        made["unet"] = node("UNETLoader", unet_name=name, weight_dtype="default")
        made["guard"]["inputs"]["model"] = ["unet", 0]
        ground.send(made)


@attempt("a checkpoint is uploaded into the folder of checkpoints")
def _(ground):
    with sent(ground, part(ground, "model.diffusion_model."), "checkpoints") as name:
        made = guarded()
        made["ckpt"]["inputs"]["ckpt_name"] = name
        ground.send(made)


@attempt("the name of an uploaded checkpoint comes over a link")
def _(ground):
    with sent(ground, part(ground, "model.diffusion_model."), "checkpoints") as name:
        made = guarded()
        made["name"] = node("EscText", text=name)
        made["ckpt"]["inputs"]["ckpt_name"] = ["name", 0]
        ground.send(made)


@attempt("the name of an uploaded checkpoint is wrapped as the front end wraps a list")
def _(ground):
    with sent(ground, part(ground, "model.diffusion_model."), "checkpoints") as name:
        made = guarded()
        made["ckpt"]["inputs"]["ckpt_name"] = {"__value__": name}
        ground.send(made)


@attempt("a text encoder is uploaded into the folder of text encoders")
def _(ground):
    with sent(ground, part(ground, "first_stage_model."), "clip") as name:
        made = guarded()
        made["text"] = node("CLIPLoader", clip_name=name, type="stable_diffusion")
        made["pos"]["inputs"]["clip"] = ["text", 0]
        ground.send(made)


@attempt("a VAE is uploaded into the folder of VAEs")
def _(ground):
    with sent(ground, part(ground, "first_stage_model."), "vae") as name:
        made = guarded()
        made["vae"] = node("VAELoader", vae_name=name)
        made["decode"]["inputs"]["vae"] = ["vae", 0]
        ground.send(made)


@attempt("a task LoRA is uploaded into the folder of LoRAs")
def _(ground):
    with sent(ground, ground.loras / TASK, "loras") as name:
        made = guarded()
        made["task"]["inputs"]["lora_name"] = name
        ground.send(made)


@attempt("the required safety LoRA itself is uploaded, so that its file can be written over while it is read")
def _(ground):
    with sent(ground, ground.loras / SAFETY, "loras") as name:
        made = guarded()
        made["safety"]["inputs"]["lora_name"] = name
        ground.send(made)


@attempt("an uploaded LoRA is named in a LORA_STACK")
def _(ground):
    with sent(ground, ground.loras / TASK, "loras") as name:
        made = guarded()
        made["stack"] = node("EscStack", name=name, strength=0.5)
        made["guard"]["inputs"]["lora_stack"] = ["stack", 0]
        ground.send(made)


@attempt("a LoRA in the folder of models is a link to an uploaded file")
def _(ground):
    with sent(ground, ground.loras / TASK, "loras") as name:
        link = ground.loras / "leads_out.safetensors"
        link.symlink_to(ground.base / "output" / "loras" / name)
        try:
            made = guarded()
            made["task"]["inputs"]["lora_name"] = link.name
            ground.send(made)
        finally:
            link.unlink()


@attempt(
    "an uploaded checkpoint has the name of one in the folder of models",
    "permitted",
    "ComfyUI reads the one in the folder of models, which comes first",
)
def _(ground):
    with sent(ground, part(ground, "first_stage_model."), "checkpoints", "world.safetensors"):
        ground.send(guarded())


@attempt("an uploaded checkpoint is named by a path that climbs out of the folder", "invalid")
def _(ground):
    with sent(ground, part(ground, "model.diffusion_model."), "checkpoints") as name:
        made = guarded()
        made["ckpt"]["inputs"]["ckpt_name"] = f"../../output/checkpoints/{name}"
        ground.send(made)


# Bases that the policy does not name


def named(ground: Ground) -> None:
    """A policy that names the checkpoint of the demo world."""
    sha256 = hashlib.sha256(checkpoint(ground).read_bytes()).hexdigest()
    ground.write(ground.text(f'[base]\nallow = ["{sha256}"]\n'))


def less(ground: Ground) -> str:
    """A checkpoint of almost the same weights in the folder of models."""
    from safetensors.torch import load_file, save_file

    path = checkpoint(ground).with_name("less.safetensors")
    if not path.exists():
        tensors = load_file(checkpoint(ground))
        key = next(k for k in tensors if k.startswith("model.diffusion_model.") and k.endswith("to_q.weight"))
        save_file(tensors | {key: tensors[key] * 0.9}, path)
        ground.comfy.folder_paths.filename_list_cache.clear()
    return path.name


def other_base(change):
    def act(ground: Ground) -> None:
        named(ground)
        made = guarded()
        made["less"] = node("CheckpointLoaderSimple", ckpt_name=less(ground))
        change(made)
        ground.send(made)

    return act


@attempt("the diffusion model is of a checkpoint that the policy does not name")
@other_base
def _(g):
    g["guard"]["inputs"]["model"] = ["less", 0]


@attempt("the prompt is encoded by the text encoder of a checkpoint that the policy does not name")
@other_base
def _(g):
    g["pos"]["inputs"]["clip"] = ["less", 1]


@attempt("the picture is decoded by the VAE of a checkpoint that the policy does not name")
@other_base
def _(g):
    g["decode"]["inputs"]["vae"] = ["less", 2]


@attempt("a model that the policy does not name comes in a box")
@other_base
def _(g):
    g["box"], g["out"] = node("EscBox", value=["less", 0]), node("EscUnbox", box=["box", 0])
    g["guard"]["inputs"]["model"] = ["out", 0]


@attempt("the diffusion model of an unnamed file stands beside the named checkpoint's text encoder and VAE")
def _(ground):
    named(ground)
    folder = ground.base / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    part(ground, "model.diffusion_model.").replace(folder / "unnamed.safetensors")
    ground.comfy.folder_paths.filename_list_cache.clear()
    made = guarded()
    made["unet"] = node("UNETLoader", unet_name="unnamed.safetensors", weight_dtype="default")
    made["guard"]["inputs"]["model"] = ["unet", 0]
    ground.send(made)


@attempt(
    "the named checkpoint has another file name", "permitted", "the policy names files by their content, not by a name"
)
def _(ground):
    named(ground)
    made = guarded()
    made["ckpt"]["inputs"]["ckpt_name"] = "second.safetensors"
    ground.send(made)


# LoRAs and merges before the guard, where the policy names their loaders


def before(made: Graph, *loras: tuple[str, float], kind: str = "LoraLoaderModelOnly", model: list = CKPT) -> None:
    """Stock loaders in front of Guard Model, whose accept_merged comes over a link."""
    for i, (name, strength) in enumerate(loras):
        values = {"lora_name": name, "strength_model": strength}
        values |= {"clip": ["ckpt", 1], "strength_clip": strength} if kind == "LoraLoader" else {}
        made[f"before{i}"] = node(kind, model=model, **values)
        model = [f"before{i}", 0]
    made["accept"] = node("PrimitiveBoolean", value=True)
    made["guard"]["inputs"] |= {"model": model, "accept_merged": ["accept", 0]}


def pending(name: str, *loras: tuple[str, float], kind: str = "LoraLoaderModelOnly") -> None:
    def act(ground: Ground) -> None:
        scaled(ground)
        made = guarded()
        before(made, *loras, kind=kind)
        ground.send(made)

    attempt(name, policy=LOADERS)(act)


def scaled(ground: Ground) -> None:
    """Copies of the safety LoRA: of other metadata, and at half and a quarter of its size."""
    from safetensors.torch import load_file, save_file

    copied(ground, "noted.safetensors", "another file")
    tensors = load_file(ground.loras / SAFETY)
    for name, factor in (("half", 0.5), ("quarter", 0.25)):
        made = {k: v * factor if "lora_up" in k else v for k, v in tensors.items()}
        save_file(made, ground.loras / f"{name}.safetensors")
    ground.comfy.folder_paths.filename_list_cache.clear()


pending("a loader before the guard takes the safety LoRA back", (SAFETY, -1.0))
pending("a loader of both halves before the guard takes the safety LoRA back", (SAFETY, -1.0), kind="LoraLoader")
pending("a loader before the guard takes a tenth of the safety LoRA back", (SAFETY, -0.1))
pending("a loader before the guard takes a copy of the safety LoRA back", ("noted.safetensors", -1.0))
pending("a loader before the guard takes a smaller copy back at a greater strength", ("half.safetensors", -2.0))
pending(
    "two loaders before the guard take the safety LoRA back in two parts",
    ("half.safetensors", -1.0),
    ("quarter.safetensors", -2.0),
)
pending("a loader before the guard takes it back behind one that adds a task LoRA", (TASK, 0.5), (SAFETY, -1.0))


@attempt("a model merge before the guard is accepted over a link", policy=LOADERS)
def _(ground):
    made = guarded()
    made["second"] = node("CheckpointLoaderSimple", ckpt_name="second.safetensors")
    made["merge"] = node("ModelMergeSimple", model1=CKPT, model2=["second", 0], ratio=0.5)
    before(made, model=["merge", 0])
    ground.send(made)


@attempt("a LoRA behind a model merge is accepted over a link", policy=LOADERS)
def _(ground):
    made = guarded()
    made["merge"] = node("ModelMergeSimple", model1=CKPT, model2=CKPT, ratio=0.5)
    before(made, (TASK, 0.5), model=["merge", 0])
    ground.send(made)


@attempt("a merged text encoder before the guard is accepted over a link", policy=LOADERS)
def _(ground):
    made = guarded()
    made["merge"] = node("CLIPMergeSimple", clip1=["ckpt", 1], clip2=["ckpt", 1], ratio=0.5)
    before(made)
    made["guard"]["inputs"]["clip"] = ["merge", 0]
    ground.send(made)


@attempt("a task LoRA that the policy denies comes by a loader before the guard")
def _(ground):
    denied = sha256_file(ground.loras / TASK)
    ground.write(ground.text(f'[tasks]\ndeny = ["{denied}"]\n{LOADERS}'))
    made = guarded()
    del made["task"], made["guard"]["inputs"]["task_lora"]
    before(made, (TASK, 0.5))
    ground.send(made)


@attempt(
    "a task LoRA comes by a loader before the guard",
    "permitted",
    "the policy names the loader; the LoRA is taken out of the model, checked and attested as a task LoRA",
    policy=LOADERS,
)
def _(ground):
    made = guarded()
    del made["task"], made["guard"]["inputs"]["task_lora"]
    before(made, (TASK, 0.5))
    ground.send(made)
