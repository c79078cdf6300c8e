"""Enforcement of the operator's policy: when a prompt is queued, as each of its nodes runs, and around every sampling.

Without a policy only a handler for queued prompts is there, which looks at one file's state. While one is in force,
these functions of ComfyUI are wrapped:

* ``execution.get_output_data``, through which every node runs, nodes that others expand to included,
* ``comfy.samplers.CFGGuider.sample``, around every run of a guider,
* ``comfy.model_base.BaseModel.apply_model``, every evaluation of a diffusion model, whoever asks for it,
* ``execution.PromptExecutor.execute_async``, which gives each prompt that runs an id of the server's own,
* ``execution.PromptQueue.get``, with which the thread that runs prompts waits for one (idle.py),
* those that texts.py names, through which texts become embeddings,
* what reads files of weights, and what uses text encoders and VAEs (weights.py),
* ``comfy.utils.ProgressBar.update_absolute``, which shows images on the way,
* ``comfy_execution.progress.ProgressRegistry.update_progress``, which does too, and ``execution.format_value``, which
  tells of values.

Each asks for the policy of that moment, and a sampling run once more at its end: a policy that changes in between holds
as well, so that a run that ends has satisfied both.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.clip_vision
import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import comfy_execution.progress
import folder_paths
from comfy_api.latest import io
from server import PromptServer

from ...modular_lora.errors import GuardError
from ...modular_lora.util import bounds
from ...operators import graph as graphs
from ...operators.policy import OperatorPolicy, PolicyError
from ...operators.rules import Refusal, RefusedError
from .. import drop_in
from .. import patcher as host
from ..functional import measuring
from ..node_report import CATEGORY
from . import attached, gated, idle, leaving, node_info, permits, tenants, texts, weights
from . import policy as policies

LOOK = 1.0  # seconds between looks at the policy
MOST_TOLD = 50  # refusals of one prompt that are told one by one
MOST_NODES, MOST_INPUTS = 5000, 30_000  # of a prompt: the server's loop waits while it is checked
MOST_NAME = 1024  # characters of a node's id, its type and its inputs' names
HIDDEN = "load it with ComfyUI's own loader, and leave out nodes that make copies of their own"  # where all is guarded
IN_FORCE = "ModularLoraInForce"

log = logging.getLogger("modular_lora")
_lock = threading.Lock()
_attached: list[str] = []  # state of the policy that was last seen to put safety LoRAs onto every model
_wants_texts: list[bool] = []  # whether the policy that was last looked at asks for texts


class ModularLoraRefused(io.ComfyNode):
    """Takes the place of a node that the policy refuses, so that the server itself answers why, on that node.

    A handler of queued prompts cannot refuse one: ComfyUI logs what it raises and goes on. The type exists only while a
    policy is in force.
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


class ModularLoraInForce(io.ComfyNode):
    """Says in the list of nodes that every model is guarded, and by whom; it exists only while that is so."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=IN_FORCE,
            display_name=f"In force: {_who()}",
            category=CATEGORY,
            description=f"Every model on this server is guarded as it leaves a node: {_who()}. Workflows need no node "
            "for it. This one gives these words as text.",
            inputs=[],
            outputs=[io.String.Output(display_name="in force", tooltip="What is in force, and who says so.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(_who())


def _who() -> str:
    """What is in force for every model; a policy's place is the operator's own."""
    try:
        policy = policies.current()
    except PolicyError:
        policy = None
    return policy.one_line if policy is not None and policy.one_line else "the operator's policy"


def register() -> None:
    """Register the prompt handler and poll the policy file once a second: prompts may be in the queue already."""
    if not hasattr(PromptServer.instance, "add_on_prompt_handler"):
        return
    PromptServer.instance.add_on_prompt_handler(on_prompt)  # the server's own way in
    _watching()


def _watching() -> None:
    """Runs on the event loop (PromptServer.loop), so nothing iterates its nodes meanwhile."""
    PromptServer.instance.loop.call_later(LOOK, _watching)
    watch()


def watch() -> None:
    """Enforce a policy that has come into force, or stop where there is none any more."""
    found: OperatorPolicy | PolicyError | None
    try:
        found = policies.current()
    except PolicyError as error:
        found = error
    except Exception:
        log.exception("The policy cannot be read: nothing is sampled.")
        found = PolicyError("cannot be read", code="policy.unreadable")
    if found is None:
        uninstall()
        _heed_attached(None)
        return
    policies.retry()
    if install():
        log.warning("%s", _said(found))
    _heed_attached(found)
    texts_wanted = isinstance(found, OperatorPolicy) and found.record.prompts
    if texts_wanted and not _wants_texts:
        _forget_results()  # embeddings that were made before are bound to no text
    _wants_texts[:] = [True] * texts_wanted
    try:
        policies.notice(found if isinstance(found, OperatorPolicy) else None)
    except Exception:  # where it must not be missing, it is asked for again
        log.exception("The policy is not in the record.")


def _said(found: OperatorPolicy | PolicyError) -> str:
    """What is in force, for the server's log."""
    if isinstance(found, PolicyError):
        return f"Operator's policy: {found}"
    if found.one_line:
        return f"Modular LoRA Guard: in force for every model: {found.one_line}"
    return f"Operator's policy: in force, {found.sha256}{', attached to every model' if found.attaches else ''}"


