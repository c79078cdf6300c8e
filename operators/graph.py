"""What a policy says of a graph before it runs: an API-format prompt, and what is known of its node types.

Kinds of values are followed along the links, any-type nodes included, so that a MODEL, an image or the weights are
known for what they are wherever they arrive. What only shows when the graph runs (names over links, nodes that expand)
is checked again there; a graph that passes here is not yet allowed anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from ..gate.settings import ACTIVITIES
from . import leaving
from .policy import OperatorPolicy, Required, named
from .rules import Refusal, Said, stricter, task_refused

ANY = "*"
MODEL, GUARDED, LATENT, SOUND = "MODEL", "MODULAR_LORA_GUARDED_MODEL", "LATENT", "AUDIO"
VIDEO = "VIDEO"
IMAGES = frozenset(("IMAGE", VIDEO))
WEIGHTS = frozenset((MODEL, GUARDED, "CLIP", "VAE", "CONTROL_NET", "LORA_MODEL", "CLIP_VISION", "STYLE_MODEL"))
TAKES_LORA = frozenset((MODEL, "CLIP", "HOOKS"))  # what a loader of LoRAs gives
GUARD, AS_MODEL, REFUSED = "ModularLoraGuardModel", "ModularLoraGuardedAsModel", "ModularLoraRefused"
DROP_IN = "ModularLoraGuard"  # gives a MODEL, CLIP and VAE that are guarded themselves
# ComfyUI's own, which need no naming behind it: LoRAs that they load are counted, and what they sample is checked.
LOADERS = frozenset(("LoraLoader", "LoraLoaderModelOnly"))
SAMPLING = frozenset(("KSampler", "KSamplerAdvanced", "SamplerCustom", "BasicGuider", "CFGGuider", "DualCFGGuider"))
BEHIND = LOADERS | SAMPLING | {"BasicScheduler"}
PASS_CLIP = LOADERS | {"CLIPSetLastLayer"}
# ComfyUI's own that a guarded MODEL or CLIP refuses, where every one is guarded: why, and what to do instead.
NOT_GUARDED = {
    ("ModelMerge", "CLIPMerge"): ("merges weights", "merge on a server without this rule and load the saved result"),
    (
        "UNetSelfAttentionMultiply",
        "UNetCrossAttentionMultiply",
        "UNetTemporalAttentionMultiply",
        "CLIPAttentionMultiply",
    ): ("multiplies weights", "take the node out"),
    ("CreateHookModelAsLora",): ("hooks whole models", "use Create Hook LoRA"),
    ("LoraLoaderBypass", "LoraLoaderModelOnlyBypass"): ("puts LoRAs past the guard", "use Load LoRA"),
    ("EasyCache", "LazyCache"): ("skips evaluations", "take the node out"),
    ("LoraSave", "TrainLoraNode"): ("extracts or trains weights", "use a server without this rule"),
}
SAFETY, TASK, SETTINGS = "ModularLoraLoadSafety", "ModularLoraLoadTask", "ModularLoraGateSettings"
CONFIRM = "confirm"  # input of Gate Settings that takes the settings of a second detector
GATE, SAMPLE_AND_GATE = "ModularLoraGate", "ModularLoraSampleAndGate"
PLAINLY = leaving.PLAIN | IMAGES | {LATENT, "MASK", SOUND}  # types that hold no model that could decode
DECODED = frozenset(("ModularLoraDecode", "ModularLoraDecodeTiled", SAMPLE_AND_GATE))  # give images of guarded runs
SAMPLERS = frozenset(("ModularLoraKSampler", "ModularLoraKSamplerAdvanced", "ModularLoraGuider", SAMPLE_AND_GATE))
CLOSED = {  # our node type -> key of [open]
    AS_MODEL: "guarded_as_model",
    "ModularLoraAudit": "audit",
    "ModularLoraMakeSafety": "training",
    "ModularLoraCombineSafety": "training",
    "ModularLoraTrainTask": "training",
    "ModularLoraTrainSafety": "training",
    "ModularLoraProjectTask": "training",
    "ModularLoraCalibrateSafety": "training",
    "ModularLoraConceptPrompts": "training",
    "ModularLoraDatasetReport": "training",
}


@dataclass(frozen=True)
class NodeFacts:
    """A node type: names and types of its inputs ("COMBO": a choice), types of its outputs.

    ``ours``: this pack's; ``core``: ComfyUI's own; ``sends``: to a company's servers (API nodes).
    """

    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    is_output: bool
    ours: bool = False
    core: bool = False
    sends: bool = False


class Files(Protocol):
    """What is known of files by their names in the drop-downs; of LoRAs the first two.

    ``sha256``: None where there is no such file; ``values``: SHA-256 of its tensors; ``unsigned``: why a signature of a
    key does not hold, "" where it does; ``uploaded``: the folder that requests can write to from which weights of this
    name would be read, or None.
    """

    def sha256(self, node_type: str, name: str) -> str | None: ...

    def values(self, node_type: str, name: str) -> str: ...

    def unsigned(self, node_type: str, name: str, key: str) -> str: ...

    def uploaded(self, name: str) -> str | None: ...


class Kind(NamedTuple):
    """What a link carries.

    ``guarded``: a MODEL behind the guard, or an image of a guarded run; ``gated``: judged; ``free``: sound of a file,
    which holds no image; ``tells``: text or numbers that a node of another pack made of what may be an image;
    ``drop_in``: a MODEL, CLIP or VAE that the node Guard gives.
    """

    type: str
    guarded: bool = False
    gated: bool = False
    free: bool = False
    tells: bool = False
    drop_in: bool = False

    @property
    def carries(self) -> bool:
        """Whether it may hold an image in some form; weights have rules of their own."""
        return self.type not in leaving.PLAIN and self.type not in WEIGHTS


class Link(NamedTuple):
    input: str
    source: str
    slot: int


FactsOf = Callable[[str], NodeFacts | None]
Loras = dict[str, tuple[str, float]]  # name of a safety LoRA's file -> its SHA-256, its largest strength


def check(graph: Any, facts_of: FactsOf, policy: OperatorPolicy, files: Files) -> tuple[Refusal, ...]:
    """Every refusal of a graph's nodes that would run; empty: it may be queued."""
    if (wrong := _malformed(graph, facts_of)) is not None:
        return (wrong,)
    return tuple(_Graph(graph, facts_of, policy, files).refusals())


