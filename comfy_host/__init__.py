"""The one place that touches ComfyUI, beside the schemas in nodes/."""
