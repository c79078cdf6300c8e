"""What a policy asks of LoRAs, runs, images and gates; the same rules for a graph in the queue and for what runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..gate.finding import Detector
from ..gate.gate import Second
from ..gate.settings import ACTIVITIES, Activity, Settings
from ..modular_lora.errors import GuardError
from ..modular_lora.provenance.attestation import Attestation, GateRecord, LoraRecord
from ..modular_lora.util import bounds
from .policy import Gate, OperatorPolicy, Required, named

REPORT = "report"  # the action of a gate that changes nothing
Said = tuple[str, str, str]  # rule, reason, remedy
Unsigned = Callable[[LoraRecord, str], str]  # why a key's signature of a LoRA's file does not hold; "" where it does
Values = Callable[[str], str]  # SHA-256 of a file's tensors, by that of the file; "" where the file is not known


def no_values(sha256: str) -> str:
    """Of a host that knows no files."""
    return ""


@dataclass(frozen=True)
class Refusal:
    """Why a node may not run: the rule is the policy's key."""

    node: str
    type: str
    rule: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        node, kind = (bounds.cut(name, bounds.NAME) for name in (self.node, self.type))
        return f"Node {node} ({kind}): {bounds.cut(self.reason)} (policy: {self.rule}): {bounds.cut(self.remedy)}."


class RefusedError(GuardError):
    """A policy's refusal while a graph runs; the code is ``refused.`` and the policy's key."""

    code = "refused"

    def __init__(self, rule: str, reason: str, remedy: str):
        super().__init__(f"{reason} (policy: {rule}): {remedy}.", code=f"refused.{rule}")
        self.rule = rule


def task_refused(policy: OperatorPolicy, name: str, sha256: str, values: Callable[[], str]) -> Said | None:
    """Why a task LoRA may not be used.

    ``values``: SHA-256 of its tensors, by which a file that was saved again is known ("": not known); asked where a
    list is there to look it up in.
    """
    tasks = policy.tasks
    if tasks.deny and not {sha256, values()}.isdisjoint(tasks.deny):
        return "tasks.deny", f"task LoRA {name} is denied (sha256 {sha256[:16]})", "use another"
    if tasks.allow is not None and sha256 not in tasks.allow and values() not in tasks.allow:
        return "tasks.allow", f"task LoRA {name} is not allowed (sha256 {sha256[:16]})", "use one that is"
    return None


def check_run(policy: OperatorPolicy, run: Attestation, unsigned: Unsigned, values: Values = no_values) -> None:
    """RefusedError unless a run carries every safety LoRA that is required, strong enough, and no task LoRA denied,
    and puts them together as the policy asks.
    """
    check_tasks(policy, run, values)
    if policy.guard.combine not in ("", run.combine):
        what = f"the LoRAs are put together by {run.combine}, and {policy.guard.combine} is required"
        raise RefusedError("guard.combine", what, f"set combine to {policy.guard.combine} on the guard")
    if not policy.guard.required:
        return
    if run.base_had_merged_loras:
        what = "LoRAs or models were merged into the base, which may cancel a safety LoRA"
        raise RefusedError("guard.required", what, "connect the checkpoint's own MODEL")
    asked = policy.guard.for_family(run.base_family)
    if not asked and not policy.gates_others:
        raise RefusedError(*no_entry(policy, run.base_family))
    for one in asked:
        why = {lora: _unlike(lora, one, unsigned) for lora in run.safety}
        fit = [lora for lora, reason in why.items() if not reason]
        if not fit:
            what = f"the safety LoRA that is required ({one.name}) is missing: {'; '.join(why.values())}"
            raise RefusedError("guard.required", what, "load it with Load Safety LoRA")
        net = max(run.net_strength.get(lora.sha256, lora.strength_model) for lora in fit)  # on the text encoder alone
        if not net >= one.min_net_strength:
            what = f"the safety LoRA that is required ({one.name}) has a net strength of {net:.3f}"
            least = f"{one.min_net_strength:g} is the least: raise its strength or lower the task LoRAs'"
            raise RefusedError("guard.required", what, least)
        if run.evaluations and one.min_acted_strength:
            on_model = [lora.sha256 for lora in fit if lora.sha256 in run.net_strength]
            _check_acted(run, one, one.min_acted_strength, on_model)
        if one.min_functional_strength:
            _check_functional(run, one, one.min_functional_strength, [lora.sha256 for lora in fit])


