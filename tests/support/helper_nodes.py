"""Nodes of other packs that the tests need: an any-type passthrough and one that skips layers."""

from __future__ import annotations


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


NODE_CLASS_MAPPINGS = {"AnyPass": AnyPass, "SkipLayers": SkipLayers}