def check_type(node: str, kind: str, facts: NodeFacts | None, policy: OperatorPolicy) -> Refusal | None:
    """What the policy says of one node by its type alone."""
    if facts is None:
        return Refusal(node, kind, "nodes", "this node type is not known here", "install its pack, or take it out")
    ours = facts.ours
    if kind in policy.nodes.deny:
        return Refusal(node, kind, "nodes.deny", "the operator has denied this node type", "take the node out")
    if policy.nodes.allow is not None and not ours and kind not in policy.nodes.allow:
        return Refusal(node, kind, "nodes.allow", "the operator has not allowed this node type", "take the node out")
    if ours and kind in CLOSED and not getattr(policy.open, CLOSED[kind]):
        rule = f"open.{CLOSED[kind]}"
        return Refusal(node, kind, rule, "the operator has not opened this node", "take the node out")
    gives = TAKES_LORA & {part for output in facts.outputs for part in _types(output)}
    takes = [name for name, type in facts.inputs.items() if type == "COMBO" and "lora" in name.lower()]
    judged = policy.attaches or (facts.core and kind in LOADERS)  # by what comes to it
    if policy.guard.required and not ours and gives and takes and not judged and not may_take_model(kind, policy):
        what = f"loads LoRAs into {named(sorted(gives))} beside the guard"
        return Refusal(node, kind, "guard.required", what, "load them with Load Task LoRA")
    return None


def _not_guarded(kind: str) -> tuple[str, str] | None:
    """What one of ComfyUI's own types does that no guarded MODEL or CLIP takes, and the remedy."""
    return next((said for names, said in NOT_GUARDED.items() if kind.startswith(names)), None)


def may_take_model(kind: str, policy: OperatorPolicy) -> bool:
    return kind in policy.nodes.sampling or kind in policy.nodes.patching


def _unjudgeable(gate: bool) -> frozenset[str]:
    """Types that are never judged; where a gate must judge, whatever is no image."""
    never = frozenset(("MASK", "CONDITIONING", "CLIP_VISION_OUTPUT", "SVG"))
    return never | {"MESH", "VOXEL"} if gate else never


