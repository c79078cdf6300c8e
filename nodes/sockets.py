"""The pack's socket types, and the model input that its samplers share."""

from __future__ import annotations

from comfy_api.latest import io

SafetySocket = io.Custom("MODULAR_LORA_SAFETY")
TaskSocket = io.Custom("MODULAR_LORA_TASK")
GuardedSocket = io.Custom("MODULAR_LORA_GUARDED_MODEL")
StackSocket = io.Custom("LORA_STACK")
GateSocket = io.Custom("MODULAR_LORA_GATE")
# Marks an input that few change: front ends that know the mark put it behind "Show advanced inputs". The order of the
# inputs is left as it is, as saved workflows hold the values of widgets by their place.
RARE = {"extra_dict": {"advanced": True}}


def model_input() -> io.Input:
    """A guarded model, or a MODEL that is checked to be guarded."""
    tip = "Guarded model from Guard Model, or the MODEL of Guarded Model as MODEL; an unguarded MODEL is refused."
    return io.MultiType.Input("model", [GuardedSocket, io.Model], tooltip=tip)
