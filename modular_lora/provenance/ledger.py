"""What is remembered of tensors by their content: which guarded run made them, and what a gate decided.

The way of an image: a guarded run puts its latents here (`attest_latents`), a decode binds the images that it makes of
them (`attest_images`), a gate adds what it decided (`record_gate`), and whoever saves or shows an image asks for
exactly these pixels (`known`). Nothing that a graph says of an image counts, and an image that was edited on the way
has another content, of which nothing is known. The last images and latents of this process are remembered, in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor, count_nonzero

from ..branches.acted import Acted
from ..branches.changes import Owner
from ..tensor_hashing import carrying_digests, row_digests, tensor_sha256
from ..util.cache import Cache
from .attestation import Attestation, GateRecord, LoraRecord

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
embeddings: Cache[str, str] = Cache(200_000)  # content of an embedding row -> digest of the safety LoRAs that shaped it
encoders: Cache[str, Encoder] = Cache(200_000)  # content of an embedding row -> the guarded text encoder that made it
others: Cache[str, Runs] = Cache(4096)  # content of a waveform, a voxel grid or a mesh -> the runs behind it


@dataclass(frozen=True)
class Known:
    """What is known of exactly these pixels; None: no guarded run made them, no gate judged them."""

    run: Attestation | None
    gate: GateRecord | None

    @property
    def guarded(self) -> bool:
        """Whether a guarded run made this image, apart from what a gate covered of it."""
        return self.run is not None and self.run.status.startswith("guarded")

    def record(self) -> dict:
        """Goes into files."""
        if self.run is None:
            return {"status": "unattested", "gate": asdict(self.gate) if self.gate else None}
        return json.loads(self.run.of(gate=self.gate).to_json())


def known(image: Tensor) -> Known:
    """What is known of one image, h w c."""
    digest = tensor_sha256(image)
    return Known(images.get(digest), gated.get(digest))


# Latents


def attest_latents(made: Iterable[Tensor], run: Attestation, acted: Mapping[Owner, Acted]) -> None:
    """Remember the latents of a complete run, each with the acted strengths of its own.

    Args:
        made: The latents, one by one; of several that are sampled as one, all of one kind, then all of the next.
        run: The run's attestation.
        acted: See `modular_lora.branches.acted.Meter.finish`.
    """
    for number, latent in enumerate(made):
        own = {sha256: one.images[number % len(one.images)] for (_, sha256), one in acted.items()}
        latents.put(tensor_sha256(latent), run.of(acted_strength=own))


def note_unsampled(samples: Tensor) -> None:
    """Remember latents that a run without steps gave back as they came in: b ..., or nested tensors of such."""
    for batch in _batches(samples):
        for latent in batch:
            unsampled.put(tensor_sha256(latent), True)


def starts_outside(start: Iterator[Tensor], record: Attestation) -> bool:
    """Whether a run starts from anything but noise and latents of guarded runs with the same safety LoRAs."""
    runs = [latents.get(tensor_sha256(latent)) for latent in start if count_nonzero(latent)]
    return any(run is None or run.status != "guarded" or run.safety != record.safety for run in runs)


def latent_runs(samples: Tensor) -> list[Attestation | None]:
    """The run of each latent of a batch, b ...; None where no guarded run made it."""
    return [latents.get(tensor_sha256(latent)) for latent in samples]


def _batches(samples: Tensor) -> Sequence[Tensor]:
    """The latents of every kind; ComfyUI nests those of several (sound beside video)."""
    return samples.unbind() if samples.is_nested else (samples,)


# Images


def attest_images(made: Tensor, samples: Tensor, vae_sha256: str) -> list[Attestation | str]:
    """Bind images to the runs of the latents that they were decoded from.

    Args:
        made: The images, n h w c; a video's latent gives several, all frames of one latent together.
        samples: The latents, b ...; of nested tensors the first.
        vae_sha256: Of the VAE that decoded them.

    Returns:
        For each image its attestation, or why there is none.
    """
    digests = [tensor_sha256(latent) for latent in _batches(samples)[0]]
    found: list[Attestation | str] = []
    for number, image in enumerate(made):
        digest = digests[number * len(digests) // len(made)]
        if (run := latents.get(digest)) is None:
            found.append(UNSAMPLED if unsampled.get(digest) else EDITED)
            continue
        attestation = run.of(vae_sha256=vae_sha256, image_sha256=tensor_sha256(image))
        images.put(attestation.image_sha256, attestation)
        found.append(attestation)
    return found


def record_gate(record: GateRecord, after: Tensor, status: str = "") -> None:
    """Remember what a gate decided of one image; one that it changed keeps its run's attestation.

    Args:
        record: The decision; ``changed`` says whether ``after`` is the gate's work.
        after: The image as the gate hands it on, h w c.
        status: Of a changed image's attestation, where the run's own would be wrong: no run made what is shown.
    """
    source = record.source_sha256
    gated.put(source, replace(record, changed=False))  # of a changed image too: a gentler gate's record is out of date
    if record.changed:
        digest = tensor_sha256(after)
        gated.put(digest, record)
        if run := images.get(source):
            images.put(digest, run.of(image_sha256=digest, status=status or run.status))


# Embeddings


def remember_embedding(embedding: Tensor, text_digest: str) -> None:
    """Remember every row of an embedding (b n d) as made under these safety LoRAs' text-encoder half."""
    for row in row_digests(embedding):
        embeddings.put(row, text_digest)


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
