"""Nodes beside the packs of a trial, which put it into the server's custom_nodes: what else would need a download."""

from __future__ import annotations

from types import SimpleNamespace

import torch


class TrialDetector:
    """Impact Subpack's detector, with a stand-in for its weights that always finds one thing in the middle."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("BBOX_DETECTOR",), "run", "trial"

    def run(self):
        from impact import subcore  # Impact Pack puts its modules on the path

        return (subcore.UltraBBoxDetector(_middle),)


def _middle(image, **_):
    """What a YOLO model answers, as far as the detector reads it."""
    width, height = image.size
    box = torch.tensor([[width // 4, height // 4, width * 3 // 4, height * 3 // 4]], dtype=torch.float32)
    return [SimpleNamespace(names={0: "middle"}, boxes=_Boxes(box))]


class _Boxes:
    cls, conf = torch.tensor(0), torch.tensor(1.0)

    def __init__(self, xyxy):
        self.xyxy = xyxy

    def __len__(self):
        return len(self.xyxy)

    def __getitem__(self, _):
        return self


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
