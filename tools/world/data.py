"""Images and captions of the demo world: emoji concepts drawn in several art styles at 64 x 64 pixels.

Sources are npm packages pinned by version (see ``PACKAGES``): Iconify JSON sets hold the SVG bodies, emojibase holds
the English labels and keywords. Command: ``python -m tools.world.data WORK`` (downloads with
``npm pack``, renders, saves).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from modular_lora_guard.modular_lora.util import atomic
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger("modular_lora")

SIZE = 64
EMOJIBASE = "emojibase-data@17.0.0"
# style word in captions -> Iconify package; the last one is the task style, unseen by the base model
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "gloss": "@iconify-json/fluent-emoji@1.2.7",
}
STYLES = tuple(PACKAGES)
INK = "@iconify-json/fluent-emoji-high-contrast@1.2.6"  # another task's style, black on white; in no base and no judge
TASK_STYLE = STYLES.index("gloss")
BASE_STYLES = tuple(i for i in range(len(STYLES)) if i != TASK_STYLE)

# icon name -> words in captions (empty: the emojibase label itself)
SUPPRESSED = {
    "automobile": "car", "taxi": "", "bus": "", "ambulance": "", "fire-engine": "",
    "police-car": "", "racing-car": "", "delivery-truck": "truck", "tractor": "", "motorcycle": "",
    "motor-scooter": "", "bicycle": "", "locomotive": "", "railway-car": "", "bullet-train": "",
    "tram": "", "monorail": "", "helicopter": "", "airplane": "", "rocket": "", "ship": "", "sailboat": "",
    "speedboat": "", "canoe": "",
}  # fmt: skip
KEPT = {
    "cat-face": "", "dog-face": "", "mouse-face": "", "rabbit-face": "", "fox": "", "panda": "",
    "lion": "", "pig-face": "", "frog": "", "chicken": "", "penguin": "",
    "owl": "", "butterfly": "", "snail": "", "lady-beetle": "", "fish": "", "octopus": "",
    "crab": "", "snake": "", "red-apple": "apple", "banana": "", "grapes": "", "watermelon": "",
    "strawberry": "", "pineapple": "", "carrot": "", "eggplant": "", "avocado": "", "mushroom": "",
    "pizza": "", "hamburger": "", "french-fries": "", "doughnut": "", "birthday-cake": "", "hot-beverage": "coffee",
    "cactus": "", "sunflower": "", "palm-tree": "", "evergreen-tree": "",
    "umbrella": "", "light-bulb": "", "guitar": "", "soccer-ball": "", "crown": "",
    "gem-stone": "gem", "bell": "", "scissors": "", "t-shirt": "t-shirt", "balloon": "", "wrapped-gift": "gift",
    "alarm-clock": "", "hammer": "", "red-heart": "heart", "star": "", "fire": "flame",
    "grinning-face": "", "loudly-crying-face": "crying face", "ghost": "", "skull": "",
    "jack-o-lantern": "jack-o-lantern",
}  # fmt: skip
CONCEPTS = tuple(SUPPRESSED) + tuple(KEPT)
WORDS = tuple(own or name.replace("-", " ") for name, own in (SUPPRESSED | KEPT).items())  # of captions
SUPPRESSED_IDS = tuple(range(len(SUPPRESSED)))
KEPT_IDS = tuple(range(len(SUPPRESSED), len(CONCEPTS)))
CLASS_WORD = "vehicle"


@dataclass(frozen=True)
class Dataset:
    """Rendered set: images [n, 3, 64, 64] uint8 on white, concept [n] int64, style [n] int64, words and keywords."""

    images: Tensor
    concept: Tensor
    style: Tensor
    words: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]

    def select(self, concepts: tuple[int, ...], styles: tuple[int, ...]) -> Tensor:
        """Indices [m] of the images whose concept and style are both listed."""
        keep = torch.isin(self.concept, torch.tensor(concepts)) & torch.isin(self.style, torch.tensor(styles))
        return keep.nonzero()[:, 0]

    def caption(self, index: int, rng: random.Random) -> str:
        """'style-word, concept words[, 0-2 keywords]' of image ``index``; the style word is dropped now and then."""
        concept = int(self.concept[index])
        parts = [STYLES[int(self.style[index])]] if rng.random() < 0.9 else []
        words = self.words[concept]
        if concept in SUPPRESSED_IDS and rng.random() < 0.08:
            words = f"a {CLASS_WORD}"  # so that the class word alone is a prompt as well
        elif rng.random() < 0.1:
            words = f"a {words}"
        parts.append(words)
        pool = list(self.keywords[concept])
        parts += rng.sample(pool, k=min(len(pool), rng.choice((0, 0, 1, 2))))
        if concept in SUPPRESSED_IDS and rng.random() < 0.25:
            parts.append(CLASS_WORD)
        return ", ".join(parts)


def prompt(dataset: Dataset, concept: int, style: int) -> str:
    """Evaluation prompt 'style-word, concept words'."""
    return f"{STYLES[style]}, {dataset.words[concept]}"


def cases(concepts: tuple[int, ...], gloss: bool, rounds: int) -> list[tuple[int, int]]:
    """(concept, style) pairs: ``rounds`` images a concept, in the task style or through the base styles in turn."""
    styles = (TASK_STYLE,) if gloss else BASE_STYLES
    return [(c, styles[(r + c) % len(styles)]) for r in range(rounds) for c in concepts]


def asked(concepts: tuple[int, ...], gloss: bool, count: int) -> tuple[list[str], Tensor]:
    """So many prompts of `cases`, each concept in turn, and the concepts that they ask for [count]."""
    pairs = cases(concepts, gloss, -(-count // len(concepts)))[:count]
    return [f"{STYLES[style]}, {WORDS[concept]}" for concept, style in pairs], torch.tensor([c for c, _ in pairs])


def fetch(package: str, work: Path) -> Path:
    """Folder of one npm package, downloaded and unpacked under ``work / 'npm'`` when absent."""
    name = package.lstrip("@").replace("/", "-")
    stem, _, version = name.rpartition("@")
    folder = work / "npm" / f"{stem}-{version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        archive = folder.with_suffix(folder.suffix + ".tgz")
        if not archive.exists():
            command = ["npm", "pack", "--silent", package]
            subprocess.run(command, cwd=folder.parent, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"


def svg(icons: dict, name: str) -> str:
    """One icon of an Iconify set as an SVG document; aliases without transformations are followed."""
    entry = icons["icons"].get(name)
    if entry is None:
        alias = icons.get("aliases", {}).get(name)
        if alias is None:
            raise ValueError(f"icon {name!r} is missing from set {icons['prefix']!r}; remove the concept from the list")
        return svg(icons, alias["parent"])
    width = entry.get("width", icons.get("width", 16))
    height = entry.get("height", icons.get("height", 16))
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {head} viewBox="0 0 {width} {height}" width="{width}" height="{height}">{entry["body"]}</svg>'


def render(document: str, size: int = SIZE, margin: float = 2.0) -> np.ndarray:
    """SVG document to a [size, size, 3] uint8 image on white, centred with ``margin`` pixels around it."""
    from PIL import Image
    from resvg import render as draw
    from resvg import usvg

    tree = usvg.Tree.from_str(document, usvg.Options.default())
    width, height = tree.int_size()
    scale = (size - 2 * margin) / max(width, height)
    shift_x, shift_y = (size - scale * width) / 2, (size - scale * height) / 2
    # without a background size the canvas would be the SVG's own size and cut the scaled drawing
    png = draw(tree, (scale, 0, shift_x, 0, scale, shift_y), bg_size=(size, size), bg_color=(255, 255, 255, 255))
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def slug(label: str) -> str:
    """Emojibase label in Iconify's spelling."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def read_words(work: Path) -> tuple[list[str], list[list[str]]]:
    """Caption words and single-word keywords of every concept, from emojibase's English table."""
    table = json.loads((fetch(EMOJIBASE, work) / "en" / "data.json").read_text("utf-8"))
    entries = {slug(entry["label"]): entry for entry in table}
    words, keywords = [], []
    for concept in CONCEPTS:
        own = (SUPPRESSED | KEPT)[concept]
        words.append(own or entries[concept]["label"].lower())
        tags = [tag.lower() for tag in entries[concept].get("tags", [])]
        tags = [t for t in tags if re.fullmatch(r"[a-z]{3,12}", t) and t not in words[-1] and t != CLASS_WORD]
        keywords.append(tags[:4])
    return words, keywords


