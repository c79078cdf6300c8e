"""Attempts of the catalogue (escapes.py) with task LoRAs that cancel a safety LoRA past the weights of its layers.

Every file of an attempt keeps the safety LoRA's net strength at 1. ``moments`` undoes it where it acts, on inputs like
those of the base (`cancelling.against_inputs`): the sampling run stops. ``outputs`` undoes a safety LoRA of ``to_v``
one layer further on (`cancelling.behind_values`): Guard Model stops.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from modular_lora_guard.modular_lora.guard import concept
from modular_lora_guard.modular_lora.util.hashing import hash_file
from modular_lora_guard.tools.benchmarks import cancelling
from safetensors.torch import save_file

from support.escape_bases import LOADERS, SAFETY, before
from support.escape_ground import LEAST, Ground
from support.escapes import Graph, attempt, guarded, node

VALUES, PROMPT, HEADS = "values.safetensors", "gloss, cat", 8
SAID = {"moments": "as it acted, a net strength of", "outputs": "functional strength is"}  # what refuses them
VARIANTS: dict[str, tuple[tuple[str, float], ...]] = {
    "in one file": (("{}", 1.0),),
    "in two files": (("{}_even", 1.0), ("{}_odd", 1.0)),
    "as a dense change": (("{}_dense", 1.0),),
    "as a LoKr": (("{}_lokr", 1.0),),
    "at a negative strength": (("{}_negated", -1.0),),
    "between two other task LoRAs": (("task", 0.5), ("{}", 1.0), ("other", 0.5)),
}


def files(ground: Ground) -> None:
    """The safety LoRA ``VALUES`` and the files against it, made where no policy is in force."""
    if (ground.loras / VALUES).exists():
        return
    ground.write(None)
    model, clip, _ = ground.comfy.nodes.CheckpointLoaderSimple().load_checkpoint("world.safetensors")
    info, state = ground.comfy.anatomy.model_info(model), model.model.state_dict()
    values = cancelling.only(cancelling.factors(ground.loras / SAFETY), "_to_v")
    values = {name: (down, 20 * up) for name, (down, up) in values.items()}  # by themselves they do little
    modules = {name: model.model.get_submodule(info.specs[info.key_map[name]].path) for name in values}
    with cancelling.moments(modules) as moments:
        cancelling.drawn(model, clip, (PROMPT,))
    outputs = [name.replace("_to_v", "_to_out_0") for name in values]
    weights = {name: state[info.key_map[name]] for name in outputs}
    made = {
        "moments": cancelling.against_inputs(values, moments, ridge=1e-2),
        "outputs": cancelling.behind_values(values, weights, HEADS),
    }
    for name, layers in made.items():
        half = lambda first: {n: (d[first::2], u[:, first::2]) for n, (d, u) in layers.items()}  # noqa: E731, B023
        forms = {"": layers, "_even": half(0), "_odd": half(1), "_negated": cancelling.negated(layers)}
        for form, some in forms.items():
            cancelling.save(ground.loras / f"{name}{form}.safetensors", some)
        whole = {n: (up @ down).float().contiguous() for n, (down, up) in layers.items()}
        save_file({f"{n}.diff": change for n, change in whole.items()}, ground.loras / f"{name}_dense.safetensors")
        pairs = {f"{n}.lokr_w1": torch.ones(1, 1) for n in whole} | {f"{n}.lokr_w2": w for n, w in whole.items()}
        save_file(pairs, ground.loras / f"{name}_lokr.safetensors")
    cancelling.save(ground.loras / VALUES, values, {concept.PROMPTS_KEY: json.dumps([PROMPT])})
    ground.comfy.folder_paths.filename_list_cache.clear()


def task_loras(made: Graph, *loras: tuple[str, float]) -> None:
    """In a chain of Load Task LoRA."""
    link: dict = {}
    for i, (name, strength) in enumerate(loras):
        values = {"lora_name": name, "strength_model": strength, "strength_clip": 0.0}
        made[f"task{i}"] = node("ModularLoraLoadTask", **values, **link)
        link = {"task_lora": [f"task{i}", 0]}
    made["guard"]["inputs"] |= link


def stack(made: Graph, *loras: tuple[str, float]) -> None:
    ((name, strength),) = loras
    made["stack"] = node("EscStack", name=name, strength=strength)
    made["guard"]["inputs"]["lora_stack"] = ["stack", 0]


def safety_lora(made: Graph, *loras: tuple[str, float]) -> None:
    ((name, strength),) = loras
    made["more"] = node("ModularLoraLoadSafety", lora_name=name, strength=strength, safety_lora=["safety", 0])
    made["guard"]["inputs"]["safety_lora"] = ["more", 0]


def both_halves(made: Graph, *loras: tuple[str, float]) -> None:
    before(made, *loras, kind="LoraLoader")


def cancels(kind: str, how: str, variant: str, load: Callable[..., None], name: str, more: str = "") -> None:
    """An attempt that brings ``variant`` of the attack ``kind`` in by ``load``; it must be refused for what it is."""

    def act(ground: Ground) -> None:
        files(ground)
        sha256 = hash_file(ground.loras / VALUES)
        ground.require(sha256, more)
        made = guarded(safety=VALUES, task=None, clip=kind == "outputs")
        load(made, *((f"{form.format(kind)}.safetensors", strength) for form, strength in VARIANTS[variant]))
        ground.send(made)
        assert any(SAID[kind] in sentence for sentence in ground.seen.refused), ground.seen.refused

    attempt(f"{name} {how}")(act)


for kind, name in {
    "moments": "a file against the second moments of the layers' inputs",
    "outputs": "a change of to_out against a safety LoRA of to_v",
}.items():
    for variant in VARIANTS:
        cancels(kind, f"comes {variant}", variant, task_loras, name)
    for how, load, variant, more in (
        ("comes in a LORA_STACK", stack, "in one file", ""),
        ("is loaded as a second safety LoRA", safety_lora, "in one file", ""),
        ("comes by a loader before the guard", before, "in one file", LOADERS),
        ("comes by a loader of both halves before the guard", both_halves, "at a negative strength", LOADERS),
        ("comes by two loaders before the guard", before, "in two files", LOADERS),
    ):
        cancels(kind, how, variant, load, name, more)


@attempt("a change of to_out against a safety LoRA of to_v comes where Guard Model has no CLIP to measure it with")
def _(ground):
    files(ground)
    sha256 = hash_file(ground.loras / VALUES)
    asked = f'{{sha256 = "{sha256}", min_net_strength = {LEAST}, min_functional_strength = 0.5}}'
    ground.write(f"[guard]\nrequired = [{asked}]\n")
    made = guarded(safety=VALUES, task=None)
    task_loras(made, ("outputs.safetensors", 1.0))
    ground.send(made)
    assert any("functional strength" in sentence for sentence in ground.seen.refused), ground.seen.refused
