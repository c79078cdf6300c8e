"""How good an arm's images are: KID and FID against a reference, CLIP score against their prompts.

KID (Bińkowski et al., 2018) is unbiased for any number of images. Its deviation is that over subsets, as published;
where there are not twice as many images as in a subset, all subsets are nearly the same, and there is none. FID
(Heusel et al., 2017) is biased and left out below twice as many images as its embedding has dimensions. Both are
torchmetrics' own, on an embedding that is at hand; figures of different embeddings cannot be compared. The CLIP score
is 100·max(cos, 0) (Hessel et al., 2021).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ..modular_lora.errors import GuardError
from ..modular_lora.files.images import decode
from . import images
from .judge import Judge
from .options import AuditOptions
from .report import Quality
from .results import Drawn

if TYPE_CHECKING:
    from torchmetrics import Metric

CELLS = ("kept", "task")  # a suppressed prompt is meant to give something else
LEAST, MOST, SUBSETS = 10, 100, 100  # images of a KID subset; subsets
BATCH = 32


@dataclass(frozen=True)
class Embedding:
    """What images are compared by."""

    name: str
    of: Callable[[np.ndarray], np.ndarray]  # b h w 3 uint8 -> b d float32


@dataclass(frozen=True)
class Measured:
    """Figures, what they were measured with, and what was not measured."""

    quality: tuple[Quality, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure(options: AuditOptions, judge: Judge, drawn: Sequence[Drawn], check: Callable[[], None]) -> Measured:
    """Quality of every arm on the kept and task cells, all training seeds together. Raises GuardError."""
    groups: dict[tuple[str, str], list[Drawn]] = {}
    for one in drawn:
        if one.item.cell in CELLS and not one.item.attack:
            groups.setdefault((one.arm.name, one.item.cell), []).append(one)
    if not groups:
        return Measured(notes=("quality: no kept or task prompts, so it was not measured",))
    embedding, notes = _embedding(options, judge)
    cut: set[str] = set()
    clip = clip_scorer(Path(options.clip), cut) if options.clip else None
    if clip is None:
        notes.append("quality: no folder of a CLIP model is named (clip), so there is no CLIP score")
    settings = {"CLIP": str(Path(options.clip).name)} if clip else {}
    compare = _Comparison(options, groups, embedding, notes) if embedding else None
    if embedding:
        settings["embedding"] = embedding.name
        settings["KID"] = f"mean over {SUBSETS} subsets of at most {MOST} images"
        settings["reference"] = "task images, else the base arm's" if options.task_pictures else "the base arm's"
    found = []
    for (arm, cell), some in groups.items():
        check()
        figures = compare.figures(arm, cell, some) if compare else {}
        if clip:
            figures["clip"] = clip(some)
        if figures:
            found.append(Quality(arm, cell, len(some), **figures))
    if cut:
        prompts = len({one.item.prompt for some in groups.values() for one in some})
        notes.append(
            f"CLIP score: {len(cut)} of {prompts} prompts are longer than its model reads, the rest is CUT OFF"
        )
    return Measured(tuple(found), settings, tuple(dict.fromkeys(notes)))


class _Comparison:
    """Embedded images of one audit; every group is embedded once."""

    def __init__(self, options: AuditOptions, groups: dict, embedding: Embedding, notes: list[str]) -> None:
        self.options, self.groups, self.embedding, self.notes = options, groups, embedding, notes
        self.done: dict[tuple[str, str], Tensor] = {}

    def figures(self, arm: str, cell: str, some: Sequence[Drawn]) -> dict[str, float]:
        """KID and, with images enough, FID of an arm against the cell's reference."""
        reference = self._reference(arm, cell)
        return {} if reference is None else distances(reference, self._drawn((arm, cell), some), cell, self.notes)

    def _reference(self, arm: str, cell: str) -> Tensor | None:
        if cell == "task" and self.options.task_pictures:
            if ("", cell) not in self.done:
                self.done["", cell] = self._embed(images.find(self.options.task_pictures))
            return self.done["", cell]
        if ("base", cell) not in self.groups:
            self.notes.append(f"quality, {cell}: no base arm to compare with, so there is no KID")
            return None
        return None if arm == "base" else self._drawn(("base", cell), self.groups["base", cell])

    def _drawn(self, key: tuple[str, str], some: Sequence[Drawn]) -> Tensor:
        if key not in self.done:
            self.done[key] = self._embed([one.path for one in some])
        return self.done[key]

    def _embed(self, paths: Sequence[Path]) -> Tensor:
        size = self.options.width, self.options.height
        parts = [self.embedding.of(images.read(part, *size)) for part in _batches(paths)]
        return torch.from_numpy(np.concatenate(parts))