def _heed_attached(found: OperatorPolicy | PolicyError | None) -> None:
    """Where other safety LoRAs are put onto every model than before, what was made before is not kept.

    While some are, a node type that says so stands in the list of nodes.
    """
    now = [found.state] if isinstance(found, OperatorPolicy) and found.attaches else []
    if now != _attached:
        _forget_results()
        _attached[:] = now
    if now:
        ModularLoraInForce.RELATIVE_PYTHON_MODULE = node_info.origin()
        node_info.classes()[IN_FORCE] = ModularLoraInForce
    else:
        node_info.classes().pop(IN_FORCE, None)


def on_prompt(said: Any) -> Any:
    """The queued prompt, or in its place one that the server's validation refuses; it must not raise.

    The server calls it on its event loop and takes what it returns for the prompt (trigger_on_prompt). The check cannot
    be awaited in a thread, and must be short: prompts of more than MOST_NODES nodes or MOST_INPUTS inputs are refused
    unread, and lines of the record are written by a thread of their own.
    """
    if not isinstance(said, dict) or "prompt" not in said:
        return said  # the server answers that itself
    policy: OperatorPolicy | None = None
    refusals: tuple[Refusal, ...] = ()
    try:
        if (policy := policies.current()) is None:
            uninstall()
            return said
        install()
        _heed_attached(policy)
        wrong = _too_much(said["prompt"]) or _nobodys(policy, said["prompt"])
        refusals = wrong or graphs.check(said["prompt"], node_info.by_name(), policy, node_info.Files(policy))
        said = said | {"prompt_id": said.get("prompt_id") or str(uuid.uuid4()), "prompt": _plain(said["prompt"])}
        said |= tenants.ticket(policy, said)
    except Exception as error:  # a prompt that cannot be checked is not run
        install()
        why = str(error) if isinstance(error, GuardError) else f"cannot be checked ({type(error).__name__}: {error})"
        refusals = (Refusal(*_first(said["prompt"]), "policy", why.rstrip("."), "tell the operator"),)
    return _refused(said, policy, refusals) if refusals else said


def _nobodys(policy: OperatorPolicy, prompt: Any) -> tuple[Refusal, ...]:
    """A refusal of a prompt of which nobody says whose it is, where the policy asks."""
    return (Refusal(*_first(prompt), *tenants.NOBODYS),) if tenants.unknown(policy) else ()


def _too_much(prompt: Any) -> tuple[Refusal, ...]:
    """A refusal of a prompt that is too large to be checked while the server waits; none where it is not."""
    if not isinstance(prompt, dict):
        return ()
    inputs = [node.get("inputs") for node in prompt.values() if isinstance(node, dict)]
    count = sum(len(some) for some in inputs if isinstance(some, dict))
    names = (str(name) for node in prompt.values() if isinstance(node, dict) for name in (node.get("class_type"),))
    keys = (str(name) for some in inputs if isinstance(some, dict) for name in some)
    problem = ""
    if len(prompt) > MOST_NODES:
        problem = f"the prompt has {len(prompt)} nodes, at most {MOST_NODES} are checked"
    elif count > MOST_INPUTS:
        problem = f"the prompt's nodes have {count} inputs, at most {MOST_INPUTS} are checked"
    elif long := next((one for some in (prompt, names, keys) for one in some if len(one) > MOST_NAME), ""):
        problem = f"a name in the prompt is too long: {bounds.cut(long, bounds.NAME)}"
    return (Refusal(*_first(prompt), "nodes", problem, "send a smaller graph"),) if problem else ()


