"""Nodes that sample parts of an image or latent and put them back, as packs that people use have them."""

from __future__ import annotations

from collections import namedtuple

import numpy as np

SEG = namedtuple("SEG", "cropped_image cropped_mask confidence crop_region bbox label control_net_wrapper")
CONDS = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
SAMPLES = {"model": ("MODEL",), "vae": ("VAE",), "seed": ("INT", {}), **CONDS}
HOOK = {"optional": {"hook": ("HOOK",)}}


class Middle:
    """A detector that finds the middle of an image."""

    def detect(self, image):
        mask = np.zeros((32, 32), np.float32)
        mask[2:-2, 2:-2] = 1
        crop = image[:, 16:48, 16:48].numpy()
        return tuple(image.shape[1:3]), [SEG(crop, mask, 1.0, (16, 16, 48, 48), None, "middle", None)]


class GiveDetector:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("BBOX_DETECTOR",), "run", "test"

    def run(self):
        return (Middle(),)


class Detect:
    """Segments of an image, for another node."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",), "detector": ("BBOX_DETECTOR",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("SEGS",), "run", "test"

    def run(self, image, detector):
        return (detector.detect(image),)


class DetailSegments:
    """Samples every segment, as DetailerForEach does."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",), "segs": ("SEGS",), **SAMPLES}, **HOOK})
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "test"

    def run(self, image, segs, hook=None, **given):
        for segment in segs[1]:
            image = pasted(image, segment.crop_region, segment.cropped_mask, **given)
        return (image if hook is None else hook(image),)


class Detail(DetailSegments):
    """Finds and samples, as FaceDetailer does."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"image": ("IMAGE",), "detector": ("BBOX_DETECTOR",), **SAMPLES}, **HOOK}
    )

    def run(self, image, detector, **given):
        return super().run(image, detector.detect(image), **given)


class Tiles:
    """Samples an image half by half, as Ultimate SD Upscale does; of 72 pixels."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",), **SAMPLES}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "test"

    def run(self, image, **given):
        for left in (0, 32):
            image = pasted(image, (left, 0, left + 40, 72), np.ones((72, 40), np.float32), **given)
        return (image,)


class TiledLatent:
    """Samples a latent half by half, as Tiled KSampler does; of 72 pixels."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"model": ("MODEL",), "latent": ("LATENT",), "seed": ("INT", {}), **CONDS}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "test"

    def run(self, model, latent, seed, positive, negative):
        import nodes  # ComfyUI's own

        samples = latent["samples"].clone()
        for part in (slice(0, 5), slice(5, 9)):
            tile = latent | {"samples": samples[..., part]}
            (made,) = nodes.common_ksampler(model, seed, 2, 2.0, "euler", "simple", positive, negative, tile)
            samples[..., part] = made["samples"]
        return (latent | {"samples": samples},)


class Upscaler:
    """What enlarges a latent for another node, as PixelKSampleUpscaler does; of 72 pixels."""

    def __init__(self, **given):
        self.given, self.hook = given, given.pop("hook", None)

    def enlarged(self, latent):
        import torch

        import nodes  # ComfyUI's own

        model, vae, seed, positive, negative = (self.given[name] for name in SAMPLES)
        pixels = vae.decode(latent["samples"]).movedim(-1, 1)
        pixels = torch.nn.functional.interpolate(pixels, size=(96, 96)).movedim(1, -1)
        larger = {"samples": vae.encode(pixels if self.hook is None else self.hook(pixels))}
        return nodes.common_ksampler(model, seed, 2, 2.0, "euler", "simple", positive, negative, larger, denoise=0.5)


class GiveUpscaler:
    INPUT_TYPES = classmethod(lambda cls: {"required": SAMPLES, **HOOK})
    RETURN_TYPES, FUNCTION, CATEGORY = ("UPSCALER",), "run", "test"

    def run(self, **given):
        return (Upscaler(**given),)


class Enlarge:
    """As IterativeLatentUpscale."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"latent": ("LATENT",), "upscaler": ("UPSCALER",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "test"

    def run(self, latent, upscaler):
        return upscaler.enlarged(latent)


class REGIONAL_PROMPT:  # Impact Pack's name
    """A mask of a region, and the sampler for it: a model and its prompts."""

    def __init__(self, mask, **sampler):
        self.mask, self.sampler = mask[0], sampler


class GiveRegion:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"mask": ("MASK",), "model": ("MODEL",), **CONDS}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("REGIONAL_PROMPTS",), "run", "test"

    def run(self, **given):
        return ([REGIONAL_PROMPT(**given)],)


class Regional:
    """Samples a latent whole, then once more in every region, as RegionalSampler does."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"latent": ("LATENT",), "regions": ("REGIONAL_PROMPTS",), "seed": ("INT", {})}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "test"

    def run(self, latent, regions, seed):
        import nodes  # ComfyUI's own

        for mask in (None, *(region.mask for region in regions)):
            part = latent if mask is None else latent | {"noise_mask": mask[None]}
            model, positive, negative = (regions[0].sampler[name] for name in ("model", "positive", "negative"))
            (made,) = nodes.common_ksampler(model, seed, 2, 2.0, "euler", "simple", positive, negative, part)
            latent = {"samples": made["samples"]}
        return (latent,)


class Cut:
    """A part of an image and what puts it back, as InpaintCropImproved makes them."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",), "mask": ("MASK",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("STITCHER", "IMAGE", "MASK"), "run", "test"

    def run(self, image, mask):
        part, outline = image[:, 8:40, 8:40], mask[:, 8:40, 8:40]
        return {"canvas_image": [image], "left": [8], "blend": [outline], "how": "bicubic"}, part, outline


class Stitch:
    """As InpaintStitchImproved."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"stitcher": ("STITCHER",), "part": ("IMAGE",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "test"

    def run(self, stitcher, part):
        (canvas,), (mask,) = stitcher["canvas_image"], stitcher["blend"]
        image = canvas.clone()
        image[:, 8:40, 8:40] += mask[..., None] * (part - image[:, 8:40, 8:40])
        return (image,)


def pasted(image, region, outline, model, vae, seed, positive, negative):
    """One part of an image sampled anew."""
    import torch

    import nodes  # ComfyUI's own

    left, top, right, bottom = region
    mask = torch.from_numpy(outline)
    latent = {"samples": vae.encode(image[:, top:bottom, left:right]), "noise_mask": mask[None]}
    (made,) = nodes.common_ksampler(model, seed, 2, 2.0, "euler", "simple", positive, negative, latent, denoise=0.5)
    image = image.clone()
    part = image[:, top:bottom, left:right]
    image[:, top:bottom, left:right] = part + mask[..., None] * (vae.decode(made["samples"]) - part)
    return image


SAMPLING = (Detail, DetailSegments, Tiles, TiledLatent, Enlarge, Regional, Cut, Stitch)
NODES = {kind.__name__: kind for kind in (GiveDetector, GiveRegion, GiveUpscaler, Detect, *SAMPLING)}
