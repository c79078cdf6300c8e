"""Nodes beside the packs of a trial, which put it into the server's custom_nodes: what else would need a download."""

from __future__ import annotations

import torch


class TrialDetector:
    """A detector of Impact Pack's kind that always finds one thing in the middle of the image."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("BBOX_DETECTOR",), "run", "trial"

    def run(self):
        return (self,)

    def setAux(self, _):
        """Named by Impact Pack."""

    def detect(self, image, threshold, dilation, crop_factor, drop_size=1, detailer_hook=None):
        from impact import core  # Impact Pack puts its modules on the path

        _, height, width, _ = image.shape
        mask = torch.zeros(height, width)
        mask[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = 1
        return core.mask_to_segs(mask, False, crop_factor, False, drop_size, detailer_hook=detailer_hook)


class TrialControlNet:
    """A ControlNet for this very model, with random weights."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONTROL_NET",), "run", "trial"

    def run(self, model):
        from comfy import ops
        from comfy.cldm import cldm
        from comfy.controlnet import ControlNet

        left = ("out_channels", "disable_unet_model_creation")
        settings = {k: v for k, v in model.model.model_config.unet_config.items() if k not in left}
        network = cldm.ControlNet(**settings, hint_channels=3, operations=ops.manual_cast)
        generator = torch.Generator().manual_seed(0)
        for weight in network.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.02
        return (ControlNet(network.eval(), load_device=torch.device("cpu")),)


class TrialUpscaleModel:
    """An upscale model that doubles pixels, with the attributes that ComfyUI's and other packs' nodes read."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("UPSCALE_MODEL",), "run", "trial"
    scale, model = 2, torch.nn.Identity()

    def run(self):
        from comfy.model_patcher import ModelPatcher

        cpu = torch.device("cpu")
        self.patcher = ModelPatcher(self.model, load_device=cpu, offload_device=cpu)  # 0.33.0 asks for it
        return (self,)

    def to(self, _):
        return self

    def __call__(self, image):
        return torch.nn.functional.interpolate(image, scale_factor=2)


NODE_CLASS_MAPPINGS = {kind.__name__: kind for kind in (TrialDetector, TrialControlNet, TrialUpscaleModel)}
