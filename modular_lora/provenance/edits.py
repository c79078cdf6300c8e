"""What is known of an image after a node has edited it: everything that was known of what the node was given.

A node is looked at from outside: the hashes of the images, latents and masks that came to it, and of those that it
made. Where the node's type is one of which a test has shown that it makes its images of what it is given and of
nothing else (``vouched``), what it made has the worst provenance of what it was given, and the edit is named. What any
other node made of a guarded image is remembered as passed through that node, for which nobody vouches: it may have
read another image from a file. What one of the inputs brought from outside stays so, whoever edits it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..tensor_hashing import tensor_sha256
from . import ledger
from .attestation import Attestation
from .ledger import Runs
from .noise import is_white

EVEN = 1e-4  # a mask whose values differ by no more is of one value: resizing it rounds
MOST_RUNS = 32  # behind one image; of an image that was put together of more, nothing is known
Kind = Literal["image", "latent", "mask"]
WORSE = ("guarded", "guarded, outside start", "guarded, merged base", "guarded, merged base, outside start")


class Row(NamedTuple):
    """One image (h w c), latent or mask (h w) of a batch, by its content; ``blank``: a latent of zeros."""

    kind: Kind
    digest: str
    blank: bool = False


@dataclass(frozen=True)
class Source:
    """Where something comes from.

    Attributes:
        runs: The runs behind it, one attestation for all of them, or none behind what holds nothing (a latent of
            zeros, a mask of one value). None: nobody knows.
        through: Types of nodes that it passed through and for which nobody vouches; `runs` is None then.
    """

    runs: Runs | None = None
    through: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """Whether a guarded run is behind it, as far as is remembered."""
        return bool(self.runs or self.through)


OUTSIDE, BLANK = Source(), Source(())


def rows(tensor: Tensor, kind: Kind) -> tuple[Row, ...]:
    """Every image, latent or mask of a batch; none of a tensor that is not laid out in rows.

    Args:
        tensor: b h w c of images, b ... or nested tensors of such of latents, b h w, b 1 h w or h w of masks.
        kind: What the rows are.
    """
    if tensor.is_nested:
        return tuple(row for batch in tensor.unbind() for row in rows(batch, kind))
    if tensor.layout != torch.strided or not tensor.numel() or tensor.ndim < 2:
        return ()
    if kind == "latent":
        return tuple(Row(kind, tensor_sha256(one), not torch.count_nonzero(one)) for one in tensor)
    last = 3 if kind == "image" else 2
    if tensor.ndim < last:
        return ()
    return tuple(Row(kind, tensor_sha256(one)) for one in tensor.reshape(-1, *tensor.shape[-last:]))


def source(row: Row) -> Source:
    """Where a row comes from."""
    if row.blank:
        return BLANK
    runs = ledger.masks.get(row.digest) if row.kind == "mask" else _runs(row.digest)
    return Source(runs) if runs is not None else Source(None, ledger.passed.get(row.digest) or ())


def _runs(digest: str) -> Runs | None:
    run = ledger.images.get(digest) or ledger.latents.get(digest)
    return None if run is None else (run,)


def follow(
    node: str,
    vouched: bool,
    given: Sequence[Sequence[Row]],
    made: Iterable[Sequence[Row]],
    ran: Sequence[Attestation] = (),
) -> None:
    """Remember of what a node made what is known of what it was given.

    Args:
        node: The node's type.
        vouched: Whether it is known to make its images of what it is given and of nothing else.
        given: The rows of each of its inputs, hashed before it ran: a node may write into its inputs.
        made: The rows of each of its outputs; not asked for where nothing is known of the inputs.
        ran: The guarded runs that it made itself; see `Inside`.
    """
    sources = [[source(row) for row in batch] for batch in given]
    every = [one for batch in sources for one in batch] + [Source((run,)) for run in together(ran)]
    if not any(one.known for one in every) and not (vouched and all(one.runs is not None for one in every)):
        return
    whole = combined(every, node) if vouched else passed(every, node)
    behind = vouched and bool(ran) and whole.runs is not None  # what its last run gave has the ones before it behind it
    for batch in made:
        each = vouched and not ran and len(sources) == 1 and len(sources[0]) == len(batch)  # image i of image i
        for number, row in enumerate(batch):
            if behind or source(row).runs is None:  # else exactly this came from a guarded run, or an edit of one
                _remember(row, combined(sources[0][number : number + 1], node) if each else whole)


def _remember(row: Row, found: Source) -> None:
    if found.runs is None:
        if found.through and not source(row).through:  # else the decode inside a node has said what it passed through
            ledger.passed.put(row.digest, found.through)
    elif row.kind == "mask":
        ledger.masks.put(row.digest, found.runs)
    elif found.runs:
        (run,) = found.runs
        table = ledger.images if row.kind == "image" else ledger.latents
        table.put(row.digest, run.of(image_sha256=row.digest if row.kind == "image" else ""))


def passed(sources: Iterable[Source], node: str) -> Source:
    """Of what a node made for which nobody vouches."""
    before = dict.fromkeys(name for one in sources for name in one.through)
    return Source(None, tuple(before | {node: None}))


def combined(sources: Sequence[Source], node: str) -> Source:
    """Of what a node made of all of these: the worst of them.

    Args:
        sources: Of everything that the node was given.
        node: Its type, which is added to the edits.
    """
    if any(one.runs is None and not one.through for one in sources):
        return OUTSIDE
    if through := dict.fromkeys(name for one in sources for name in one.through):
        return Source(None, tuple(through))
    found = [run for one in sources for run in one.runs or ()]
    if not found:
        return BLANK
    edits = tuple(dict.fromkeys((*(edit for run in found for edit in run.edits), node)))
    runs = list(_distinct(found))
    if len(runs) > MOST_RUNS:
        return OUTSIDE
    worst = max(runs, key=_badness)
    if not worst.status.startswith("guarded"):  # what a gate put in an image's place
        return OUTSIDE
    return Source((worst.of(others=tuple(run for run in runs if run is not worst)).edited(edits),))


def _distinct(found: Sequence[Attestation]) -> Iterator[Attestation]:
    """Every run once, without what holds of one image of it alone."""
    seen: list[Attestation] = []
    for run in (run for one in found for run in one.runs):
        plain = run.of(others=(), gate=None, image_sha256="").edited(())
        if plain not in seen:
            seen.append(plain)
            yield plain


def _badness(run: Attestation) -> int:
    status = run.run_status
    return WORSE.index(status) if status in WORSE else len(WORSE)


class Start(NamedTuple):
    """What a run starts from. ``outside``: from more than noise and latents of guarded runs; ``edits`` of these."""

    outside: bool
    edits: tuple[str, ...]


# Between two guarded runs this is no edit of an image: the second run samples all of what was resized.
RESIZED = frozenset(("LatentUpscale", "LatentUpscaleBy"))


def start(latents: Iterable[Tensor], mask: Tensor | None, record: Attestation) -> Start:
    """What a run starts from, the noise apart (`pictured`).

    Args:
        latents: The latents that it is given, one by one; latents of zeros hold nothing.
        mask: Where it may change them (... h w), or None: everywhere. What is kept, be it nothing, and what is sampled
            show the mask's own outlines, so that a mask which is not of one value counts as an image from outside.
            ComfyUI has resized it before, so that its content says nothing of where it comes from.
        record: Of the run that begins; runs with other safety LoRAs count as outside.
    """
    filled = [latent for latent in latents if torch.count_nonzero(latent)]
    begun = _start((run for latent in filled for run in _runs(tensor_sha256(latent)) or (None,)), record)
    drawn = mask is not None and bool(mask.max() - mask.min() > EVEN)
    return begun._replace(outside=begun.outside or drawn)


def pictured(noise: Iterable[Tensor], images: Iterable[Sequence[Row]], record: Attestation) -> bool:
    """Whether a picture from outside comes in beside the latents that a run starts from.

    Args:
        noise: What it takes for noise, one by one; what is not white counts as a picture.
        images: The images and latents that its conditionings hold (to go on from, or to fill in).
        record: Of the run that begins; runs with other safety LoRAs count as outside.
    """
    if not all(map(is_white, noise)):
        return True
    sources = [source(row) for batch in images for row in batch if row.kind != "mask"]
    return _start(_behind(sources), record).outside


def _behind(sources: Iterable[Source]) -> list[Attestation | None]:
    """The runs behind all of these; None for one of which nobody knows."""
    return [run for one in sources for run in ((None,) if one.runs is None else one.runs)]


def _start(before: Iterable[Attestation | None], record: Attestation) -> Start:
    runs = list(before)
    found = dict.fromkeys(edit for run in runs if run is not None for edit in run.edits)
    outside = any(run is None or not _like(run, record) for run in runs)
    return Start(outside, tuple(edit for edit in found if edit not in RESIZED))


def _like(before: Attestation, record: Attestation) -> bool:
    return all(run.run_status == "guarded" and run.safety == record.safety for run in before.runs)


@dataclass
class Inside:
    """A node that samples parts of its images and puts them back, and that is vouched for, while it runs.

    The latents and masks that it samples are its own work on what it was given, so that they say nothing: a run inside
    it starts from what the node was given, edited by the node.

    Attributes:
        node: Its type.
        given: Where everything comes from that the node was given.
        ran: The guarded runs that it has made.
    """

    node: str
    given: Sequence[Source]
    ran: list[Attestation] = field(default_factory=list)

    def start(self, record: Attestation) -> Start:
        """What a run inside it starts from; see `start`."""
        runs = _behind(self.given)
        begun = _start(runs, record)
        return begun._replace(edits=tuple(dict.fromkeys((*begun.edits, self.node)))) if runs else begun


def together(ran: Iterable[Attestation]) -> list[Attestation]:
    """Runs of one guard as one, with all that was counted and the least that was measured: a tile each, for instance.

    Runs with other LoRAs, at other strengths or of another base stay apart.
    """
    groups: list[tuple[Attestation, list[Attestation]]] = []
    for run in ran:
        same = run.of(**_COUNTED)
        some = next((some for known, some in groups if known == same), None)
        if some is None:
            groups.append((same, [run]))
        else:
            some.append(run)
    return [_joined(some) for _, some in groups]


_COUNTED: dict[str, Any] = {
    "evaluations": 0,
    "firings": 0,
    "idle_layers": 0,
    "measured_evaluations": 0,
    "muted_evaluations": 0,
    "embeddings_sha256": (),
    "weighted": (),
    "acted_strength": {},
    "acted_share": {},
    "activity": {},
    "task_share": None,
}


def _joined(some: Sequence[Attestation]) -> Attestation:
    counts = ("evaluations", "firings", "measured_evaluations", "muted_evaluations")
    sums: dict[str, Any] = {name: sum(getattr(run, name) for run in some) for name in counts}
    texts = {name: _each(getattr(run, name) for run in some) for name in ("embeddings_sha256", "weighted")}
    activities = [pair for run in some for pair in run.activity.items()]
    return some[0].of(
        **sums,
        **texts,
        idle_layers=max(run.idle_layers for run in some),
        acted_strength=_least(run.acted_strength for run in some),
        acted_share=_least(run.acted_share for run in some),
        activity=dict(sorted(activities, key=lambda pair: pair[1].value)),  # of one LoRA the greatest comes last
        task_share=min((run.task_share for run in some if run.task_share is not None), default=None),
    )


def _each(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for part in parts for one in part))


def _least(figures: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """By key the least that was measured; None where nothing was."""
    found: dict[str, Any] = {}
    for key, value in (pair for one in figures for pair in one.items()):
        known = found.get(key)
        found[key] = value if known is None else known if value is None else min(known, value)
    return found
