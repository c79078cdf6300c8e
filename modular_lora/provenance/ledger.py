"""What is remembered of tensors by their content: which guarded run made them, and what a gate decided.

The way of an image: a guarded run puts its latents here (`attest_latents`), a decode binds the images that it makes of
them (`attest_images`), a gate adds what it decided (`record_gate`), and whoever saves or shows an image asks for
exactly these pixels (`known`). Nothing that a graph says of an image counts. An image that was edited on the
way has another content; of it is known what edits.py remembers of the node that made it. The last images and latents
of this process are remembered, in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

from torch import Tensor

from ..branches.acted import Acted
from ..branches.changes import Owner
from ..tensor_hashing import carrying_digests, row_digests, tensor_sha256
from ..util.cache import Cache
from . import marking
from .attestation import OUTSIDE, Activity, Attestation, Found, GateRecord, LoraRecord

EDITED = (
    "unattested: no guarded run made exactly this; it was edited on the way, sampled without the guard, or not sampled"
)
UNSAMPLED = "unattested: nothing was sampled (denoise 0, or no step to do), so the latent is what went into the sampler"

Runs = tuple[Attestation, ...]  # that something was made by; none: it holds nothing of any run


@dataclass(frozen=True)
class Encoder:
    """A guarded text encoder: the task LoRAs that acted in it, and how many of its layers are guarded."""

    loras: tuple[LoraRecord, ...]
    layers: int


latents: Cache[str, Attestation] = Cache(4096)  # content of one latent of a batch -> its run
unsampled: Cache[str, bool] = Cache(4096)  # content of one latent -> a run without steps gave it back as it came in
images: Cache[str, Attestation] = Cache(4096)  # content of one image of a batch -> its run
gated: Cache[str, GateRecord] = Cache(4096)  # content of one image of a batch -> what the last gate that saw it decided
labels: Cache[str, tuple[Found, ...]] = Cache(4096)  # content of one image of a batch -> what that gate found in it
embeddings: Cache[str, str] = Cache(200_000)  # content of an embedding row -> digest of the safety LoRAs that shaped it
passed: Cache[str, tuple[str, ...]] = Cache(4096)  # content of an image or latent -> nodes nobody vouches for
masks: Cache[str, Runs] = Cache(4096)  # content of one mask of a batch -> the runs behind it
weighted: Cache[str, str] = Cache(200_000)  # content of an embedding row -> type of the node that weighted or mixed it
encoders: Cache[str, Encoder] = Cache(200_000)  # content of an embedding row -> the guarded text encoder that made it
others: Cache[str, Runs] = Cache(4096)  # content of a waveform, a voxel grid or a mesh -> the runs behind it


@dataclass(frozen=True)
class Known:
    """What is known of exactly these pixels; None: no guarded run made them, no gate judged them.

    ``through``: types of nodes that made them of what a guarded run had made, and for which nobody vouches. ``found``:
    what that gate found in the image that it judged.
    """

    run: Attestation | None
    gate: GateRecord | None
    through: tuple[str, ...] = ()
    found: tuple[Found, ...] = ()

    @property
    def guarded(self) -> bool:
        """Whether guarded runs made this image, apart from edits that are named and what a gate covered of it."""
        return self.run is not None and self.run.status.startswith("guarded")

    @property
    def edits(self) -> tuple[str, ...]:
        """Types of the nodes that edited the image since a guarded run made it, in order; see `status`."""
        return self.run.edits if self.run else ()

    @property
    def status(self) -> str:
        """What the image says of itself, in words; what each means stands in docs/guarantees.md."""
        if self.run is None:
            return f"passed through {', '.join(self.through)}: not vouched for" if self.through else "not guarded"
        started = "guarded throughout, started from an outside picture"
        said = self.run.status.replace(f"guarded{OUTSIDE}", started)
        return said.replace(f"merged base{OUTSIDE}", "merged base, started from an outside picture")

    @property
    def source_type(self) -> str:
        """IPTC's code for the image, a composite where a run behind it began with an image from outside.

        "" where it is not known that a model made what is seen.
        """
        if self.run is None or not self.guarded:
            return ""
        outside = any(OUTSIDE in run.run_status for run in self.run.runs)
        return marking.COMPOSITE if outside else marking.TRAINED

    def record(self, activity: bool = False) -> dict:
        """Goes into files; ``activity``: with what the safety LoRAs' activity tells of the prompt."""
        if self.run is None:
            passed = {"passed_through": list(self.through)} if self.through else {}
            return {"status": "unattested", "gate": asdict(self.gate) if self.gate else None, **passed}
        run = self.run if activity else self.run.without_activity()
        return json.loads(run.of(gate=self.gate).to_json())


def known(image: Tensor) -> Known:
    """What is known of one image, h w c."""
    return known_of(tensor_sha256(image))


def known_of(digest: str) -> Known:
    """What is known of one image by the hash of its content."""
    run = images.get(digest)
    return Known(run, gated.get(digest), () if run else passed.get(digest) or (), labels.get(digest) or ())


# Latents


