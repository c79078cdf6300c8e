"""Metadata keys of the files that are trained here, apart from what only the pack's own environment can import."""

CONCEPT_KEY = "modular_lora.concept"  # prompts that a safety LoRA erases
PRESERVED_KEY = "modular_lora.preserved_prompts"  # JSON list of prompts that a safety LoRA was to leave alone
METHOD_KEY = "modular_lora.method"  # how a safety LoRA was made that was not trained
COMBINED_KEY = "modular_lora.combined_from"  # JSON list of the safety LoRA files that one was combined from
CONVERTED_KEY = "modular_lora.converted_from"  # name and SHA-256 of the weights that a file was converted from
BASE_FILE_KEY = "modular_lora.converted_base"  # name and SHA-256 of the W0 that was subtracted from them
RESIDUAL_KEY = "modular_lora.residual"  # |W0 + UD - W_safe| / |dW| of a converted file
SAFETY_KEY = "modular_lora.safety_sha256"  # safety LoRA files that a task LoRA was trained beside
PROJECTED_KEY = "modular_lora.projected"  # "residual 3.5e-05, outputs 3.1e-05": see projection.LayerProjection
ENGINE_KEY = "modular_lora.engine"
EMA_KEY = "modular_lora.ema_decay"  # decay of the running mean that was saved
DATASET_KEY = "modular_lora.dataset_sha256"
CLIPS_KEY = "modular_lora.clip_frames"  # frames of the clips that were trained on, e.g. "9" or "9,17"
INITIALISATION_KEY = "modular_lora.initialisation"  # role and seed that A was drawn from
LEAKS = ("ss_tag_frequency", "ss_dataset_dirs", "ss_output_name")  # what no_dataset_metadata leaves out