def _malformed(graph: Any, facts_of: FactsOf) -> Refusal | None:
    """What is wrong with a graph's form, or with a type that would run; the server itself names the rest."""
    if not isinstance(graph, dict):
        return Refusal(
            "prompt", type(graph).__name__, "nodes", "the prompt is not a graph", "send a graph in API format"
        )
    for name, node in graph.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            return Refusal(name, "?", "nodes", "the node has no class_type", "send a graph in API format")
        if not isinstance(node.get("inputs"), dict):
            return Refusal(name, node["class_type"], "nodes", "the node has no inputs", "send a graph in API format")
    for name in graph:
        for link in _links(graph, name):
            facts = facts_of(kind := graph[link.source]["class_type"])
            if facts and not -len(facts.outputs) <= link.slot < len(facts.outputs):
                what = f"input {link.input} asks for output {link.slot} of node {link.source} ({kind})"
                return Refusal(name, graph[name]["class_type"], "nodes", what, "connect an output that is there")
    return None


def _links(graph: dict, name: str) -> Iterator[Link]:
    for key, value in graph[name]["inputs"].items():
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], int | float):
            continue  # the executor takes any number for an output, True and 0.0 among them
        if isinstance(value[0], str) and value[0] in graph:
            yield Link(key, value[0], int(value[1]))


def _types(declared: str) -> frozenset[str]:
    """Types of a socket; whatever is not a plain name (matched or dynamic types) can carry anything."""
    if ANY in declared or declared.startswith("COMFY_"):
        return frozenset((ANY,))
    return frozenset(part.strip() for part in declared.split(","))


