"""kohya's data-set form: ``N_name`` folders, or sd-scripts' data-set TOML; checked before an image is opened.

    [general]                     values for all data sets
    [[datasets]]                  a resolution, a batch size, buckets; over [general]
    [[datasets.subsets]]          a folder of images with captions; over [[datasets]]

What is accepted here sd-scripts accepts too, key by key and level by level, but for ``caption_dir``,
``reference_dir``, ``clip_frames`` and ``clip_extraction``, which are ours, and ``.json`` as a ``caption_extension``.
Three things differ in what a missing value means: without ``caption_extension`` both ``.txt`` and ``.caption`` are
looked for (there, only ``.caption``), without ``min_bucket_reso`` and ``max_bucket_reso`` the usual 256 and 1024 give
way to the resolution, and a relative folder that is not in the working directory is looked for beside the TOML.
``to_toml`` writes all of it out.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ...modular_lora.errors import GuardError
from ...modular_lora.files import texts
from ...modular_lora.files.images import ENDINGS
from ...modular_lora.options import tomllib
from ..choices import ClipExtraction
from .captions import CaptionRules
from .images import INTERPOLATIONS, Buckets

CAPTION_ENDINGS = (".txt", ".caption")
GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"
ALL, UPPER = (GENERAL, DATASET, SUBSET), (GENERAL, DATASET)
CLIP_EXTRACTIONS = get_args(ClipExtraction)
REPEATS = re.compile(r"(\d+)(?:_(.*))?", re.DOTALL)


class DatasetError(GuardError):
    """A data set that can't be read: a key that does not exist, a value that does not fit, a folder that is none."""

    code = "dataset"


@dataclass(frozen=True)
class Key:
    """A key's type (tuple: a whole number, or [width, height]) and range."""

    kind: type
    low: float | None = None
    high: float | None = None


RATE, COUNT, STEPS = Key(float, 0, 1), Key(int, 1), Key(int, 0)
EVERYWHERE = {  # [general], [[datasets]] and [[datasets.subsets]]
    "num_repeats": COUNT,
    "class_tokens": Key(str),
    "caption_extension": Key(str),
    "caption_dir": Key(str),
    "reference_dir": Key(str),
    "flip_aug": Key(bool),
    "resize_interpolation": Key(str),
    "shuffle_caption": Key(bool),
    "caption_separator": Key(str),
    "keep_tokens": STEPS,
    "keep_tokens_separator": Key(str),
    "secondary_separator": Key(str),
    "enable_wildcard": Key(bool),
    "caption_prefix": Key(str),
    "caption_suffix": Key(str),
    "caption_dropout_rate": RATE,
    "caption_dropout_every_n_epochs": STEPS,
    "caption_tag_dropout_rate": RATE,
    "token_warmup_min": STEPS,
    "token_warmup_step": Key(float, 0),
}
OF_DATASETS = {  # [general] and [[datasets]]
    "resolution": Key(tuple, 8),
    "batch_size": COUNT,
    "enable_bucket": Key(bool),
    "min_bucket_reso": COUNT,
    "max_bucket_reso": COUNT,
    "bucket_reso_steps": COUNT,
    "bucket_no_upscale": Key(bool),
    "validation_split": Key(float, 0, 0.99),
    "validation_seed": Key(int),
    "clip_frames": STEPS,
    "clip_extraction": Key(str),
}
OF_SUBSETS = {  # [[datasets.subsets]]
    "image_dir": Key(str),
    "is_reg": Key(bool),
    "alpha_mask": Key(bool),
    "conditioning_data_dir": Key(str),
    "metadata_file": Key(str),
}
NO_MASKS = ("class_tokens", "is_reg", "alpha_mask")  # what sd-scripts' subsets with conditioning_data_dir do not take
NO_METADATA = ("class_tokens", "is_reg", "caption_extension", "caption_dir", "conditioning_data_dir")  # metadata_file
CACHE = "latents are cached once, so {} can't change from draw to draw: leave it out, or use the sd-scripts engine"
REFUSED = {  # sd-scripts' keys: levels, values that change nothing, why
    "color_aug": (ALL, (False,), CACHE.format("colours")),
    "random_crop": (ALL, (False,), CACHE.format("the crop")),
    "face_crop_aug_range": (ALL, (), CACHE.format("the crop")),
    "custom_attributes": (ALL, ({},), "nothing here reads them: leave them out"),
    "cache_info": (ALL, (False,), "every image is opened and checked before training: leave it out"),
    "network_multiplier": (UPPER, (1,), "every data set trains the LoRA at strength 1: leave it out"),
}
NOT_HERE = {
    "prior_loss_weight": "is an option of the training, in sd-scripts too: give it there",
    "masked_loss": "is on where conditioning_data_dir or alpha_mask is given: leave it out",
    "train_data_dir": "is an option of the training, instead of a TOML: give it there, or image_dir here",
}
DEFAULTS = "defaults"  # what the training's options say; sd-scripts lets these fall to subsets as well
LEVELS = {
    DEFAULTS: EVERYWHERE | OF_DATASETS | {"alpha_mask": Key(bool)},
    GENERAL: EVERYWHERE | OF_DATASETS,
    DATASET: EVERYWHERE | OF_DATASETS,
    SUBSET: EVERYWHERE | OF_SUBSETS,
}


