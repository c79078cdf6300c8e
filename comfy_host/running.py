"""The prompt that runs now, as far as the pack asks: what its graph holds, and who queued it."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..modular_lora.provenance.edits import Inside

GUARDS = frozenset(("ModularLoraGuardModel", "ModularLoraGuard"))  # node types that put the guard on a model
GATES = frozenset(("ModularLoraGate", "ModularLoraSampleAndGate"))


@dataclass
class Prompt:
    """One prompt from its start to its end.

    Attributes:
        id: As its client or the server chose it.
        client: Id of the client that queued it; None: none was given.
        graph: In API format.
        enforced: Whether an operator's policy is in force.
        gated: Whether that policy requires a gate.
        began: When it started to run, in seconds since the epoch.
        shown: What is known of the images that came to nodes which write or show them.
        wrote: These nodes, with what they wrote.
        judged: These images, each once, by the hash of its pixels, with the run behind it where a calibration gave a
            verdict on its prompt, else None: where there is none the Guard node does not name the figure.
    """

    id: str
    client: str | None
    graph: Mapping[str, Any]
    enforced: bool = False
    gated: bool = False
    began: float = field(default_factory=time.time)
    shown: list[Any] = field(default_factory=list)
    wrote: list[Any] = field(default_factory=list)
    judged: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def followed(self) -> bool:
        """Whether its nodes are looked at as they run: it holds a guard, or a policy asks for one."""
        return self.enforced or any(self.holding(GUARDS))

    def holding(self, types: frozenset[str]) -> Iterator[str]:
        """Ids of the graph's nodes of some types."""
        return (name for name, node in self.graph.items() if node.get("class_type") in types)


current: contextvars.ContextVar[Prompt | None] = contextvars.ContextVar("modular_lora_prompt", default=None)

# The node that samples at this moment, where it is one that is vouched for (pack_samplers.py).
inside: contextvars.ContextVar[Inside | None] = contextvars.ContextVar("modular_lora_inside", default=None)


def shows_previews() -> bool:
    """Whether images may be shown while they are sampled: in a prompt that holds no gate, where no policy asks for one.

    Of a run that belongs to no prompt nothing is known, and nothing is shown.
    """
    prompt = current.get()
    if prompt is None or prompt.gated or any(prompt.holding(GATES)):
        return False
    from comfy_execution.progress import get_progress_state  # it needs comfy_api, which an audit's worker has not

    grown = get_progress_state().dynprompt  # with the nodes that others have expanded to
    return not any(grown.get_node(name)["class_type"] in GATES for name in grown.all_node_ids())
