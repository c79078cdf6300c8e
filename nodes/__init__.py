"""ComfyUI nodes of Modular LoRA Guard (V3 schema); host.py alone touches ComfyUI's internals."""
