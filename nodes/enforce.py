"""Enforcement of the operator's policy: when a prompt is queued, as each of its nodes runs, and around every sampling.

Without a policy only a handler for queued prompts is there, which looks at one file's state. While one is in force,
three functions of ComfyUI are wrapped:

* ``execution.get_output_data``, through which every node runs, nodes that others expand to included,
* ``comfy.samplers.CFGGuider.sample``, around every run of a guider,
* ``comfy.model_base.BaseModel.apply_model``, every evaluation of a diffusion model, whoever asks for it

(0.3.75 and 0.33.0, tested in both). Each asks for the policy of that moment, and a sampling run once more at its end: a
policy that changes in between holds as well, so that a run that ends has satisfied both.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import torch
from comfy_api.latest import io
from server import PromptServer

from ..modular_lora.errors import GuardError
from ..operators import graph as graphs
from ..operators.graph import NodeFacts
from ..operators.policy import Policy, PolicyError
from ..operators.rules import Refusal, RefusedError
from . import facts, host
from . import policy as policies
from .functional import measuring
from .guard import GuardModel
from .sockets import CATEGORY

LOOK = 1.0  # seconds between looks at the policy
MOST_TOLD = 50  # refusals of one prompt
ANY_MODEL = object()  # what an open training or audit may evaluate

log = logging.getLogger("modular_lora")
_lock = threading.Lock()
_evaluating: contextvars.ContextVar = contextvars.ContextVar("modular_lora_evaluating", default=None)


class ModularLoraRefused(io.ComfyNode):
    """Takes the place of a node that the policy refuses, so that the server itself answers why, on that node.

    A handler of queued prompts cannot refuse one: ComfyUI logs what it raises and goes on (0.3.75 and 0.33.0). The
    type exists only while a policy is in force.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=graphs.REFUSED,
            display_name="Refused by the operator's policy",
            category=CATEGORY,
            description="Stands where the operator's policy refused a node; not for graphs.",
            inputs=[io.String.Input("policy", tooltip="Why the node was refused.")],
            outputs=[],
            is_output_node=True,
            is_deprecated=True,  # menus and searches leave it out
        )

    @classmethod
    def validate_inputs(cls, policy=None) -> str:
        return policy or "refused by the operator's policy"

    @classmethod
    def execute(cls, policy) -> io.NodeOutput:
        raise GuardError(policy)


def register() -> None:
    """Hear of queued prompts; look at the policy now and once a second, as prompts may be in the queue already."""
    if not hasattr(PromptServer.instance, "add_on_prompt_handler"):
        return
    PromptServer.instance.add_on_prompt_handler(on_prompt)  # the server's own way in (0.3.75 and 0.33.0)
    _watching()


def _watching() -> None:
    """In the server's own loop (PromptServer.loop, 0.3.75 and 0.33.0), where nobody goes through its nodes now."""
    PromptServer.instance.loop.call_later(LOOK, _watching)
    watch()


def watch() -> None:
    """Enforce a policy that has come into force, or stop where there is none any more."""
    try:
        found = policies.current()
    except PolicyError as error:
        found = error
    except Exception:
        log.exception("The policy cannot be looked at: nothing is sampled.")
        found = PolicyError("cannot be looked at")
    if found is None:
        uninstall()
        return
    if install():
        log.warning("Operator's policy: %s", found if isinstance(found, PolicyError) else f"in force, {found.sha256}")
    try:
        policies.notice(found if isinstance(found, Policy) else None)
    except Exception:  # where it must not be missing, it is asked for again
        log.exception("The policy is not in the record.")


