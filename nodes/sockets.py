"""The pack's socket types, and the model input that its samplers share."""

from __future__ import annotations

from comfy_api.latest import io

from ..modular_lora.provenance.attestation import COMBINE

SafetySocket = io.Custom("MODULAR_LORA_SAFETY")
TaskSocket = io.Custom("MODULAR_LORA_TASK")
GuardedSocket = io.Custom("MODULAR_LORA_GUARDED_MODEL")
StackSocket = io.Custom("LORA_STACK")
TaskOptionsSocket = io.Custom("MODULAR_LORA_TASK_OPTIONS")
SafetyOptionsSocket = io.Custom("MODULAR_LORA_SAFETY_OPTIONS")
GateSocket = io.Custom("MODULAR_LORA_GATE")


def model_input() -> io.Input:
    """A guarded model, or a MODEL that is checked to be guarded."""
    tip = "Guarded model from Guard Model, or the MODEL of Guarded Model as MODEL; an unguarded MODEL is refused."
    return io.MultiType.Input("model", [GuardedSocket, io.Model], tooltip=tip)


def combine_input() -> io.Input:
    """How the LoRAs beside the weights are put together."""
    tip = (
        "sum: all LoRAs act together. safety first: the task LoRAs of an image give way where the safety LoRA acts on "
        "its prompt; needs a safety LoRA with a calibration (Calibrate Safety LoRA), and one more evaluation a run."
    )
    made = io.Combo.Input("combine", list(COMBINE), default=COMBINE[0], optional=True, tooltip=tip)
    return rarely([made], made.id)[0]


def guard_report() -> io.Output:
    """What the nodes that put the guard in say of it."""
    return io.String.Output(
        "report", display_name="report", tooltip="Which layers matched, at which strength, with hashes and warnings."
    )


def rarely(inputs: list[io.Input], *names: str) -> list[io.Input]:
    """The inputs, those of these names marked as changed by few: front ends that know the mark fold them away.

    Their order is left as it is, as saved workflows hold the values of widgets by their place. ComfyUI 0.3.75 has no
    such mark of its own and hands this one on all the same.
    """
    for one in inputs:
        if one.id in names:
            one.extra_dict = {**one.extra_dict, "advanced": True}
    return inputs
