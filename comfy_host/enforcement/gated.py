"""A gate without a node: where a policy guards every model, it stands in front of every node that lets images out.

It judges what no gate of the graph has let pass: by the best detector that is installed, at thresholds and with an
action as strict as the policy asks, as Safety Gate without Gate Settings does. Images whose form it does not know (with
transparency, in one channel) are left to the check behind it, which lets none of them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ...operators import graph as graphs
from ...operators.policy import OperatorPolicy
from .. import gating, values
from ..image_values import is_video
from . import policy as policies
from .leaving import Node

_gate: dict[str, gating.Gate] = {}  # state of the policy -> its gate; the last


def inputs(policy: OperatorPolicy, node: Node, given: Mapping[str, list]) -> Mapping[str, list]:
    """The inputs of a node, its images judged where it lets them out; what the gate does with them has happened.

    In the place of a batch of which the gate withheld everything stands what ComfyUI passes over without an error.
    """
    asked = policy.attaches and (policy.gate.required or policy.gates_others)
    if not (asked and node.leaves(policy) and node.known(policy)) or node.trusted(policy):
        return given
    shown = {name: some for name, some in given.items() if _takes_images(node.facts.inputs.get(name, ""))}
    judged = values.exchange(shown, lambda one: _lacks_gate(policy, one), lambda some: _judged(policy, some))
    return {**given, **judged}


def _takes_images(declared: str) -> bool:
    """Whether a socket is one for images or videos: what another prints or writes of them, no gate sees."""
    return bool(graphs.IMAGES & {part.strip() for part in declared.split(",")})


def _lacks_gate(policy: OperatorPolicy, value: Any) -> bool:
    images = value.get_components().images if is_video(value) else value
    fits = isinstance(images, torch.Tensor) and images.ndim == 4 and images.shape[-1] == 3
    return fits and images.is_floating_point() and any(policies.lacks_gate(policy, one) for one in images)


def _judged(policy: OperatorPolicy, some: list) -> dict[int, Any]:
    if policy.state not in _gate:
        _gate.clear()
        _gate[policy.state] = gating.checked(None)
    return {id(one): _through(_gate[policy.state], one) for one in some}


def _through(gate: gating.Gate, value: Any) -> Any:
    """Images, or a video, as the gate lets them pass."""
    parts = value.get_components() if is_video(value) else None
    images = gating.judge(value if parts is None else parts.images, gate).images
    if images is None:
        return ExecutionBlocker(None)
    return images if parts is None else type(value)(type(parts)(**{**vars(parts), "images": images}))
