"""Data sets: folders and TOML, images, captions, batches."""
