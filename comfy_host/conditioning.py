"""Conditionings that stock nodes make of guarded ones stay guarded: averages, and what an image adds to a prompt.

The guard knows an embedding that the guarded CLIP made by its content, and these nodes make new ones. What comes out of
them is remembered as the guarded CLIP's where all text that went in was; an image's share is no text, so the safety
LoRA's text-encoder half has nothing to do with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import comfy.sd

from ..modular_lora.provenance import ledger
from ..modular_lora.tensor_hashing import carrying_digests
from . import patcher

CARRYING = ("ConditioningAverage", "StyleModelApply", "PhotoMakerEncode")  # node ids


def register() -> None:
    """Put the memory around these nodes' functions, once; a node that this ComfyUI lacks is left out."""
    import nodes  # ComfyUI's top-level module, complete only after start-up

    for cls in filter(None, map(nodes.NODE_CLASS_MAPPINGS.get, CARRYING)):
        name = "execute" if "execute" in vars(cls) else cls.FUNCTION  # V3's and older nodes
        function = vars(cls)[name]
        if not hasattr(getattr(cls, name), "carries"):
            setattr(cls, name, _class_method(function) if isinstance(function, classmethod) else _carrying(function))


def _class_method(method: classmethod) -> classmethod:
    return classmethod(_carrying(method.__func__))


def _carrying(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **inputs):
        output = function(*args, **inputs)
        if (digest := _text_of((*args, *inputs.values()))) is not None:
            for value in getattr(output, "result", output) or ():
                _remember(value, digest)
        return output

    vars(call)["carries"] = True
    return call


def _text_of(inputs: Iterable) -> str | None:
    """Digest of the safety LoRAs that all text in the inputs was encoded under; None where there is none such."""
    found = set()
    for value in inputs:
        if isinstance(value, comfy.sd.CLIP):
            guarded = isinstance(value, patcher.GuardedClipMixin)
            found.add(value.text_digest if guarded else None)
        found |= {ledger.embeddings.get(row) for row in embedding_rows(value)}
    return found.pop() if len(found) == 1 else None


def _remember(value: object, digest: str) -> None:
    for row in embedding_rows(value):
        ledger.embeddings.put(row, digest)


def embedding_rows(value: object) -> Iterator[str]:
    """Digests of the rows that carry something of a conditioning's embeddings; of any other value nothing."""
    entries = value if isinstance(value, list) else ()
    for cross, further in (entry for entry in entries if isinstance(entry, list | tuple) and len(entry) == 2):
        for tensor in patcher.encoded({**further, "cross_attn": cross}) if isinstance(further, dict) else ():
            yield from carrying_digests(tensor)
