"""LoRA files: read, named, matched with a model's weights."""
