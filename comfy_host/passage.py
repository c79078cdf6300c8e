"""Which nodes an image came through, as the queued graph has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OURS = "ModularLora"  # how this pack's node types begin
MOST = 20  # nodes that are named


def passed_through(prompt: Mapping[str, Any] | None, node: str, name: str) -> list[dict[str, str]]:
    """The nodes between an image input and the nodes of this pack that had the image before, the last first.

    Any of them may have edited it; which did is not known. Links of other types than IMAGE are not followed.

    Args:
        prompt: The graph in API form; None where a caller sent none.
        node: The id of the node that was handed the image.
        name: Its input.
    """
    graph = prompt if isinstance(prompt, Mapping) else {}
    found: list[dict[str, str]] = []
    waiting, seen = [graph.get(node, {}).get("inputs", {}).get(name)], {node}
    while waiting and len(found) < MOST:
        link = waiting.pop(0)
        if not isinstance(link, list) or len(link) != 2 or link[0] in seen:
            continue
        source = graph.get(link[0], {})
        kind = str(source.get("class_type", ""))
        if kind.startswith(OURS) or _type_of(kind, link[1]) not in ("IMAGE", "*"):
            continue
        seen.add(link[0])
        found.append({"node": str(link[0]), "type": kind})
        waiting.extend(source.get("inputs", {}).values())
    return found


def _type_of(kind: str, output: Any) -> str:
    import nodes  # ComfyUI's top-level module, complete only after start-up

    types = getattr(nodes.NODE_CLASS_MAPPINGS.get(kind), "RETURN_TYPES", ())
    return str(types[output]) if isinstance(output, int) and output < len(types) else ""