def on_prompt(said: Any) -> Any:
    """The queued prompt, or in its place one that the server's validation refuses; it must not raise."""
    if not isinstance(said, dict) or "prompt" not in said:
        return said  # the server answers that itself
    policy, refusals = None, ()
    try:
        if (policy := policies.current()) is None:
            uninstall()
            return said
        install()
        refusals = graphs.check(said["prompt"], facts.by_name(), policy, facts.Files(policy))
        said = said | {"prompt_id": said.get("prompt_id") or str(uuid.uuid4()), "prompt": _plain(said["prompt"])}
        if not refusals and policy.record.prompts:
            policies.remember_texts(said["prompt_id"], list(_texts(said["prompt"])))
    except Exception as error:  # a prompt that cannot be checked is not run
        install()
        why = str(error) if isinstance(error, GuardError) else f"cannot be checked ({type(error).__name__}: {error})"
        refusals = (Refusal(*_first(said["prompt"]), "policy", why.rstrip("."), "tell the operator"),)
    return _refused(said, policy, refusals) if refusals else said


def _plain(prompt: Any) -> Any:
    """A graph without answers to whether a node has changed, which the executor would believe (0.3.75 and 0.33.0)."""
    if not isinstance(prompt, dict) or not all(isinstance(node, dict) for node in prompt.values()):
        return prompt
    return {name: {k: v for k, v in node.items() if k != "is_changed"} for name, node in prompt.items()}


def _refused(said: dict, policy: Policy | None, refusals: Iterable[Refusal]) -> dict:
    """A prompt of nothing but refusals; targets are left out, as the server would look at those nodes alone.

    Of a graph with more refusals the first are told: each is a synced line of the record, and the server waits for it.
    """
    sentences: dict[str, list[str]] = {}
    for one in islice(refusals, MOST_TOLD):
        log.warning("refused: %s", one)
        sentences.setdefault(one.node, []).append(str(one))
        _record_refusal(policy, one.rule, str(one), prompt_id=said.get("prompt_id"), node=one.node, type=one.type)
    prompt = {
        node: {"class_type": graphs.REFUSED, "inputs": {"policy": " ".join(some)}} for node, some in sentences.items()
    }
    return {key: value for key, value in said.items() if key != "partial_execution_targets"} | {"prompt": prompt}


def _record_refusal(policy: Policy | None, rule: str, sentence: str, **where: Any) -> None:
    try:
        policies.record(policy, "refused", rule=rule, reason=sentence, **where)
    except Exception:  # it stays refused
        log.exception("A refusal is not in the record.")


def _first(prompt: Any) -> tuple[str, str]:
    """A node to show a refusal on that is about none."""
    for name, node in prompt.items() if isinstance(prompt, dict) else ():
        return str(name), str(node.get("class_type")) if isinstance(node, dict) else "?"
    return "prompt", "?"


def _texts(prompt: Mapping[str, Any]) -> Iterator[str]:
    """What is written into nodes that make conditioning."""
    facts_of = facts.by_name()
    for node in prompt.values():
        if "CONDITIONING" in facts_of(node["class_type"]).outputs:
            yield from (value for value in node["inputs"].values() if isinstance(value, str))


@dataclass
class _Wrapped:
    """A function of ComfyUI, and what stands in its place while a policy is in force."""

    owner: Any
    name: str
    wrap: Callable[[Callable], Callable]
    before: Callable | None = None
    ours: Callable | None = None

    def put(self) -> None:
        now = getattr(self.owner(), self.name)
        if self.ours is None:
            self.before, self.ours = now, functools.wraps(now)(self.wrap(now))
            setattr(self.owner(), self.name, self.ours)

    def take(self) -> None:
        """Where another pack has wrapped it since, ours stays inside and does nothing without a policy."""
        if self.ours is not None and getattr(self.owner(), self.name) is self.ours:
            setattr(self.owner(), self.name, self.before)
            self.ours = None


def install() -> bool:
    """Whether it was not enforced before."""
    with _lock:
        if graphs.REFUSED in facts.classes():
            return False
        ModularLoraRefused.RELATIVE_PYTHON_MODULE = getattr(GuardModel, "RELATIVE_PYTHON_MODULE", facts.PACK)
        facts.classes()[graphs.REFUSED] = ModularLoraRefused
        for one in _WRAPPED:
            one.put()
    if (queue := getattr(PromptServer.instance, "prompt_queue", None)) is not None:
        queue.set_flag("free_memory", True)  # as POST /free: what was made before is not kept (0.3.75 and 0.33.0)
    return True