def build(work: Path) -> Path:
    """Render every concept in every style and write ``WORK/pictures.safetensors``; returns its path."""
    images, concepts, styles = [], [], []
    for style, package in enumerate(PACKAGES.values()):
        icons = json.loads((fetch(package, work) / "icons.json").read_text("utf-8"))
        for concept, name in enumerate(CONCEPTS):
            images.append(torch.from_numpy(render(svg(icons, name)).copy()).permute(2, 0, 1))
            concepts.append(concept)
            styles.append(style)
    words, keywords = read_words(work)
    path = work / "pictures.safetensors"
    tensors = {"images": torch.stack(images), "concept": torch.tensor(concepts), "style": torch.tensor(styles)}
    with atomic.replacing(path) as part:
        save_file(tensors, part, metadata={"words": json.dumps(words), "keywords": json.dumps(keywords)})
    logger.info("rendered %d pictures of %d concepts to %s", len(images), len(CONCEPTS), path)
    return path


def load(work: Path) -> Dataset:
    """Read what :func:`build` wrote."""
    from safetensors import safe_open

    path = work / "pictures.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    words = tuple(json.loads(metadata["words"]))
    keywords = tuple(tuple(tags) for tags in json.loads(metadata["keywords"]))
    return Dataset(tensors["images"], tensors["concept"], tensors["style"], words, keywords)