def _plain(prompt: Any) -> Any:
    """A graph without answers to whether a node has changed, which the executor would believe."""
    if not isinstance(prompt, dict) or not all(isinstance(node, dict) for node in prompt.values()):
        return prompt
    return {name: {k: v for k, v in node.items() if k != "is_changed"} for name, node in prompt.items()}


def _refused(said: dict, policy: OperatorPolicy | None, refusals: tuple[Refusal, ...]) -> dict:
    """A prompt of nothing but refusals; targets are left out, as the server would look at those nodes alone.

    Of a graph with more refusals the first are told, each with a line of the record, and the rest counted.
    """
    sentences: dict[str, list[str]] = {}
    where = {"prompt_id": _id(said), "execution": uuid.uuid4().hex}
    for one in refusals[:MOST_TOLD]:
        log.warning("refused: %s", one)
        sentences.setdefault(bounds.cut(one.node, MOST_NAME), []).append(str(one))
        policies.record_later(policy, one.rule, reason=str(one), node=one.node, type=one.type, **where)
    if more := Counter(one.rule for one in refusals[MOST_TOLD:]):
        told = policies.more_refused(more)
        sentences[next(reversed(sentences))].append(f"{told['reason']}.")
        policies.record_later(policy, **told, **where)
    prompt = {
        node: {"class_type": graphs.REFUSED, "inputs": {"policy": " ".join(some)}} for node, some in sentences.items()
    }
    return {key: value for key, value in said.items() if key != "partial_execution_targets"} | {"prompt": prompt}


def _id(said: Mapping[str, Any]) -> str:
    """A prompt's id as its sender has chosen it, which may be any value."""
    chosen = said.get("prompt_id")
    try:
        return str(chosen)
    except RecursionError:
        return f"({type(chosen).__name__})"


def _record_refusal(policy: OperatorPolicy | None, rule: str, sentence: str, **where: Any) -> None:
    """Of a node as it runs."""
    try:
        policies.record(policy, "refused", rule=rule, reason=sentence, **where)
    except Exception:  # it stays refused
        log.exception("A refusal is not in the record.")


def _first(prompt: Any) -> tuple[str, str]:
    """A node to show a refusal on that is about none."""
    for name, node in prompt.items() if isinstance(prompt, dict) else ():
        return str(name), str(node.get("class_type")) if isinstance(node, dict) else "?"
    return "prompt", "?"


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
        if graphs.REFUSED in node_info.classes():
            return False
        ModularLoraRefused.RELATIVE_PYTHON_MODULE = node_info.origin()
        node_info.classes()[graphs.REFUSED] = ModularLoraRefused
        for one in _WRAPPED:
            one.put()
    _forget_results()
    return True


def _forget_results() -> None:
    """As POST /free: what was made before is not kept."""
    if (queue := getattr(PromptServer.instance, "prompt_queue", None)) is not None:
        queue.set_flag("free_memory", True)


def uninstall() -> None:
    with _lock:
        if graphs.REFUSED not in node_info.classes():
            return
        for one in _WRAPPED:
            one.take()
        del node_info.classes()[graphs.REFUSED]
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
        policy = None
        where = {"prompt_id": prompt_id, "node": unique_id, "type": ", ".join(node_info.names(type(obj)))}
        where["pack"] = node_info.pack(type(obj))
        try:
            if (policy := policies.current()) is None:
                return await original(prompt_id, unique_id, obj, input_data_all, *args, **kwargs)
            node = leaving.node_of(type(obj))
            permit, input_data_all = _check_node(policy, unique_id, type(obj), input_data_all)
            with permits.granted(permit), leaving.showing(policy, node), weights.reading() as read:
                made = await original(prompt_id, unique_id, obj, input_data_all, *args, **kwargs)
                weights.end(policy, read, made[0])
                made = (attached.outputs(policy, made[0]), *made[1:])
                made = leaving.given_out(policy, node, input_data_all, made)
                for task in (one for one in made[0] if isinstance(one, asyncio.Task)):  # a coroutine's end comes later
                    task.add_done_callback(
                        lambda done: None if done.cancelled() else _failed(policy, done.exception(), where)
                    )
            return made
        except GuardError as error:
            _failed(policy, error, where)
            raise

    return get_output_data


