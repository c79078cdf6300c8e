"""What comes to a node that writes, shows or sends, judged as it runs by where it came from.

Images and latents are known by their content (modular_lora/provenance/ledger.py). Sound and solids
have no judge: that they hold nothing of an image, or that a guarded run made them, is noted here of what ComfyUI's own
nodes make of what is known. Whatever else holds numbers is of unknown origin, whichever socket it came through.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import fractions
import hashlib
import pathlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.clip_vision
import comfy.controlnet
import comfy.model_patcher
import comfy.sd
import numpy as np
import torch
from comfy_execution.graph import DynamicPrompt
from comfy_execution.graph_utils import ExecutionBlocker

from ...modular_lora.errors import GuardError
from ...modular_lora.provenance import ledger
from ...modular_lora.provenance.attestation import Attestation
from ...modular_lora.provenance.ledger import Runs
from ...modular_lora.tensor_hashing import tensor_sha256
from ...modular_lora.util.cache import Cache
from ...operators import graph as graphs
from ...operators import leaving
from ...operators.graph import NodeFacts
from ...operators.policy import OperatorPolicy
from ...operators.rules import RefusedError
from .. import patcher
from ..bound_vae import BoundVaeMixin
from . import node_info as facts
from . import policy as policies

PLAIN = (str, int, float, complex, enum.Enum, fractions.Fraction, pathlib.PurePath, np.number, np.bool_, type(None))
CONTAINERS = (Mapping, list, tuple, set, frozenset)
EXECUTORS = (DynamicPrompt, ExecutionBlocker)  # what the executor itself hands to nodes
WEIGHTS = (
    patcher.GuardedModel,
    comfy.model_patcher.ModelPatcher,
    comfy.sd.CLIP,
    comfy.sd.VAE,
    comfy.sd.StyleModel,
    comfy.controlnet.ControlBase,
    comfy.clip_vision.ClipVisionModel,
)

SHORT = 32  # characters of a text that is too short to be told from any other of its kind

_told: Cache[str, bool] = Cache(4096)  # content of a text that a node of another pack may have made of an image
_files: weakref.WeakSet = weakref.WeakSet()  # videos that are files of the user's
_shows: contextvars.ContextVar[bool] = contextvars.ContextVar("modular_lora_shows", default=False)


@dataclass(frozen=True)
class Node:
    """A node that runs: what its class says of itself, and every name that this goes by."""

    facts: NodeFacts
    names: frozenset[str]

    def leaves(self, policy: OperatorPolicy) -> bool:
        """Whether it writes, shows or sends."""
        return self.facts.is_output or self.facts.sends or bool(self.names & set(policy.nodes.showing))

    def known(self, policy: OperatorPolicy) -> bool:
        """Whether it is known to show what it is given and nothing beside."""
        return self.facts.ours or leaving.may_show(self.names, self.facts.core, policy)

    def trusted(self, policy: OperatorPolicy) -> bool:
        return leaving.trusted(self.names, policy)


def node_of(kind: type) -> Node:
    return Node(facts.facts(kind), frozenset(facts.names(kind) or [kind.__name__]))


@dataclass(frozen=True)
class _Sound:
    waveform: Any


@dataclass(frozen=True)
class _Latent:
    samples: Any


MARKS = {"waveform": _Sound, "samples": _Latent}  # key by which ComfyUI's nodes know a sound, a latent


def check(policy: OperatorPolicy, node: Node, inputs: Mapping[str, list]) -> None:
    """RefusedError where something has come to a node that writes, shows or sends, and may not leave."""
    if not node.leaves(policy):
        return
    latent_file = node.facts.core and "SaveLatent" in node.names  # it writes the samples and nothing else
    held = policy.attaches and not node.facts.core  # a guarded model gives no weights away
    weights_pass = node.facts.ours or node.names & set(policy.nodes.allow or ())
    judged, known = leaving.closed(policy) and not node.trusted(policy), node.known(policy)
    for name, value in ((name, value) for name, some in inputs.items() for value in some):
        for leaf in _leaves(value, whole=judged and not latent_file):
            if isinstance(leaf, WEIGHTS):
                if not weights_pass and not (held and _is_guarded(leaf)):
                    what = f"{min(node.names)} writes or shows weights ({name}, {type(leaf).__name__})"
                    raise RefusedError("nodes.allow", what, "take the node out")
            elif judged and not known:
                raise RefusedError(*leaving.unknown_type(min(node.names), name, _called(leaf), policy))
            elif judged:
                _check_leaf(policy, node, name, leaf)
        own = name in node.facts.inputs  # and no hidden one, in which the user's whole graph stands
        if judged and own and any(_told.get(text) for text in _texts(value)):
            what = f"{name} lets out text that a node of another pack may have made of an image"
            raise RefusedError(leaving.rule(policy), what, "take the node out")


def _is_guarded(leaf: Any) -> bool:
    """A MODEL, CLIP or VAE as the policy has put it there."""
    return isinstance(leaf, patcher.GuardMixin | patcher.GuardedClipMixin | BoundVaeMixin)


@contextmanager
def showing(policy: OperatorPolicy, node: Node) -> Iterator[None]:
    """Around a node that runs: images that it shows meanwhile pass where it was checked.

    What trainings and audits show on the way is what they sample, which no gate judges.
    """
    opened = node.facts.ours and graphs.CLOSED.keys() & node.names
    checked = node.known(policy) and node.leaves(policy) and not (opened and policy.gate.required)
    token = _shows.set(bool(checked))
    try:
        yield
    finally:
        _shows.reset(token)


def _check_leaf(policy: OperatorPolicy, node: Node, name: str, leaf: Any) -> None:
    gate = policy.gate.required
    if isinstance(leaf, torch.Tensor):
        for image in _images(leaf):
            policies.check_image(policy, image, leaving.attested(policy))
        return
    if isinstance(leaf, _Latent) and gate:
        raise RefusedError("gate.required", f"{name} lets out a latent that no gate can judge", "take it out")
    if node.facts.ours:
        return
    runs = origin(leaf)
    if runs is None or (runs and gate):
        what = f"{name} lets out {_called(leaf)}, of which nobody knows what image it holds"
        raise RefusedError(leaving.rule(policy), what, "take the node out")
    for run in runs if leaving.attested(policy) else ():
        policies.check_run(policy, run)


def _images(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Single images (h w c) of a tensor; rows of a mask or of numbers (fewer dimensions) count as one, unknown."""
    if tensor.layout != torch.strided or tensor.is_nested:
        yield torch.zeros(0)
    elif tensor.numel():
        yield from tensor.reshape(-1, *tensor.shape[-3:]) if tensor.ndim >= 3 else (tensor,)


