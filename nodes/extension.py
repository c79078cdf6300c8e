"""What ComfyUI loads: the list of nodes, and the one line that an older ComfyUI gets."""

from __future__ import annotations

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError as error:
    raise ImportError("Modular LoRA Guard needs ComfyUI 0.3.75 or newer (V3 nodes): update ComfyUI.") from error

from . import carried, enforce
from .audit import Audit
from .concept import WriteConceptPrompts
from .gate import GateSettings
from .gated import SafetyGate, SampleAndGate
from .guard import GuardedAsModel, GuardModel
from .interference import LoraInterference
from .load import LoadSafetyLora, LoadTaskLora
from .picture import GuardedDecode, GuardedDecodeTiled
from .sample import GuardedGuider, GuardedKSampler, GuardedKSamplerAdvanced
from .save import SaveAttestedImage, SaveGatedImage
from .sockets import register_folders
from .training import DatasetReport, ProjectTaskLora, TrainSafetyLora, TrainTaskLora


class ModularLoraExtension(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()
        enforce.register()
        carried.register()
        return [
            LoadSafetyLora,
            LoadTaskLora,
            GuardModel,
            GuardedAsModel,
            GuardedKSampler,
            GuardedKSamplerAdvanced,
            GuardedGuider,
            GuardedDecode,
            GuardedDecodeTiled,
            SaveAttestedImage,
            GateSettings,
            SafetyGate,
            SampleAndGate,
            SaveGatedImage,
            LoraInterference,
            TrainTaskLora,
            TrainSafetyLora,
            DatasetReport,
            ProjectTaskLora,
            WriteConceptPrompts,
            Audit,
        ]
