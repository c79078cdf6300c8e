"""ComfyUI's own audio nodes, which import torchaudio although only resampling needs it."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np

RATE = 16000


NODES = {"audio": "SaveAudio", "audio_encoder": "AudioEncoderLoader"}  # modules, and a node of each


def load(comfy, name: str = "audio") -> None:
    """Register a module of them; where torchaudio is missing, something of its name stands in while it is imported."""
    if NODES[name] in comfy.nodes.NODE_CLASS_MAPPINGS:
        return
    missing = importlib.util.find_spec("torchaudio") is None
    if missing:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    path = Path(comfy.nodes.__file__).parent / "comfy_extras" / f"nodes_{name}.py"
    assert asyncio.run(comfy.nodes.load_custom_node(str(path), module_parent="comfy_extras"))
    if missing:
        del sys.modules["torchaudio"]  # others ask whether it is there


def write_sound(path: Path) -> Path:
    """A second of a tone, as a user's own file."""
    tone = np.sin(np.arange(RATE, dtype=np.float32) * 0.1)[None]
    with av.open(str(path), "w", format="flac") as file:
        stream = file.add_stream("flac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone, format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def samples(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)])
