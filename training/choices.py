"""Choices that options and the code behind them share; nothing is imported for them, as in sd-scripts' environment."""

from __future__ import annotations

from typing import Literal

SavePrecision = Literal["fp16", "bf16", "float"]
ClipExtraction = Literal["head", "spread"]  # which frames of a clip are taken, see data/clips.py
Sides = Literal["input", "output", "both"]  # of the safety LoRA that a projection keeps clear
