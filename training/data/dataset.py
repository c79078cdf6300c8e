"""A look at every image and caption of a data set before training: one report, with counts and names."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...modular_lora.files import texts as textfiles
from ...modular_lora.files.images import ENDINGS, SIDE_FILES, Decoded, ImageError, decode, named
from . import captions, clips, images
from .captions import CaptionError
from .config import CAPTION_ENDINGS, Dataset, DatasetConfig, Subset
from .images import Fit, MaskShapeError, Size

WORDS = re.compile(r"\w+|[^\w\s]")
PROMPT_WORDS = 75  # tokens of one chunk of CLIP's
JSON = ".json"
KEPT = 0.6  # share of an image that its bucket should keep: of 16:9 a square keeps 0.56
KINDS = {  # finding -> what a report says of it
    "broken": "broken images and clips, LEFT OUT: mend or delete them",
    "too_small": "images smaller than a bucket step, LEFT OUT: use larger ones or leave out bucket_no_upscale",
    "empty_captions": "EMPTY caption files, trained without text: write captions, or delete them for class tokens",
    "unreadable_captions": "UNREADABLE caption files, class tokens instead: save them as UTF-8",
    "other_encodings": "captions in UTF-16 or UTF-32, read as such (sd-scripts reads UTF-8 alone)",
    "without_caption": "images without caption file, trained with the class tokens",
    "without_text": "images WITHOUT caption file and class tokens, trained without text: write captions",
    "odd_masks": "images whose mask has another shape, LEFT OUT: draw masks on the images as they are seen",
    "empty_masks": "images with nothing of their mask or alpha in the bucket, LEFT OUT, since they train nothing",
    "missing_masks": "images WITHOUT mask in conditioning_data_dir, trained whole: add the masks (sd-scripts stops)",
    "unused_masks": "masks without image",
    "missing_references": "images WITHOUT image in reference_dir, LEFT OUT: put one of the same name there",
    "broken_references": "images whose reference image cannot be used, LEFT OUT: mend it",
    "unused_references": "reference images without image",
    "transparent_masks": "masks with transparent parts, which count as black (sd-scripts does not see transparency)",
    "coloured_masks": "masks in colours, of which red alone counts, as in sd-scripts: draw them in grey",
    "without_alpha": "images without transparent parts, and clips, under alpha_mask, trained whole",
    "duplicates": "images that are there more than once: delete all but one, or use num_repeats",
    "shared_captions": "images of one name, which share a caption, mask or reference image: give each its own name",
    "cut_off": "images that lose much to their bucket: cut them yourself, or use enable_bucket or other limits",
    "upscaled": "images smaller than their bucket, scaled up: use larger ones, or bucket_no_upscale",
    "turned": "images and clips turned as their files say (sd-scripts takes images unturned)",
    "transparent": "images with transparent parts, put on white",
    "animated": "animated images, first frame taken",
    "unread_clips": "clips, NOT read: clip_frames says how many frames of each a model of video is trained on",
    "short_clips": "clips of fewer frames than clip_frames, LEFT OUT: use longer ones, or lower clip_frames",
    "further_lines": "captions of several lines, only the first is used: enable_wildcard draws among them",
    "long_captions": f"captions of more than about {PROMPT_WORDS} tokens",
    "captions_alone": "caption files without image",
    "other_captions": "caption files beside the images, NOT read: caption_dir or metadata_file has the captions",
    "not_in_metadata": "images that metadata_file does not name, LEFT OUT: add them to it (sd-scripts leaves them out)",
    "metadata_alone": "entries of metadata_file without image",
    "unsupported": "files that are no image for training: convert them to PNG, JPEG or WebP",
    "ignored_folders": "folders not looked into",
    "held_out": "images HELD OUT of training, for the validation loss",
    "unused_regularisation": "regularisation images beyond the number of training images, not used",
}


Bucket = tuple[int, int, int]  # width, height, frames


@dataclass(frozen=True)
class Reference:
    """The image that an edit model is given beside the caption."""

    path: Path
    sha256: str  # of the file
    fit: Fit  # in the bucket of its own shape


@dataclass(frozen=True)
class TrainingImage:
    """An image or clip that can be trained on."""

    path: Path
    name: str  # folder/file
    sha256: str  # of the file
    size: Size  # width height, EXIF orientation applied
    fit: Fit
    caption: str  # of the file, lines joined by newlines, or the class tokens; captions.draw makes a draw's text of it
    caption_ending: str  # of its file; '' where there is none
    draws: int  # an epoch
    mask_path: Path | None
    dataset: int
    subset: Subset
    pixels_sha256: str  # of what is seen, whatever the file's encoding; of a clip's file
    frames: tuple[int, ...] = ()  # of a clip, those that are taken
    reference: Reference | None = None

    @property
    def is_reg(self) -> bool:
        """Whether it is a regularisation image, its loss weighted by prior_loss_weight."""
        return self.subset.is_reg

    @property
    def bucket(self) -> Bucket:
        """What it shares batches with; a clip of one frame is an image."""
        return (*self.fit.bucket, max(1, len(self.frames)))


@dataclass(frozen=True)
class DatasetReport:
    """What a data set holds; ``problems`` stop a training, ``findings`` are said and counted."""

    source: str
    images: tuple[TrainingImage, ...]
    folders: tuple[tuple[str, int, int, bool], ...]  # name, images, num_repeats, regularisation
    findings: Mapping[str, tuple[str, ...]]  # kind, see KINDS -> names
    buckets: Mapping[Bucket, tuple[int, int]]  # images, draws an epoch
    draws: int  # images an epoch, repeats counted
    batches: int  # an epoch
    regularisation: int  # images
    distinct_captions: int
    dataset_sha256: str  # of files, captions, masks and settings; neither paths nor their order matter
    problems: tuple[str, ...]
    held_out: tuple[TrainingImage, ...] = ()  # not in ``images``


def scan(config: DatasetConfig, progress: Callable[[int, int], None] | None = None) -> DatasetReport:
    """Decodes every image of ``config``; ``progress`` gets (done, all) and may raise to stop."""
    found: dict[str, list[str]] = defaultdict(list)
    found["ignored_folders"] += config.ignored
    folders = [_folder(subset, found) for subset in _once(config, found)]
    _note_alone(folders, found)
    total, done, out = sum(len(folder.files) for folder in folders), 0, []
    for folder in folders:
        for path in folder.files:
            image = folder.image(path)
            out += [image] if image else []
            done += 1
            if progress:
                progress(done, total)
    training, held_out = _split(config, out)
    found["held_out"] += [image.name for image in held_out]
    return _report(config, _paired(training, found), held_out, folders, found)


def load(image: TrainingImage, flipped: bool = False, downscale: int = 8) -> tuple[Tensor, Tensor | None]:
    """Pixels (h w 3, float32 0..1) in the image's bucket, and the loss mask (h/downscale w/downscale, float32 0..1).

    Of a clip of more than one frame they are t h w 3, and its mask is that of every frame. The mask is the red channel
    of the subset's mask image (the field's form), 0 where that is transparent, or with ``alpha_mask`` the image's
    alpha; None: the whole image counts. ImageError where the file is another one than the report saw.
    """
    data = _as_seen(image.path, image.sha256)
    placed = partial(images.place, fit=image.fit, interpolation=image.subset.resize_interpolation)
    mask = None
    if image.frames:
        frames = clips.read(data, image.path.suffix, image.frames)
        pixels = torch.stack([images.pixels(placed(frame), flipped) for frame in frames])
        pixels = pixels if len(pixels) > 1 else pixels[0]
    else:
        decoded = decode(data)
        pixels = images.pixels(placed(decoded.image), flipped)
        mask = decoded.alpha if image.subset.alpha_mask else None
    if image.mask_path:
        mask = images.read_mask(image.mask_path, image.size).image
    weights = None if mask is None else images.mask(placed(mask), flipped, downscale)
    return pixels, weights


def load_reference(image: TrainingImage, flipped: bool = False) -> Tensor | None:
    """Pixels (h w 3, float32 0..1) of the image's reference, mirrored as the image is; None where it has none.

    ImageError as for `load`.
    """
    if image.reference is None:
        return None
    decoded = decode(_as_seen(image.reference.path, image.reference.sha256))
    placed = images.place(decoded.image, image.reference.fit, image.subset.resize_interpolation)
    return images.pixels(placed, flipped)


def _as_seen(path: Path, sha256: str) -> bytes:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError(f"{path}: has changed since the data set was read: start again.", code="image.changed")
    return data


def summary(report: DatasetReport) -> str:
    """The report in one line, which names nothing."""
    training, stops, found = len(report.images) - report.regularisation, len(report.problems), len(report.findings)
    verdict = f"{stops} problem{'s' * (stops != 1)} would stop a training" if stops else "nothing stops a training"
    more = f"; {found} kind{'s' * (found != 1)} of finding" if found else ""
    return f"{training} images{_clips(report)} to train on: {verdict}{more}."


def _clips(report: DatasetReport) -> str:
    """How many of the images to train on are clips."""
    count = sum(bool(image.frames) for image in report.images if not image.is_reg)
    return f" ({count} of them clips)" if count else ""


def findings(report: DatasetReport) -> list[str]:
    """What was found in the images and captions, a line for each kind with at most ten names."""
    return [f"{len(names)} {KINDS[kind]}: {named(names)}" for kind, names in report.findings.items()]


def format_contents(report: DatasetReport) -> str:
    """The report as plain text, without the hash."""
    lines = [f"Data set {Path(report.source).name}"]
    lines += [f"  STOPS TRAINING: {problem}" for problem in report.problems]
    training = len(report.images) - report.regularisation
    reg = f" and {report.regularisation} regularisation images" if report.regularisation else ""
    lines.append(f"  {training} images{_clips(report)}{reg}, {report.draws} draws in {report.batches} batches an epoch")
    for name, count, repeats, is_reg in report.folders:
        lines.append(f"  {name}: {count} images, {repeats} repeats{', regularisation' if is_reg else ''}")
    for (width, height, frames), (count, draws) in report.buckets.items():
        what = f"{count} clips of {frames} frames" if frames > 1 else f"{count} images"
        lines.append(f"  bucket {width}×{height}: {what}, {draws} draws")
    lines.append(f"  {report.distinct_captions} distinct captions")
    return "\n".join([*lines, *(f"  {line}" for line in findings(report))])


def format_report(report: DatasetReport) -> str:
    """The whole report as plain text."""
    return f"{format_contents(report)}\n  sha256 {report.dataset_sha256}"


@dataclass(frozen=True)
class _Folder:
    """A subset's folder as it lies on the disk."""

    index: int  # of the data set
    dataset: Dataset
    subset: Subset
    files: tuple[Path, ...]  # images, by ending
    captions: Mapping[str, Path]  # stem and ending, this in small letters -> file
    stems: Mapping[Path, str]  # caption file -> stem
    entries: Mapping[Path, Any] | None  # of metadata_file: image -> entry
    masks: Mapping[str, Path]  # stem -> mask
    references: Mapping[str, Path]  # stem -> reference image
    found: dict[str, list[str]]

    def image(self, path: Path) -> TrainingImage | None:
        """None for one that can't be trained on, which is then among the findings."""
        name = self.name(path)
        if self.entries is not None and path not in self.entries:
            self.found["not_in_metadata"].append(name)
            return None
        try:
            data = path.read_bytes()
            decoded, frames = self._decoded(path, data)
        except (OSError, ImageError) as error:
            self.found["broken"].append(f"{name}: {error}")
            return None
        if frames == ():
            self.found["short_clips"].append(f"{name}: {decoded.frames}")
            return None
        size = decoded.image.size
        try:
            fit = images.fit(size, self.dataset.buckets)
        except ImageError:
            self.found["too_small"].append(f"{name}: {size[0]}×{size[1]}")
            return None
        sha256 = hashlib.sha256(data).hexdigest()
        mask_path, trained = self._mask(path, name, decoded, fit)
        if not trained:
            return None
        reference = self._reference(path, name)
        if reference is None and self.subset.reference_dir is not None:
            return None
        self._note(name, decoded, fit, is_clip=frames is not None)
        return TrainingImage(
            path,
            name,
            sha256,
            size,
            fit,
            *self._caption(path, name),
            self.subset.num_repeats,
            mask_path,
            self.index,
            self.subset,
            sha256 if frames else _pixels_sha256(decoded),
            frames or (),
            reference,
        )

    def _decoded(self, path: Path, data: bytes) -> tuple[Decoded, tuple[int, ...] | None]:
        """The image, or the first frame of a clip, and the frames that are taken of it; None of an image."""
        wanted, ending = self.dataset.clip_frames, path.suffix.lower()
        if ending in ENDINGS:
            decoded = decode(data)
            if not (wanted and ending in clips.ANIMATED and decoded.frames > 1):
                return decoded, None
        decoded, frames = clips.look(data, ending, wanted, self.dataset.clip_extraction)
        return (replace(decoded, alpha=None) if self.subset.alpha_mask else decoded), frames

    def name(self, path: Path) -> str:
        return f"{path.parent.name}/{path.name}"

    def _note(self, name: str, decoded: Decoded, fit: Fit, is_clip: bool) -> None:
        size = decoded.image.size
        if fit.kept < KEPT:
            self.found["cut_off"].append(f"{name}: {1 - fit.kept:.0%} of {size[0]}×{size[1]} is cut off")
        if fit.resized[0] > size[0] or fit.resized[1] > size[1]:
            self.found["upscaled"].append(f"{name}: {size[0]}×{size[1]} to {fit.resized[0]}×{fit.resized[1]}")
        animated = decoded.frames > 1 and not is_clip
        for kind, is_so in (("turned", decoded.turned), ("animated", animated)):
            if is_so:
                self.found[kind].append(name)
        if decoded.alpha is not None and not self.subset.alpha_mask:
            self.found["transparent"].append(name)
        if decoded.alpha is None and self.subset.alpha_mask:
            self.found["without_alpha"].append(name)

    def _mask(self, path: Path, name: str, decoded: Decoded, fit: Fit) -> tuple[Path | None, bool]:
        """The mask file, and whether the image is trained on."""
        file, image = None, decoded.alpha if self.subset.alpha_mask else None
        if self.subset.conditioning_data_dir is not None:
            file = self.masks.get(path.stem)
            if file is None:
                self.found["missing_masks"].append(name)
                return None, True
            try:
                mask = images.read_mask(file, decoded.image.size)
            except MaskShapeError as error:
                self.found["odd_masks"].append(f"{name}: its mask {file.name}, {error}")
                return None, False
            except (OSError, ImageError) as error:
                self.found["missing_masks"].append(f"{name}: its mask {file.name} can't be read, {error}")
                return None, True
            for kind, is_so in (("transparent_masks", mask.has_alpha), ("coloured_masks", mask.coloured)):
                if is_so:
                    self.found[kind].append(file.name)
            image = mask.image
        if image is not None and not images.place(image, fit, self.subset.resize_interpolation).getbbox():
            self.found["empty_masks"].append(name)
            return None, False
        return file, True

    def _reference(self, path: Path, name: str) -> Reference | None:
        """None where the subset has none, and where it cannot be used, which is then among the findings."""
        if self.subset.reference_dir is None:
            return None
        file = self.references.get(path.stem)
        if file is None:
            self.found["missing_references"].append(name)
            return None
        try:
            data = file.read_bytes()
            return Reference(
                file, hashlib.sha256(data).hexdigest(), images.fit(decode(data).image.size, self.dataset.buckets)
            )
        except (OSError, ImageError) as error:
            self.found["broken_references"].append(f"{name}: {file.name}, {error}")
            return None

    def _caption(self, path: Path, name: str) -> tuple[str, str]:
        """What the file says, and its ending; the class tokens where there is none."""
        if self.entries is not None:
            return self._noted(captions.of_record(self.entries[path], self.subset.rules, name), name), ""
        found = (self.captions.get(path.stem + ending.lower()) for ending in self.subset.caption_endings)
        file = next(filter(None, found), None)
        if file is not None:
            try:
                if file.suffix.lower() == JSON:
                    text = captions.read_json(file, self.subset.rules)
                else:
                    text = captions.read(file)
                if not textfiles.encoding_of(file.read_bytes()).startswith("utf-8"):
                    self.found["other_encodings"].append(name)
                return self._noted(text, name), file.name[len(path.stem) :]
            except (OSError, CaptionError) as error:
                self.found["unreadable_captions"].append(f"{name}: {error}")
        else:
            others = [self.captions[path.stem + e].name for e in CAPTION_ENDINGS if path.stem + e in self.captions]
            others += [f.name for f in (self.subset.captions_in / f"{path.stem}{JSON}",) if f.is_file()]
            wanted = self.subset.caption_endings[0]
            hint = f" (there is {others[0]}, caption_extension is {wanted})" if others else ""
            kind = "without_caption" if self.subset.class_tokens else "without_text"
            self.found[kind].append(name + hint)
        return self.subset.class_tokens or "", ""

    def _noted(self, caption: str, name: str) -> str:
        lines = caption.splitlines()
        if not lines:
            self.found["empty_captions"].append(name)
        if len(lines) > 1 and not self.subset.rules.enable_wildcard:
            self.found["further_lines"].append(name)
        if any(len(WORDS.findall(line)) > PROMPT_WORDS for line in lines):
            self.found["long_captions"].append(name)
        return caption


