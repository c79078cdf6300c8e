"""ComfyUI nodes of Modular LoRA Guard (V3 schema); host.py, trainee.py, drawing.py alone touch ComfyUI's internals."""
