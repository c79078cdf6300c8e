"""What a node may show on itself: hashes, lists of layers and norms are in the report that it gives at its output."""

from __future__ import annotations

import re

HASH = re.compile(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{10,}\b")
LAYER = re.compile(r"\b(?:lora_(?:unet|te\d?)_|diffusion_model\.|(?:input|output|down|up|middle|mid)_blocks?[._])\w")
NORM = re.compile("\u2016|\\bnorm\\b")


def assert_plain(text: str) -> None:
    """Of what a node shows: no hash, no norm, and in a line one layer as an example, by its names in file and model."""
    for line in text.splitlines():
        assert not HASH.search(line), f"a hash is shown on a node: {line}"
        assert not NORM.search(line), f"a norm is shown on a node: {line}"
        assert len(LAYER.findall(line)) <= 2, f"layers are listed on a node: {line}"