def _once(config: DatasetConfig, found: dict[str, list[str]]) -> list[tuple[int, Dataset, Subset]]:
    """Every subset, but a folder once in a data set, as in sd-scripts."""
    out, seen = [], set()
    for index, dataset in enumerate(config.datasets):
        for subset in dataset.subsets:
            key = (index, subset.image_dir)
            if key in seen:
                found["ignored_folders"].append(f"{subset.image_dir.name}: given twice in a data set, the first counts")
            else:
                out.append((index, dataset, subset))
            seen.add(key)
    return out


def _folder(where: tuple[int, Dataset, Subset], found: dict[str, list[str]]) -> _Folder:
    index, dataset, subset = where
    entries = sorted(subset.image_dir.iterdir(), key=lambda entry: entry.name)
    entries = [entry for entry in entries if not SIDE_FILES.fullmatch(entry.name)]
    endings = {*ENDINGS, *clips.VIDEOS, *clips.ANIMATED} if dataset.clip_frames else set(ENDINGS)
    files = tuple(entry for entry in entries if entry.suffix.lower() in endings and entry.is_file())
    stems, beside = {file.stem for file in files}, _captions(entries, subset)
    elsewhere = subset.caption_dir is not None or subset.metadata_file is not None
    for entry in sorted(set(entries) - set(files)):
        name = f"{entry.parent.name}/{entry.name}"
        if entry.is_dir():
            if entry not in (subset.conditioning_data_dir, subset.caption_dir, subset.reference_dir):
                found["ignored_folders"].append(f"{name}: inside a folder of images")
        elif entry not in beside:
            if entry != subset.metadata_file:
                found["unread_clips" if entry.suffix.lower() in clips.VIDEOS else "unsupported"].append(name)
        elif elsewhere:
            found["other_captions"].append(name)
    texts = {} if subset.metadata_file else beside
    if subset.caption_dir is not None:
        texts = _captions(sorted(subset.captions_in.iterdir(), key=lambda entry: entry.name), subset)
    masks = _partners(subset.conditioning_data_dir, stems, found["unused_masks"])
    references = _partners(subset.references_in, stems, found["unused_references"])
    by_name = {stem + entry.name[len(stem) :].lower(): entry for entry, stem in texts.items()}
    found["shared_captions"] += _shared(files, {*texts.values(), *masks, *references})
    return _Folder(
        index, dataset, subset, files, by_name, texts, _entries(subset, files, found), masks, references, found
    )


