"""Attempts of the catalogue (escapes.py) with LoRA files: strengths, copies, names that lead elsewhere."""

from __future__ import annotations

from modular_lora_guard.modular_lora.files.reader import sha256_file

from support.escape_ground import LEAST, Ground
from support.escapes import CKPT, GUARD, Graph, attempt, graph, guarded, unguarded
from support.graphs import node

SAFETY, COPY = "safety.safetensors", "copied.safetensors"
DENIED = """[tasks]
deny = ["{}"]
"""


def copied(ground: Ground, name: str, note: str = "") -> None:
    """A copy of the safety LoRA; with a note in its metadata it has another SHA-256."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = ground.loras / name
    path.parent.mkdir(exist_ok=True)
    if not note:
        path.write_bytes((ground.loras / SAFETY).read_bytes())
        return
    with safe_open(ground.loras / SAFETY, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(ground.loras / SAFETY), path, {**metadata, "note": note})


def deny(ground: Ground, name: str = "task.safetensors") -> None:
    sha256 = sha256_file(ground.loras / name)
    ground.write(ground.text(DENIED.format(sha256)))


def task(made: Graph, name: object, strength: float, **more) -> None:
    made["task"]["inputs"] |= {"lora_name": name, "strength_model": strength, "strength_clip": strength, **more}


BLOCKS = ("BASE", "IN00", "IN01", "IN02", "IN03", "M00", "OUT00", "OUT01", "OUT02", "OUT03")  # of the demo world


def only(block: str) -> str:
    """Block weights that leave one block."""
    return ", ".join(f"{name}:0" for name in BLOCKS if name != block)


@graph("the required safety LoRA stands just below the least strength")
def _(g):
    g["safety"]["inputs"]["strength"] = LEAST - 0.01


@graph(
    "the required safety LoRA stands exactly at the least strength",
    "permitted",
    "the least net strength is still enough",
)
def _(g):
    del g["task"], g["guard"]["inputs"]["task_lora"]
    g["safety"]["inputs"]["strength"] = LEAST


@graph("the strength of the safety LoRA is written as a text")
def _(g):
    g["safety"]["inputs"]["strength"] = "0.1"


@graph("the strength of the safety LoRA is wrapped as the front end wraps a list")
def _(g):
    g["safety"]["inputs"]["strength"] = {"__value__": 0.1}


@graph("the strength of the safety LoRA is wrapped twice", "invalid")
def _(g):
    g["safety"]["inputs"]["strength"] = {"__value__": {"__value__": 0.1}}


@graph("the strength of the safety LoRA is not a number")
def _(g):
    g["safety"]["inputs"]["strength"] = float("nan")


@graph("a strength that is not a number comes over a link")
def _(g):
    g["number"] = node("PrimitiveFloat", value=float("nan"))
    g["safety"]["inputs"]["strength"] = ["number", 0]


@graph("a low strength of the safety LoRA comes over a link")
def _(g):
    g["number"] = node("PrimitiveFloat", value=0.2)
    g["safety"]["inputs"]["strength"] = ["number", 0]


@graph("the safety LoRA itself is a task LoRA at -1")
def _(g):
    task(g, SAFETY, -1.0)


@attempt("a copy of the safety LoRA with another SHA-256 is a task LoRA at -1")
def _(ground):
    copied(ground, COPY, "another file")
    made = guarded()
    task(made, COPY, -1.0)
    ground.send(made)


@attempt("a copy of the safety LoRA takes back half of it")
def _(ground):
    copied(ground, COPY, "another file")
    made = guarded()
    task(made, COPY, -0.5)
    ground.send(made)


@attempt("block weights let a copy of the safety LoRA take back half of the blocks")
def _(ground):
    copied(ground, COPY, "another file")
    made = guarded()
    task(made, COPY, -1.0, block_weights="IN01:0, IN02:0, M00:0")
    ground.send(made)


@attempt(
    "block weights let a copy of the safety LoRA take back a single block",
    "permitted",
    "the net strength over all layers is still enough; whoever minds names the task LoRAs that are allowed",
)
def _(ground):
    copied(ground, COPY, "another file")
    made = guarded()
    task(made, COPY, -1.0, block_weights=only("IN00"))
    ground.send(made)


@attempt("a copy of the safety LoRA takes back a single block, where the policy names the task LoRAs")
def _(ground):
    copied(ground, COPY, "another file")
    sha256 = sha256_file(ground.loras / "task.safetensors")
    ground.write(ground.text(f'[tasks]\nallow = ["{sha256}"]\n'))
    made = guarded()
    task(made, COPY, -1.0, block_weights=only("IN00"))
    ground.send(made)


@graph(
    "block weights are sent to Load Safety LoRA",
    "permitted",
    "it has no such input: the safety LoRA acts on all its layers",
)
def _(g):
    g["safety"]["inputs"]["block_weights"] = "0,0,0,0,0,0,0,0,0,0,0,0,0"


def weak_beside_a_namesake(ground) -> dict:
    """The required safety LoRA at 0.2, and another file of its name at 1."""
    made = guarded(task=None)
    made["number"] = node("PrimitiveFloat", value=0.2)
    made["safety"]["inputs"]["strength"] = ["number", 0]
    made["more"] = node("ModularLoraLoadSafety", lora_name=f"sub/{SAFETY}", strength=1.0, safety_lora=["safety", 0])
    made["guard"]["inputs"]["safety_lora"] = ["more", 0]
    return made


@attempt("a second file of the same name stands in for the strength of the safety LoRA")
def _(ground):
    path = ground.loras / "sub" / SAFETY
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((ground.loras / "other.safetensors").read_bytes())
    ground.send(weak_beside_a_namesake(ground))


@attempt(
    "a second file of the same name and weights stands in for the strength of the safety LoRA",
    "permitted",
    why="both together act at 1.2, and net strengths are kept by SHA-256, so that neither hides the other",
)
def _(ground):
    copied(ground, f"sub/{SAFETY}", "another file")
    ground.send(weak_beside_a_namesake(ground))


def huge_terms(ground, name: str, sign: float, cancelling: bool) -> None:
    """A task LoRA on the safety LoRA's layers with terms of 2^40, which cancel in the file itself or in another one."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(ground.loras / SAFETY)
    for key, up in tensors.items():
        if key.endswith("lora_up.weight"):
            up.zero_()
            up[:, 0] = sign * 2.0**40
            down = tensors[key.replace("lora_up", "lora_down")]
            if cancelling:
                up[:, 1], down[1] = -up[:, 0].clone(), down[0].clone()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, ground.loras / name)
    assert torch.isfinite(next(iter(tensors.values()))).all()


