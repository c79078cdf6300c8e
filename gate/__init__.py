"""The gate: detectors of what a picture shows, and what is done about it. Knows no ComfyUI."""