def _entries(subset: Subset, files: Sequence[Path], found: dict[str, list[str]]) -> dict[Path, Any] | None:
    """Image -> its entry in metadata_file, which names it by its path or without its ending; None without that file.

    CaptionError where the file, or the entry of an image, cannot be read.
    """
    if subset.metadata_file is None:
        return None
    by_key = {str(file): file for file in files} | {str(file.with_suffix("")): file for file in files}
    out = {}
    for key, record in captions.metadata(subset.metadata_file).items():
        file = by_key.get(os.path.abspath(subset.image_dir / key))
        if file is None:
            found["metadata_alone"].append(key)
        else:
            out[file] = record
    return out


def _note_alone(folders: Sequence[_Folder], found: dict[str, list[str]]) -> None:
    """Caption files of no image, in folders that several subsets may share."""
    stems: dict[Path, set[str]] = defaultdict(set)
    files: dict[Path, dict[Path, str]] = defaultdict(dict)
    for folder in folders:
        place = folder.subset.captions_in
        stems[place] |= {file.stem for file in folder.files}
        files[place] |= folder.stems
    for place, captioned in files.items():
        alone = sorted(file for file, stem in captioned.items() if stem not in stems[place])
        found["captions_alone"] += [f"{file.parent.name}/{file.name}" for file in alone]


