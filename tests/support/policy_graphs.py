"""Graphs that a policy is asked about, and what is known of their nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from modular_lora_guard.operators.graph import NodeFacts, check
from modular_lora_guard.operators.policy import FILE, parse

from support.graphs import node

SAFETY, TASK = "a" * 64, "b" * 64


GUARDED = "MODULAR_LORA_GUARDED_MODEL"


VALUES = {"task.safetensors": "d" * 64}  # of its tensors


FILES = {"safety.safetensors": SAFETY, "task.safetensors": TASK}


def known(inputs: str = "", outputs: str = "", is_output: bool = False, ours: bool = False) -> NodeFacts:
    """Facts from "name TYPE" pairs."""
    pairs = dict(pair.split() for pair in inputs.split("; ") if pair)
    return NodeFacts(pairs, tuple(outputs.split()), is_output, ours)


FACTS = {
    "CheckpointLoaderSimple": known("ckpt_name COMBO", "MODEL CLIP VAE"),
    "CLIPTextEncode": known("clip CLIP; text STRING", "CONDITIONING"),
    "EmptyLatentImage": known("width INT", "LATENT"),
    "KSampler": known("model MODEL; positive CONDITIONING; latent_image LATENT", "LATENT"),
    "BasicScheduler": known("model MODEL", "SIGMAS"),
    "FreeU": known("model MODEL", "MODEL"),
    "VAEDecode": known("samples LATENT; vae VAE", "IMAGE"),
    "ImageInvert": known("image IMAGE", "IMAGE"),
    "CreateVideo": known("images IMAGE; audio AUDIO", "VIDEO"),
    "SaveVideo": known("video VIDEO", "", True),
    "LoadImage": known("image COMBO", "IMAGE MASK"),
    "SaveImage": known("images IMAGE", "", True),
    "PreviewAny": known("source *", "", True),
    "SaveLatent": known("samples LATENT", "", True),
    "ModelSave": known("model MODEL", "", True),
    "CLIPSave": known("clip CLIP", "", True),
    "LoraLoader": known("model MODEL; clip CLIP; lora_name COMBO", "MODEL CLIP"),
    "EfficientLoader": known("ckpt_name COMBO; lora_name COMBO", "MODEL CLIP"),
    "LoraStacker": known("lora_name_1 COMBO", "LORA_STACK"),
    "Any": known("value *", "*"),
    "Switch": known("a *; b *", "*"),
    "Matched": known("a COMFY_MATCHTYPE_V3", "COMFY_MATCHTYPE_V3"),
    "Source": known("", "*"),
    "ModularLoraLoadSafety": known("lora_name COMBO; strength FLOAT", "MODULAR_LORA_SAFETY", ours=True),
    "ModularLoraLoadTask": known("lora_name COMBO", "MODULAR_LORA_TASK LORA_STACK", ours=True),
    "ModularLoraGuardModel": known("model MODEL; clip CLIP", f"{GUARDED} CLIP STRING", ours=True),
    "ModularLoraGuard": known("model MODEL; lora_name COMBO; clip CLIP; vae VAE", "MODEL CLIP VAE STRING", ours=True),
    "ModularLoraGuardedAsModel": known(f"guarded_model {GUARDED}", "MODEL", ours=True),
    "ModularLoraKSampler": known(f"model {GUARDED},MODEL; latent_image LATENT", "LATENT STRING", ours=True),
    "ModularLoraDecode": known("samples LATENT; vae VAE", "IMAGE STRING", ours=True),
    "ModularLoraDecodeTiled": known("samples LATENT; vae VAE; tile_size INT", "IMAGE STRING", ours=True),
    "ModularLoraGate": known("images IMAGE", "IMAGE BOOLEAN MASK", ours=True),
    "ModularLoraGateSettings": known("threshold FLOAT", "MODULAR_LORA_GATE", ours=True),
    "ModularLoraSaveImage": known("images IMAGE", "", True, True),
    "ModularLoraAudit": known("model MODEL", "STRING", True, True),
    "ModularLoraTrainTask": known("model MODEL", "MODULAR_LORA_TASK", True, True),
    "LoadAudio": known("audio COMBO", "AUDIO"),
    "LoadVideo": known("file COMBO", "VIDEO"),
    "TrimAudioDuration": known("audio AUDIO; start_index FLOAT", "AUDIO"),
    "GetVideoComponents": known("video VIDEO", "IMAGE AUDIO FLOAT"),
    "VAEDecodeAudio": known("samples LATENT; vae VAE", "AUDIO"),
    "SaveAudio": known("audio AUDIO; filename_prefix STRING", "", True),
    "PreviewAudio": known("audio AUDIO", "", True),
    "MaskPreview": known("mask MASK", "", True),
    "ImageToMask": known("image IMAGE", "MASK"),
    "SaveGLB": known("mesh MESH", "", True),
    "VAEDecodeHunyuan3D": known("samples LATENT", "VOXEL"),
    "VoxelToMesh": known("voxel VOXEL", "MESH"),
    "GetImageSize": known("image IMAGE", "INT INT INT"),
    "StringConcatenate": known("string_a STRING; string_b STRING", "STRING"),
    "SaveNew": known("images IMAGE", "", True),  # of a later ComfyUI
}


FACTS = {name: replace(facts, core=not facts.ours) for name, facts in FACTS.items()} | {
    "OtherSave": known("images IMAGE; latent LATENT; filename_prefix STRING", "", True),
    "OtherShow": known("text STRING; anything *", "", True),
    "OtherAny": known("value *", "*"),
    "Base64": known("image IMAGE", "STRING"),
    "Speech": known("text STRING", "AUDIO"),
    "Edit": known("image IMAGE", "IMAGE"),
    "Sends": NodeFacts({"image": "IMAGE", "prompt": "STRING"}, ("IMAGE", "STRING"), False, core=True, sends=True),
}


class Files:
    def sha256(self, node_type: str, name: str) -> str | None:
        return FILES.get(name)

    def values(self, node_type: str, name: str) -> str:
        return VALUES.get(name, "")

    def unsigned(self, node_type: str, name: str, key: str) -> str:
        return "" if (name, key) == ("safety.safetensors", "team") else f"{name}: not signed by {key}"

    def uploaded(self, name: str) -> str | None:
        return "output" if name.startswith("uploaded") else None


def guarded() -> dict:
    return {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name="x"),
        "pos": node("CLIPTextEncode", clip=["guard", 1], text="a cat"),
        "latent": node("EmptyLatentImage", width=64),
        "safety": node("ModularLoraLoadSafety", lora_name="safety.safetensors", strength=1.0),
        "task": node("ModularLoraLoadTask", lora_name="task.safetensors"),
        "guard": node("ModularLoraGuardModel", model=["ckpt", 0], safety_lora=["safety", 0], task_lora=["task", 0]),
        "sample": node("ModularLoraKSampler", model=["guard", 0], positive=["pos", 0], latent_image=["latent", 0]),
        "decode": node("ModularLoraDecode", samples=["sample", 0], vae=["ckpt", 2]),
        "save": node("SaveImage", images=["decode", 0]),
    }


def refused(graph: object, *more: str, required: str = f'{{sha256 = "{SAFETY}", min_net_strength = 0.9}}') -> dict:
    """Node -> rules that refuse it."""
    text = "\n".join((f"[guard]\nrequired = [{required}]", *more))
    found: dict[str, set[str]] = {}
    for one in check(graph, FACTS.get, parse(text.encode(), Path(FILE)), Files()):
        assert f"Node {one.node} ({one.type})" in str(one)
        assert f"(policy: {one.rule})" in str(one)
        found.setdefault(one.node, set()).add(one.rule)
    return found
