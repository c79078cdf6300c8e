"""200 random mutations of guarded graphs: no image is ever both unguarded and reported guarded.

What the guard says of an image is never the judge. The judge is the same graph with every LoRA merged in fp32 by
ComfyUI's own loader, the safety LoRA into every model and CLIP that the graph uses, and that graph without it.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import re
from collections import Counter

import pytest
import torch
from conftest import new_executor
from PIL import Image
from support.drop_in import translated, without_node
from support.errors import refuses
from support.graphs import GraphError, guarded_graph, keeping_code, sampler, save_lora
from support.mutations import COPY, LORAS, Graph, Mutator, ancestors, edges, install

pytestmark = pytest.mark.slow
GROUPS, SIZE, SAMPLE, ATTACH_SAMPLE = 20, 10, 8, 5
GUARDED = ("guarded: ", "guarded; edited: ")  # how a decode's report of a guarded image begins
STOCK = {
    "ModularLoraGuardedAsModel": ("TestReroute", {"guarded_model": "value"}),
    "ModularLoraKSampler": ("KSampler", {}),
    "ModularLoraKSamplerAdvanced": ("KSamplerAdvanced", {}),
    "ModularLoraGuider": ("CFGGuider", {}),
    "ModularLoraDecode": ("VAEDecode", {}),
    "TestRebind": ("TestReroute", {}),
    "TestPop": ("TestReroute", {"model": "value"}),
}


@pytest.fixture(scope="module")
def world(comfy):
    """The executor that all graphs share. Its checkpoint has text encoders in fp32, for speed."""
    from comfy.cli_args import args

    args.fp32_text_enc = True
    model, clip, vae = comfy.nodes.CheckpointLoaderSimple().load_checkpoint("world.safetensors")
    args.fp32_text_enc = False
    write_loras(comfy, model, clip)
    before = dict(comfy.nodes.NODE_CLASS_MAPPINGS)
    install(comfy.nodes, (model, clip, vae))
    execution, sizes = comfy.execution, {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    yield keeping_code(execution.PromptExecutor(comfy.server, execution.CacheType.CLASSIC, cache_args=sizes))
    for name in set(comfy.nodes.NODE_CLASS_MAPPINGS) - set(before):
        del comfy.nodes.NODE_CLASS_MAPPINGS[name]


def layers(info, prefix: str) -> dict:
    """Every layer that takes a LoRA once, under its kohya name."""
    keys = {key: name for name, key in info.key_map.items() if name.startswith(prefix) and key in info.specs}
    return {name: info.specs[key] for key, name in keys.items() if not info.specs[key].problem}


def write_loras(comfy, model, clip) -> None:
    """LoRAs of large effect on some layers of every kind, and copies of the safety LoRAs with other hashes."""
    anatomy = comfy.anatomy
    unet, text = layers(anatomy.model_info(model), "lora_unet_"), layers(anatomy.clip_info(clip), "lora_te_")
    few = dict(list(unet.items())[::4])
    for i, (name, rank) in enumerate(zip(LORAS, (4, 8, 3, 4, 4), strict=True)):
        save_lora(comfy.loras / name, few | text if "_te" in name else few, rank, i, size=0.6)
    for name in (LORAS[0], LORAS[3]):
        save_lora(
            comfy.loras / COPY.format(name), few | text if "_te" in name else few, 4, LORAS.index(name), 0.6, copy=""
        )


@pytest.fixture(scope="module")
def tally() -> Counter:
    return Counter()


@pytest.fixture(scope="module")
def drop_in_tally() -> Counter:
    return Counter()


@pytest.fixture(scope="module")
def attach_tally() -> Counter:
    return Counter()


@pytest.fixture(scope="module")
def images() -> dict[str, torch.Tensor]:
    """Images of references by signature."""
    return {}


def source(graph: Graph, link: list) -> dict:
    """The node that a link comes from, through any-type nodes."""
    node = graph[link[0]]
    if node["class_type"] == "TestReroute":
        return source(graph, node["inputs"]["value"])
    if node["class_type"] == "TestSwitch":
        return source(graph, node["inputs"]["a" if node["inputs"]["use_a"] else "b"])
    return node


def chain(graph: Graph, guard: dict, key: str) -> list[dict]:
    """The inputs of all loaders of one role before a guard."""
    found, link = [], guard["inputs"].get(key)
    while link:
        found.append(source(graph, link)["inputs"])
        link = found[-1].get(key)
    return found


def without_empty_hooks(graph: Graph, all_guarded: bool) -> Graph:
    """The graph without Set CLIP Hooks of no hook, and without those before it, which it takes the place of.

    A CLIP of ComfyUI 0.3.75 encodes nothing behind such a node with schedule_clip, as no hook has no step: a reference
    could not tell safe from unsafe. A guarded CLIP encodes as without the node, be it in front of the guard or behind
    it; a CLIP that no guard is on keeps the node, unless ``all_guarded``.
    """
    made = copy.deepcopy(graph)
    for name in [name for name, one in graph.items() if one["class_type"] == "SetClipHooks" and _is_empty(one)]:
        link = graph[name]["inputs"]["clip"]
        while graph[link[0]]["class_type"] == "SetClipHooks":
            link = graph[link[0]]["inputs"]["clip"]
        behind = all_guarded or source(graph, link)["class_type"] == "ModularLoraGuardModel"
        for consumer, key, _ in [edge for edge in edges(made) if edge[2][0] == name]:
            if behind or _leads_to_guard(graph, consumer):
                made[consumer]["inputs"][key] = link
    return made


def _leads_to_guard(graph: Graph, name: str) -> bool:
    if graph[name]["class_type"] in ("SetClipHooks", "TestReroute", "TestSwitch"):
        return any(_leads_to_guard(graph, consumer) for consumer, _, link in edges(graph) if link[0] == name)
    return graph[name]["class_type"] == "ModularLoraGuardModel"


def _is_empty(node: dict) -> bool:
    return node["inputs"]["hooks"] == ["no_hook", 0]


def reference(graph: Graph, safe: bool) -> Graph:
    """The graph with stock nodes and merged LoRAs; ``safe`` merges the safety LoRAs into every model and CLIP."""
    stock, merged, last = copy.deepcopy(graph), {}, {"model": ["ckpt", 0], "clip": ["ckpt", 1]}
    guards = {name: node for name, node in graph.items() if node["class_type"] == "ModularLoraGuardModel"}
    loaders = chain(graph, next(iter(guards.values())), "safety_lora") if safe else []

    def merge(name: str, after: dict, lora_name: str, model: float, clip: float) -> dict:
        kind = "LoraLoader" if after.get("clip") else "LoraLoaderModelOnly"
        strengths = {"strength_model": model} | ({"strength_clip": clip} if after.get("clip") else {})
        links = {key: link for key, link in after.items() if link}
        merged[name] = {"class_type": kind, "inputs": {**links, "lora_name": lora_name, **strengths}}
        return {key: [name, i] for i, key in enumerate(links)}

    for i, item in enumerate(loaders):
        last = merge(f"safety{i}", last, item["lora_name"], item["strength"], item["strength"])
    places = {("ckpt", 0): last["model"], ("ckpt", 1): last["clip"]}
    for name, key, link in edges(graph):
        stock[name]["inputs"][key] = places.get(tuple(link), link)
    for name, guard in guards.items():
        after = {key: stock[name]["inputs"].get(key) for key in ("model", "clip")}
        for i, item in enumerate(chain(graph, guard, "task_lora")):
            after = merge(f"{name}_task{i}", after, item["lora_name"], item["strength_model"], item["strength_clip"])
        for consumer, key, link in list(edges(stock)):
            if link[0] == name:
                stock[consumer]["inputs"][key] = after["model" if link[1] == 0 else "clip"]
        del stock[name]
    for node in stock.values():
        if node["class_type"] in STOCK:
            node["class_type"], names = STOCK[node["class_type"]]
            node["inputs"] = {names.get(key, key): value for key, value in node["inputs"].items()}
    return stock | merged


def part(graph: Graph, links: list[list]) -> Graph:
    """What the links need of a graph."""
    return {name: graph[name] for name in set().union(*(ancestors(graph, link[0]) for link in links))}


def signature(graph: Graph, link: list) -> str:
    """Everything that the value on a link comes from, whatever the nodes are called."""
    node, index = graph[link[0]], link[1]
    inputs = {k: signature(graph, v) if isinstance(v, list) else v for k, v in sorted(node["inputs"].items())}
    return hashlib.sha256(json.dumps([node["class_type"], index, inputs]).encode()).hexdigest()


class Judge:
    """Runs graphs and references on one executor; images of references are remembered."""

    folder = "m"

    def __init__(self, comfy, run_graph, executor, images: dict[str, torch.Tensor]):
        self.comfy, self.run_graph, self.executor, self.images = comfy, run_graph, executor, images

    def graph(self, mutant: Mutator) -> Graph:
        """What is run."""
        return mutant.graph

    def meant(self, graph: Graph) -> Graph:
        """The mutated graph of which the merged image is expected."""
        return graph

    def run(self, mutant: Mutator, seed: int) -> str:
        """What came of a mutated graph: refused by ComfyUI, refused by the guard, attested or unattested."""
        # frames of the last error: where they die later, together with a chain of stock patchers that they hold,
        # ComfyUI keeps a dead entry among its loaded models and collects garbage at every load from then on
        gc.collect(1)
        graph = self.graph(mutant)
        for name, node in graph.items():
            if node["class_type"] == "ModularLoraSaveImage":
                node["inputs"]["filename_prefix"] = f"{self.folder}{seed}/{name}"
        try:
            results = self.run_graph(graph, self.executor)
        except GraphError as error:
            return self._refusal(error)
        claimed = {}
        for name, node in graph.items():
            if node["class_type"] == "ModularLoraSaveImage":
                link = node["inputs"]["images"]
                claims = self._claims(f"{self.folder}{seed}", name)
                assert len(claims) == len(results[link[0]][link[1]])
                if name.startswith("save_") and graph[link[0]]["class_type"] == "ModularLoraDecode":
                    lines = [re.sub(r"^image \d+: ", "", line) for line in results[link[0]][1].split("\n")]
                    assert any(line.startswith(GUARDED) for line in lines) == any(claims)
                if any(claims):
                    claimed[name] = (results[link[0]][link[1]], claims)
        if claimed:
            self._check(mutant.graph, claimed)
        return "attested" if claimed else "unattested"

    def _refusal(self, error: GraphError) -> str:
        if error.stage == "validation":
            assert "exception_during" not in str(error), str(error)
            return "refused by ComfyUI"
        kind = next(d["exception_type"] for e, d in self.comfy.server.messages if e == "execution_error")
        if kind == "ExecutionBlocked":
            assert "gives no CLIP" in str(error), str(error)
            return "refused by the guard"
        assert kind.endswith((".errors.GuardError", ".errors.HandleError", ".errors.LoraFileError")), f"{kind}: {error}"
        return "refused by the guard"

    def _claims(self, folder: str, name: str) -> list[bool]:
        """Which of the PNG files that a save node wrote say that they are guarded."""
        files = sorted((self.comfy.output / folder).glob(f"{name}_[0-9]*.png"))
        texts = [Image.open(file).text["modular_lora_attestation"] for file in files]
        return [json.loads(text)["status"].partition("; edited: ")[0] == "guarded" for text in texts]

    def _check(self, graph: Graph, claimed: dict[str, tuple[torch.Tensor, list[bool]]]) -> None:
        """Every image that is claimed to be guarded is the merged one, and far from the unguarded one."""
        links = [graph[save]["inputs"]["images"] for save in claimed]
        graph = self.meant(graph)
        safe, unsafe = (self._references(reference(graph, flag), links) for flag in (True, False))
        for k, (save, (images, claims)) in enumerate(claimed.items()):
            for i in (i for i, claim in enumerate(claims) if claim):
                near, far = distance(images[i], safe[k][i]), distance(images[i], unsafe[k][i])
                effect = distance(safe[k][i], unsafe[k][i])
                assert near < 0.1 * effect, f"image {i} of {save}: {near} to merged, effect {effect}"
                assert far > 5 * near, f"image {i} of {save}: {far} to unguarded, {near} to merged"

    def _references(self, graph: Graph, links: list[list]) -> list[torch.Tensor]:
        keys = [signature(graph, link) for link in links]
        if missing := [(key, link) for key, link in zip(keys, links, strict=True) if key not in self.images]:
            shown = {f"show{i}": preview(link) for i, (_, link) in enumerate(missing)}
            results = self.run_graph(part(graph, [link for _, link in missing]) | shown, self.executor)
            self.images |= {key: results[link[0]][link[1]] for key, link in missing}
        return [self.images[key] for key in keys]


class DropInJudge(Judge):
    """The same graphs with Guard in the place of Guard Model, and stock loaders, samplers and decode behind it."""

    folder = "n"

    def graph(self, mutant: Mutator) -> Graph:
        return translated(mutant.graph, savers=False)

    def meant(self, graph: Graph) -> Graph:
        return without_empty_hooks(graph, all_guarded=False)


def preview(link: list) -> dict:
    return {"class_type": "PreviewAny", "inputs": {"source": link}}


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).double().square().mean().sqrt())


@pytest.mark.sampled(SAMPLE)
@pytest.mark.parametrize("group", range(GROUPS))
def test_no_image_is_unguarded_and_reported_guarded(comfy, run_graph, world, images, tally, record_property, group):
    judge, came = Judge(comfy, run_graph, world, images), Counter()
    for seed in range(group * SIZE, (group + 1) * SIZE):
        mutant = Mutator(seed, comfy.nodes.NODE_CLASS_MAPPINGS)
        try:
            came[judge.run(mutant, seed)] += 1
        except (AssertionError, Exception) as error:
            raise AssertionError(f"graph {seed}: {error}\n{mutant}") from error
    tally += came
    record_property("outcomes", dict(came))


def test_enough_mutations_were_attested_and_enough_refused(tally, extent):
    count = extent(SAMPLE, GROUPS) * SIZE
    if sum(tally.values()) < count:
        pytest.skip("needs all mutations of this file in one process")
    assert tally["attested"] >= 0.2 * count
    assert tally["refused by the guard"] >= 0.15 * count
    assert tally["refused by the guard"] + tally["refused by ComfyUI"] >= 0.2 * count


@pytest.mark.sampled(4)
@pytest.mark.parametrize("group", range(GROUPS))
def test_nor_is_one_where_the_drop_in_node_is_the_guard(
    comfy, run_graph, world, images, drop_in_tally, record_property, group
):
    judge, came = DropInJudge(comfy, run_graph, world, images), Counter()
    for seed in range(group * SIZE, (group + 1) * SIZE):
        mutant = Mutator(seed, comfy.nodes.NODE_CLASS_MAPPINGS)
        if translated(mutant.graph) is None:
            came["not translated"] += 1
            continue
        try:
            came[judge.run(mutant, seed)] += 1
        except (AssertionError, Exception) as error:
            made = translated(mutant.graph, savers=False)
            raise AssertionError(f"graph {seed}: {error}\n{mutant}\n{json.dumps(made, indent=1)}") from error
    drop_in_tally += came
    record_property("outcomes", dict(came))


def test_enough_of_them_were_attested_and_enough_refused(drop_in_tally, extent):
    count = extent(4, GROUPS) * SIZE
    if sum(drop_in_tally.values()) < count:
        pytest.skip("needs all mutations of this file in one process")
    assert drop_in_tally["attested"] >= 0.3 * count  # of all 200: 118 attested, 30 refused by the guard
    assert drop_in_tally["refused by the guard"] >= 0.1 * count


class AttachJudge(DropInJudge):
    """The same graphs without a node of the guard, under a policy that puts the safety LoRA onto every model."""

    folder = "a"

    def __init__(self, operator, *rest):
        super().__init__(*rest)
        self.operator, self.own, self.plain = operator, new_executor(self.comfy), self.executor

    def graph(self, mutant: Mutator) -> Graph:
        return without_node(super().graph(mutant))

    def meant(self, graph: Graph) -> Graph:
        return without_empty_hooks(graph, all_guarded=True)

    def run(self, mutant: Mutator, seed: int) -> str:
        guard = next((one for one in mutant.graph.values() if one["class_type"] == "ModularLoraGuardModel"), None)
        asked = chain(mutant.graph, guard, "safety_lora") if guard else [{"lora_name": LORAS[0], "strength": 1.0}]
        some = []
        for one in asked:
            sha256 = hashlib.sha256((self.comfy.loras / one["lora_name"]).read_bytes()).hexdigest()
            least = "min_net_strength = 0.1, min_acted_strength = 0.0"
            what = f'sha256 = "{sha256}", file = "{one["lora_name"]}", strength = {float(one["strength"])}'
            some.append(f"{{{what}, {least}}}")
        text = f'[guard]\nattach = "always"\nrequired = [{", ".join(some)}]\n[open]\nunattested = true\n'
        self.operator.write(text)
        self.own.reset()
        self.executor = self.own
        try:
            return super().run(mutant, seed)
        finally:
            self.operator.remove()

    def _references(self, graph: Graph, links: list[list]) -> list[torch.Tensor]:
        """Without the policy."""
        self.operator.remove()
        self.executor = self.plain
        return super()._references(graph, links)

    def _refusal(self, error: GraphError) -> str:
        kinds = {d.get("exception_type", "") for e, d in self.comfy.server.messages if e == "execution_error"}
        if any(kind.endswith("RefusedError") for kind in kinds):
            return "refused by the guard"
        return super()._refusal(error)


@pytest.mark.sampled(ATTACH_SAMPLE)
@pytest.mark.parametrize("seed", range(GROUPS * SIZE))
def test_nor_is_one_where_every_model_is_guarded_without_a_node(
    comfy, run_graph, world, images, operator, attach_tally, record_property, seed
):
    judge = AttachJudge(operator, comfy, run_graph, world, images)
    mutant, came = Mutator(seed, comfy.nodes.NODE_CLASS_MAPPINGS), "not translated"
    try:
        if translated(mutant.graph) is not None:  # else handles of LoRAs go a way that has no counterpart
            came = judge.run(mutant, seed)
    except (AssertionError, Exception) as error:
        made = json.dumps(judge.graph(mutant), indent=1)
        raise AssertionError(f"graph {seed}: {error}\n{mutant}\n{made}") from error
    attach_tally[came] += 1
    record_property("outcomes", {came: 1})


def test_enough_of_these_were_attested_and_enough_refused(attach_tally, extent):
    count = extent(ATTACH_SAMPLE, GROUPS * SIZE)
    if sum(attach_tally.values()) < count:
        pytest.skip("needs all mutations of this file in one process")
    assert attach_tally["attested"] >= 0.4 * count  # of all 200: 120 attested, 32 and 31 refused
    assert attach_tally["refused by the guard"] + attach_tally["refused by ComfyUI"] >= 0.15 * count
    assert attach_tally["refused by the guard"] >= (0.1 * count if count == GROUPS * SIZE else 0)


def stock_graph(safety: str = LORAS[0]) -> Graph:
    """A guarded model on the stock sampler."""
    graph = guarded_graph(safety, None) | {"ckpt": {"class_type": "TestCheckpoint", "inputs": {}}}
    graph["as_model"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    graph["sample"] = sampler(["as_model", 0])
    return graph


@pytest.mark.parametrize("after", [0, 1], ids=["at once", "after one evaluation"])
@pytest.mark.parametrize("what", ["one", "layers", "all"])
def test_branches_that_a_node_takes_off_during_the_run_stop_it(run_graph, world, what, after):
    graph = stock_graph()
    graph["pop"] = {"class_type": "TestPop", "inputs": {"model": ["as_model", 0], "what": what, "after": after}}
    graph["sample"]["inputs"]["model"] = ["pop", 0]
    with refuses(("run.short", "run.never-evaluated", "run.branches-lost")):
        run_graph(graph, world)
    del graph["pop"]
    graph["sample"]["inputs"]["model"] = ["as_model", 0]
    assert "\nguarded: " in run_graph(graph, world)["decode"][1]


def test_a_model_that_lost_the_guards_class_after_a_run_is_refused(comfy, run_graph, world):
    from comfy.model_patcher import ModelPatcher

    results = run_graph(stock_graph(), world)
    model, conds = results["as_model"][0], [results[name][0] for name in ("pos", "neg")]
    guarded, model.__class__ = type(model), ModelPatcher
    try:
        with refuses("model.guard-taken-off"):
            comfy.nodes.KSampler().sample(model, 2, 2, 2.0, "euler", "normal", *conds, results["latent"][0])
    finally:
        model.__class__ = guarded


@pytest.mark.parametrize("name", ["model", "clip", "safety_lora", "task_lora"])
def test_guard_model_refuses_what_an_any_type_node_brings_to_the_wrong_input(run_graph, world, name):
    graph = stock_graph()
    graph["any"] = {"class_type": "TestReroute", "inputs": {"value": ["ckpt", 2]}}
    graph["guard"]["inputs"][name] = ["any", 0]
    with refuses("input.wrong-type", "VAE"):
        run_graph(graph, world)
