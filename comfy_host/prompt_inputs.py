"""Inputs that a prompt gives to a node and the node's schema does not have.

ComfyUI hands a literal value of such a name to nobody and says nothing of it; one that is linked it hands on.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import is_link


def unlisted(node: type[io.ComfyNode], listed: set[str]) -> dict[str, Any]:
    """Those with a literal value that are none of ``listed``; the node's schema asks for the hidden ``dynprompt``."""
    hidden = node.hidden
    if hidden is None or hidden.dynprompt is None:
        return {}
    given = hidden.dynprompt.get_node(hidden.unique_id)["inputs"]
    return {name: value for name, value in given.items() if name not in listed and not is_link(value)}