def _split(config: DatasetConfig, out: list[TrainingImage]) -> tuple[list[TrainingImage], list[TrainingImage]]:
    """Images to train on, and those held out of every folder but regularisation: sd-scripts' draw, rounded down."""
    held: set[int] = set()
    folders: dict[tuple[int, Path], list[int]] = defaultdict(list)
    for i, image in enumerate(out):
        if not image.is_reg:
            folders[image.dataset, image.subset.image_dir].append(i)
    for (dataset, _), rows in folders.items():
        if share := config.datasets[dataset].validation_split:
            random.Random(config.datasets[dataset].validation_seed).shuffle(rows)
            held.update(rows[math.ceil(len(rows) * (1 - share)) :])
    return [p for i, p in enumerate(out) if i not in held], [out[i] for i in sorted(held)]


def _shared(files: Sequence[Path], stems: Container[str]) -> list[str]:
    """Images of one stem and different endings, where a caption or mask of that stem is there."""
    same: dict[str, list[str]] = defaultdict(list)
    for file in files:
        same[file.stem].append(f"{file.parent.name}/{file.name}")
    return [" = ".join(names) for stem, names in same.items() if len(names) > 1 and stem in stems]


def _captions(entries: list[Path], subset: Subset) -> dict[Path, str]:
    """Caption files -> stem, by any ending that may be meant; '.wd14.txt' goes before '.txt'."""
    endings = sorted({ending.lower() for ending in (*subset.caption_endings, *CAPTION_ENDINGS)}, key=len)
    out: dict[Path, str] = {}
    for ending in endings:
        out |= {e: e.name[: -len(ending)] for e in entries if e.name.lower().endswith(ending) and e.is_file()}
    return out