@attempt("a task LoRA's huge terms cancel each other and would swallow the safety LoRA's share")
def _(ground):
    huge_terms(ground, "huge.safetensors", 1, True)
    made = guarded()
    made["task"]["inputs"]["lora_name"] = "huge.safetensors"
    ground.send(made)


@attempt("the huge terms of two task LoRAs cancel each other")
def _(ground):
    made = guarded()
    for node_id, name, sign in (("task", "plus.safetensors", 1), ("more", "minus.safetensors", -1)):
        huge_terms(ground, name, sign, False)
        strengths = {"strength_model": 1.0, "strength_clip": 0.0}
        made[node_id] = node("ModularLoraLoadTask", lora_name=name, **strengths)
    made["more"]["inputs"]["task_lora"] = ["task", 0]
    made["guard"]["inputs"]["task_lora"] = ["more", 0]
    ground.send(made)


@attempt("a second safety LoRA's huge terms would swallow the share of the one that is required")
def _(ground):
    huge_terms(ground, "huge.safetensors", 1, True)
    made = guarded(task=None)
    made["more"] = node("ModularLoraLoadSafety", lora_name="huge.safetensors", strength=1.0, safety_lora=["safety", 0])
    made["guard"]["inputs"]["safety_lora"] = ["more", 0]
    ground.send(made)


@graph("another LoRA is loaded in the place of the one that is required")
def _(g):
    g["safety"]["inputs"]["lora_name"] = "other.safetensors"


@attempt("another file has the name of the safety LoRA that is required")
def _(ground):
    path = ground.base / "models" / "safety_loras" / SAFETY
    path.write_bytes((ground.loras / "other.safetensors").read_bytes())
    try:
        ground.send(guarded())
    finally:
        path.unlink()


@attempt(
    "the safety LoRA that is required has been copied to another name",
    "permitted",
    "it is the same file, byte for byte, which is what the policy pins",
)
def _(ground):
    copied(ground, "renamed.safetensors")
    ground.send(guarded(safety="renamed.safetensors"))


@attempt("a task LoRA that is denied has been copied to another name")
def _(ground):
    deny(ground)
    (ground.loras / "harmless.safetensors").write_bytes((ground.loras / "task.safetensors").read_bytes())
    ground.send(guarded(task="harmless.safetensors"))


@attempt("a link in the file system leads to a task LoRA that is denied")
def _(ground):
    deny(ground)
    link = ground.loras / "linked.safetensors"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(ground.loras / "task.safetensors")
    except OSError:  # Windows without the right to make links
        link.write_bytes((ground.loras / "task.safetensors").read_bytes())
    ground.send(guarded(task="linked.safetensors"))


@attempt("a task LoRA that is denied comes over a link from a node that gives any type")
def _(ground):
    deny(ground)
    made = guarded()
    made["name"] = node("EscText", text="task.safetensors")
    made["task"]["inputs"]["lora_name"] = ["name", 0]
    ground.send(made)


@attempt("a task LoRA that is denied comes in the LORA_STACK of another pack")
def _(ground):
    deny(ground)
    made = guarded(task="other.safetensors")
    made["stack"] = node("EscStack", name="task.safetensors", strength=1.0)
    made["task"]["inputs"]["lora_stack"] = ["stack", 0]
    ground.send(made)


