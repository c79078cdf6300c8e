"""The gate: detectors of what an image shows, and what is done about it. Knows no ComfyUI."""