def _partners(folder: Path | None, stems: set[str], unused: list[str]) -> dict[str, Path]:
    """Stem -> image of a folder that has one for each image, as masks; those of no image go to ``unused``."""
    if folder is None:
        return {}
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name, reverse=True)
    partners = {entry.stem: entry for entry in entries if entry.suffix.lower() in ENDINGS}  # the first by name counts
    unused += [partner.name for stem, partner in partners.items() if stem not in stems]
    return partners


def _paired(trained: list[TrainingImage], found: dict[str, list[str]]) -> list[TrainingImage]:
    """Regularisation images drawn as often as the training images of their data set, as in sd-scripts."""
    out = list(trained)
    for dataset in {image.dataset for image in out}:
        rows = [i for i, image in enumerate(out) if image.dataset == dataset and image.is_reg]
        wanted = sum(p.draws for p in out if p.dataset == dataset and not p.is_reg)
        draws = regularisation_draws(wanted, [out[i].draws for i in rows])
        for i, count in zip(rows, draws, strict=True):
            out[i] = replace(out[i], draws=count)
            if not count:
                found["unused_regularisation"].append(out[i].name)
    return [image for image in out if image.draws]


def regularisation_draws(wanted: int, repeats: Sequence[int]) -> list[int]:
    """Draws an epoch of regularisation images with these num_repeats, to pair with ``wanted`` training draws.

    In order, each gets its repeats until there are enough; if there never are, all get one more in turn.
    """
    draws, total = [0] * len(repeats), 0
    for i, count in enumerate(repeats):
        if total < wanted:
            draws[i], total = count, total + count
    if repeats and total < wanted:
        each, rest = divmod(wanted - total, len(repeats))
        draws = [count + each + (i < rest) for i, count in enumerate(draws)]
    return draws