def uninstall() -> None:
    with _lock:
        if graphs.REFUSED not in facts.classes():
            return
        for one in _WRAPPED:
            one.take()
        del facts.classes()[graphs.REFUSED]
    try:
        policies.gone()
    except Exception:
        log.exception("That the policy is gone is not in the record.")


def _execution():
    import execution  # ComfyUI's top-level module

    return execution


def _node(original: Callable) -> Callable:
    """Around every node as it runs: its type and what has come to it are checked, now that they are known."""

    async def get_output_data(prompt_id, unique_id, obj, input_data_all, *args, **kwargs):
        policy, token = None, None
        where = {"prompt_id": prompt_id, "node": unique_id, "type": ", ".join(facts.names(type(obj)))}
        try:
            if (policy := policies.current()) is not None:
                token = _evaluating.set(_check_node(policy, unique_id, type(obj), input_data_all))
            made = await original(prompt_id, unique_id, obj, input_data_all, *args, **kwargs)
            if policy is not None:
                _check_shown(policy, facts.facts(type(obj)), made[1])
                for task in (one for one in made[0] if isinstance(one, asyncio.Task)):  # a coroutine's end comes later
                    task.add_done_callback(lambda done: done.cancelled() or _failed(policy, done.exception(), where))
            return made
        except GuardError as error:
            _failed(policy, error, where)
            raise
        finally:
            if token is not None:
                _evaluating.reset(token)

    return get_output_data


def _failed(policy: Policy | None, error: BaseException | None, where: Mapping[str, str]) -> None:
    """A line for a node that was refused as it ran."""
    if isinstance(error, PolicyError) or (policy is not None and isinstance(error, GuardError)):
        rule = getattr(error, "rule", "policy" if isinstance(error, PolicyError) else "guard")
        _record_refusal(policy, rule, str(error), **where)


def _check_node(policy: Policy, unique_id: str, kind: type, inputs: Mapping[str, list]) -> object | None:
    """RefusedError for a node that may not run with what has come to it; ANY_MODEL for an open training or audit."""
    said, names = facts.facts(kind), facts.names(kind) or [kind.__name__]
    refusals = [refusal for name in names if (refusal := graphs.check_type(unique_id, name, said, policy))]
    denied = next((one for one in refusals if one.rule != "nodes.allow"), None)
    if denied or len(refusals) == len(names):  # one class under two names: one that is allowed is enough
        one = denied or refusals[0]
        raise RefusedError(one.rule, f"{one.type}: {one.reason}", one.remedy)
    values = [(name, value) for name, some in inputs.items() for value in some]
    if policy.guard.required and not said.ours:
        _check_models(policy, names, values)
    if said.is_output:
        _check_leaving(policy, said, values)
    if not said.ours or not graphs.CLOSED.keys() & set(names) - {graphs.AS_MODEL}:
        return None
    policies.record(policy, "opened", type=names[0], node=unique_id)
    return ANY_MODEL


def _check_models(policy: Policy, names: list[str], values: list[tuple[str, Any]]) -> None:
    for name, value in values:
        guarded = isinstance(value, host.GuardMixin | host.GuardedModel)
        if not guarded and not _is_model(value):
            continue
        if set(names) & set(policy.nodes.patching) or (guarded and set(names) & set(policy.nodes.sampling)):
            continue
        what = f"{names[0]} got a MODEL{'' if guarded else ' that is not guarded'} as {name}"
        raise RefusedError("nodes.sampling", what, "use a Guarded sampler, or Guarded Model as MODEL if it is named")


def _is_model(value: Any) -> bool:
    patcher = isinstance(value, comfy.model_patcher.ModelPatcher)
    return patcher and isinstance(value.model, comfy.model_base.BaseModel)


