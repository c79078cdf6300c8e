"""ComfyUI nodes of Modular LoRA Guard (V3 schema); docs/compatibility.md says which modules touch its internals."""
