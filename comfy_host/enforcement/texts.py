"""Texts of prompts for the record, where the policy asks for them: each bound to the embeddings that it gave.

A text is noted where ComfyUI makes tokens of it, the embeddings where those tokens are encoded, and a run looks its
texts up by the embeddings that it was handed. So a text is known whichever node encodes it and whatever it came over,
also where the encoder's result was kept from an earlier prompt. Nothing that a request says of itself counts.
"""

from __future__ import annotations

import contextvars
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ...modular_lora.tensor_hashing import row_digests, tensor_sha256
from ...modular_lora.util.bounds import bounded
from ...modular_lora.util.cache import Cache
from ...operators.policy import PolicyError
from .. import patcher
from . import policy as policies

MOST = 16_384  # of tokenised texts, and of encodings, that are remembered

_lock = threading.Lock()
_used: contextvars.ContextVar[dict[int, torch.Tensor] | None] = contextvars.ContextVar(
    "modular_lora_used", default=None
)


class Texts(NamedTuple):
    """What is known of embeddings. ``unknown``: rows whose text is not known, as nobody encoded them whole."""

    known: tuple[str, ...] = ()
    unknown: int = 0


class Sequences:
    """Values by sequences of marks, found again within longer sequences; the least recently used goes first."""

    def __init__(self, size: int):
        self._values: Cache[str, tuple[tuple[str, ...], bool]] = Cache(size)
        self._lengths: Cache[str, frozenset[int]] = Cache(size)  # by the first mark

    def put(self, marks: Sequence[str], texts: tuple[str, ...], whole: bool) -> None:
        if marks:
            self._values.put(_digest(marks), (texts, whole))
            self._lengths.put(marks[0], (self._lengths.get(marks[0]) or frozenset()) | {len(marks)})

    def find(self, marks: Sequence[str], empty: Sequence[bool]) -> Texts:
        """Texts of the longest sequences that follow one another; what is ``empty`` and in none of them is left out."""
        known: list[str] = []
        at = unknown = 0
        while at < len(marks):
            lengths = sorted(self._lengths.get(marks[at]) or (), reverse=True)
            fit = (n for n in lengths if at + n <= len(marks))
            found = next(((n, v) for n in fit if (v := self._values.get(_digest(marks[at : at + n])))), None)
            if found is None:
                unknown += not empty[at]
                at += 1
                continue
            length, (texts, whole) = found
            known += texts
            unknown += 0 if whole else length
            at += length
        return Texts(tuple(known), unknown)


_tokens, _rows = Sequences(MOST), Sequences(MOST)


def wanted() -> bool:
    """Whether the policy in force asks for texts."""
    try:
        policy = policies.current()
    except PolicyError:
        return False  # nothing is sampled
    return policy is not None and policy.record.prompts


def tokenizing(original: Callable) -> Callable:
    """Around comfy.sd.CLIP.tokenize."""

    def tokenize(self, text, *args, **kwargs):
        tokens = original(self, text, *args, **kwargs)
        if wanted():
            texts = tuple(bounded(one) for one in (text, *kwargs.values()) if isinstance(one, str))  # lyrics too
            with _lock:
                for marks in _sections(tokens):
                    _tokens.put(marks, texts, True)
        return tokens

    return tokenize


def encoding(original: Callable) -> Callable:
    """Around comfy.sd.CLIP.encode_from_tokens, through which guarded and stock encoders pass."""

    def encode_from_tokens(self, tokens, *args, **kwargs):
        made = original(self, tokens, *args, **kwargs)
        if wanted():
            _bind(tokens, made.values() if isinstance(made, Mapping) else made if isinstance(made, tuple) else (made,))
        return made

    return encode_from_tokens


def encoding_scheduled(original: Callable) -> Callable:
    """Around comfy.sd.CLIP.encode_from_tokens_scheduled, which encodes by itself under hooks."""

    def encode_from_tokens_scheduled(self, tokens, *args, **kwargs):
        made = original(self, tokens, *args, **kwargs)
        if self.patcher.forced_hooks is not None and wanted():
            _bind(tokens, (one for cond, more in made for one in (cond, *more.values())))
        return made

    return encode_from_tokens_scheduled


def handing_over(original: Callable) -> Callable:
    """Around comfy.samplers.encode_model_conds: every conditioning of a run passes here."""

    def encode_model_conds(model_function, conds, *args, **kwargs):
        if (used := _used.get()) is not None:
            used.update((id(tensor), tensor) for entry in conds for tensor in patcher.encoded(entry))
        return original(model_function, conds, *args, **kwargs)

    return encode_model_conds


def collect() -> contextvars.Token:
    """Begin to note what a run is handed; give the token to `stop`."""
    return _used.set({} if wanted() else None)


def stop(token: contextvars.Token) -> Texts | None:
    """Texts of what the run was handed, each once; None where the policy did not ask for them when it began."""
    used = _used.get()
    _used.reset(token)
    if used is None:
        return None
    found = [_of(tensor) for tensor in used.values()]
    return Texts(tuple(dict.fromkeys(text for one in found for text in one.known)), sum(one.unknown for one in found))


def _of(embedding: torch.Tensor) -> Texts:
    rows = embedding.detach().reshape(-1, embedding.shape[-1])
    empty = (rows == 0).all(1).tolist()  # what ConditioningZeroOut leaves carries nothing
    marks = row_digests(rows)
    with _lock:
        return _rows.find(marks, empty)


def _bind(tokens: Any, made: Iterable[Any]) -> None:
    """Embeddings to the texts of the tokens that gave them."""
    embeddings = [row_digests(one) for one in made if isinstance(one, torch.Tensor) and one.is_floating_point()]
    with _lock:
        sections = list(_sections(tokens))
        found = [_tokens.find(marks, [False] * len(marks)) for marks in sections]
        texts = tuple(dict.fromkeys(text for one in found for text in one.known))
        whole = bool(sections) and not any(one.unknown for one in found)
        for rows in embeddings:
            _rows.put(rows, texts, whole)


def _sections(tokens: Any) -> Iterator[list[str]]:
    """Marks of the sections of every encoder's tokens (encoder -> sections of (token, weight)).

    Weights are left out: nodes that weigh words in their own way change them.
    """
    for name, sections in tokens.items() if isinstance(tokens, Mapping) else (("", tokens),):
        if isinstance(sections, list | tuple):
            yield [_digest((name, *map(_mark, section))) for section in sections if isinstance(section, list | tuple)]


def _mark(token: Any) -> str:
    value = token[0] if isinstance(token, list | tuple) and token else token
    if isinstance(value, torch.Tensor):  # a textual inversion
        return tensor_sha256(value)
    if isinstance(value, Mapping):  # an image between the words
        return _digest([f"{key}={_mark([entry])}" for key, entry in value.items()])
    return repr(value) if isinstance(value, int | float | str) else type(value).__name__


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
