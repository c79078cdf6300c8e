"""The branches in ComfyUI's memory management: counted, made on loading and freed on unloading the model."""

from __future__ import annotations

import torch

from ..modular_lora.branches.attachment import Branches
from ..modular_lora.branches.fused import COMPUTE
from .bases import ModelPatcher


def compute_dtype(patcher) -> torch.dtype:
    """What a model's activations are in: the dtype that weights are cast to, else the weights' own, else float32.

    ``manual_cast_dtype`` (ModelComputeDtype patches it; text encoders have none).
    """
    cast = patcher.object_patches.get("manual_cast_dtype", getattr(patcher.model, "manual_cast_dtype", None))
    return next((dtype for dtype in (cast, patcher.model_dtype()) if dtype in COMPUTE), torch.float32)


class MemoryMixin(ModelPatcher):
    """In front of a ModelPatcher's class: ComfyUI makes room for the branches as it does for weights."""

    branches: Branches
    guard_cloning = False  # meanwhile nobody needs the size of the branches, which may not be made yet

    def model_size(self):
        """Bytes of weights and branches, loaded or not."""
        size = super().model_size()
        return size if self.guard_cloning else size + self.branches.size(compute_dtype(self))

    def loaded_size(self):
        """Bytes of weights and branches that are loaded."""
        return super().loaded_size() + self.branches.nbytes()

    def load(self, device_to=None, lowvram_model_memory=0, **kwargs):
        """Load into the memory that the branches leave, then make them: the next model's budget sees both.

        A full load notes ``model_size()`` as the weights', which here has the branches in it.
        """
        dtype, weights = compute_dtype(self), super().model_size()
        missing = max(0, self.branches.size(dtype) - self.branches.nbytes())
        room = lowvram_model_memory and lowvram_model_memory - missing  # 0 stands for all there is
        super().load(device_to, lowvram_model_memory=room, **kwargs)
        self.model.model_loaded_weight_memory = min(self.model.model_loaded_weight_memory, weights)
        self.branches.to(self.load_device, dtype)

    def detach(self, unpatch_all=True):
        """Give the branches' memory back when the model leaves the device; a swap keeps them."""
        if unpatch_all:
            self.branches.free()
        return super().detach(unpatch_all)
