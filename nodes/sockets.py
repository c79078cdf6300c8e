"""The pack's socket types, and the model input that its samplers share."""

from __future__ import annotations

from comfy_api.latest import io

SafetySocket = io.Custom("MODULAR_LORA_SAFETY")
TaskSocket = io.Custom("MODULAR_LORA_TASK")
GuardedSocket = io.Custom("MODULAR_LORA_GUARDED_MODEL")
StackSocket = io.Custom("LORA_STACK")
GateSocket = io.Custom("MODULAR_LORA_GATE")


def model_input() -> io.Input:
    """A guarded model, or a MODEL that is checked to be guarded."""
    tip = "Guarded model from Guard Model, or the MODEL of Guarded Model as MODEL; an unguarded MODEL is refused."
    return io.MultiType.Input("model", [GuardedSocket, io.Model], tooltip=tip)


def rarely(inputs: list[io.Input], *names: str) -> list[io.Input]:
    """The inputs, those of these names marked as changed by few: front ends that know the mark fold them away.

    Their order is left as it is, as saved workflows hold the values of widgets by their place. ComfyUI 0.3.75 has no
    such mark of its own and hands this one on all the same.
    """
    for one in inputs:
        if one.id in names:
            one.extra_dict = {**one.extra_dict, "advanced": True}
    return inputs
