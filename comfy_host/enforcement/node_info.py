"""What the policy's checks ask of this ComfyUI: its node classes, and LoRA files by their names."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from ...modular_lora.errors import GuardError
from ...modular_lora.files.reader import sha256_file
from ...operators import graph as graphs
from ...operators.graph import NodeFacts
from ...operators.policy import OperatorPolicy
from ..model_folders import SAFETY_FOLDERS, TASK_FOLDERS, lora_path
from . import policy as policies
from . import weights

PACK = "modular_lora_guard"
CORE = frozenset(("custom_nodes.websocket_image_save",))  # comes with ComfyUI, in the folder of other packs
_facts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # node class -> NodeFacts


class Files:
    """See operators.graph.Files."""

    def __init__(self, policy: OperatorPolicy):
        self.policy, self.uploaded = policy, weights.Choices().uploaded

    def sha256(self, node_type: str, name: str) -> str | None:
        try:
            return sha256_file(_path(node_type, name))
        except (GuardError, OSError, ValueError):
            return None

    def values(self, node_type: str, name: str) -> str:
        return policies.values_sha256(_path(node_type, name))

    def unsigned(self, node_type: str, name: str, key: str) -> str:
        path = _path(node_type, name)
        return policies.unsigned(path, sha256_file(path), key, self.policy)


def _path(node_type: str, name: str) -> Path:
    return lora_path(name, *(SAFETY_FOLDERS if node_type == graphs.SAFETY else TASK_FOLDERS))


def by_name() -> graphs.FactsOf:
    mapping = classes()

    def facts_of(name: str) -> NodeFacts | None:
        return facts(mapping[name]) if name in mapping else None

    return facts_of


def classes() -> dict[str, type]:
    import nodes  # ComfyUI's top-level module, complete only after start-up

    return nodes.NODE_CLASS_MAPPINGS


def origin() -> str:
    """Where ComfyUI says that this pack's nodes come from (RELATIVE_PYTHON_MODULE, set by its loader)."""
    return getattr(classes().get(graphs.GUARD), "RELATIVE_PYTHON_MODULE", PACK)


def pack(kind: type) -> str:
    """Which pack a node class came with, as the loader notes; "comfyui" for ComfyUI's own."""
    return "comfyui" if _is_core(kind) else str(getattr(kind, "RELATIVE_PYTHON_MODULE", "") or kind.__module__)


def facts(kind: Any) -> NodeFacts:
    """What a node class says of itself (INPUT_TYPES, RETURN_TYPES, OUTPUT_NODE: V1, and what V3 makes of it)."""
    if kind not in _facts:
        said = kind.INPUT_TYPES()
        inputs = {name: spec[0] for part in ("required", "optional") for name, spec in said.get(part, {}).items()}
        inputs = {name: _plain(type) for name, type in inputs.items()}
        outputs = tuple(map(_plain, kind.RETURN_TYPES or ()))
        ours = kind.__module__.startswith(f"{PACK}.")
        is_output, sends = (bool(getattr(kind, name, False)) for name in ("OUTPUT_NODE", "API_NODE"))
        _facts[kind] = NodeFacts(inputs, outputs, is_output, ours, _is_core(kind), sends)
    return _facts[kind]


def _is_core(kind: type) -> bool:
    """Whether a class itself, not one that it was made of, came with ComfyUI, as the loader notes."""
    place = vars(kind).get("RELATIVE_PYTHON_MODULE", "")
    return kind.__module__ == "nodes" or place.startswith("comfy_extras.") or place in CORE


def _plain(type: object) -> str:
    """A type's name; any-type nodes bring strings that are equal to every other, or unequal to none."""
    return str.__str__(type) if isinstance(type, str) else "COMBO"


def names(kind: type) -> list[str]:
    """Every name that a node class goes by."""
    return [name for name, known in list(classes().items()) if known is kind]