def _leaves(value: Any, whole: bool = True) -> Iterator[Any]:
    """Tensors, sounds, latents and objects in a value; text, numbers and what holds nothing else are left out.

    ``whole`` False: of a latent its samples alone, and a video as it is.
    """
    waiting, seen = [value], {}  # what was seen is kept, as the place of what is gone is given to the next
    while waiting:
        one = waiting.pop()
        if isinstance(one, PLAIN + EXECUTORS):
            continue
        if isinstance(one, CONTAINERS):
            if id(one) in seen:
                continue
            seen[id(one)] = one
        if isinstance(one, Mapping):
            marked = {key: one[key] for key in MARKS if key in one and not isinstance(one[key], PLAIN + CONTAINERS)}
            yield from (MARKS[key](item) for key, item in marked.items())
            if whole or "samples" not in marked:
                waiting.extend(item for key, item in one.items() if key not in marked)
                waiting.extend(one)
        elif isinstance(one, CONTAINERS):
            waiting.extend(one)
        elif whole and _is_video(one):
            components = one.get_components()
            waiting.extend((components.images, components.audio))
        else:
            yield one


def _is_video(value: Any) -> bool:
    """Of ComfyUI's own classes: what another pack's video gives out is not what it writes."""
    return hasattr(value, "get_components") and type(value).__module__.startswith("comfy_api.")


