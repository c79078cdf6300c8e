"""What the templates are called, what each shows in a sentence, and the graphs of those that are built here."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..demo.graphs import node
from ..world import CFG, CHECKPOINT, SAFETY_LORA, SAMPLER, SCHEDULER, SIZE, STEPS, TASK_LORA
from .graph import Blueprint, Column

Json = dict[str, Any]


class About(NamedTuple):
    """A sentence on a template, and the node types whose images stand on its card."""

    sentence: str
    shown: tuple[str, ...]


ABOUT = {  # file name, which the template browser shows as the title -> what it shows, in the order of a first visit
    "1 Guard an ordinary graph": About(
        "An ordinary workflow with a LoRA loader, and one node behind the checkpoint loader: Guard.", ("SaveImage",)
    ),
    "2 Gate and save": About(
        "A detector looks at every image; the one that it flags is pixelated, and only judged images are saved.",
        ("ModularLoraSaveGated",),
    ),
    "3 Sample again what the gate flags": About(
        "An image that the detector flags is sampled again, alone, with a new seed.", ("ModularLoraSaveGated",)
    ),
    "4 Compare LoRAs": About(
        "How far a task LoRA works against the safety LoRA, layer by layer, without sampling.", ("PreviewImage",)
    ),
    "5 Train a task LoRA": About(
        "A style is learnt from captioned images beside the safety LoRA, which stays whole.",
        ("ModularLoraTrainTask", "ModularLoraSaveImage"),
    ),
    "6 Train a safety LoRA": About(
        "A concept is taken away from prompts alone; what you list is kept.",
        ("ModularLoraTrainSafety", "ModularLoraSaveImage"),
    ),
    "7 Audit LoRAs": About(
        "The same prompts with and without each LoRA: how often does the suppressed concept come back?",
        ("ModularLoraAudit", "PreviewImage"),
    ),
    "Guarded nodes one by one": About(
        "Safety LoRA, task LoRA, guard, sampler, decode and save as nodes of their own, each with its report.",
        ("ModularLoraSaveImage",),
    ),
    "Custom sampler and guider": About(
        "The guard with SamplerCustomAdvanced and any noise, sampler and sigmas.", ("ModularLoraSaveImage",)
    ),
    "Samplers that take MODEL": About(
        "The guarded model in the stock KSampler and in nodes of other packs.", ("ModularLoraSaveImage",)
    ),
}


def titled(title: str) -> Json:
    """A node's title, where its type's name does not say enough."""
    return {"_meta": {"title": title}}


ORDINARY: Json = {
    "checkpoint": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
    "guard": node(
        "ModularLoraGuard",
        model=["checkpoint", 0],
        clip=["checkpoint", 1],
        vae=["checkpoint", 2],
        lora_name=SAFETY_LORA,
    ),
    "lora": node("LoraLoader", model=["guard", 0], clip=["guard", 1], lora_name=TASK_LORA),
    "positive": node("CLIPTextEncode", clip=["lora", 1], text="gloss, racing car") | titled("Positive prompt"),
    "negative": node("CLIPTextEncode", clip=["lora", 1], text="") | titled("Negative prompt"),
    "latent": node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=4),
    "sampler": node(
        "KSampler",
        model=["lora", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=1,
        steps=STEPS,
        cfg=CFG,
        sampler_name=SAMPLER,
        scheduler=SCHEDULER,
    ),
    "decode": node("VAEDecode", samples=["sampler", 0], vae=["guard", 2]),
    "save": node("SaveImage", images=["decode", 0], filename_prefix="guarded"),
}
ORDINARY_COLUMNS = (
    Column("1  Load", ("checkpoint",), 300),
    Column("2  Guard", ("guard",), 380),
    Column("3  Your LoRA", ("lora",), 300),
    Column("4  Prompt", ("positive", "negative", "latent"), 290),
    Column("5  Sample", ("sampler",), 300),
    Column("6  Decode and save", ("decode", "save"), 330),
)
ORDINARY_NOTE = (
    "This is ComfyUI's ordinary graph with a LoRA loader. **Guard** is its only other node: it stands behind the "
    "checkpoint loader, and the model, the CLIP and the VAE go through it.\n\n"
    "The LoRA asks for its style and the prompt for a racing car, which this safety LoRA takes away. Bypass **Guard** "
    "(Ctrl+B) and run again: the car is there. A safety LoRA holds back most of what it suppresses, not all: **2 Gate "
    "and save** looks at what comes out.\n\n"
    "In your own workflow: put **Guard** behind the checkpoint loader, choose a safety LoRA, leave the rest as it is."
)
BUILT = {"1 Guard an ordinary graph": (ORDINARY, ORDINARY_COLUMNS, ORDINARY_NOTE)}

SAMPLING: Json = {
    "safety": node("ModularLoraLoadSafety", lora_name=SAFETY_LORA),
    "task": node("ModularLoraLoadTask", lora_name=TASK_LORA),
    "guard": node("ModularLoraGuardModel", safety_lora=["safety", 0], task_lora=["task", 0]),
    "positive": node("CLIPTextEncode", clip=["guard", 1], text="") | titled("Positive prompt"),
    "negative": node("CLIPTextEncode", clip=["guard", 1], text="") | titled("Negative prompt"),
    "sampler": node(
        "ModularLoraKSampler", model=["guard", 0], positive=["positive", 0], negative=["negative", 0], cfg=7.0
    ),
    "decode": node("ModularLoraDecode", samples=["sampler", 0]),
}
GATING: Json = {
    "settings": node("ModularLoraGateSettings"),
    "gate": node("ModularLoraGate", gate=["settings", 0]),
    "save": node("ModularLoraSaveGated", images=["gate", 0]),
}
TRAINING: Json = {
    "options": node("ModularLoraTaskTrainingOptions"),
    "train": node("ModularLoraTrainTask", options=["options", 0]),
    "previews": node("PreviewImage", images=["train", 3]) | titled("Previews of the training"),
}
BLUEPRINTS: dict[str, tuple[Json, Blueprint]] = {  # file name, which the front end shows -> its graph and its face
    "Guarded sampling": (
        SAMPLING,
        Blueprint(
            "Samples an image with a safety LoRA and a task LoRA beside the model's weights, and decodes it with its "
            "attestation.",
            (
                Column("1  Load", ("safety", "task")),
                Column("2  Guard", ("guard",), 390),
                Column("3  Prompt", ("positive", "negative"), 300),
                Column("4  Sample", ("sampler", "decode"), 360),
            ),
            (
                ("model", "guard", "model"),
                ("clip", "guard", "clip"),
                ("vae", "decode", "vae"),
                ("latent_image", "sampler", "latent_image"),
                ("safety LoRA", "safety", "lora_name"),
                ("safety strength", "safety", "strength"),
                ("task LoRA", "task", "lora_name"),
                ("task strength", "task", "strength_model"),
                ("positive prompt", "positive", "text"),
                ("negative prompt", "negative", "text"),
                ("seed", "sampler", "seed"),
                ("steps", "sampler", "steps"),
                ("cfg", "sampler", "cfg"),
                ("sampler_name", "sampler", "sampler_name"),
                ("scheduler", "sampler", "scheduler"),
                ("denoise", "sampler", "denoise"),
            ),
            (("image", "decode", 0), ("latent", "sampler", 0), ("report", "decode", 1)),
        ),
    ),
    "Gate and save": (
        GATING,
        Blueprint(
            "Judges every image with a detector, acts on those that it flags, and saves only images that a guarded run "
            "made and the gate judged.",
            (
                Column("1  Gate settings", ("settings",), 380),
                Column("2  Gate", ("gate",), 380),
                Column("3  Save", ("save",), 380),
            ),
            (
                ("images", "gate", "images"),
                ("detector", "settings", "detector"),
                ("classifier", "settings", "classifier"),
                ("labels", "settings", "labels"),
                ("threshold", "settings", "threshold"),
                ("action", "settings", "action"),
                ("filename_prefix", "save", "filename_prefix"),
                ("format", "save", "format"),
                ("unfit", "save", "unfit"),
            ),
            (("images", "gate", 0), ("flagged", "gate", 1), ("report", "gate", 4)),
        ),
    ),
    "Train a task LoRA": (
        TRAINING,
        Blueprint(
            "Trains a task LoRA of a data set on the pretrained weights alone, and shows the previews with the safety "
            "LoRA attached.",
            (
                Column("1  Options", ("options",), 460),
                Column("2  Train", ("train",), 460),
                Column("3  Previews", ("previews",), 380),
            ),
            (
                ("model", "train", "model"),
                ("clip", "train", "clip"),
                ("vae", "train", "vae"),
                ("safety_lora", "train", "safety_lora"),
                ("data_set", "train", "data_set"),
                ("preset", "train", "preset"),
                ("output_name", "train", "output_name"),
                ("max_train_steps", "train", "max_train_steps"),
                ("network_dim", "options", "network_dim"),
                ("learning_rate", "options", "learning_rate"),
                ("train_batch_size", "options", "train_batch_size"),
                ("resolution", "options", "resolution"),
                ("sample_every_n_steps", "options", "sample_every_n_steps"),
                ("sample_prompts", "options", "sample_prompts"),
            ),
            (("task_lora", "train", 0), ("report", "train", 1), ("samples", "train", 3)),
        ),
    ),
}
