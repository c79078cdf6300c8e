"""Whether an invisible watermark is still read after an image was encoded again or made smaller.

`python -m tools.benchmarks.watermark FOLDER`, in an environment of its own with `invisible-watermark` and what it
imports (torch, onnxruntime, opencv-python-headless, PyWavelets). FOLDER: photographs; each is made 512 pixels high or
wide, marked with 32 random bits, and read again at scales 1, 4/3 and 2, as a reader would that does not know what was
done to the file. Read is a mark of which at least 29 bits are right: of an image without it, by chance, one in 800,000
at each scale.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

METHODS = ("dwtDct", "dwtDctSvd", "rivaGan")
BITS, ENOUGH, SIDE, SCALES = 32, 29, 512, (1.0, 4 / 3, 2.0)
ENDINGS = frozenset((".png", ".jpg", ".jpeg"))


def main(arguments: list[str]) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    made.add_argument("--marks", type=int, default=2, help="marks a picture")
    made.add_argument("--seed", type=int, default=1)
    chosen = made.parse_args(arguments)
    files = sorted(file for file in chosen.folder.iterdir() if file.suffix.lower() in ENDINGS)
    for method in chosen.methods:
        print(json.dumps(measured(method, files, chosen.marks, chosen.seed)), flush=True)
    return 0


def measured(method: str, files: list[Path], marks: int, seed: int) -> dict:
    """How many marks of a method are read after each change; images without a mark are read too."""
    from imwatermark import WatermarkEncoder

    WatermarkEncoder.loadModel()
    numbers = np.random.default_rng(seed)
    read = dict.fromkeys((*CHANGES, "no mark"), 0)
    seconds, noise, total = [], [], 0
    for file in files:
        plain = _sized(Image.open(file).convert("RGB"), SIDE)
        for _ in range(marks):
            bits = numbers.integers(0, 2, BITS).tolist()
            encoder = WatermarkEncoder()
            encoder.set_watermark("bits", bits)
            began = time.process_time()
            pixels = encoder.encode(_bgr(plain), method)
            seconds.append(time.process_time() - began)
            marked = Image.fromarray(np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8)[:, :, ::-1]))
            error = np.mean((np.asarray(marked, float) - np.asarray(plain, float)) ** 2)
            noise.append(10 * math.log10(255**2 / error))
            for name, change in CHANGES.items():
                read[name] += _is_read(change(marked), bits, method)
            read["no mark"] += _is_read(plain, bits, method)
            total += 1
    return {
        "method": method,
        "marks": total,
        "read": read,
        "psnr_db": round(statistics.median(noise), 1),
        "processor_seconds": round(statistics.median(seconds), 2),
    }


def _is_read(image: Image.Image, bits: list[int], method: str) -> bool:
    return any(_right(_scaled(image, scale), bits, method) >= ENOUGH for scale in SCALES)


def _right(image: Image.Image, bits: list[int], method: str) -> int:
    from imwatermark import WatermarkDecoder

    found = WatermarkDecoder("bits", BITS).decode(_bgr(image), method)
    return sum(bool(one) == bool(bit) for one, bit in zip(found, bits, strict=True))


def _bgr(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def _sized(image: Image.Image, side: int) -> Image.Image:
    return _scaled(image, side / min(image.size))


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    size = tuple(max(8, round(edge * scale) // 8 * 8) for edge in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _encoded(image: Image.Image, format: str, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, format, quality=quality)
    return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "JPEG 75": lambda image: _encoded(image, "JPEG", 75),
    "WebP 75": lambda image: _encoded(image, "WEBP", 75),
    "three quarters": lambda image: _scaled(image, 0.75),
    "half": lambda image: _scaled(image, 0.5),
    "three quarters, JPEG 75": lambda image: _encoded(_scaled(image, 0.75), "JPEG", 75),
    "half, JPEG 75": lambda image: _encoded(_scaled(image, 0.5), "JPEG", 75),
    "60 %": lambda image: _scaled(image, 0.6),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
