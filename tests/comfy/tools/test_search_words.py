"""Words that find the nodes: in the schemas where this ComfyUI's have them, and no error where they have none."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

WANTED = {  # what somebody types -> nodes that it has to find
    "lora loader": {"ModularLoraLoadSafety", "ModularLoraLoadTask"},
    "nsfw": {"ModularLoraGate", "ModularLoraGateSettings", "ModularLoraGuard", "ModularLoraSaveGated"},
    "nudenet": {"ModularLoraGate", "ModularLoraGateSettings", "ModularLoraSampleAndGate"},
    "censor": {"ModularLoraGate", "ModularLoraGuard"},
    "safety": {"ModularLoraGuard", "ModularLoraLoadSafety"},
    "train lora": {"ModularLoraTrainTask", "ModularLoraTrainSafety"},
}


def test_every_node_has_words_where_schemas_know_them(comfy: Any) -> None:
    found = {name: one for name, one in comfy.nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("ModularLora")}
    assert found
    schemas = {name: one.GET_SCHEMA() for name, one in found.items() if hasattr(one, "GET_SCHEMA")}
    for name, schema in schemas.items():
        if "search_aliases" not in {field.name for field in fields(schema)}:
            assert not hasattr(schema, "search_aliases")  # ComfyUI 0.3.75: the nodes load all the same
            continue
        if name == "ModularLoraRefused":  # shown by no menu
            continue
        assert schema.search_aliases, name
        assert len(set(schema.search_aliases)) == len(schema.search_aliases), name
        for word, nodes in WANTED.items():
            assert name not in nodes or word in schema.search_aliases, f"{name}: {word}"