class _Graph:
    def __init__(self, graph: dict, facts_of: FactsOf, policy: OperatorPolicy, files: Files):
        self.graph, self.policy, self.files = graph, policy, files
        types = {node["class_type"] for node in graph.values()}
        self.facts = {kind: facts for kind in types if (facts := facts_of(kind)) is not None}
        self.links = {name: tuple(_links(graph, name)) for name in graph}
        self.loaded: dict[str, Loras | None] = {}  # node -> see `_loaded`
        every = (link for links in self.links.values() for link in links)
        self.confirming = {link.source for link in every if link.input == CONFIRM}  # settings of second detectors
        self.running = self._running()
        self.kinds = self._follow()

    def refusals(self) -> Iterator[Refusal]:
        for name in filter(self.running.__contains__, self.graph):
            kind = self._type(name)
            if refusal := check_type(name, kind, self.facts.get(kind), self.policy):
                yield refusal
                continue
            yield from (Refusal(name, kind, *said) for said in self._of(name))

    def _type(self, name: str) -> str:
        return self.graph[name]["class_type"]

    def _of_node(self, name: str) -> NodeFacts | None:
        return self.facts.get(self._type(name))

    def _known(self, name: str) -> NodeFacts:
        """Of a node whose type is known: no other passes `check_type`, and no other has outputs to follow."""
        return self.facts[self._type(name)]

    def _ours(self, name: str) -> bool:
        facts = self._of_node(name)
        return facts is not None and facts.ours

    def _running(self) -> frozenset[str]:
        """Nodes that would run: what no output needs is never evaluated. A type that is not known may be an output."""
        stack = [n for n in self.graph if (facts := self._of_node(n)) is None or facts.is_output]
        seen = set(stack)
        while stack:
            for link in self.links[stack.pop()]:
                if link.source not in seen:
                    seen.add(link.source)
                    stack.append(link.source)
        return frozenset(seen)

    def _follow(self) -> dict[tuple[str, int], frozenset[Kind]]:
        """Kinds on every output, followed along the links until nothing changes; loops end, as kinds only add up.

        Nodes come after their sources, so that each is visited once, unless a loop is in front of it.
        """
        users: dict[str, list[str]] = {}
        for name in self.graph:
            for link in self.links[name]:
                users.setdefault(link.source, []).append(name)
        self.kinds, order, waiting = {}, self._sources_first(), set(self.graph)
        while waiting:
            for name in filter(waiting.__contains__, order):
                waiting.remove(name)
                changed = False
                for slot, kinds in enumerate(self._given(name)):
                    known = self.kinds.get((name, slot), frozenset())
                    if not kinds <= known:
                        self.kinds[name, slot], changed = known | kinds, True
                waiting.update(users.get(name, ()) if changed else ())
        return self.kinds

    def _sources_first(self) -> list[str]:
        """All nodes, each after those that its links come from, except for one link of every loop."""
        order, seen = [], set()
        for start in self.graph:
            path = [] if start in seen else [(start, iter(self.links[start]))]
            seen.add(start)
            while path:
                links = path[-1][1]
                if (source := next((link.source for link in links if link.source not in seen), None)) is None:
                    order.append(path.pop()[0])
                else:
                    seen.add(source)
                    path.append((source, iter(self.links[source])))
        return order

    def _coming(self, name: str) -> Iterator[tuple[Link, Kind]]:
        for link in self.links[name]:
            facts = self._of_node(link.source)
            slot = link.slot % len(facts.outputs) if facts else link.slot  # -1 is the last, to the server too
            for kind in self.kinds.get((link.source, slot), ()):
                yield link, kind

    def _given(self, name: str) -> Iterator[frozenset[Kind]]:
        facts = self._of_node(name)
        coming = frozenset(kind for _, kind in self._coming(name))
        for output in facts.outputs if facts else ():
            found: set[Kind] = set()
            for type in _types(output):
                if type == ANY:
                    found |= coming or {Kind(ANY)}
                    found |= {Kind("STRING", tells=True)} if self._tells(name, coming) else set()
                elif type == MODEL:
                    found |= self._model(name, coming)
                elif type in ("CLIP", "VAE"):
                    found |= self._others(name, type, coming)
                elif type in IMAGES:
                    found |= self._images(name, type, coming)
                elif type == SOUND:
                    found |= self._sound(name, coming)
                else:
                    found.add(Kind(type, tells=type in leaving.PLAIN and self._tells(name, coming)))
            yield frozenset(found)

    def _model(self, name: str, coming: frozenset[Kind]) -> set[Kind]:
        if self._ours(name) and self._type(name) == AS_MODEL:
            return {Kind(MODEL, guarded=True)}
        if self.policy.attaches or self._is_drop_in(name):
            return {Kind(MODEL, guarded=True, drop_in=True)}
        models = {kind for kind in coming if kind.type == MODEL}
        passes = may_take_model(self._type(name), self.policy) or self._is_core(name, LOADERS)
        return models if models and passes else {Kind(MODEL)}

    def _others(self, name: str, type: str, coming: frozenset[Kind]) -> set[Kind]:
        """A CLIP or VAE: whether it is Guard's, also behind a loader of LoRAs."""
        if self.policy.attaches or self._is_drop_in(name):
            return {Kind(type, drop_in=True)}
        same = {kind for kind in coming if kind.type == type}
        passes = may_take_model(self._type(name), self.policy) or self._is_core(name, PASS_CLIP)
        return same if same and passes else {Kind(type)}

    def _is_drop_in(self, name: str) -> bool:
        return self._ours(name) and self._type(name) == DROP_IN

    def _is_core(self, name: str, kinds: frozenset[str]) -> bool:
        return self._type(name) in kinds and self._known(name).core

    def _images(self, name: str, type: str, coming: frozenset[Kind]) -> set[Kind]:
        kind = self._type(name) if self._ours(name) else ""
        if kind in DECODED:
            return {Kind(type, guarded=True, gated=kind == SAMPLE_AND_GATE)}
        if any(k.type == "VAE" and k.drop_in for k in coming):  # whether a guarded run made it shows when it runs
            return {Kind(type, guarded=True)}
        others = self.policy.attaches and not self._known(name).core
        if others and any(k.type not in PLAINLY for k in coming):  # a pipe may hold a model and a VAE
            return {Kind(type, guarded=True)}
        passed = {Kind(type, k.guarded, k.gated or kind == GATE) for k in coming if k.type in IMAGES}
        return (passed or {Kind(type)}) | (self._track(name, coming) if type == VIDEO else set())

    def _track(self, name: str, coming: frozenset[Kind]) -> set[Kind]:
        """The sound of a video, which goes where the video goes."""
        if self._known(name).core and self._type(name) in leaving.SOURCES:
            return {Kind(SOUND, free=True)}
        return {k for k in coming if k.type == SOUND}

    def _sound(self, name: str, coming: frozenset[Kind]) -> set[Kind]:
        kind, core = self._type(name), self._known(name).core
        if (core and kind in leaving.SOURCES) or leaving.trusted(frozenset((kind,)), self.policy):
            return {Kind(SOUND, free=True)}
        sounds = {k for k in coming if k.type == SOUND}
        only = all(k.type in (SOUND, VIDEO) for k in coming if k.carries)
        return sounds if core and kind in leaving.SOUND_EDITS and only and sounds else {Kind(SOUND)}

    def _tells(self, name: str, coming: frozenset[Kind]) -> bool:
        """Whether texts and numbers that a node gives may be made of an image; ComfyUI's own make none of them."""
        facts = self._known(name)
        if facts.ours or leaving.trusted(frozenset((self._type(name),)), self.policy):
            return False
        return any(k.tells or (k.carries and not facts.core) for k in coming)

    def _of(self, name: str) -> Iterator[Said]:
        """(rule, reason, remedy) of one node that would run."""
        facts = self._known(name)
        yield from self._choices(name, facts)
        if self.policy.attaches:
            if facts.core and not self.policy.gates_others and (said := _not_guarded(self._type(name))):
                yield "guard.attach", f"{said[0]}, and every model here is guarded", said[1]
        elif self.policy.guard.required:
            yield from self._models(name)
        if self._is_core(name, LOADERS):
            yield from self._loads(name)
        if facts.is_output or facts.sends or self._type(name) in self.policy.nodes.showing:
            yield from self._leaving(name)
        if facts.ours:
            yield from self._literals(name)

    def _choices(self, name: str, facts: NodeFacts) -> Iterator[Said]:
        """Weights that a request can have written, chosen in a drop-down."""
        for key in (key for key, type in facts.inputs.items() if type == "COMBO"):
            chosen = _literal(self.graph[name], key)
            if isinstance(chosen, str) and (folder := self.files.uploaded(chosen)):
                what = f"{key} {chosen!r} would be read from {folder}, a folder that requests can write to"
                yield "weights", what, "ask the operator to put it into a folder of models"

    def _loads(self, name: str) -> Iterator[Said]:
        """Of a loader of LoRAs: that it stands behind Guard, and whether its file may be used."""
        loose = sorted({k.type for _, k in self._coming(name) if k.type in ("CLIP", MODEL) and not k.drop_in})
        if loose and self.policy.guard.required and not may_take_model(self._type(name), self.policy):
            remedy = "load them with Load Task LoRA, or put the loader behind Guard"
            yield "guard.required", f"loads LoRAs into {named(loose)} beside the guard", remedy
        elif isinstance(lora := _literal(self.graph[name], "lora_name"), str):
            sha256 = self.files.sha256(TASK, lora)  # where there is no such file, the server says so
            values = partial(self.files.values, TASK, lora)
            if sha256 is not None and (said := task_refused(self.policy, lora, sha256, values)):
                yield said

    def _models(self, name: str) -> Iterator[Said]:
        """One refusal an input at most; whatever a link may carry is judged, as a switch may let any of it through."""
        refused = set()
        for link, given in self._coming(name):
            if link.input not in refused and (said := self._refused_model(name, link, given)):
                refused.add(link.input)
                yield said

    def _refused_model(self, name: str, link: Link, given: Kind) -> Said | None:
        kind, facts, nodes = self._type(name), self._known(name), self.policy.nodes
        if not self._is_model(facts, link, given):
            return None
        what = f"{link.input} is a MODEL that did not pass a guard (node {link.source}, output {link.slot})"
        unguarded = given.type == MODEL and not given.guarded
        if facts.ours:
            return ("guard.required", what, "connect what the guard gives") if kind in SAMPLERS and unguarded else None
        if kind in nodes.patching or self._is_core(name, LOADERS):  # these are judged in _loads
            return None
        if given.drop_in and self._is_core(name, BEHIND):
            return None
        if kind in nodes.sampling:
            return ("guard.required", what, "connect Guarded Model as MODEL") if unguarded else None
        return "nodes.sampling", f"takes a MODEL ({link.input}) and is not named", _use(kind)

    def _is_model(self, facts: NodeFacts, link: Link, given: Kind) -> bool:
        """Whether a link brings a MODEL, or something that is not known into an input for one."""
        declared = MODEL in _types(facts.inputs.get(link.input, ""))
        return given.type in (MODEL, GUARDED) or (given.type == ANY and declared)

    def _leaving(self, name: str) -> Iterator[Said]:
        """Of a node that writes, shows or sends: what may not leave, and weights."""
        kind, facts, coming = self._type(name), self._known(name), list(self._coming(name))
        if leaving.closed(self.policy) and not leaving.trusted(frozenset((kind,)), self.policy):
            yield from self._unjudged(name, coming)
        allowed = self._ours(name) or kind in (self.policy.nodes.allow or ())
        held = self.policy.attaches and not facts.core  # a guarded model gives no weights away
        loose = (k for _, k in coming if k.type in WEIGHTS and not (held and k.drop_in))
        if not allowed and (bad := next(loose, None)):
            yield "nodes.allow", f"writes or shows weights ({bad.type})", "take the node out"

    def _unjudged(self, name: str, coming: list[tuple[Link, Kind]]) -> Iterator[Said]:
        """What comes to a node that writes, shows or sends, and must not leave so; the rest shows when it runs."""
        kind, facts, policy = self._type(name), self._known(name), self.policy
        if not facts.ours and not leaving.may_show(frozenset((kind,)), facts.core, policy):
            if bad := next(((link, k) for link, k in coming if k.carries or k.tells), None):
                yield leaving.unknown_type(kind, bad[0].input, bad[1].type, policy)
            return
        images = [(link, k) for link, k in coming if k.type in IMAGES]
        loose = next((link for link, k in images if not k.guarded), None)
        if loose and leaving.attested(policy) and not policy.gates_others:
            source = f"node {loose.source} ({self._type(loose.source)})"
            what = f"{loose.input} comes from {source}, behind which is an image that no guarded run made"
            yield "open.unattested", what, "connect Guarded VAE Decode"
        elif (
            policy.gate.required
            and not policy.attaches
            and (loose := next((link for link, k in images if not k.gated), None))
        ):
            yield "gate.required", f"{loose.input} shows an image that no gate judged", "put Safety Gate in front"
        for link, what in ((link, self._no_image(facts, link, k)) for link, k in coming):
            if what:
                yield leaving.rule(policy), f"{link.input} lets out {what}", "take the node out"
                return

    def _no_image(self, facts: NodeFacts, link: Link, kind: Kind) -> str:
        """What comes over a link, where it is no image and may not leave; "" where it may, or the run tells."""
        gate = self.policy.gate.required
        if kind.tells and _types(facts.inputs.get(link.input, ANY)) & (leaving.PLAIN | {ANY}):
            return "text or numbers that a node of another pack may have made of an image"
        if kind.type == LATENT and gate:
            return "a latent that no gate can judge"
        if facts.ours:
            return ""
        if kind.type == SOUND and gate and not kind.free:
            return "sound that no gate can judge and that may hold an image"
        return f"a {kind.type} that nobody can judge" if kind.type in _unjudgeable(gate) else ""

    def _literals(self, name: str) -> Iterator[Said]:
        """Of one of our nodes: values that are written in the graph and that the policy does not take."""
        kind, policy = self._type(name), self.policy
        if kind == GUARD and policy.guard.required:
            if _literal(self.graph[name], "accept_merged"):
                yield "guard.required", "accept_merged takes a base that may cancel a safety LoRA", "switch it off"
            yield from self._safety(name)
        elif kind == DROP_IN and policy.guard.required and not policy.attaches:  # there it adds its own
            yield from self._safety(name)
        elif kind in (SAFETY, TASK) and isinstance(lora := _literal(self.graph[name], "lora_name"), str):
            if (sha256 := self.files.sha256(kind, lora)) is None:
                yield "nodes", f"there is no LoRA file {lora!r}", "choose one of the list"
            elif kind == TASK and (said := task_refused(policy, lora, sha256, partial(self.files.values, kind, lora))):
                yield said
        elif kind == SETTINGS:
            threshold = _literal(self.graph[name], "threshold")
            second = name in self.confirming
            for label, most in (policy.gate.confirm if second else policy.gate.thresholds).items():
                if isinstance(threshold, int | float) and not threshold <= most:
                    what = f"threshold {threshold:g} is above {most:g}, the highest allowed for {label}"
                    yield "gate.confirm" if second else "gate.thresholds", what, "lower it, or set 0"
                    return
            activity = _literal(self.graph[name], "activity")
            if not second and activity in ACTIVITIES and stricter(activity, policy.gate.activity) != activity:
                what = f"activity is {activity}, and {policy.gate.activity} is the least"
                yield "gate.activity", what, f"set it to {policy.gate.activity}"

    def _safety(self, name: str) -> Iterator[Said]:
        """Of a guard whose safety LoRAs are all named in the graph: those of some family must be among them."""
        loras = self._loaded(name)
        if loras is not None and self._is_drop_in(name):
            loras = self._with(self.graph[name], loras)
        if loras is not None:
            guard = self.policy.guard
            sets = filter(None, map(guard.for_family, (*guard.families, "")))  # which it is shows when it runs
            yield from min(([said for one in some for said in self._required(one, loras)] for some in sets), key=len)

    def _required(self, one: Required, loras: Loras) -> Iterator[Said]:
        why = {name: self._unlike(one, name, sha256) for name, (sha256, _) in loras.items()}
        fit = [strength for name, (_, strength) in loras.items() if not why[name]]
        if not fit:
            reasons = "; ".join(filter(None, why.values()))
            yield "guard.required", f"lacks the safety LoRA that is required ({one.name}): {reasons}", "load it"
        elif not max(fit) >= one.min_net_strength:  # not a number is too little
            what = f"the safety LoRA that is required ({one.name}) stands at {max(fit):g}"
            yield "guard.required", what, f"give it a strength of {one.min_net_strength:g} or more"

    def _unlike(self, one: Required, name: str, sha256: str) -> str:
        """Why a safety LoRA is not the one that is required."""
        if one.signed_by:
            return self.files.unsigned(SAFETY, name, one.signed_by)
        return "" if sha256 == one.sha256 else f"{name} has the sha256 {sha256[:16]}"

    def _loaded(self, name: str) -> Loras | None:
        """The safety LoRAs that a node gets from a chain of Load Safety LoRA nodes; None where one is not known.

        What comes to each loader is remembered: many guards on one chain do not walk it each.
        """
        path = []
        while name not in self.loaded:
            source = next((link.source for link in self.links[name] if link.input == "safety_lora"), None)
            self.loaded[name] = {} if source is None else None  # a loop comes back to this None
            if source is None or not self._ours(source) or self._type(source) != SAFETY:
                break
            path.append((name, source))
            name = source
        loras = self.loaded[name]
        for name, source in reversed(path):
            loras = self.loaded[name] = None if loras is None else self._with(self.graph[source], loras)
        return loras

    def _with(self, loader: dict, loras: Loras) -> Loras | None:
        """``loras`` and the one that a node names; None where it comes over a link or is no file: the run tells."""
        lora, strength = _literal(loader, "lora_name"), _literal(loader, "strength")
        sha256 = self.files.sha256(SAFETY, lora) if isinstance(lora, str) else None
        if sha256 is None or isinstance(strength, bool) or not isinstance(strength, int | float):
            return None
        _, before = loras.get(lora, (sha256, strength))
        return {lora: (sha256, strength)} | loras | {lora: (sha256, max(before, strength))}


def _literal(node: dict, name: str) -> Any:
    """A value that stands in the graph; None where it comes over a link or is not given."""
    value = node["inputs"].get(name)
    if isinstance(value, dict):
        return value.get("__value__")
    return None if isinstance(value, list) else value


def _use(kind: str) -> str:
    ours = {"KSampler": "Guarded KSampler", "KSamplerAdvanced": "Guarded KSampler (Advanced)"}
    ours |= {"CFGGuider": "Guarded Guider", "BasicGuider": "Guarded Guider"}
    behind = "put Guard in front of it, or " if kind in BEHIND else ""
    return f"{behind}use {ours.get(kind, 'a Guarded sampler')}, or ask the operator to name {kind} under [nodes]"
