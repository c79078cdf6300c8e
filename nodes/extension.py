"""What ComfyUI loads: the list of nodes, and the one line that an older ComfyUI gets."""

from __future__ import annotations

try:
    from comfy_api.latest import ComfyExtension, io
except ImportError as error:
    raise ImportError("Modular LoRA Guard needs ComfyUI 0.3.75 or newer (V3 nodes): update ComfyUI.") from error

from ..comfy_host import conditioning, following, origins
from ..comfy_host.enforcement import hooks, monitor, tenants
from ..comfy_host.model_folders import register_folders
from .audit import Audit
from .calibrate_safety import CalibrateSafetyLora
from .combine_safety import CombineSafetyLoras
from .concept_prompts import WriteConceptPrompts
from .dataset_report import DatasetReport
from .decode import GuardedDecode, GuardedDecodeTiled
from .drop_in import Guard
from .gate_settings import GateSettings
from .guard import GuardedAsModel, GuardModel
from .interference import LoraInterference
from .load import LoadSafetyLora, LoadTaskLora
from .make_safety import MakeSafetyLora
from .project_task import ProjectTaskLora
from .safety_gate import SafetyGate, SampleAndGate
from .sample import GuardedGuider, GuardedKSampler, GuardedKSamplerAdvanced
from .save import SaveAttestedImage, SaveGatedImage
from .train_safety import TrainSafetyLora
from .train_task import TrainTaskLora
from .training_options import SafetyTrainingOptions, TaskTrainingOptions


class ModularLoraExtension(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()
        hooks.register()
        tenants.register()
        monitor.register()
        conditioning.register()
        following.register()
        origins.register()
        return [
            Guard,
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
            MakeSafetyLora,
            CombineSafetyLoras,
            TrainTaskLora,
            TaskTrainingOptions,
            TrainSafetyLora,
            SafetyTrainingOptions,
            DatasetReport,
            ProjectTaskLora,
            WriteConceptPrompts,
            CalibrateSafetyLora,
            Audit,
        ]