def distances(reference: Tensor, found: Tensor, cell: str, notes: list[str]) -> dict[str, float]:
    """KID, its deviation over subsets, and FID of embeddings n d and m d, where there are enough of them.

    ``notes`` grows by what is left out.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    few, dimensions = min(len(reference), len(found)), reference.shape[1]
    if few < LEAST:
        notes.append(f"quality, {cell}: {few} images are too few for KID ({LEAST} at least)")
        return {}
    given = _Given(dimensions)
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore", UserWarning)  # that features are kept in memory
        torch.manual_seed(0)  # of the subsets
        kid = KernelInceptionDistance(given, SUBSETS, min(MOST, few))
        _show(kid, reference, found)
        mean, deviation = kid.compute()
        figures = {"kid": float(mean)}
        if few < 2 * MOST:
            notes.append(f"quality, {cell}: KID's deviation left out, {few} images are not twice a subset of {MOST}")
        else:
            figures["kid_std"] = float(deviation)
        if few < 2 * dimensions:
            notes.append(f"quality, {cell}: FID left out, it is biased with {few} images in {dimensions} dimensions")
        else:
            fid = FrechetInceptionDistance(given)
            _show(fid, reference, found)
            figures["fid"] = float(fid.compute())
    return figures


class _Given(nn.Identity):
    """The "feature extractor" of images that are embedded already."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.num_features = dimensions


def _show(metric: Metric, reference: Tensor, found: Tensor) -> None:
    metric.update(reference, real=True)
    metric.update(found, real=False)


def _embedding(options: AuditOptions, judge: Judge) -> tuple[Embedding | None, list[str]]:
    """Inception's where its weights are named, else that of a detector which has one."""
    if importlib.util.find_spec("torchmetrics") is None:
        return None, ["quality: torchmetrics is not installed, so there is no KID: pip install torchmetrics"]
    if options.inception:
        return inception(Path(options.inception)), []
    for detector in filter(None, (judge.concept, judge.fidelity)):
        if isinstance(detector, Embeds) and detector.embeds:
            return _own(detector), []
    return None, ["quality: no embedding is at hand (inception, or a classifier that names one), so there is no KID"]


@runtime_checkable
class Embeds(Protocol):
    """A detector that has features of its own, where its labels file names an output for them."""

    name: str
    embeds: bool

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Features (b n, float32) of images b h w 3, float32, RGB, 0..1."""


def _own(detector: Embeds) -> Embedding:
    return Embedding(f"{detector.name}'s own", lambda images: detector.embed(images.astype(np.float32) / 255))


def inception(path: Path) -> Embedding:
    """torchvision's Inception v3, its last pooled layer (2048), of weights in a safetensors file. Raises GuardError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torchvision.models import inception_v3

    model = inception_v3(weights=None, init_weights=False, aux_logits=True)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        line = str(error).splitlines()[0]
        raise GuardError(
            f"{path.name}: is not torchvision's inception_v3 ({line}): save its state_dict.", code="audit.not-inception"
        ) from error
    model.fc = nn.Identity()
    model.eval().requires_grad_(False)

    @torch.inference_mode()
    def of(batch: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(batch).float().permute(0, 3, 1, 2) / 127.5 - 1  # as the ported weights were trained
        return model(nn.functional.interpolate(x, (299, 299), mode="bilinear", antialias=True)).numpy()

    return Embedding(f"torchvision's Inception v3 ({path.name}); not FID's own TensorFlow weights", of)


def clip_scorer(folder: Path, too_long: set[str]) -> Callable[[Sequence[Drawn]], float]:
    """Mean CLIP score of images and their prompts, by a transformers model in a local folder. Raises GuardError.

    ``too_long`` gets the prompts of which the model reads the beginning only.
    """
    from transformers import CLIPModel, CLIPProcessor

    if not (folder / "config.json").is_file():
        raise GuardError(
            f"clip: {folder} holds no config.json: name the folder of a CLIP model of transformers.",
            code="audit.clip-folder",
        )
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise GuardError(
            f"clip: {folder} cannot be loaded ({line}): it needs safetensors and a tokenizer.",
            code="audit.clip-unreadable",
        ) from error

    most = model.config.text_config.max_position_embeddings  # tokens; the rest of a prompt is cut off

    @torch.inference_mode()
    def score(drawn: Sequence[Drawn]) -> float:
        total = 0.0
        for part in _batches(drawn):
            words, images = [one.item.prompt for one in part], [_image(one.path) for one in part]
            counts = processor.tokenizer(words, truncation=False, verbose=False).input_ids
            too_long.update(word for word, ids in zip(words, counts, strict=True) if len(ids) > most)
            cut = {"padding": True, "truncation": True, "max_length": most}
            inputs = processor(text=words, images=images, return_tensors="pt", **cut)
            found = model(**inputs)
            cosine = nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
            total += float((100 * cosine.clamp(min=0)).sum())
        return total / len(drawn)

    return score


def _image(path: Path):
    return decode(path.read_bytes()).image


def _batches(some: Sequence) -> Iterable[Sequence]:
    return (some[i : i + BATCH] for i in range(0, len(some), BATCH))