@dataclass(frozen=True)
class Subset:
    """A folder of images and how they are drawn."""

    image_dir: Path
    num_repeats: int
    class_tokens: str | None
    is_reg: bool
    caption_endings: tuple[str, ...]  # the first that exists
    flip_aug: bool
    alpha_mask: bool
    conditioning_data_dir: Path | None  # masks of the loss, an image of the same name each
    resize_interpolation: str | None
    rules: CaptionRules
    caption_dir: Path | None = None  # of the caption files, where they are not beside the images
    metadata_file: Path | None = None  # captions of all images in one JSON file, instead of caption files
    reference_dir: Path | None = None  # what an edit model is given beside the caption, an image of the same name each

    @property
    def captions_in(self) -> Path:
        """The folder of the caption files: ``caption_dir``, or the folder in it that is called as ``image_dir``."""
        return self.image_dir if self.caption_dir is None else self._own(self.caption_dir)

    @property
    def references_in(self) -> Path | None:
        """The folder of the reference images, found as that of the captions."""
        return None if self.reference_dir is None else self._own(self.reference_dir)

    def _own(self, folder: Path) -> Path:
        own = folder / self.image_dir.name
        return own if own.is_dir() else folder


@dataclass(frozen=True)
class Dataset:
    """Subsets that share batches."""

    subsets: tuple[Subset, ...]
    batch_size: int
    buckets: Buckets
    validation_split: float = 0.0  # share of every subset's images that is held out of training
    validation_seed: int = 0
    clip_frames: int = 0  # of each clip; 0: clips are not read
    clip_extraction: str = CLIP_EXTRACTIONS[0]


@dataclass(frozen=True)
class DatasetConfig:
    """A data set as it was asked for; ``dataset.scan`` looks at its images."""

    source: str  # the TOML or the folder
    datasets: tuple[Dataset, ...]
    ignored: tuple[str, ...] = ()  # 'name: why'

    @property
    def folders(self) -> list[Path]:
        """Every folder that it reads from."""
        found = ((s.image_dir, s.conditioning_data_dir, s.caption_dir, s.reference_dir) for s in self.subsets)
        return [folder for folders in found for folder in folders if folder]

    @property
    def files(self) -> list[Path]:
        """Every metadata file that it reads."""
        return [subset.metadata_file for subset in self.subsets if subset.metadata_file]

    @property
    def subsets(self) -> list[Subset]:
        """Of all data sets."""
        return [subset for data in self.datasets for subset in data.subsets]


def from_toml(path: str | Path, defaults: Mapping[str, Any] | None = None, within: Path | None = None) -> DatasetConfig:
    """The data set of a TOML (or JSON) file; ``defaults`` are keys of [general] that count where it says nothing.

    Whether a folder that it names is there is not looked at: `check_folders` does. ``within``: the folder that all of
    them have to be in, known from their paths alone, so that a file of somebody else's cannot ask what else there is;
    relative ones are then beside the file.
    """
    path = Path(path)
    try:
        text = texts.decode(path.read_bytes())
        document = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError, texts.TextError) as error:  # parsers' errors are ValueErrors
        raise DatasetError(
            f"{path}: cannot be read as a data-set TOML ({error}): mend the file.", code="dataset.toml"
        ) from error
    return _Reader(path.name, path.parent, dict(defaults or {}), within).config(str(path), document)


def check_folders(config: DatasetConfig) -> DatasetConfig:
    """``config``; DatasetError where a folder that it names is none."""
    for folder in config.folders:
        if not os.path.isdir(folder):  # unlike Path.is_dir, False for names that are too long
            raise DatasetError(
                f"{Path(config.source).name}: {folder} is not a folder: correct the path.", code="dataset.no-folder"
            )
    for file in config.files:
        if not os.path.isfile(file):
            raise DatasetError(
                f"{Path(config.source).name}: {file} is not a file: correct the path.", code="dataset.no-metadata"
            )
    return config