@graph("the name of the safety LoRA leads to another folder")
def _(g):
    g["safety"]["inputs"]["lora_name"] = "../checkpoints/world.safetensors"


@attempt("the name of a task LoRA is an absolute path")
def _(ground):
    outside = ground.inputs / "outside.safetensors"
    outside.write_bytes((ground.loras / "other.safetensors").read_bytes())
    made = guarded()
    task(made, str(outside), 1.0)
    ground.send(made)


@graph("a LORA_STACK names a file above its folder, in the way of Windows")
def _(g):
    g["stack"] = node("EscStack", name="..\\..\\input\\outside.safetensors", strength=1.0)
    g["task"]["inputs"]["lora_stack"] = ["stack", 0]


@graph("the classifier of a gate is a file above its folder")
def _(g):
    g["name"] = node("EscText", text="../../user/__modular_lora/policy.toml")
    choices = {"detector": "classifier", "labels": "none", "preset": "none", "threshold": 0.0, "classes": ""}
    choices |= {"action": "as the preset says", "provider": "CPU"}
    g["gate"] = node("ModularLoraGateSettings", classifier=["name", 0], **choices)
    g["shown"] = node("PreviewAny", source=["gate", 1])


@graph("Save Attested Image is told a prefix above its folder", "invalid")
def _(g):
    g["save"]["inputs"]["filename_prefix"] = "../user/__modular_lora/policy"


@attempt(
    "core's data set node writes a guarded picture and a text into the policy's folder",
    "permitted",
    "the picture is a guarded one, and no file of the policy or the record can be named so",
)
def _(ground):
    before = ground.policy.read_bytes()
    made = guarded()
    place = {"folder_name": "../user/__modular_lora", "filename_prefix": "policy.toml"}
    made["data"] = node("SaveImageTextDataSetToFolder", images=["decode", 0], texts="[guard]\nrequired = []", **place)
    ground.send(made)
    assert ground.policy.read_bytes() == before
    assert ground.in_force()


@attempt("the text encoder is the checkpoint's own, where the safety LoRA has a half of its own for it")
def _(ground):
    sha256 = sha256_file(ground.loras / "safety_te.safetensors")
    ground.require(sha256)
    made = guarded(safety="safety_te.safetensors", task=None, clip=True)
    made["pos"]["inputs"]["clip"] = ["ckpt", 1]
    ground.send(made)


@graph("the link to an unguarded MODEL is wrapped as the front end wraps a list", "invalid")
def _(g):
    unguarded(g, CKPT)
    g["stock"]["inputs"]["model"] = {"__value__": CKPT}
    g["stock_save"]["inputs"]["images"] = {"__value__": ["stock_decode", 0]}


@graph("the link to a picture that nobody attested is wrapped as the front end wraps a list")
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["show"] = node("PreviewImage", images={"__value__": ["load", 0]})


@graph("the wrapped link of a sampler leads past Guard Model")
def _(g):
    g["sample"]["inputs"]["model"] = {"__value__": CKPT}


@graph(
    "a second run on an unguarded MODEL refines what the guarded run began",
    policy="""[open]
guarded_as_model = true
[nodes]
sampling = ["KSampler"]
""",
)
def _(g):
    g["hidden"] = node("EscHidden")
    unguarded(g, ["hidden", 0], latent_image=["sample", 0], denoise=0.5)
    g["stock_decode"]["class_type"] = "ModularLoraDecode"


@graph("a node type is denied and used under its other name", policy='[nodes]\ndeny = ["PreviewImage"]\n')
def _(g):
    g["show"] = node("EscAlias", images=["decode", 0])


@graph("a node type is not among those that are allowed", policy='[nodes]\nallow = ["CheckpointLoaderSimple"]\n')
def _(g):
    pass


@graph(
    "a node type that is denied stands where no output needs it",
    "permitted",
    "what no output needs is never evaluated",
    policy='[nodes]\ndeny = ["ImageInvert"]\n',
)
def _(g):
    g["unused"] = node("ImageInvert", image=["decode", 0])


@graph("a node type that is denied is reached by a wrapped link", policy='[nodes]\ndeny = ["ImageInvert"]\n')
def _(g):
    g["denied"] = node("ImageInvert", image=["decode", 0])
    g["save"]["inputs"] |= {"images": {"__value__": ["denied", 0]}, "unattested": "save and say so"}


@graph(
    "Guard Model is put after Guard Model, so that the second could take the first one's place",
    policy="""[open]
guarded_as_model = true
""",
)
def _(g):
    g["as_model"] = node("ModularLoraGuardedAsModel", guarded_model=GUARD)
    g["guard2"] = node("ModularLoraGuardModel", model=["as_model", 0], safety_lora=["safety", 0])
    g["sample"]["inputs"]["model"] = ["guard2", 0]