def attest_latents(
    made: Iterable[Tensor],
    run: Attestation,
    acted: Mapping[Owner, Acted],
    activities: Mapping[str, Sequence[Activity | None]] = MappingProxyType({}),
    shares: Sequence[float] = (),
) -> None:
    """Remember the latents of a complete run, each with the acted strengths and activities of its own.

    Args:
        made: The latents, one by one; of several that are sampled as one, all of one kind, then all of the next.
        run: The run's attestation.
        acted: See `modular_lora.branches.acted.Meter.finish`.
        activities: Of every image, by the SHA-256 of the safety LoRA; see `modular_lora.guard.activity.judged`.
        shares: Of the task LoRAs on every image, where they give way; see `modular_lora.guard.safety_first`.
    """
    for number, latent in enumerate(made):
        own = {sha256: one.images[number % len(one.images)] for (_, sha256), one in acted.items()}
        each = {sha256: one[number % len(one)] for sha256, one in activities.items() if one}
        shown = {sha256: one for sha256, one in each.items() if one is not None}
        share = shares[number % len(shares)] if shares else run.task_share
        latents.put(tensor_sha256(latent), run.of(acted_strength=own, activity=shown, task_share=share))


def note_unsampled(samples: Tensor) -> None:
    """Remember latents that a run without steps gave back as they came in: b ..., or nested tensors of such."""
    for batch in _batches(samples):
        for latent in batch:
            unsampled.put(tensor_sha256(latent), True)


def latent_runs(samples: Tensor) -> list[Attestation | None]:
    """The run of each latent of a batch, b ... (of nested tensors the first); None where no guarded run made it."""
    return [latents.get(tensor_sha256(latent)) for latent in _batches(samples)[0]]


def _batches(samples: Tensor) -> Sequence[Tensor]:
    """The latents of every kind; ComfyUI nests those of several (sound beside video)."""
    return samples.unbind() if samples.is_nested else (samples,)


# Images


def attest_images(made: Tensor, samples: Tensor, vae_sha256: str, stranger: str = "") -> list[Attestation | str]:
    """Bind images to the runs of the latents that they were decoded from.

    Args:
        made: The images, n h w c; a video's latent gives several, all frames of one latent together.
        samples: The latents, b ...; of nested tensors the first.
        vae_sha256: Of the VAE that decoded them.
        stranger: The class of a VAE that is not ComfyUI's and may decode to whatever it likes: what it made of a
            guarded latent has passed through it.

    Returns:
        For each image its attestation, or why there is none.
    """
    digests = [tensor_sha256(latent) for latent in _batches(samples)[0]]
    found: list[Attestation | str] = []
    for number, image in enumerate(made):
        digest = digests[number * len(digests) // len(made)]
        run, through = latents.get(digest), passed.get(digest) or ()
        if run is None or stranger:
            through = (*through, stranger) if stranger and (run or through) else through
            found.append(_through(through) if through else _why_not(digest))
            if through and images.get(content := tensor_sha256(image)) is None:
                passed.put(content, through)
            continue
        attestation = run.of(vae_sha256=vae_sha256, image_sha256=tensor_sha256(image))
        images.put(attestation.image_sha256, attestation)
        found.append(attestation)
    return found


def _through(names: Sequence[str]) -> str:
    return f"unattested: the latent passed through {', '.join(names)}, for which nobody vouches"


def _why_not(digest: str) -> str:
    """Why what is decoded of a latent has no attestation."""
    return UNSAMPLED if unsampled.get(digest) else EDITED


def record_gate(record: GateRecord, after: Tensor, status: str = "", found: Iterable[Found] = ()) -> str:
    """Remember what a gate decided of one image; one that it changed keeps its run's attestation.

    Args:
        record: The decision; ``changed`` says whether ``after`` is the gate's work.
        after: The image as the gate hands it on, h w c.
        status: Of a changed image's attestation, where the run's own would be wrong: no run made what is shown.
        found: The labels that were found.

    Returns:
        The hash of ``after``.
    """
    source, found = record.source_sha256, tuple(found)
    gated.put(source, replace(record, changed=False))  # of a changed image too: a gentler gate's record is out of date
    labels.put(source, found)
    if not record.changed:
        return source
    digest = tensor_sha256(after)
    gated.put(digest, record)
    labels.put(digest, found)
    if run := images.get(source):
        images.put(digest, run.of(image_sha256=digest, status=status or run.status))
    return digest


# Embeddings


def remember_embedding(embedding: Tensor, text_digest: str) -> None:
    """Remember every row of an embedding (b n d) as made under these safety LoRAs' text-encoder half."""
    for row in row_digests(embedding):
        embeddings.put(row, text_digest)


def weighted_by(embedding: Tensor) -> tuple[str, ...]:
    """Types of the nodes that weighted or mixed the rows of an embedding (b n d), each once."""
    return tuple(dict.fromkeys(name for row in carrying_digests(embedding) if (name := weighted.get(row))))


def note_encoder(embedding: Tensor, encoder: Encoder) -> None:
    """Remember which guarded text encoder made every row of an embedding (b n d)."""
    for row in carrying_digests(embedding):
        encoders.put(row, encoder)


def encoders_of(embedding: Tensor) -> Iterator[Encoder]:
    """The guarded text encoders that rows of an embedding (b n d) are known to come from, each once."""
    found = (encoders.get(row) for row in carrying_digests(embedding))
    yield from dict.fromkeys(encoder for encoder in found if encoder is not None)


def was_made_under(embedding: Tensor, text_digest: str) -> bool:
    """Whether every row of an embedding (b n d) that carries anything was made under these safety LoRAs."""
    return all(embeddings.get(row) == text_digest for row in carrying_digests(embedding))