def _failed(policy: OperatorPolicy | None, error: BaseException | None, where: Mapping[str, str]) -> None:
    """A line for a node that was refused as it ran."""
    if isinstance(error, PolicyError) or (policy is not None and isinstance(error, GuardError)):
        rule = getattr(error, "rule", "policy" if isinstance(error, PolicyError) else "guard")
        _record_refusal(policy, rule, str(error), **where)


def _check_node(
    policy: OperatorPolicy, unique_id: str, kind: type, inputs: Mapping[str, list]
) -> tuple[permits.Permit, Mapping[str, list]]:
    """What a node may evaluate beside runs that are checked, and its inputs with what the policy puts there.

    A training or an audit that the policy opens may evaluate every model. Raises RefusedError for a node that may not
    run with what has come to it.
    """
    if tenants.unknown(policy):
        raise RefusedError(*tenants.NOBODYS)
    said, names = node_info.facts(kind), node_info.names(kind) or [kind.__name__]
    refusals = [refusal for name in names if (refusal := graphs.check_type(unique_id, name, said, policy))]
    denied = next((one for one in refusals if one.rule != "nodes.allow"), None)
    if denied or len(refusals) == len(names):  # one class under two names: one that is allowed is enough
        one = denied or refusals[0]
        raise RefusedError(one.rule, f"{one.type}: {one.reason}", one.remedy)
    values = [(name, value) for name, some in inputs.items() for value in some]
    for value in weights.models([value for _, value in values]):
        weights.check_base(policy, value)
    if policy.guard.required and not said.ours:
        _check_models(policy, names, values, said.core)
    node = leaving.node_of(kind)
    inputs = gated.inputs(policy, node, attached.bare_inputs(policy, node, inputs))
    leaving.check(policy, node, inputs)
    if not said.ours or not graphs.CLOSED.keys() & set(names) - {graphs.AS_MODEL}:
        return permits.NO_MODEL, inputs
    policies.record(policy, "opened", type=names[0], node=unique_id)
    return permits.EVERY_MODEL, inputs


def _check_models(policy: OperatorPolicy, names: list[str], values: list[tuple[str, Any]], core: bool) -> None:
    known = set(names) if core else set()
    for name, value in values:
        exempt = policy.gates_others and not isinstance(value, host.GuardMixin)
        if known & graphs.LOADERS and exempt:
            attached.check_listed(policy, name, value)
        elif known & graphs.LOADERS and not set(names) & set(policy.nodes.patching):
            _check_loads(names[0], name, value)
        if policy.attaches:
            _check_attached(policy, names[0], name, value)
            continue
        if known & graphs.BEHIND and isinstance(value, drop_in.DropInMixin):
            continue
        guarded = isinstance(value, host.GuardMixin | host.GuardedModel)
        if not guarded and not attached.is_model(value):
            continue
        if set(names) & set(policy.nodes.patching) or (guarded and set(names) & set(policy.nodes.sampling)):
            continue
        what = f"{names[0]} got a MODEL{'' if guarded else ' that is not guarded'} as {name}"
        raise RefusedError("nodes.sampling", what, "sample a MODEL of Guard, or use a Guarded sampler")


def _check_loads(kind: str, name: str, value: Any) -> None:
    """RefusedError for a MODEL or CLIP that a LoRA would be merged into."""
    model = isinstance(value, host.GuardedModel) or attached.is_model(value)
    clip = isinstance(value, comfy.sd.CLIP)
    if (model or clip) and not isinstance(value, drop_in.DropInMixin | drop_in.DropInClipMixin):
        what = f"{kind} got a {'MODEL' if model else 'CLIP'} that is not behind Guard as {name}"
        raise RefusedError("guard.required", what, "load LoRAs with Load Task LoRA, or put the loader behind Guard")


def _check_attached(policy: OperatorPolicy, kind: str, name: str, value: Any) -> None:
    """RefusedError for a MODEL that the guard has not reached although it guards every one."""
    loose = attached.is_model(value) and not isinstance(value, host.GuardMixin)
    if loose and not attached.is_exempt(policy, value):
        what = f"{kind} got a MODEL as {name} that is not guarded: a node on the way hid it, or took the guard off"
        raise RefusedError("guard.attach", what, HIDDEN)