def origin(leaf: Any) -> Runs | None:
    """The runs that made something that is no image; None where that is not known."""
    if isinstance(leaf, _Latent):
        samples = leaf.samples
        if not isinstance(samples, torch.Tensor) or samples.is_nested or not samples.ndim or not len(samples):
            return None
        runs = ledger.latent_runs(samples)
        known = [run for run in runs if run is not None]
        return tuple(one for run in known for one in run.runs) if len(known) == len(runs) else None
    if _is_video(leaf):
        return () if leaf in _files else _of_all(_leaves(leaf.get_components().audio, whole=False))
    return ledger.others.get(digest) if (digest := _digest(leaf)) else None


def _digest(leaf: Any) -> str:
    """Of what a sound, a voxel grid or a mesh holds (comfy_api's VOXEL and MESH); "" of anything else.

    In 0.3.75 these two hold tensors alone, in 0.33.0 flags, sizes and None as well.
    """
    if isinstance(leaf, _Sound):
        parts = {"waveform": leaf.waveform}
    elif type(leaf).__name__ in ("VOXEL", "MESH") and type(leaf).__module__.startswith("comfy_api."):
        parts = vars(leaf)
    else:
        return ""
    named = [type(leaf).__name__]
    for name, part in sorted(parts.items()):
        if isinstance(part, torch.Tensor) and part.layout == torch.strided:
            named.append(f"{name} {tensor_sha256(part)}")
        elif isinstance(part, PLAIN):
            named.append(f"{name} {part!r}")
        else:
            return ""
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


def _of_all(leaves: Iterator[Any]) -> Runs | None:
    found: list[Attestation] = []
    for leaf in leaves:
        if isinstance(leaf, comfy.sd.VAE):
            continue
        if (runs := origin(leaf)) is None:
            return None
        found += runs
    return tuple(found)


def _called(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor) and not leaf.is_nested:  # a nested one has no shape
        return f"a tensor ({' × '.join(map(str, leaf.shape))})"
    return {_Sound: "sound", _Latent: "a latent"}.get(type(leaf), f"a {type(leaf).__name__}")


def given_out(policy: OperatorPolicy, node: Node, inputs: Mapping[str, list], made: tuple) -> tuple:
    """What a node has made (outputs, shown, whether it expands, whether its end comes later), checked and noted.

    RefusedError where it shows what nobody has checked; of a coroutine, when it ends.
    """

    def check(result: Any) -> None:
        outputs, shown = _returned(result)
        check_shown(policy, node, inputs, shown)
        _note(policy, node, inputs, outputs)
        _note_texts(policy, node, inputs, outputs)

    outputs, shown, expands, later, *_ = *made, False
    if later:
        for one in outputs:
            if not isinstance(one, asyncio.Task):  # of a list of runs, one that has ended
                check(one)
        return [_then(one, check) if isinstance(one, asyncio.Task) else one for one in outputs], *made[1:]
    check_shown(policy, node, inputs, shown)
    if not expands:
        _note(policy, node, inputs, outputs)
    _note_texts(policy, node, inputs, outputs)
    return made


def _then(task: asyncio.Task, check: Callable[[Any], None]) -> asyncio.Task:
    async def checked() -> Any:
        check(result := await task)
        return result

    return asyncio.create_task(checked())


def _returned(result: Any) -> tuple[Any, Mapping]:
    """Outputs and what is shown, of what a node's function gives back (V1, V3)."""
    if isinstance(result, Mapping):
        return result.get("result"), result.get("ui") or {}
    shown = getattr(result, "ui", None) or {}
    return getattr(result, "result", result), shown if isinstance(shown, Mapping) else shown.as_dict()