def check_clips(config: DatasetConfig, family: str, frames_of: Callable[[int], int]) -> None:
    """DatasetError for a number of frames that a model cannot be trained on.

    Args:
        config: The data set, its files not yet read.
        family: Of the model.
        frames_of: Gives the frames of a clip that so many frames of a latent are; 0 of a model of still images.
    """
    for wanted in sorted({data.clip_frames for data in config.datasets} - {0, 1}):
        if not frames_of(1):
            raise DatasetError(
                f"clip_frames: {wanted}, and {family} draws still images: train a model of video, or set it to 1, the "
                "first frame of each clip, or to 0.",
                code="dataset.clip-frames",
            )
        latent = 1
        while frames_of(latent) < wanted:
            latent += 1
        if (above := frames_of(latent)) != wanted:
            first = ", ".join(str(frames_of(k)) for k in range(1, 4))
            raise DatasetError(
                f"clip_frames: {wanted}, and the VAE of this {family} takes {first} and so on: set it to "
                f"{frames_of(latent - 1)} or {above}.",
                code="dataset.clip-frames",
            )


def from_folders(
    train_data_dir: str | Path,
    reg_data_dir: str | Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    within: Path | None = None,
) -> DatasetConfig:
    """The data set of ``N_name`` folders (N repeats, class tokens 'name'), with buckets unless ``defaults`` say no.

    ``within``: as for `from_toml`.
    """
    subsets: list[dict[str, Any]] = []
    ignored: list[str] = []
    for folder, is_reg in ((train_data_dir, False), (reg_data_dir, True)):
        if folder:
            found, left = _numbered(Path(folder), is_reg)
            subsets, ignored = subsets + found, ignored + left
    if not subsets:
        seen = f" (found: {'; '.join(ignored[:5])})" if ignored else ""
        raise DatasetError(
            f"{train_data_dir}: has no folder named like '10_name' (10 repeats, class tokens 'name'){seen}: "
            "put the images into one.",
            code="dataset.no-repeats",
        )
    config = _folders(str(train_data_dir), subsets, defaults, within)
    return DatasetConfig(config.source, config.datasets, tuple(ignored))


def from_metadata(
    image_dir: str | Path,
    metadata_file: str | Path,
    defaults: Mapping[str, Any] | None = None,
    within: Path | None = None,
) -> DatasetConfig:
    """The data set of a plain folder of images with their captions in sd-scripts' metadata, with buckets; see above."""
    subset = {"image_dir": str(Path(image_dir).absolute()), "metadata_file": str(Path(metadata_file).absolute())}
    return _folders(str(image_dir), [subset], defaults, within)


def _folders(
    source: str, subsets: list[dict[str, Any]], defaults: Mapping[str, Any] | None, within: Path | None
) -> DatasetConfig:
    reader = _Reader("data set", Path.cwd(), {"enable_bucket": True} | dict(defaults or {}), within)
    return reader.config(source, {"datasets": [{"subsets": subsets}]})


def _numbered(folder: Path, is_reg: bool) -> tuple[list[dict[str, Any]], list[str]]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: is not a folder: correct the path.", code="dataset.no-folder")
    subsets, ignored, loose = [], [], 0
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        match = REPEATS.fullmatch(entry.name)
        if not entry.is_dir():
            loose += entry.suffix.lower() in ENDINGS
        elif match and int(match[1]):
            subset = {"image_dir": str(entry.absolute()), "num_repeats": int(match[1]), "is_reg": is_reg}
            subsets.append(subset | {"class_tokens": match[2] or ""})
        elif not entry.name.startswith("."):
            why = "0 repeats" if match else "no number of repeats before its name, as in '10_name'"
            ignored.append(f"{entry.name}: {why}")
    if loose:
        ignored.append(f"{folder.name}: {loose} images beside the numbered folders")
    return subsets, ignored


