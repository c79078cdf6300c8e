"""Errors of the gate. Each message is one line: subject, value, remedy."""

from __future__ import annotations

from ..modular_lora.errors import GuardError


class GateError(GuardError):
    """A detector that cannot run, settings that do not fit it, or images that cannot be judged."""

    code = "gate"


class Blocked(GateError):
    """The action is "block" and images were flagged; none of the batch is handed on."""

    code = "gate.blocked"
