"""Random mutations of guarded graphs, the nodes that they may insert, and the references that judge the images."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from itertools import count

from support.graphs import decode, guarded_graph, sampler

Graph = dict[str, dict]
Link = list
PIXELS = 48
LORAS = tuple(f"few_{name}.safetensors" for name in ("safety", "task", "other", "safety_te", "task_te"))
COPY = "copy_of_{}"  # the safety LoRA under another name and hash
GUARDED, SAFETY, TASK = "MODULAR_LORA_GUARDED_MODEL", "MODULAR_LORA_SAFETY", "MODULAR_LORA_TASK"
SAMPLERS = ("euler", "heun", "dpmpp_2m", "euler_ancestral", "ddim", "uni_pc", "lcm")
MODEL0, CLIP0 = ["ckpt", 0], ["ckpt", 1]

HOOK = {"class_type": "CreateHookLora", "inputs": {"lora_name": LORAS[0], "strength_model": -1.0, "strength_clip": 0.0}}
HELPERS = {  # nodes that an inserted node may need beside it
    "plain": sampler(MODEL0, seed=7),
    "plain_pos": {"class_type": "CLIPTextEncode", "inputs": {"clip": CLIP0, "text": "a dog on a hill"}},
    "plain_image": decode(["plain", 0], "VAEDecode"),
    "hook": HOOK,
    "no_hook": {"class_type": "CreateHookLora", "inputs": HOOK["inputs"] | {"strength_model": 0.0}},
    "mask": {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": PIXELS, "height": PIXELS}},
}
LORA = {"lora_name": LORAS[2], "strength_model": 0.8}
ATTENTION = {"q": 1.1, "k": 1.0, "v": 0.9, "out": 1.0}
CACHE = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
SCALE = {"upscale_method": "nearest-exact", "width": PIXELS, "height": PIXELS, "crop": "disabled"}
# type -> (class, input that takes the edge, output that goes on, other inputs)
INSERTS: dict[str, list[tuple[str, str, int, dict]]] = {
    "MODEL": [
        ("LoraLoaderModelOnly", "model", 0, LORA),
        ("LoraLoaderModelOnly", "model", 0, LORA | {"lora_name": LORAS[0], "strength_model": -1.0}),
        ("LoraLoader", "model", 0, LORA | {"clip": CLIP0, "strength_clip": 1.0}),
        ("ModelMergeSimple", "model1", 0, {"model2": MODEL0, "ratio": 0.5}),
        ("ModelMergeSimple", "model2", 0, {"model1": MODEL0, "ratio": 0.5}),
        ("ModelSamplingDiscrete", "model", 0, {"sampling": "eps", "zsnr": False}),
        ("ModelSamplingDiscrete", "model", 0, {"sampling": "v_prediction", "zsnr": True}),
        ("ModelSamplingContinuousEDM", "model", 0, {"sampling": "eps", "sigma_max": 20.0, "sigma_min": 0.01}),
        ("FreeU", "model", 0, {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}),
        ("HyperTile", "model", 0, {"tile_size": 32, "swap_size": 1, "max_depth": 0, "scale_depth": False}),
        ("PerturbedAttentionGuidance", "model", 0, {"scale": 2.0}),
        ("SelfAttentionGuidance", "model", 0, {"scale": 0.5, "blur_sigma": 2.0}),
        ("RescaleCFG", "model", 0, {"multiplier": 0.7}),
        ("DifferentialDiffusion", "model", 0, {}),
        ("PerpNeg", "model", 0, {"empty_conditioning": ["neg", 0], "neg_scale": 1.0}),
        ("EasyCache", "model", 0, CACHE),
        ("LazyCache", "model", 0, CACHE),
        ("UNetCrossAttentionMultiply", "model", 0, ATTENTION),
        ("TestClone", "model", 0, {}),
        ("TestRebind", "value", 0, {}),
        *(("TestPop", "model", 0, {"what": what, "after": n}) for what in ("one", "layers", "all") for n in (0, 1)),
    ],
    "CLIP": [
        ("CLIPSetLastLayer", "clip", 0, {"stop_at_clip_layer": -2}),
        ("SetClipHooks", "clip", 0, {"apply_to_conds": True, "schedule_clip": False, "hooks": ["hook", 0]}),
        ("SetClipHooks", "clip", 0, {"apply_to_conds": True, "schedule_clip": True, "hooks": ["no_hook", 0]}),
        ("LoraLoader", "clip", 1, LORA | {"lora_name": LORAS[4], "model": MODEL0, "strength_clip": 1.0}),
        ("CLIPMergeSimple", "clip1", 0, {"clip2": CLIP0, "ratio": 0.5}),
        ("CLIPMergeSimple", "clip2", 0, {"clip1": CLIP0, "ratio": 0.0}),
        ("CLIPAttentionMultiply", "clip", 0, ATTENTION),
        ("TestRebind", "value", 0, {}),
    ],
    "CONDITIONING": [
        ("ConditioningCombine", "conditioning_1", 0, {"conditioning_2": ["plain_pos", 0]}),
        ("ConditioningConcat", "conditioning_to", 0, {"conditioning_from": ["plain_pos", 0]}),
        ("ConditioningConcat", "conditioning_to", 0, {"conditioning_from": ["neg", 0]}),
        (
            "ConditioningAverage",
            "conditioning_to",
            0,
            {"conditioning_from": ["neg", 0], "conditioning_to_strength": 0.6},
        ),
        ("ConditioningZeroOut", "conditioning", 0, {}),
        ("ConditioningSetTimestepRange", "conditioning", 0, {"start": 0.0, "end": 0.9}),
        ("ConditioningSetProperties", "cond_NEW", 0, {"strength": 0.8, "set_cond_area": "default"}),
        *(
            (
                "ConditioningSetProperties",
                "cond_NEW",
                0,
                {"strength": 1.0, "set_cond_area": "default", "hooks": [name, 0]},
            )
            for name in ("hook", "no_hook")
        ),
    ],
    "LATENT": [
        ("LatentUpscale", "samples", 0, SCALE | {"upscale_method": "bilinear", "width": 80}),
        ("LatentUpscale", "samples", 0, SCALE),
        ("LatentMultiply", "samples", 0, {"multiplier": 0.9}),
        ("LatentAdd", "samples1", 0, {"samples2": ["plain", 0]}),
        ("LatentInterpolate", "samples1", 0, {"samples2": ["plain", 0], "ratio": 0.01}),
        ("LatentBlend", "samples1", 0, {"samples2": ["plain", 0], "blend_factor": 0.0}),
        ("LatentBatch", "samples1", 0, {"samples2": ["plain", 0]}),
        ("LatentBatch", "samples2", 0, {"samples1": ["plain", 0]}),
        ("LatentFlip", "samples", 0, {"flip_method": "x-axis: vertically"}),
        ("RepeatLatentBatch", "samples", 0, {"amount": 2}),
        ("LatentFromBatch", "samples", 0, {"batch_index": 0, "length": 1}),
        ("SetLatentNoiseMask", "samples", 0, {"mask": ["mask", 0]}),
        *(("KSampler", "latent_image", 0, sampler(MODEL0, seed=3, denoise=d)["inputs"]) for d in (0.5, 1.0)),
        *(("ModularLoraKSampler", "latent_image", 0, sampler(["guard", 0], denoise=d)["inputs"]) for d in (0.5, 1.0)),
    ],
    "IMAGE": [
        ("ImageInvert", "image", 0, {}),
        ("ImageScale", "image", 0, SCALE),
        ("ImageScale", "image", 0, SCALE | {"upscale_method": "bicubic", "width": 64}),
        ("ImageBatch", "image1", 0, {"image2": ["plain_image", 0]}),
        ("ImageBatch", "image2", 0, {"image1": ["plain_image", 0]}),
    ],
}


def install(nodes, checkpoint: tuple) -> None:
    """The test's own nodes: a loaded checkpoint, any-type switch and reroute, and three that tamper with a model."""
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import WrappersMP
    from comfy.sd import CLIP

    class Any(str):
        def __ne__(self, other):
            return False

    anything = Any("*")

    def node(run, *returns, **inputs):
        def input_types(cls):
            return {"required": inputs}

        def execute(self, **given):
            made = run(**given)
            return made if len(returns) > 1 else (made,)

        members = {"INPUT_TYPES": classmethod(input_types), "RETURN_TYPES": returns, "FUNCTION": "run"}
        return type("TestNode", (), members | {"CATEGORY": "test", "run": execute})

    def rebind(value):
        value = value.clone()
        value.__class__ = CLIP if isinstance(value, CLIP) else ModelPatcher
        return value

    def pop(model, what, after):
        calls = iter(range(10**6))

        def wrapper(executor, *args, **kwargs):
            root = executor.class_obj.diffusion_model
            if next(calls) >= after:
                layers = [m for m in root.modules() if m is not root and "forward" in m.__dict__]
                for module in layers[:1] if what == "one" else layers if what == "layers" else [*layers, root]:
                    module.__dict__.pop("forward", None)
            return executor(*args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test_pop", wrapper)
        return model

    choices = (["one", "layers", "all"],)
    nodes.NODE_CLASS_MAPPINGS |= {
        "TestCheckpoint": node(lambda: checkpoint, "MODEL", "CLIP", "VAE"),
        "TestReroute": node(lambda value: value, anything, value=(anything,)),
        "TestSwitch": node(
            lambda a, b, use_a: a if use_a else b, anything, a=(anything,), b=(anything,), use_a=("BOOLEAN",)
        ),
        "TestClone": node(lambda model: model.clone(), "MODEL", model=("MODEL",)),
        "TestRebind": node(rebind, anything, value=(anything,)),
        "TestPop": node(pop, "MODEL", model=("MODEL",), what=choices, after=("INT", {"default": 0})),
    }


def edges(graph: Graph) -> Iterator[tuple[str, str, Link]]:
    for name, node in graph.items():
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                yield name, key, value


def output_type(classes: dict, graph: Graph, link: Link) -> str:
    """The type on a link; any-type nodes give what goes in."""
    node = graph[link[0]]
    if node["class_type"] in ("TestReroute", "TestSwitch", "TestRebind"):
        key = {"TestReroute": "value", "TestRebind": "value"}.get(node["class_type"], "a")
        return output_type(classes, graph, node["inputs"][key])
    return str(classes[node["class_type"]].RETURN_TYPES[link[1]])


def ancestors(graph: Graph, name: str) -> set[str]:
    found, todo = set(), [name]
    while todo:
        if (current := todo.pop()) not in found and current in graph:
            found.add(current)
            todo += [v[0] for v in graph[current]["inputs"].values() if isinstance(v, list)]
    return found


class Mutator:
    """One deterministic guarded graph and its mutations."""

    def __init__(self, seed: int, classes: dict):
        self.random, self.classes, self.done, self.numbers = random.Random(seed), classes, [], count()
        pick = self.random.choice
        safety, task = pick((LORAS[0], LORAS[3])), pick((None, *LORAS[1:3], LORAS[4]))
        self.graph = guarded_graph(safety, task, clip=safety == LORAS[3] or pick((True, False)))
        self.graph["ckpt"] = {"class_type": "TestCheckpoint", "inputs": {}}
        self.graph["latent"]["inputs"] |= {"width": PIXELS, "height": PIXELS}
        self.graph["save"]["inputs"]["unattested"] = "save and say so"
        self._route(pick(("plain", "model", "stock", "advanced", "guider", "perpneg")))
        for _ in range(pick((1, 1, 2, 3))):
            getattr(self, pick(("insert", "insert", "insert", "rewire", "bypass", "hide", "settings", "settings")))()
            self._add_helpers()
        self._add_saves()

    def _route(self, kind: str) -> None:
        self.done.append(kind)
        if kind == "plain":
            return
        graph, model = self.graph, ["as_model", 0]
        graph["as_model"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
        inputs = graph["sample"]["inputs"]
        if kind in ("model", "stock"):
            graph["sample"] = sampler(model, "KSampler" if kind == "stock" else "ModularLoraKSampler")
        elif kind == "advanced":
            inputs |= {"add_noise": "enable", "noise_seed": inputs.pop("seed"), "start_at_step": 0, "end_at_step": 2}
            inputs |= {"return_with_leftover_noise": "disable", "model": self.random.choice((model, ["guard", 0]))}
            inputs.pop("denoise")
            graph["sample"]["class_type"] = "ModularLoraKSamplerAdvanced"
        else:
            conds = {"positive": ["pos", 0], "negative": ["neg", 0], "cfg": 2.0}
            guider = {"class_type": "ModularLoraGuider", "inputs": {"model": ["guard", 0], **conds}}
            if kind == "perpneg":
                more = {"model": model, "empty_conditioning": ["neg", 0], "neg_scale": 1.0}
                guider = {"class_type": "PerpNegGuider", "inputs": {**conds, **more}}
            schedule = {"model": model, "scheduler": "normal", "steps": 2, "denoise": 1.0}
            links = {name: [name, 0] for name in ("noise", "guider", "sampler", "sigmas")}
            graph |= {
                "guider": guider,
                "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
                "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
                "sigmas": {"class_type": "BasicScheduler", "inputs": schedule},
                "sample": {"class_type": "SamplerCustomAdvanced", "inputs": {**links, "latent_image": ["latent", 0]}},
            }

    def insert(self) -> None:
        """A node on an edge, where one of that type exists."""
        typed = [(n, k, link, output_type(self.classes, self.graph, link)) for n, k, link in edges(self.graph)]
        kinds = sorted({t for *_, t in typed if t in INSERTS})
        kind = self.random.choice([*kinds, *(k for k in ("MODEL", "MODEL", "CLIP") if k in kinds)])
        name, key, link, _ = self.random.choice([edge for edge in typed if edge[3] == kind])
        class_type, takes, gives, others = self.random.choice(INSERTS[kind])
        new = f"new{next(self.numbers)}"
        self.graph[new] = {"class_type": class_type, "inputs": {**copy.deepcopy(others), takes: link}}
        if any(name in ancestors(self.graph, v[0]) for v in self.graph[new]["inputs"].values() if isinstance(v, list)):
            del self.graph[new]  # it would make a cycle
            return
        self.graph[name]["inputs"][key] = [new, gives]
        self.done.append(f"insert {class_type} before {name}.{key}")

    def rewire(self) -> None:
        """An edge to another output of its type, or to the plain checkpoint."""
        typed = [(n, k, link, output_type(self.classes, self.graph, link)) for n, k, link in edges(self.graph)]
        name, key, old, kind = self.random.choice(typed)
        kinds = {kind, "MODEL"} if kind == GUARDED else {kind}
        sources = [[n, i] for n, node in self.graph.items() for i, _ in enumerate(self._returns(node))]
        sources = [s for s in sources if output_type(self.classes, self.graph, s) in kinds and s != old]
        if sources := [s for s in sources if name not in ancestors(self.graph, s[0])]:
            self.graph[name]["inputs"][key] = new = self.random.choice(sources)
            self.done.append(f"rewire {name}.{key} to {new}")

    def _returns(self, node: dict) -> tuple:
        return self.classes[node["class_type"]].RETURN_TYPES

    def bypass(self) -> None:
        """As ComfyUI's bypass: the first input of an output's type goes on in its place, or nothing does."""
        name = self.random.choice([n for n in self.graph if n not in ("ckpt", "save", "latent")])
        links = [v for v in self.graph[name]["inputs"].values() if isinstance(v, list)]
        for consumer, key, link in list(edges(self.graph)):
            if link[0] == name:
                kind = output_type(self.classes, self.graph, link)
                same = [v for v in links if output_type(self.classes, self.graph, v) == kind]
                if same:
                    self.graph[consumer]["inputs"][key] = same[0]
                else:
                    del self.graph[consumer]["inputs"][key]
        del self.graph[name]
        self.done.append(f"bypass {name}")

    def hide(self) -> None:
        """An any-type reroute or switch on an edge; the switch may turn it to something else."""
        name, key, link = self.random.choice(list(edges(self.graph)))
        kind = output_type(self.classes, self.graph, link)
        others = [[n, 0] for n in self.graph if name not in ancestors(self.graph, n) and n != "save"]
        if kind not in ("MODEL", "CLIP", GUARDED, SAFETY, TASK):  # a stock node fails in its own words on another type
            others = [other for other in others if output_type(self.classes, self.graph, other) == kind]
        elif not self.graph[name]["class_type"].startswith("ModularLora"):
            kinds = ("MODEL", GUARDED) if kind == "MODEL" else (kind,)
            others = [other for other in others if output_type(self.classes, self.graph, other) in kinds]
        other, new = self.random.choice(others or [link]), f"new{next(self.numbers)}"
        switch = {"a": link, "b": other, "use_a": self.random.random() < 0.6}
        node = {"class_type": "TestSwitch", "inputs": switch}
        if self.random.random() < 0.4:
            node = {"class_type": "TestReroute", "inputs": {"value": link}}
        self.graph[new] = node
        self.graph[name]["inputs"][key] = [new, 0]
        self.done.append(f"hide {name}.{key} behind {node}")

    def settings(self) -> None:
        """Other values: strengths, files, batch sizes, samplers, prompts."""
        pick, graph = self.random.choice, self.graph
        safety = graph.get("safety", {"inputs": {"lora_name": LORAS[0]}})["inputs"]["lora_name"]
        changes = [
            ("latent", {"batch_size": pick((2, 3))}),
            ("safety", {"strength": pick((0.6, 1.5))}),
            ("guard", {"accept_merged": True}),
            ("task", {"strength_model": pick((-0.5, 0.0, 1.3)), "strength_clip": pick((-0.5, 0.0))}),
            ("task", {"lora_name": safety}),
            ("task", {"lora_name": COPY.format(safety), "strength_model": pick((-1.0, -0.3)), "strength_clip": -0.3}),
            (
                "sample",
                {"sampler_name": pick(SAMPLERS), "scheduler": pick(("karras", "simple")), "cfg": pick((1.0, 4.0))},
            ),
            ("sample", {"steps": 3, "denoise": 0.6, "end_at_step": 1, "return_with_leftover_noise": "enable"}),
            ("pos", {"text": pick(("a (red:1.4) cat", ""))}),
        ]
        name, values = pick([(name, values) for name, values in changes if name in graph])
        fits = {k: v for k, v in values.items() if k in graph[name]["inputs"] or k == "accept_merged"}
        graph[name]["inputs"] |= fits
        self.done.append(f"set {name} {fits}")

    def _add_helpers(self) -> None:
        """The helpers that some link names."""
        while missing := {link[0] for *_, link in edges(self.graph) if link[0] in HELPERS} - set(self.graph):
            self.graph |= {name: copy.deepcopy(HELPERS[name]) for name in sorted(missing)}

    def _add_saves(self) -> None:
        """A save right behind every guarded decode."""
        for name in [n for n, node in self.graph.items() if node["class_type"] == "ModularLoraDecode"]:
            self.graph[f"save_{name}"] = copy.deepcopy(self.graph["save"])
            self.graph[f"save_{name}"]["inputs"] |= {"images": [name, 0]}

    def __str__(self) -> str:
        return "; ".join(self.done) + "\n" + json.dumps(self.graph, indent=1)