def no_entry(policy: OperatorPolicy, family: str) -> Said:
    """(rule, reason, remedy) for a model of a family for which no safety LoRA is required."""
    what = f"no safety LoRA is named for {family}, only for {named(policy.guard.families)}"
    return "guard.required", what, "use a model of these, or ask the operator to name a safety LoRA for it"


def check_tasks(policy: OperatorPolicy, run: Attestation, values: Values = no_values) -> None:
    """RefusedError where a run, or a guard that has not run yet, carries a task LoRA that is not allowed."""
    for lora in run.loras:
        if lora.pending and (rule := _asks_for_files(policy)):
            what = f"task LoRA {lora.name} came with the model, so its file is not known"
            raise RefusedError(rule, what, "load it with Load Task LoRA")
        if lora.role == "task" and (said := task_refused(policy, lora.name, lora.sha256, partial(values, lora.sha256))):
            raise RefusedError(*said)


def _check_acted(run: Attestation, one: Required, least: float, fit: Sequence[str]) -> None:
    """RefusedError unless one of these safety LoRAs (by SHA-256) acted as strongly in the run as is asked.

    Where it had nothing to do there is no figure to ask for.
    """
    if not fit:  # on the text encoder alone
        return
    subject = f"the safety LoRA that is required ({one.name})"
    if not run.measured_evaluations:
        what = f"what was left of {subject} as it acted is not measured"
        raise RefusedError("guard.required", what, "sample without torch.compile, or with PyTorch 2.6 or newer")
    acted = [value for sha256 in fit if (value := run.acted_strength.get(sha256)) is not None]
    if len(acted) == len(fit) and not max(acted) >= least:
        what = f"{subject} had a net strength of {max(acted):.3f} as it acted"
        remedy = f"{least:g} is the least: lower the task LoRAs' strength or leave them out"
        raise RefusedError("guard.required", what, remedy)


def _check_functional(run: Attestation, one: Required, least: float, fit: Sequence[str]) -> None:
    """RefusedError unless one of these safety LoRAs (by SHA-256) was measured to act as strongly as is asked."""
    measured = [run.functional_strength[sha256] for sha256 in fit if sha256 in run.functional_strength]
    if not measured:
        why = "; ".join(run.functional_not_measured.get(sha256, "no figure was recorded") for sha256 in fit)
        what = f"the functional strength of the safety LoRA that is required ({one.name}) is not measured: {why}"
        remedy = "connect the checkpoint's CLIP to the guard, and use a safety LoRA with concept prompts in its file"
        raise RefusedError("guard.required", what, remedy)
    if not max(measured) >= least:
        what = f"the safety LoRA that is required ({one.name}) has a functional strength of {max(measured):.3f}"
        remedy = f"{least:g} is the least: take out the task LoRAs that undo it"
        raise RefusedError("guard.required", what, remedy)


def _asks_for_files(policy: OperatorPolicy) -> str | None:
    """The rule that only the file of a task LoRA can answer."""
    if policy.tasks.allow is not None or policy.tasks.deny:
        return "tasks.deny" if policy.tasks.allow is None else "tasks.allow"
    return "guard.contamination_is_error" if policy.guard.contamination_is_error else None


def _unlike(lora: LoraRecord, one: Required, unsigned: Unsigned) -> str:
    """Why a LoRA is not the one that is required; "" where it is."""
    if lora.scale and lora.scale != one.scale:
        asked = f"the one of its {one.scale}" if one.scale else "none (guard.required.scale)"
        return f"{lora.name} acts at the scale of its {lora.scale}, and of its two scales the policy names {asked}"
    if one.signed_by:
        return unsigned(lora, one.signed_by)
    return "" if lora.sha256 == one.sha256 else f"{lora.name} has the sha256 {lora.sha256[:16]}"


