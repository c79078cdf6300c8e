"""Nodes of other packs that the tests need: passthroughs, loaders of what no run made, and one that skips layers."""

from __future__ import annotations

import torch


class AnyType(str):
    """A type name that matches every other, as any-type switches use it."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANY = AnyType("*")


class AnyPass:
    """Gives on whatever it gets."""

    RETURN_TYPES, FUNCTION, CATEGORY = (ANY,), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY,)}}

    def run(self, value):
        return (value,)


class SkipLayers:
    """Skips one transformer block by a block replacement, as skip-layer nodes do."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        model = model.clone()
        first = next(m for m in model.model.diffusion_model.modules() if type(m).__name__ == "SpatialTransformer")

        def skip(apply_model, args):
            kept = first.__dict__.get("forward")
            first.forward = lambda x, *a, **k: x
            try:
                return apply_model(args["input"], args["timestep"], **args["c"])
            finally:
                if kept is None:
                    del first.__dict__["forward"]
                else:
                    first.forward = kept

        model.set_model_unet_function_wrapper(skip)
        return (model,)


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Outside:
    """An image, a latent and a mask that no run made, as loaders give them."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE", "LATENT", "MASK"), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "size": ("INT", {"default": 64})}}

    def run(self, seed, size):
        small = size // 8
        return (
            _noise(seed, 1, size, size, 3),
            {"samples": _noise(seed, 1, 4, small, small)},
            _noise(seed, 1, size, size),
        )


class TinyUpscaler:
    """An upscale model of one layer, with what ComfyUI asks of spandrel's."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("UPSCALE_MODEL",), "run", "test"
    scale = 2

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        from comfy.model_patcher import ModelPatcher

        self.model = torch.nn.Upsample(scale_factor=self.scale, mode="bilinear")
        self.patcher = ModelPatcher(self.model, torch.device("cpu"), torch.device("cpu"))  # 0.33.0 asks for it
        return (self,)

    def to(self, device):
        return self

    def __call__(self, image):
        return self.model(image)


class LoadBeside:
    """Takes an image and gives another, which it loads by a widget."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "file": ("INT", {"default": 0})}}

    def run(self, image, file):
        return (_noise(file, *image.shape),)


class EditInPlace:
    """Writes into the very tensor that it was given, and gives it on."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "file": ("INT", {"default": 0})}}

    def run(self, image, file):
        image[:] = _noise(file, *image.shape)
        return (image,)


class WeighWords:
    """Encodes a prompt and weights what comes out in its own way, mixed with what another CLIP may give."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "test"
    hidden_clip = None  # a text encoder that the node has by itself

    @classmethod
    def INPUT_TYPES(cls):
        clip = ("CLIP",)
        return {"required": {"clip": clip, "text": ("STRING",)}, "optional": {"second": clip, "mix": ("CONDITIONING",)}}

    def run(self, clip, text, second=None, mix=None):
        words, empty = (self._encode(clip, one) for one in (text, ""))
        made = empty[0][0] + 1.3 * (words[0][0] - empty[0][0])
        if mix is not None:
            made = 0.5 * (made + mix[0][0])
        for other in filter(None, (second, self.hidden_clip)):
            made = made + self._encode(other, text)[0][0]
        return ([[made, {"pooled_output": words[0][1]["pooled_output"]}]],)

    def _encode(self, clip, text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


class MixPrompts:
    """Averages two conditionings."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"one": ("CONDITIONING",), "other": ("CONDITIONING",)}}

    def run(self, one, other):
        return ([[0.3 * one[0][0] + 0.7 * other[0][0], dict(one[0][1])]],)


NODE_CLASS_MAPPINGS = {
    kind.__name__: kind
    for kind in (AnyPass, SkipLayers, Outside, TinyUpscaler, LoadBeside, EditInPlace, WeighWords, MixPrompts)
}
