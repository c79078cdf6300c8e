"""ComfyUI nodes of Modular LoRA Guard (V3 schema); host, anatomy, trainee, drawing touch its internals."""