def check_shown(policy: OperatorPolicy, node: Node, inputs: Mapping[str, list], shown: Mapping[str, Any]) -> None:
    """RefusedError where a node that is not known shows a file, or shows anything and was given what may be an image.

    Of nodes that neither write, show nor send by their own account, ComfyUI hands on what they show all the same.
    """
    if not shown or not leaving.closed(policy) or node.known(policy):
        return
    files = any(isinstance(one, Mapping) and "filename" in one for some in shown.values() for one in _listed(some))
    leaves = (leaf for some in inputs.values() for value in some for leaf in _leaves(value, whole=False))
    if files or any(not isinstance(leaf, WEIGHTS) for leaf in leaves):
        what = f"{min(node.names)} shows {'a file' if files else 'something'} on the way, which nobody has checked"
        remedy = f"take the node out, or ask the operator to name {min(node.names)} under [nodes] trusted"
        raise RefusedError(leaving.rule(policy), what, remedy)


def _listed(some: Any) -> tuple:
    return tuple(some) if isinstance(some, list | tuple) else (some,)


def _note(policy: OperatorPolicy, node: Node, inputs: Mapping[str, list], outputs: Any) -> None:
    """Remember where sound and solids come from that a node has made."""
    if (runs := _sources(policy, node, inputs)) is None:
        return
    for leaf in _leaves(outputs, whole=False):
        if _is_video(leaf) and not runs:
            _files.add(leaf)
        elif digest := _digest(leaf):
            ledger.others.put(digest, runs)


def _note_texts(policy: OperatorPolicy, node: Node, inputs: Mapping[str, list], outputs: Any) -> None:
    """Remember texts that may be made of an image, and what is made of them; see operators.graph.Kind.tells."""
    if node.facts.ours or node.trusted(policy):
        return
    values = [value for some in inputs.values() for value in some]
    given = {text for value in values for text in _texts(value)}
    told = {text for text in given if _told.get(text)}
    own = not node.facts.core and any(
        not isinstance(leaf, WEIGHTS) for value in values for leaf in _leaves(value, whole=False)
    )
    for text in _texts(outputs) if own or told else ():
        if text not in given - told:  # what it only hands on
            _told.put(text, True)


def _texts(value: Any) -> Iterator[str]:
    """Digests of the texts in a value, short ones left out."""
    waiting, seen = [value], {}
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if len(one) >= SHORT:
                yield hashlib.sha256(one.encode("utf-8", "surrogatepass")).hexdigest()
        elif isinstance(one, CONTAINERS) and id(one) not in seen:
            seen[id(one)] = one
            waiting.extend(one)
            waiting.extend(one.values() if isinstance(one, Mapping) else ())


def _sources(policy: OperatorPolicy, node: Node, inputs: Mapping[str, list]) -> Runs | None:
    """The runs behind what a node makes that is no image; None: it is not known to make it of what is known."""
    if node.trusted(policy) or (node.facts.core and node.names & leaving.SOURCES):
        return ()
    if not (node.facts.core and node.names & (leaving.SOUND_EDITS | leaving.DECODERS)):
        return None
    return _of_all(leaf for some in inputs.values() for value in some for leaf in _leaves(value, whole=False))


def _silent() -> bool:
    """Whether no image may be shown now: the node that runs was not checked, or nobody knows which one it is."""
    return _closed() and not _shows.get()


def _closed() -> bool:
    """Whether anything that leaves is judged now; a policy that cannot be read judges."""
    try:
        policy = policies.current()
    except GuardError:
        return True
    return policy is not None and leaving.closed(policy)


def no_previews(original: Callable) -> Callable:
    """Around ComfyUI's ways to show an image while a node runs, which is their last argument."""

    def update(self, *args, **kwargs):
        if _silent():
            args = args[: 2 if original.__name__ == "update_absolute" else 3]  # value, total / node, value, most
            kwargs = {key: value for key, value in kwargs.items() if key not in ("preview", "image")}
        return original(self, *args, **kwargs)

    return update


def no_values(original: Callable) -> Callable:
    """Around what an error tells of a node's inputs, which prints the numbers of images and texts made of them."""

    def format_value(value: Any) -> Any:
        if value is None or not _closed():
            return original(value)
        if isinstance(value, str):
            return f"a text of {len(value)} characters"
        return "a number" if isinstance(value, int | float) else _called(value)

    return format_value