def _sampling(original: Callable) -> Callable:
    """Around every run of a guider."""

    def sample(self, *args, **kwargs):
        policy = policies.current()
        if policy is None or permits.current().every_model:
            return original(self, *args, **kwargs)
        guarded = isinstance(self.model_patcher, host.GuardMixin)
        weights.check_base(policy, self.model_patcher)
        if policy.guard.required and not guarded and not attached.is_exempt(policy, self.model_patcher):
            what = "sampling began on a MODEL that is not guarded"
            remedy = HIDDEN if policy.attaches else "sample what Guard or Guard Model gives"
            raise RefusedError("guard.required", what, remedy)
        if guarded:
            policies.check_run(policy, self.model_patcher.guard_record(self.original_conds))
        collecting, began = texts.collect(), time.monotonic()
        try:
            with permits.granted(permits.Permit(self.model_patcher.model)):
                output = original(self, *args, **kwargs)
        finally:
            said = texts.stop(collecting)
        _end(self.model_patcher, guarded, said, time.monotonic() - began)
        return output

    return sample


def _end(patcher: Any, guarded: bool, said: texts.Texts | None, seconds: float) -> None:
    """After a run: it must satisfy the policy of now too, and stand in the record before anybody has its latents."""
    if (policy := policies.current()) is None:
        return
    base = weights.check_base(policy, patcher)
    run = host.attestation(patcher) if guarded else None
    if run is not None:
        policies.check_run(policy, run)
    elif policy.guard.required and not attached.is_exempt(policy, patcher):
        what = "the policy asks for a guard since this run began"
        raise RefusedError("guard.required", what, "queue it again, guarded")
    policies.record_run(policy, run, base, said if policy.record.prompts else None, seconds)


def _evaluation(original: Callable) -> Callable:
    """Around every evaluation of a diffusion model: it must belong to the run that was checked."""

    def apply_model(self, *args, **kwargs):
        if not permits.current().covers(self) and measuring.get() is not self:
            policy = policies.current()
            if policy is not None and policy.guard.required:
                what = "a diffusion model was evaluated outside of a guarded run"
                raise RefusedError("guard.required", what, "use a Guarded sampler")
            if policy is not None:
                weights.check_base(policy, self)
        return original(self, *args, **kwargs)

    return apply_model


def _executing(original: Callable) -> Callable:
    """Around every prompt as it runs: its lines carry an id that nobody has chosen, and whose it is."""

    async def execute_async(self, prompt, prompt_id, extra_data=None, *args, **kwargs):
        token, whose = policies.execution.set(uuid.uuid4().hex), policies.tenant.set(tenants.of(extra_data))
        try:
            return await original(self, prompt, prompt_id, extra_data or {}, *args, **kwargs)
        finally:
            policies.tenant.reset(whose)
            policies.execution.reset(token)

    return execute_async


_WRAPPED = (
    _Wrapped(lambda: _execution().PromptExecutor, "execute_async", _executing),
    _Wrapped(lambda: _execution().PromptQueue, "get", idle.between),
    _Wrapped(_execution, "get_output_data", _node),
    _Wrapped(lambda: comfy.samplers.CFGGuider, "sample", _sampling),
    _Wrapped(lambda: comfy.model_base.BaseModel, "apply_model", _evaluation),
    _Wrapped(lambda: comfy.sd.CLIP, "tokenize", texts.tokenizing),
    _Wrapped(lambda: comfy.sd.CLIP, "encode_from_tokens", texts.encoding),
    _Wrapped(lambda: comfy.sd.CLIP, "encode_from_tokens_scheduled", texts.encoding_scheduled),
    _Wrapped(lambda: comfy.samplers, "encode_model_conds", texts.handing_over),
    _Wrapped(_execution, "format_value", leaving.no_values),
    _Wrapped(lambda: comfy.utils.ProgressBar, "update_absolute", leaving.no_previews),
    _Wrapped(lambda: comfy_execution.progress.ProgressRegistry, "update_progress", leaving.no_previews),
    _Wrapped(lambda: comfy.utils, "load_torch_file", weights.loading),
    _Wrapped(lambda: comfy.clip_vision, "load_torch_file", weights.loading),
    _Wrapped(lambda: folder_paths, "get_full_path", weights.finding),
    _Wrapped(lambda: comfy.sd1_clip, "load_embed", weights.embedding),
    _Wrapped(lambda: comfy.sd.CLIP, "load_model", weights.using),
    _Wrapped(lambda: comfy.sd.VAE, "decode", weights.using),
    _Wrapped(lambda: comfy.sd.VAE, "decode_tiled", weights.using),
)
