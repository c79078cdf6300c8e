"""The classes of ComfyUI in front of which the pack's mixins stand, for the type checker alone.

At run time a mixin is put in front of the class that a model, CLIP or VAE has at that moment, ComfyUI's own or another
pack's (`patcher.guarded_class`), and has no base itself. A type checker without ComfyUI takes these for Any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE
else:
    ModelPatcher = CLIP = VAE = object

__all__ = ["CLIP", "VAE", "ModelPatcher"]
