"""Erased weights that others publish, turned into safety LoRA files."""