@dataclass(frozen=True)
class _Reader:
    """Checks a document and lets values fall from level to level."""

    name: str
    folder: Path
    defaults: dict[str, Any]
    within: Path | None  # the folder that everything has to be in; None: anywhere

    def config(self, source: str, document: Any) -> DatasetConfig:
        self._table("top level", document, {"general": Key(dict), "datasets": Key(list)})
        self._level(DEFAULTS, DEFAULTS, self.defaults)
        general = document.get("general", {})
        self._level(GENERAL, GENERAL, general)
        tables = document.get("datasets", [])
        if not tables:
            raise DatasetError(
                f"{self.name}: has no {DATASET}: add one, with {SUBSET} and their image_dir.",
                code="dataset.nothing-in-it",
            )
        return DatasetConfig(source, tuple(self._dataset(i, self.defaults | general, t) for i, t in enumerate(tables)))

    def _dataset(self, index: int, above: dict[str, Any], table: Any) -> Dataset:
        place = f"{DATASET} {index + 1}"
        if not isinstance(table, dict):
            raise DatasetError(
                f"{self.name}: {place}: {table!r} is not a table: write {DATASET}.", code="dataset.no-table"
            )
        own = {key: value for key, value in table.items() if key != "subsets"}
        self._level(place, DATASET, own)
        subsets = table.get("subsets", [])
        if not isinstance(subsets, list) or not subsets:
            raise DatasetError(
                f"{self.name}: {place}: has no {SUBSET}: add one with its image_dir.", code="dataset.nothing-in-it"
            )
        values = above | own
        made = [self._subset(f"{place}, {SUBSET} {i + 1}", values, subset) for i, subset in enumerate(subsets)]
        if mixed := _mixed(own, subsets, "conditioning_data_dir", NO_MASKS):
            raise DatasetError(f"{self.name}: {place}: conditioning_data_dir: {mixed}", code="dataset.masks")
        if mixed := _mixed(own, subsets, "metadata_file", NO_METADATA):
            raise DatasetError(f"{self.name}: {place}: metadata_file: {mixed}", code="dataset.metadata")
        split = values.get("validation_split", 0.0), values.get("validation_seed", 0)
        extraction = values.get("clip_extraction", CLIP_EXTRACTIONS[0])
        if extraction not in CLIP_EXTRACTIONS:
            self._wrong(place, "clip_extraction", extraction, f"is not one of {', '.join(CLIP_EXTRACTIONS)}")
        clips = values.get("clip_frames", 0), extraction
        return Dataset(tuple(made), values.get("batch_size", 1), self._buckets(place, values), *split, *clips)

    def _subset(self, place: str, above: dict[str, Any], table: Any) -> Subset:
        self._level(place, SUBSET, table)
        if "image_dir" not in table:
            raise DatasetError(
                f"{self.name}: {place}: has no image_dir: name the folder of its images.", code="dataset.nothing-in-it"
            )
        values = above | table
        ending = values.get("caption_extension")
        interpolation = values.get("resize_interpolation")
        if interpolation is not None and interpolation not in INTERPOLATIONS:
            self._wrong(place, "resize_interpolation", interpolation, f"is not one of {', '.join(INTERPOLATIONS)}")
        masks, metadata = values.get("conditioning_data_dir"), values.get("metadata_file")
        captions_in = None if metadata else values.get("caption_dir")
        references = None if values.get("is_reg") else values.get("reference_dir")
        rules = {f.name: values[f.name] for f in fields(CaptionRules) if f.name in values}
        if not rules.get("caption_separator", ","):
            self._wrong(place, "caption_separator", "", "is empty")
        return Subset(
            image_dir=self._folder(place, "image_dir", values["image_dir"]),
            num_repeats=values.get("num_repeats", 1),
            class_tokens=values.get("class_tokens"),
            is_reg=values.get("is_reg", False),
            caption_endings=("." + ending.lstrip("."),) if ending else CAPTION_ENDINGS,
            flip_aug=values.get("flip_aug", False),
            alpha_mask=values.get("alpha_mask", False) and not masks,
            conditioning_data_dir=self._folder(place, "conditioning_data_dir", masks) if masks else None,
            resize_interpolation=interpolation,
            rules=CaptionRules(**rules),
            caption_dir=self._folder(place, "caption_dir", captions_in) if captions_in else None,
            metadata_file=self._folder(place, "metadata_file", metadata) if metadata else None,
            reference_dir=self._folder(place, "reference_dir", references) if references else None,
        )

    def _buckets(self, place: str, values: dict[str, Any]) -> Buckets:
        resolution = values.get("resolution", 512)
        width, height = resolution if isinstance(resolution, list | tuple) else (resolution, resolution)
        enable, step = values.get("enable_bucket", False), values.get("bucket_reso_steps", 64)
        if enable and step % 8:
            self._wrong(place, "bucket_reso_steps", step, "is not a multiple of 8, the pixels of a latent cell")
        if not enable and (width % 8 or height % 8):
            self._wrong(place, "resolution", resolution, "is not a multiple of 8 and there are no buckets")
        least = values.get("min_bucket_reso", min(256, width, height))
        most = values.get("max_bucket_reso", max(1024, width, height))
        least, most = max(least // step, 1) * step, -(-most // step) * step  # as sd-scripts rounds them
        if enable and min(width, height) < step:
            self._wrong(place, "bucket_reso_steps", step, "is larger than the resolution")
        if enable and not least <= min(width, height) <= max(width, height) <= most:
            self._wrong(place, "resolution", resolution, f"is outside min_bucket_reso {least} … max_bucket_reso {most}")
        no_upscale = values.get("bucket_no_upscale", False)
        return Buckets((width, height), enable, least, most, step, no_upscale)

    def _folder(self, place: str, key: str, value: str) -> Path:
        """An absolute path without '..', so that what is looked at later is what was judged here; a file's as well."""
        beside = Path(os.path.abspath(self.folder / value))
        if self.within is None:
            return Path(os.path.abspath(value)) if os.path.exists(value) else beside
        if not beside.is_relative_to(os.path.abspath(self.within)):
            raise DatasetError(
                f"{self.name}: {place}: {key}: {value!r} is outside the folder {self.within.name!r}, where its "
                "images have to be: move or link them there.",
                code="dataset.outside",
            )
        return beside

    def _level(self, place: str, level: str, table: Any) -> None:
        if isinstance(table, dict):
            table = {key: value for key, value in table.items() if not self._neutral(place, level, key, value)}
        self._table(place, table, LEVELS[level])

    def _neutral(self, place: str, level: str, key: str, value: Any) -> bool:
        """Whether a key is one of sd-scripts' that are refused here, at a value that changes nothing."""
        if key in NOT_HERE:
            raise DatasetError(f"{self.name}: {place}: {key} {NOT_HERE[key]}.", code="dataset.not-taken")
        if key not in REFUSED or level not in REFUSED[key][0]:
            return False
        _, neutral, why = REFUSED[key]
        if value not in neutral:
            raise DatasetError(
                f"{self.name}: {place}: {key} = {value!r} is not taken: {why}.", code="dataset.not-taken"
            )
        return True

    def _table(self, place: str, table: Any, known: Mapping[str, Key]) -> None:
        if not isinstance(table, dict):
            raise DatasetError(
                f"{self.name}: {place}: {table!r} is not a table: write {place}.", code="dataset.no-table"
            )
        for key, value in table.items():
            if key not in known:
                raise DatasetError(f"{self.name}: {place}: {key!r} {_unknown(key, known)}.", code="dataset.unknown-key")
            self._check(place, key, value, known[key])

    def _check(self, place: str, key: str, value: Any, rule: Key) -> None:
        pair = rule.kind is tuple and isinstance(value, list | tuple) and len(value) == 2
        for number in value if pair else (value,):
            kinds = {tuple: (int,), float: (float, int)}.get(rule.kind, (rule.kind,))
            if not isinstance(number, kinds) or (isinstance(number, bool) and rule.kind is not bool):
                self._wrong(place, key, value, f"must be {_kind(rule.kind)}")
            if rule.low is not None and not rule.low <= number <= (number if rule.high is None else rule.high):
                limits = f"at least {rule.low:g}" if rule.high is None else f"{rule.low:g} … {rule.high:g}"
                self._wrong(place, key, value, f"has to be {limits}")

    def _wrong(self, place: str, key: str, value: Any, why: str) -> None:
        raise DatasetError(f"{self.name}: {place}: {key} = {value!r} {why}: correct it.", code="dataset.wrong-value")


def _mixed(own: Mapping[str, Any], subsets: list[dict[str, Any]], key: str, others: tuple[str, ...]) -> str:
    """What is wrong with a key, which all subsets of a data set have or none, without ``others``; "" for nothing."""
    having = sum(key in subset for subset in subsets)
    if having and having < len(subsets):
        return f"{having} of {len(subsets)} subsets have it: move those without into another {DATASET}."
    found = [other for other in others if having and (other in own or any(other in subset for subset in subsets))]
    return f"{found[0]} does not go with it, in sd-scripts too: leave out one of them." if found else ""


def _kind(kind: type) -> str:
    names: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
    names |= {dict: "a table", list: "an array of tables"}
    return names.get(kind, "a whole number or [width, height]")


def _unknown(key: str, known: Mapping[str, Key]) -> str:
    for level, keys in LEVELS.items():
        if level != DEFAULTS and key in keys and key not in known:
            return f"belongs in {DATASET if level == GENERAL else level}: move it"
    if key in REFUSED:
        return "does not belong here: leave it out"
    near = difflib.get_close_matches(key, known, 1)
    return f"does not exist: {f'did you mean {near[0]!r}?' if near else f'known are {chr(44).join(sorted(known))}'}"
