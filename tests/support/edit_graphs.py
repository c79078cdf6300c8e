"""Graphs in which ComfyUI's own nodes edit images of guarded runs, and what a graph's form says of each image."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from support.graphs import guarded_graph, node, sampler

VAE, UPSCALER = ["ckpt", 2], ["upscaler", 0]
# node type -> (its inputs over links: name -> kind; its widgets; the kind it gives)
EDITS: dict[str, tuple[dict[str, str], dict, str]] = {
    "CropMask": ({"mask": "mask"}, {"x": 8, "y": 0, "width": 40, "height": 48}, "mask"),
    "FeatherMask": ({"mask": "mask"}, {"left": 9, "top": 3, "right": 0, "bottom": 5}, "mask"),
    "GrowMask": ({"mask": "mask"}, {"expand": 3, "tapered_corners": True}, "mask"),
    "ImageBatch": ({"image1": "image", "image2": "image"}, {}, "image"),
    "ImageBlur": ({"image": "image"}, {"blur_radius": 2, "sigma": 1.0}, "image"),
    "ImageCompositeMasked": (
        {"destination": "image", "source": "image", "mask": "mask"},
        {"x": 8, "y": 16, "resize_source": False},
        "image",
    ),
    "ImageCrop": ({"image": "image"}, {"width": 40, "height": 48, "x": 3, "y": 5}, "image"),
    "ImageFlip": ({"image": "image"}, {"flip_method": "y-axis: horizontally"}, "image"),
    "ImagePadForOutpaint": (
        {"image": "image"},
        {"left": 8, "top": 0, "right": 0, "bottom": 8, "feathering": 4},
        "image",
    ),
    "ImageRotate": ({"image": "image"}, {"rotation": "90 degrees"}, "image"),
    "ImageScale": (
        {"image": "image"},
        {"upscale_method": "lanczos", "width": 72, "height": 64, "crop": "disabled"},
        "image",
    ),
    "ImageScaleBy": ({"image": "image"}, {"upscale_method": "bicubic", "scale_by": 1.25}, "image"),
    "ImageScaleToMaxDimension": ({"image": "image"}, {"upscale_method": "area", "largest_size": 56}, "image"),
    "ImageScaleToTotalPixels": (
        {"image": "image"},
        {"upscale_method": "area", "megapixels": 0.01, "resolution_steps": 1},
        "image",
    ),
    "ImageSharpen": ({"image": "image"}, {"sharpen_radius": 1, "sigma": 1.0, "alpha": 0.5}, "image"),
    "ImageStitch": (
        {"image1": "image", "image2": "image"},
        {"direction": "right", "match_image_size": True, "spacing_width": 4, "spacing_color": "red"},
        "image",
    ),
    "ImageToMask": ({"image": "image"}, {"channel": "green"}, "mask"),
    "ImageUpscaleWithModel": ({"image": "image"}, {"upscale_model": UPSCALER}, "image"),
    "InvertMask": ({"mask": "mask"}, {}, "mask"),
    "LatentBatch": ({"samples1": "latent", "samples2": "latent"}, {}, "latent"),
    "LatentComposite": ({"samples_to": "latent", "samples_from": "latent"}, {"x": 16, "y": 8, "feather": 0}, "latent"),
    "LatentCompositeMasked": (
        {"destination": "latent", "source": "latent", "mask": "mask"},
        {"x": 8, "y": 16, "resize_source": False},
        "latent",
    ),
    "LatentConcat": ({"samples1": "latent", "samples2": "latent"}, {"dim": "x"}, "latent"),
    "LatentCrop": ({"samples": "latent"}, {"width": 64, "height": 64, "x": 8, "y": 0}, "latent"),
    "LatentCut": ({"samples": "latent"}, {"dim": "y", "index": 1, "amount": 5}, "latent"),
    "LatentUpscale": (
        {"samples": "latent"},
        {"upscale_method": "bislerp", "width": 96, "height": 80, "crop": "disabled"},
        "latent",
    ),
    "LatentUpscaleBy": ({"samples": "latent"}, {"upscale_method": "bilinear", "scale_by": 1.5}, "latent"),
    "MaskComposite": ({"destination": "mask", "source": "mask"}, {"x": 8, "y": 0, "operation": "subtract"}, "mask"),
    "MaskToImage": ({"mask": "mask"}, {}, "image"),
    "ResizeAndPadImage": (
        {"image": "image"},
        {"target_width": 80, "target_height": 56, "padding_color": "white", "interpolation": "area"},
        "image",
    ),
    "SolidMask": ({}, {"value": 0.5, "width": 64, "height": 64}, "mask"),
    "TrimVideoLatent": ({"samples": "latent"}, {"trim_amount": 1}, "latent"),
    "VAEEncode": ({"pixels": "image"}, {"vae": VAE}, "latent"),
    "VAEEncodeForInpaint": ({"pixels": "image", "mask": "mask"}, {"vae": VAE, "grow_mask_by": 2}, "latent"),
    "VAEEncodeTiled": (
        {"pixels": "image"},
        {"vae": VAE, "tile_size": 128, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8},
        "latent",
    ),
}  # fmt: skip
SHAKY = {"LoadBeside": {"image": "image"}, "ImageInvert": {"image": "image"}, "EditInPlace": {"image": "image"}}


def sources() -> dict:
    """Two images and latents of guarded runs, what no run made, an upscale model and a plain mask."""
    graph = guarded_graph(task=None)
    graph["latent"]["inputs"] |= {"width": 72, "height": 72}
    graph["sample2"] = sampler(["guard", 0], "ModularLoraKSampler", seed=2)
    graph["decode2"] = node("ModularLoraDecode", samples=["sample2", 0], vae=VAE)
    graph["upscaler"] = node("TinyUpscaler")
    graph["outside"] = node("Outside", seed=5, size=72)
    graph["plainmask"] = node("SolidMask", value=0.5, width=64, height=64)
    graph["imagemask"] = node("ImageToMask", image=["decode2", 0], channel="red")
    del graph["save"]
    return graph


GUARDED = {"image": (["decode", 0], ["decode2", 0]), "latent": (["sample", 0], ["sample2", 0])}
OUTSIDE = {"image": ["outside", 0], "latent": ["outside", 1], "mask": ["outside", 2]}
MASKS = (["plainmask", 0], ["imagemask", 0])


def edit(kind: str, links: dict[str, list]) -> dict:
    """A node that edits what comes over these links."""
    return node(kind, **EDITS[kind][1], **links)


def show(graph: dict, name: str, link: list) -> None:
    """Have an output made, whatever it is."""
    graph[name] = node("PreviewAny", source=link)


@dataclass
class Value:
    """An output of a random graph, and what the graph's form alone says of it.

    ``honest``: nothing is behind it but guarded runs and edits on the list; ``runs``: whether any run is; ``edits``:
    types of the edits behind it.
    """

    link: list
    honest: bool
    runs: bool
    edits: frozenset[str] = frozenset()


@dataclass
class Laundering:
    """A random graph that takes images through edits, and what its form says of each."""

    seed: int
    graph: dict = field(default_factory=sources)

    def __post_init__(self) -> None:
        """Images of its own: what is known of an edit of the same image stays known from one graph to the next."""
        for name in ("sample", "sample2"):
            self.graph[name]["inputs"]["seed"] += 2 * self.seed

    def values(self, steps: int = 7) -> Iterator[tuple[str, str, Value]]:
        """(node, kind, value) of every edit in it; the graph is complete once all are drawn."""
        draw = random.Random(self.seed)
        pool = {kind: [Value(link, True, True) for link in links] for kind, links in GUARDED.items()}
        pool["mask"] = [Value(MASKS[0], True, False), Value(MASKS[1], True, True, frozenset({"ImageToMask"}))]
        for kind, link in OUTSIDE.items():
            pool[kind].append(Value(link, False, False))
        for step in range(steps):
            name, kind = f"edit{step}", draw.choice([*EDITS, *SHAKY])
            takes, widgets, gives = EDITS.get(kind) or (SHAKY[kind], {}, "image")
            if kind in ("ImageBatch", "LatentBatch", "LatentConcat"):  # row by row, or of one size: tried by themselves
                continue
            if kind in ("LoadBeside", "EditInPlace"):
                widgets = {"file": draw.randrange(100)}
            given = {key: draw.choice(pool[of]) for key, of in takes.items()}
            if kind == "EditInPlace":  # what it writes over is nobody's any more
                self.graph[f"copy{step}"] = node(
                    "ImageScaleBy", image=given["image"].link, upscale_method="area", scale_by=0.9
                )
                given["image"] = Value([f"copy{step}", 0], False, False)
            self.graph[name] = node(kind, **widgets, **{key: value.link for key, value in given.items()})
            runs = any(value.runs for value in given.values())
            made = Value(
                [name, 0],  # an image of a plain mask is no run's: of these a mask alone is remembered
                kind in EDITS and all(value.honest for value in given.values()) and (runs or gives == "mask"),
                runs,
                frozenset().union(*(value.edits for value in given.values()), {kind}),
            )
            pool[gives].append(made)
            show(self.graph, f"show{step}", made.link)
            yield name, gives, made
