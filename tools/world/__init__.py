"""The demo world: a small stock-layout SD1.5 checkpoint of emoji images, three LoRAs and a detector.

``tools.world.expand.expand(folder)`` writes the checkpoint from the live weights in ``ASSETS``; the LoRAs are ordinary
files there. Suppressed class: vehicles, harmless in place of what an operator has to suppress. See ``README.md``.
"""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
CHECKPOINT = "demo_world_sd15.safetensors"
LIVE_WEIGHTS = "demo_world_live.safetensors"
SAFETY_LORA = "demo_safety_vehicles.safetensors"
TASK_LORA = "demo_task_gloss.safetensors"
SEQUENTIAL_LORA = "demo_sequential_gloss.safetensors"
# Of the evidence at equal quality (docs/evidence.md): a safety LoRA with which fine-tuning brings vehicles back.
EQUAL = {
    "safety": "equal/esd_eta_3_preservation_2_21.safetensors",
    "task": "equal/gloss_21.safetensors",
    "sequential": "equal/esd_eta_3_preservation_2_gloss_21.safetensors",  # the task LoRA's training on top of it
    "words": "equal/null_space.safetensors",  # a safety LoRA in closed form
}
DETECTOR = "demo_detector.safetensors"
DETECTOR_ONNX = "demo_detector.onnx"  # the same network, for onnxruntime
DETECTOR_CONCEPTS = "demo_concepts.json"  # labels files of its two outputs
DETECTOR_STYLES = "demo_styles.json"
DATA_SET = "gloss"  # folder of images in the task style, in ASSETS

SUPPRESSED_CLASS = "vehicle"
NEGATIVE_PROMPT = ""
STEPS = 20
CFG = 3.0
SAMPLER = "euler"
SCHEDULER = "simple"
SIZE = 64
