"""Embeddings that a node weights or mixes stay guarded where it was given guarded text encoders and nothing else.

Nodes of other packs weight words in their own ways (A1111, compel, averages), so that what comes out is no embedding
that the guarded CLIP gave. It is accepted, and the node's type is named in the attestation, where

* every CLIP that came to the node is guarded, and every embedding that came to it was made under the same safety LoRAs,
* the guarded encoders ran while it did, every branch of theirs as often as the others,
* no text encoder ran that is not one of these,
* and the node neither calls itself a loader nor was given the name of a file, from which it might have read embeddings.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import comfy.sd
import comfy.sd1_clip

from ..modular_lora.errors import GuardError
from ..modular_lora.provenance import ledger
from ..modular_lora.provenance.ledger import Encoder
from ..operators.graph import NodeFacts
from .conditioning import embedding_rows
from .patcher import GuardedClipMixin
from .run import check_even

FILE = re.compile(
    r"[^\n]*\.(safetensors|sft|pth?|ckpt|bin|gguf|np[yz]|pkl|json|latent|txt|png|jpe?g|webp)\s*", re.IGNORECASE
)


class _Watch:
    """A node while it runs; ``digest`` None: what it makes is not accepted."""

    def __init__(self, name: str, digest: str | None, clips: list[comfy.sd.CLIP], rows: set[str]):
        self._name, self._digest, self._clips, self._rows = name, digest, clips, rows
        self._before: list = []
        try:
            if digest is not None:
                self._before = [clip.patcher.branches.counts()[1] for clip in clips]
        except GuardError:  # its LoRAs may not act together: the encoding says why
            self._digest = None
        self.ran: dict[int, Any] = {}  # text encoders by their place in memory, kept so that none takes another's

    def end(self, outputs: Any) -> None:
        """Remember what the node made, as made under the same safety LoRAs and weighted by this node."""
        if self._digest is None or not self._whole():
            return
        encoder = self._encoder()
        for value in _leaves(outputs):
            for row in embedding_rows(value):
                if ledger.embeddings.get(row) != self._digest:
                    ledger.embeddings.put(row, self._digest)
                    ledger.weighted.put(row, self._name)
                    if encoder is not None:
                        ledger.encoders.put(row, encoder)

    def _whole(self) -> bool:
        """Whether every guarded encoder ran with all of its branches, and no other encoder ran."""
        try:
            for clip, before in zip(self._clips, self._before, strict=True):
                check_even(clip.patcher.branches, before)
        except GuardError:
            return False
        known = {id(module) for clip in self._clips for module in clip.cond_stage_model.modules()}
        return self.ran.keys() <= known

    def _encoder(self) -> Encoder | None:
        """The task LoRAs of every text encoder that has a share in what the node made."""
        every = (*map(ledger.encoders.get, self._rows), *(getattr(clip, "guard_encoder", None) for clip in self._clips))
        found = [encoder for encoder in every if encoder]
        loras = dict.fromkeys(lora for encoder in found for lora in encoder.loras)
        return Encoder(tuple(loras), max(encoder.layers for encoder in found)) if found else None


@contextlib.contextmanager
def watching(name: str, facts: NodeFacts, inputs: Mapping[str, list]) -> Iterator[_Watch]:
    """Watch a node of this type run on these inputs; only one that gives conditionings is looked at."""
    gives = "CONDITIONING" in facts.outputs and not _loads(name, inputs)
    values = [leaf for some in inputs.values() for value in some for leaf in _leaves(value)] if gives else []
    clips = [value for value in values if isinstance(value, comfy.sd.CLIP)]
    rows = {row for value in values for row in embedding_rows(value)}
    watch = _Watch(name, _digest(clips, rows), clips, rows)
    with _noting(watch.ran) if clips else contextlib.nullcontext():
        yield watch


def _digest(clips: list[comfy.sd.CLIP], rows: set[str]) -> str | None:
    """Digest of the safety LoRAs that all of these stand under; None where there are none, or not the same."""
    found = {clip.text_digest if isinstance(clip, GuardedClipMixin) else None for clip in clips}
    found |= {ledger.embeddings.get(row) for row in rows}
    return (found.pop() or None) if len(found) == 1 else None  # "": no safety LoRA acts on text


def _loads(name: str, inputs: Mapping[str, list]) -> bool:
    """Whether a node may read embeddings from a file, by what it is called and by the texts that it is given."""
    texts = (value for some in inputs.values() for value in some if isinstance(value, str))
    return "load" in name.lower() or any(FILE.fullmatch(text) for text in texts)


@contextlib.contextmanager
def _noting(ran: dict[int, Any]) -> Iterator[None]:
    """Note every text encoder that runs (SDClipModel, of which ComfyUI makes all of them)."""
    kind = comfy.sd1_clip.SDClipModel
    original = kind.forward

    def forward(self, *args, **kwargs):
        ran[id(self)] = self
        return original(self, *args, **kwargs)

    kind.forward = forward
    try:
        yield
    finally:
        if kind.forward is forward:
            kind.forward = original


def _leaves(value: Any) -> Iterator[Any]:
    """CLIPs and conditionings in a value; packs put them into tuples and mappings with others."""
    waiting, seen = [value], {}
    while waiting:
        one = waiting.pop()
        if isinstance(one, comfy.sd.CLIP):
            yield one
        elif isinstance(one, list | tuple | Mapping) and id(one) not in seen:
            seen[id(one)] = one
            if isinstance(one, list) and any(True for _ in embedding_rows(one)):
                yield one
            else:
                waiting.extend(one.values() if isinstance(one, Mapping) else one)