def check_image(
    policy: OperatorPolicy,
    run: Attestation | None,
    gate: GateRecord | None,
    unsigned: Unsigned,
    accepted: bool,
    attested: bool,
    values: Values = no_values,
) -> None:
    """RefusedError for an image that may not leave.

    ``accepted``: its gate's settings are within the policy; ``attested``: a guarded run must have made it.
    """
    made = run is not None and (run.status.startswith("guarded") or (gate is not None and gate.changed))
    if attested:
        if not made and not policy.gates_others:
            what = "an image that no guarded run made, or that passed through a node nobody vouches for, would leave"
            raise RefusedError("open.unattested", what, "connect Guarded VAE Decode or Safety Gate directly")
        for one in run.runs if run is not None and made else ():  # of an image that was put together of several
            check_run(policy, one, unsigned, values)
    if not (policy.gate.required or (attested and not made)):
        return
    rule = "gate.required" if policy.gate.required else "guard.other_families"
    reports = REPORT in (policy.gate.allowed if policy.gate.required else policy.gate.actions or ())
    if gate is None or not accepted:
        what = "an image would leave that no gate judged as the policy asks"
        raise RefusedError(rule, what, "connect Safety Gate, with nothing behind it that edits")
    if gate.flagged and not gate.changed and not (gate.action == REPORT and reports):
        what = f"an image would leave that a gate flagged and did not let pass (action {gate.action})"
        raise RefusedError(rule, what, "take the images that come out of the gate, not those that went in")


def check_gate(gate: Gate, settings: Settings, detector: Detector, second: Second | None = None) -> None:
    """RefusedError for a gate's settings that are looser than the policy's, or a second detector that may be."""
    if settings.action not in gate.allowed:
        what, few = f"the action {settings.action} is not allowed", f"choose one of {', '.join(gate.allowed)}"
        raise RefusedError("gate.actions", what, few)
    if settings.activity != stricter(settings.activity, gate.activity):
        what = f"the gate's activity is {settings.activity}, and {gate.activity} is the least"
        raise RefusedError("gate.activity", what, f"set activity to {gate.activity} in Gate Settings")
    _check_thresholds("gate.thresholds", gate.thresholds, settings, detector)
    if second is not None and (gate.required or gate.thresholds):
        if not gate.confirm:
            what = f"{second.detector.name} would let pass what {detector.name} flags"
            raise RefusedError(
                "gate.confirm", what, "take the second detector out, or ask the operator to name its labels"
            )
        _check_thresholds("gate.confirm", gate.confirm, second.settings, second.detector)


def _check_thresholds(rule: str, highest: Mapping[str, float], settings: Settings, detector: Detector) -> None:
    """RefusedError unless a detector looks for these labels from these scores on or from lower ones."""
    for label, most in highest.items():
        if label not in detector.labels:
            what = f"{detector.name} does not know {label}, which must be looked for"
            raise RefusedError(rule, what, "choose a detector that does")
        least = settings.block.get(label)
        if least is None or not least <= most:
            said = "off" if least is None else f"{least:g}"
            raise RefusedError(rule, f"the threshold of {label} is {said}", f"set {most:g} or less")
        if not settings.growth.get(label, 1.0) >= 1:
            what = f"the boxes of {label} are shrunk to {settings.growth[label]:g}"
            raise RefusedError(rule, what, "let them grow by 1 or more")


def stricter(one: Activity, other: Activity) -> Activity:
    """Of two ways to take a prompt that is about a safety LoRA's concept the stricter one."""
    return max(one, other, key=ACTIVITIES.index)


def tightened(gate: Gate, settings: Settings, detector: Detector) -> Settings:
    """A detector's own settings, made as strict as the policy asks."""
    block = dict(settings.block)
    for label, most in gate.thresholds.items():
        if label in detector.labels:
            block[label] = min(most, block.get(label, most))
    action = settings.action if settings.action in gate.allowed else (*gate.allowed, settings.action)[0]
    return replace(settings, block=block, action=action, activity=stricter(settings.activity, gate.activity))
