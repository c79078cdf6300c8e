"""How a child process ended, in words: a negative exit code is the number of the signal that ended it."""

from __future__ import annotations

import signal

# Signals that a program gets for a fault of its own; any other was sent by somebody, or by the system.
CRASHES = frozenset(
    getattr(signal, name)
    for name in ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")
    if hasattr(signal, name)
)
BY_THE_SYSTEM = "SIGKILL"


def ending(code: int) -> str:
    """What follows the name of a child: "ended with exit code 3", "was ended by SIGTERM", "crashed (SIGSEGV)"."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"crashed ({_name(-code)})" if -code in CRASHES else f"was ended by {_name(-code)}"


def remedy(code: int, otherwise: str) -> str:
    """What to do about an ending.

    Args:
        code: The exit code of the child.
        otherwise: The remedy for a failure of the child's own, which no signal from outside is.
    """
    if code >= 0 or -code in CRASHES:
        return otherwise
    again = "run the same command again."
    if _name(-code) == BY_THE_SYSTEM:
        return f"The system does that where memory runs out: if nobody did, end other programs, then {again}"
    return f"Nothing is broken: {again}"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
