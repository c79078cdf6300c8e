"""Words by which people look for a node, where ComfyUI's schemas have them: 0.33 does, 0.3.75 does not."""

from __future__ import annotations

from dataclasses import fields

from comfy_api.latest import io

KNOWN = "search_aliases" in {field.name for field in fields(io.Schema)}


def found_by(*words: str) -> dict[str, list[str]]:
    """An argument of ``io.Schema``: further words that find the node; none in a ComfyUI that does not know them."""
    return {"search_aliases": list(words)} if KNOWN else {}