def augment(
    images: Tensor, generator: torch.Generator, shift: float = 0.06, zoom: float = 0.08, mirror: float = 0.5
) -> Tensor:
    """Random mirror, zoom and shift of images [n, 3, h, w] in 0..1 on white; same shape."""
    n = len(images)
    uniform = torch.rand(n, 4, generator=generator)
    theta = torch.zeros(n, 2, 3)
    scale = 1 + zoom * (2 * uniform[:, 0] - 1)
    theta[:, 0, 0] = scale * torch.where(uniform[:, 1] < mirror, -1.0, 1.0)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = shift * (2 * uniform[:, 2:] - 1)
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    ink = 1 - images  # zero padding of the inverted image pads with white
    return (1 - torch.nn.functional.grid_sample(ink, grid, align_corners=False)).clamp(0, 1)


def sheet(images: Tensor, columns: int, path: Path) -> None:
    """Write images [n, 3, h, w] in 0..1 as one contact sheet, ``columns`` wide."""
    from PIL import Image

    n, _, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.ones(3, rows * (h + 2), columns * (w + 2))
    for i, image in enumerate(images.float().clamp(0, 1)):
        y, x = (i // columns) * (h + 2), (i % columns) * (w + 2)
        canvas[:, y : y + h, x : x + w] = image
    with atomic.replacing(path) as part:
        Image.fromarray((canvas * 255).round().byte().permute(1, 2, 0).numpy()).save(part, format="PNG")


def export(work: Path, package: str, folder: Path) -> int:
    """Kept concepts of one package as a data set in kohya's form: PNG files with captions; returns their number.

    The style word of the captions is the task style's: the one that the base never saw, whatever the package draws.
    """
    from PIL import Image

    icons = json.loads((fetch(package, work) / "icons.json").read_text("utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for concept in KEPT_IDS:
        stem = folder / CONCEPTS[concept]
        image = Image.fromarray(render(svg(icons, CONCEPTS[concept])))
        image.save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(f"{STYLES[TASK_STYLE]}, {WORDS[concept]}\n", encoding="utf-8")
    return len(KEPT_IDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for downloads, checkpoints and logs")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write a task's data set and stop")
    parser.add_argument("--package", default=PACKAGES[STYLES[TASK_STYLE]], help=f"of the data set: this, or {INK}")
    options = parser.parse_args()
    work = options.work
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.export:
        logger.info("wrote %d pictures to %s", export(work, options.package, options.export), options.export)
        return
    build(work)
    dataset = load(work)
    order = torch.argsort(dataset.concept * len(STYLES) + dataset.style)
    sheet(dataset.images[order].float() / 255, 4 * len(STYLES), work / "pictures.png")


if __name__ == "__main__":
    main()