def _report(
    config: DatasetConfig,
    out: list[TrainingImage],
    held_out: list[TrainingImage],
    folders: list[_Folder],
    found: dict[str, list[str]],
) -> DatasetReport:
    found["duplicates"] += _duplicates([*out, *held_out])
    counted = Counter((image.dataset, image.subset.image_dir) for image in out)
    buckets: dict[Bucket, list[int]] = defaultdict(lambda: [0, 0])
    for image in out:
        buckets[image.bucket][0] += 1
        buckets[image.bucket][1] += image.draws
    problems = []
    if not any(not image.is_reg for image in out):
        seen = sum(len(folder.files) for folder in folders)
        problems.append(f"{config.source}: none of {seen} images can be trained on: see below, or correct the folder.")
    if out and not held_out and any(data.validation_split for data in config.datasets):
        problems.append(
            f"{config.source}: validation_split holds none of {len(out)} images out, as it is taken of each folder: "
            "raise it, or leave it out."
        )
    rows = [(counted[folder.index, folder.subset.image_dir], folder.subset) for folder in folders]
    return DatasetReport(
        source=config.source,
        images=tuple(out),
        folders=tuple((s.image_dir.name, count, s.num_repeats, s.is_reg) for count, s in rows),
        findings={kind: tuple(found[kind]) for kind in KINDS if found[kind]},
        buckets={size: (count, draws) for size, (count, draws) in sorted(buckets.items())},
        draws=sum(image.draws for image in out),
        batches=sum(-(-len(rows) // size) for size, rows in grouped(config, out)),
        regularisation=sum(image.is_reg for image in out),
        distinct_captions=len({image.caption for image in out}),
        dataset_sha256=_digest(config, out, held_out),
        problems=tuple(problems),
        held_out=tuple(held_out),
    )


def grouped(config: DatasetConfig, found: Sequence[TrainingImage]) -> list[tuple[int, list[int]]]:
    """(batch size, indices of images, each as often as it is drawn) of every bucket of every data set, in order."""
    rows: dict[tuple[int, Bucket], list[int]] = defaultdict(list)
    for index, image in enumerate(found):
        rows[image.dataset, image.bucket] += [index] * image.draws
    return [(config.datasets[key[0]].batch_size, rows[key]) for key in sorted(rows)]


def _duplicates(out: list[TrainingImage]) -> list[str]:
    same: dict[str, list[str]] = defaultdict(list)
    for image in out:
        same[image.pixels_sha256].append(image.name)
    return [" = ".join(names) for names in same.values() if len(names) > 1]


def _pixels_sha256(decoded: Decoded) -> str:
    image, alpha = decoded.image, decoded.alpha
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes() + (alpha.tobytes() if alpha else b"")).hexdigest()


def _digest(config: DatasetConfig, out: list[TrainingImage], held_out: list[TrainingImage]) -> str:
    rows: list[tuple] = [("held out", image.sha256, *_of_clip(image)) for image in held_out]
    for image in out:
        subset, dataset = image.subset, config.datasets[image.dataset]
        mask = hashlib.sha256(image.mask_path.read_bytes()).hexdigest() if image.mask_path else ""
        drawing = (subset.flip_aug, subset.alpha_mask, subset.is_reg, subset.resize_interpolation, asdict(subset.rules))
        row = image.sha256, mask, image.caption, image.draws, drawing, asdict(dataset.buckets), dataset.batch_size
        rows.append((*row, *_of_clip(image), *_of_reference(image)))
    lines = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _of_reference(image: TrainingImage) -> list[str]:
    """What the digest has of an image with a reference more than of another."""
    return ["reference", image.reference.sha256] if image.reference else []


def _of_clip(image: TrainingImage) -> list[tuple[int, ...]]:
    """What the digest has of a clip more than of an image."""
    return [image.frames] if image.frames else []
