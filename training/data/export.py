"""What others are told of a data set: sd-scripts' TOML, and the metadata of a LoRA file."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...modular_lora.files.images import ENDINGS, named
from ...modular_lora.options import toml_value
from ..output import DatasetRecord
from . import captions
from .captions import CaptionRules
from .config import DATASET, SUBSET, Dataset, DatasetConfig, DatasetError, Subset
from .dataset import JSON, KINDS, DatasetReport

STOPS_SD_SCRIPTS = (  # what it stops at, and what it would train otherwise
    "broken", "too_small", "empty_captions", "unreadable_captions", "missing_masks", "unused_masks", "odd_masks",
    "empty_masks", "transparent_masks", "other_encodings", "metadata_alone",
)  # fmt: skip


def to_toml(config: DatasetConfig, report: DatasetReport) -> str:
    """The data set for sd-scripts' --dataset_config: absolute folders, every subset's own caption_extension.

    Subsets with conditioning_data_dir want --masked_loss beside it. DatasetError where sd-scripts would stop or would
    miss captions: an image that is broken, a folder with captions of two endings.
    """
    if any(dataset.clip_frames for dataset in config.datasets):
        raise DatasetError(
            "clip_frames: sd-scripts reads no clips: use the embedded engine, or leave it out.", code="dataset.kohya"
        )
    for kind in STOPS_SD_SCRIPTS:
        if kind in report.findings:
            names = "; ".join(report.findings[kind][:3])
            raise DatasetError(f"sd-scripts cannot take {KINDS[kind]}: {names}: mend this first.", code="dataset.kohya")
    lines: list[str] = []
    for index, dataset in enumerate(config.datasets):
        lines += [DATASET, *_assignments(_dataset(dataset)), ""]
        for subset in dataset.subsets:
            endings = {p.caption_ending for p in report.images if (p.dataset, p.subset) == (index, subset)} - {""}
            lines += [SUBSET, *_assignments(_subset(subset, endings)), ""]
    return "\n".join(lines)


def record(report: DatasetReport) -> DatasetRecord:
    """What the metadata of a LoRA file says of the images that it was trained on; counts include repeats."""
    reg = sum(image.draws for image in report.images if image.is_reg)
    return DatasetRecord(
        sha256=report.dataset_sha256,
        images=report.draws - reg,
        reg_images=reg,
        batches_per_epoch=report.batches,
        tag_frequency=tag_frequency(report),
        dirs={name: {"n_repeats": repeats, "img_count": count} for name, count, repeats, _ in report.folders},
        clip_frames=tuple(sorted({len(image.frames) for image in report.images} - {0})),
    )


def tag_frequency(report: DatasetReport) -> dict[str, dict[str, int]]:
    """Tags of each folder's captions with the number of images that have them, as sd-scripts counts them."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for image in report.images:
        lines = image.caption.splitlines()
        lines = lines if image.subset.rules.enable_wildcard else lines[:1]
        counts[image.subset.image_dir.name].update(tag.lower() for line in lines for tag in captions.tags(line))
    return {name: dict(count) for name, count in counts.items()}


def _dataset(dataset: Dataset) -> dict[str, Any]:
    buckets = dataset.buckets
    values = {"resolution": list(buckets.resolution), "batch_size": dataset.batch_size}
    if dataset.validation_split:
        values |= {"validation_split": dataset.validation_split, "validation_seed": dataset.validation_seed}
    if not buckets.enable_bucket:
        return values | {"enable_bucket": False}
    return values | {f.name: getattr(buckets, f.name) for f in fields(buckets) if f.name != "resolution"}


def _subset(subset: Subset, endings: set[str]) -> dict[str, Any]:
    if len(endings) > 1:
        raise DatasetError(
            f"{subset.image_dir}: has captions ending in {' and '.join(sorted(endings))}; sd-scripts reads one of "
            "them: rename the others.",
            code="dataset.captions",
        )
    if subset.caption_dir is not None or JSON in endings:
        what = "captions in a folder of their own" if subset.caption_dir else "JSON captions"
        raise DatasetError(
            f"{subset.image_dir}: sd-scripts reads no {what}: use the embedded engine, or a metadata_file.",
            code="dataset.captions",
        )
    if subset.reference_dir is not None:
        raise DatasetError(
            f"{subset.image_dir}: the sd-scripts engine gives no model a reference image: use the embedded engine, or "
            "leave out reference_dir.",
            code="dataset.references",
        )
    masks = subset.conditioning_data_dir
    values: dict[str, Any] = {
        "image_dir": subset.image_dir,
        "conditioning_data_dir": masks,
        "num_repeats": subset.num_repeats,
        "caption_extension": next(iter(endings), subset.caption_endings[0]),
        "flip_aug": subset.flip_aug,
        "resize_interpolation": subset.resize_interpolation,
    }
    if subset.metadata_file is not None:
        _check_names(subset.metadata_file)
        del values["caption_extension"]
        values |= {"metadata_file": subset.metadata_file, "alpha_mask": subset.alpha_mask}
    elif masks is None:
        own = {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg, "alpha_mask": subset.alpha_mask}
        values |= own
    rules = subset.rules
    return values | {f.name: getattr(rules, f.name) for f in fields(CaptionRules)}


def _check_names(metadata_file: Path) -> None:
    """DatasetError for images named without their ending, which sd-scripts takes for names of its cache files."""
    short = [key for key in captions.metadata(metadata_file) if Path(key).suffix.lower() not in ENDINGS]
    if short:
        raise DatasetError(
            f"{metadata_file.name}: sd-scripts wants images by their whole names: {named(short)}: add the endings.",
            code="dataset.kohya",
        )


def _assignments(values: dict[str, Any]) -> list[str]:
    return [f"{key} = {toml_value(value)}" for key, value in values.items() if value is not None]
