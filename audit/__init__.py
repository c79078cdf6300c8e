"""The audit: the same prompts and seeds drawn by every arm, judged by a detector. Knows no ComfyUI."""
