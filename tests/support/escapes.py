"""Attempts to get an unguarded image out of a ComfyUI under a policy: graphs.

escape_detours.py, escape_actions.py, escape_cancelling.py, escape_bases.py, escape_requests.py and escape_leaves.py add
those that need files, requests and gates.

Each attempt is a sentence and what ComfyUI is asked to do. ``outcome``: "refused" by the policy or the guard, queued or
running, and in the record; "invalid", which ComfyUI itself refuses; "permitted" on purpose, for the reason given, and
then every image is attested with the required safety LoRA at the strength that the policy asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from support.escape_ground import Ground
from support.graphs import decode, guarded_graph, node, sampler

Graph = dict[str, dict]
CKPT, GUARD, DECODED = ["ckpt", 0], ["guard", 0], ["decode", 0]
NAMED = """[open]
guarded_as_model = true
[nodes]
sampling = ["KSampler", "KSamplerAdvanced", "SamplerCustom", "BasicGuider", "CFGGuider", "DualCFGGuider"]
patching = ["BasicScheduler", "FreeU", "PerpNegGuider", "ModelMergeSimple", "ModelMergeSubtract"]
"""
GATED = "[gate]\nrequired = true\n"


@dataclass(frozen=True)
class Attempt:
    name: str
    act: Callable[[Ground], None]
    outcome: str = "refused"
    why: str = ""  # it is permitted
    policy: str = ""  # what the policy holds beside [guard]


ATTEMPTS: list[Attempt] = []


def attempt(name: str, outcome: str = "refused", why: str = "", policy: str = ""):
    """Add a function that does the attempt."""

    def add(act: Callable[[Ground], None]) -> Callable[[Ground], None]:
        assert bool(why) == (outcome == "permitted")
        ATTEMPTS.append(Attempt(name, act, outcome, why, policy))
        return act

    return add


def graph(name: str, outcome: str = "refused", why: str = "", policy: str = ""):
    """Add a function that changes a guarded graph, which is then sent."""

    def add(change: Callable[[Graph], None]) -> Callable[[Graph], None]:
        def act(ground: Ground) -> None:
            made = guarded()
            change(made)
            ground.send(made)

        attempt(name, outcome, why, policy)(act)
        return change

    return add


def guarded(**options) -> Graph:
    """A guarded graph; its save never comes from the cache."""
    made = guarded_graph(**options)
    made["save"]["inputs"]["filename_prefix"] = f"e{next(_numbers)}"
    return made


_numbers = iter(range(10**9))


def unguarded(made: Graph, model: list, kind: str = "KSampler", **changes) -> None:
    """Add a stock sampler, VAE Decode and Save Image."""
    made["stock"] = sampler(model, kind, **changes)
    show(made, ["stock", 0])


def show(made: Graph, latent: list, decoder: str = "VAEDecode", saver: str = "SaveImage") -> None:
    made["stock_decode"] = decode(latent, decoder)
    made["stock_save"] = node(saver, images=["stock_decode", 0], filename_prefix="x")


def custom(made: Graph, guider: dict) -> None:
    """SamplerCustomAdvanced with this guider, stock decode and save."""
    made["guider"] = guider
    made["noise"], made["euler"] = node("RandomNoise", noise_seed=1), node("KSamplerSelect", sampler_name="euler")
    made["sigmas"] = node("BasicScheduler", model=CKPT, scheduler="normal", steps=2, denoise=1.0)
    links = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0], "sigmas": ["sigmas", 0]}
    made["custom"] = node("SamplerCustomAdvanced", **links, latent_image=["latent", 0])
    show(made, ["custom", 0])


CONDS = {"positive": ["pos", 0], "negative": ["neg", 0]}


# Rewired around the guard


@graph("a stock KSampler takes the checkpoint's own MODEL")
def _(g):
    unguarded(g, CKPT)


@graph("the Guarded KSampler takes the checkpoint's own MODEL")
def _(g):
    g["sample"]["inputs"]["model"] = CKPT


@graph("Guard Model is bypassed, so its MODEL input goes on to the Guarded KSampler")
def _(g):
    g["sample"]["inputs"]["model"] = g.pop("guard")["inputs"]["model"]


@graph("Guard Model is muted, so the Guarded KSampler has no model", "invalid")
def _(g):
    del g["guard"], g["sample"]["inputs"]["model"]


@graph("two checkpoints are loaded and only one is guarded")
def _(g):
    g["second"] = node("CheckpointLoaderSimple", ckpt_name="second.safetensors")
    unguarded(g, ["second", 0])


@graph("an unguarded branch with a preview stands beside the guarded one")
def _(g):
    unguarded(g, CKPT)
    g["stock_save"] = node("PreviewImage", images=["stock_decode", 0])


@graph("a subgraph, flattened by the front end to ids with a colon, holds a stock KSampler")
def _(g):
    g["12:3"] = sampler(CKPT)
    g["12:4"] = decode(["12:3", 0], "VAEDecode")
    g["12:7:1"] = node("SaveImage", images=["12:4", 0], filename_prefix="x")


@graph("a group node inside a group node holds a Guarded KSampler on the checkpoint's own MODEL")
def _(g):
    g["5:0:0"], g["5:0:1"] = sampler(CKPT, "ModularLoraKSampler"), decode(["5:0:0", 0])
    g["5:1"] = node("ModularLoraSaveImage", images=["5:0:1", 0], filename_prefix="x", unattested="save and say so")


@graph("KSampler (Advanced) takes the checkpoint's own MODEL")
def _(g):
    advanced = {"add_noise": "enable", "noise_seed": 1, "start_at_step": 0, "end_at_step": 2}
    unguarded(g, CKPT, "KSamplerAdvanced", **advanced, return_with_leftover_noise="disable")


@graph("SamplerCustom takes the checkpoint's own MODEL")
def _(g):
    custom(g, node("BasicGuider", model=CKPT, conditioning=["pos", 0]))
    links = {"sampler": ["euler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}
    g["custom"] = node("SamplerCustom", model=CKPT, add_noise=True, noise_seed=1, cfg=2.0, **CONDS, **links)


@graph("SamplerCustomAdvanced runs a BasicGuider on the checkpoint's own MODEL")
def _(g):
    custom(g, node("BasicGuider", model=CKPT, conditioning=["pos", 0]))


@graph("SamplerCustomAdvanced runs a CFGGuider on the checkpoint's own MODEL")
def _(g):
    custom(g, node("CFGGuider", model=CKPT, cfg=2.0, **CONDS))


@graph(
    "SamplerCustomAdvanced runs a DualCFGGuider on the checkpoint's own MODEL, though the policy names it", policy=NAMED
)
def _(g):
    two = {
        "cond1": ["pos", 0],
        "cond2": ["pos", 0],
        "negative": ["neg", 0],
        "cfg_conds": 2.0,
        "cfg_cond2_negative": 2.0,
    }
    custom(g, node("DualCFGGuider", model=CKPT, style="regular", **two))


@graph("a PerpNegGuider that the policy names as patching runs on the checkpoint's own MODEL", policy=NAMED)
def _(g):
    perpneg = {"empty_conditioning": ["neg", 0], "cfg": 2.0, "neg_scale": 1.0}
    custom(g, node("PerpNegGuider", model=CKPT, **CONDS, **perpneg))
    g["stock_decode"]["class_type"] = "ModularLoraDecode"  # so that it is queued


@graph("a KSampler that the policy names takes the checkpoint's own MODEL", policy=NAMED)
def _(g):
    unguarded(g, CKPT)


@graph("a KSampler that the policy names takes a GUARDED_MODEL, whose decode is the stock one", policy=NAMED)
def _(g):
    unguarded(g, GUARD)


@graph("Guarded Model as MODEL goes into a KSampler, though neither is named")
def _(g):
    g["as_model"] = node("ModularLoraGuardedAsModel", guarded_model=GUARD)
    g["sample"] = sampler(["as_model", 0])


@graph(
    "a KSampler that the policy names takes Guarded Model as MODEL",
    "permitted",
    "the policy names it, and the guard is in the MODEL itself",
    policy=NAMED,
)
def _(g):
    g["as_model"] = node("ModularLoraGuardedAsModel", guarded_model=GUARD)
    g["sample"] = sampler(["as_model", 0])


# LoRAs and merges beside the guard


@graph("LoraLoader merges a LoRA in front of Guard Model")
def _(g):
    both = {"model": CKPT, "clip": ["ckpt", 1], "strength_model": 1.0, "strength_clip": 1.0}
    g["lora"] = node("LoraLoader", lora_name="other.safetensors", **both)
    g["guard"]["inputs"] |= {"model": ["lora", 0], "accept_merged": True}


@graph("LoraLoaderModelOnly takes the safety LoRA back out behind Guarded Model as MODEL", policy=NAMED)
def _(g):
    g["as_model"] = node("ModularLoraGuardedAsModel", guarded_model=GUARD)
    g["lora"] = node("LoraLoaderModelOnly", model=["as_model", 0], lora_name="safety.safetensors", strength_model=-1.0)
    g["sample"] = sampler(["lora", 0])


@graph("a LoRA merged by LoraLoaderModelOnly alone stands in for the guard")
def _(g):
    g["lora"] = node("LoraLoaderModelOnly", model=CKPT, lora_name="safety.safetensors", strength_model=1.0)
    unguarded(g, ["lora", 0])


@graph("LoraLoaderBypass puts a LoRA onto the layers in front of Guard Model")
def _(g):
    both = {"model": CKPT, "clip": ["ckpt", 1], "strength_model": -1.0, "strength_clip": 0.0}
    g["lora"] = node("LoraLoaderBypass", lora_name="safety.safetensors", **both)
    g["guard"]["inputs"]["model"] = ["lora", 0]


@graph("a LoRA hook on the conditioning takes the safety LoRA back out while it samples")
def _(g):
    g["hook"] = node("CreateHookLora", lora_name="safety.safetensors", strength_model=-1.0, strength_clip=0.0)
    hooked = {"strength": 1.0, "set_cond_area": "default", "hooks": ["hook", 0]}
    g["hooked"] = node("ConditioningSetProperties", cond_NEW=["pos", 0], **hooked)
    g["sample"]["inputs"]["positive"] = ["hooked", 0]


@graph("a checkpoint as a LoRA hook changes the weights while it samples")
def _(g):
    g["hook"] = node("CreateHookModelAsLora", ckpt_name="second.safetensors", strength_model=1.0, strength_clip=0.0)
    hooked = {"strength": 1.0, "set_cond_area": "default", "hooks": ["hook", 0]}
    g["hooked"] = node("ConditioningSetProperties", cond_NEW=["pos", 0], **hooked)
    g["sample"]["inputs"]["positive"] = ["hooked", 0]


@graph("ModelMergeSimple merges the guarded model into the plain one, though the policy names it", policy=NAMED)
def _(g):
    g["as_model"] = node("ModularLoraGuardedAsModel", guarded_model=GUARD)
    g["merge"] = node("ModelMergeSimple", model1=CKPT, model2=["as_model", 0], ratio=1.0)
    g["sample"] = sampler(["merge", 0])


@graph("ModelMergeSubtract takes the guarded model from itself, though the policy names it", policy=NAMED)
def _(g):
    g["as_model"] = node("ModularLoraGuardedAsModel", guarded_model=GUARD)
    g["merge"] = node("ModelMergeSubtract", model1=["as_model", 0], model2=["as_model", 0], multiplier=1.0)
    g["sample"] = sampler(["merge", 0])


@graph("a merged base is accepted on Guard Model itself", policy=NAMED)
def _(g):
    g["merge"] = node("ModelMergeSimple", model1=CKPT, model2=["second", 0], ratio=0.5)
    g["second"] = node("CheckpointLoaderSimple", ckpt_name="second.safetensors")
    g["guard"]["inputs"] |= {"model": ["merge", 0], "accept_merged": True}


@graph("EasyCache skips evaluations behind the guard")
def _(g):
    cache = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    g["cache"] = node("EasyCache", model=CKPT, **cache)
    g["guard"]["inputs"]["model"] = ["cache", 0]


@graph("CheckpointSave writes the unguarded weights to a file")
def _(g):
    g["weights"] = node("CheckpointSave", model=CKPT, clip=["ckpt", 1], vae=["ckpt", 2], filename_prefix="w")


@graph("ModelSave writes the guarded model to a file")
def _(g):
    g["weights"] = node("ModelSave", model=GUARD, filename_prefix="w")


@graph("CLIPSave writes the text encoder to a file")
def _(g):
    g["weights"] = node("CLIPSave", clip=["ckpt", 1], filename_prefix="w")


@graph("LoraSave extracts a LoRA from the difference of two models")
def _(g):
    extract = {"rank": 8, "lora_type": "standard", "bias_diff": False, "filename_prefix": "w"}
    g["weights"] = node("LoraSave", model_diff=CKPT, **extract)


@graph("core's Train LoRA node evaluates the checkpoint's own MODEL")
def _(g):
    g["train"] = node("TrainLoraNode", model=CKPT, latents=["latent", 0], positive=["pos", 0], batch_size=1, steps=1)
    g["weights"] = node("SaveLoRA", lora=["train", 1], prefix="w")


@graph("the pack's own training node, which is not open, samples the plain checkpoint")
def _(g):
    g["train"] = node("ModularLoraTrainTask", model=CKPT, clip=["ckpt", 1], vae=["ckpt", 2])


@graph("the Audit node, which is not open, draws its unguarded arm")
def _(g):
    g["audit"] = node("ModularLoraAudit", model=CKPT, clip=["ckpt", 1], vae=["ckpt", 2])