def _check_leaving(policy: Policy, said: NodeFacts, values: list[tuple[str, Any]]) -> None:
    """Of an output node: RefusedError for pictures and latents that may not leave."""
    attested, gated = graphs.closes_pictures(policy), policy.gate.required
    if not attested and not gated:
        return
    for name, value in values:
        if isinstance(value, Mapping) and "samples" in value:
            if gated:
                raise RefusedError("gate.required", f"{name} lets out a latent that no gate can judge", "take it out")
        elif said.inputs.get(name) != "AUDIO":
            for picture in _pictures(value):
                policies.check_picture(policy, picture, attested)


def _check_shown(policy: Policy, said: NodeFacts, shown: Mapping[str, Any]) -> None:
    """RefusedError where a node that is no output node, and so was not checked before, shows files of its own."""
    if said.ours or said.is_output or not (graphs.closes_pictures(policy) or policy.gate.required):
        return
    if any(isinstance(one, Mapping) and "filename" in one for some in shown.values() for one in some):
        rule = "gate.required" if policy.gate.required else "open.unattested"
        raise RefusedError(rule, "the node shows a file on the way, which nobody has checked", "take the node out")


def _pictures(value: Any) -> Iterator[torch.Tensor]:
    """Single pictures (h w c) in what came to an input; a mask (b h w) counts as one that nobody knows."""
    if isinstance(value, torch.Tensor):
        if value.ndim >= 3:
            yield from value.reshape(-1, *value.shape[-3:])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _pictures(item)
    elif isinstance(value, Mapping):
        for item in value.values() if "waveform" not in value else ():  # of AUDIO
            yield from _pictures(item)
    elif hasattr(value, "get_components"):  # VIDEO (comfy_api's VideoInput, 0.3.75 and 0.33.0)
        yield from value.get_components().images


def _sampling(original: Callable) -> Callable:
    """Around every run of a guider."""

    def sample(self, *args, **kwargs):
        policy = policies.current()
        if policy is None or _evaluating.get() is ANY_MODEL:
            return original(self, *args, **kwargs)
        guarded = isinstance(self.model_patcher, host.GuardMixin)
        if policy.guard.required and not guarded:
            what = "sampling began on a MODEL that is not guarded"
            raise RefusedError("guard.required", what, "connect Guard Model's output to a Guarded sampler")
        if guarded:
            policies.check_run(policy, self.model_patcher.guard_state.record)
        token = _evaluating.set(self.model_patcher.model)
        try:
            output = original(self, *args, **kwargs)
        finally:
            _evaluating.reset(token)
        _end(self.model_patcher if guarded else None)
        return output

    return sample


def _end(patcher: Any | None) -> None:
    """After a run: it must satisfy the policy of now too, and stand in the record before anybody has its latents."""
    if (policy := policies.current()) is None:
        return
    run = host.attestation(patcher) if patcher is not None else None
    if run is not None:
        policies.check_run(policy, run)
    elif policy.guard.required:
        what = "the policy asks for a guard since this run began"
        raise RefusedError("guard.required", what, "queue it again, guarded")
    policies.record_run(policy, run)


def _evaluation(original: Callable) -> Callable:
    """Around every evaluation of a diffusion model: it must belong to the run that was checked."""

    def apply_model(self, *args, **kwargs):
        running = _evaluating.get()
        if running is not self and running is not ANY_MODEL and measuring.get() is not self:
            policy = policies.current()
            if policy is not None and policy.guard.required:
                what = "a diffusion model was evaluated outside of a guarded run"
                raise RefusedError("guard.required", what, "use a Guarded sampler")
        return original(self, *args, **kwargs)

    return apply_model


_WRAPPED = (
    _Wrapped(_execution, "get_output_data", _node),
    _Wrapped(lambda: comfy.samplers.CFGGuider, "sample", _sampling),
    _Wrapped(lambda: comfy.model_base.BaseModel, "apply_model", _evaluation),
)
