"""The demo world's detector as ONNX with labels files, so that gate and audit run it as they run any classifier.

Command: ``python -m tools.world.export_detector`` (needs the package onnx); writes three files to ``ASSETS``.
"""

from __future__ import annotations

import hashlib
import io
import logging

import torch
from modular_lora_guard.modular_lora.util import atomic, plain_json
from torch import Tensor, nn

from ..world import (
    ASSETS,
    DETECTOR,
    DETECTOR_CONCEPTS,
    DETECTOR_ONNX,
    DETECTOR_STYLES,
    SIZE,
    SUPPRESSED_CLASS,
    data,
    detector,
)

logger = logging.getLogger("modular_lora")
OUTPUTS = ("concept", "style", "embedding")
OPSET = 17


class Exported(nn.Module):
    """Logits over concepts b 84 and styles b 6, and the features that the styles are told by as an embedding b 256."""

    def __init__(self, model: detector.Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = self.model.features[:3](images * 2 - 1)
        high = self.model.features[3:](middle)
        embedding = torch.cat([high.mean((2, 3)), middle.mean((2, 3))], 1)
        return *self.model(images), embedding


def onnx_bytes(model: detector.Detector) -> bytes:
    """The network as an ONNX file with input "pictures" b 3 64 64, float32, 0..1, b free."""
    buffer = io.BytesIO()
    torch.onnx.export(
        Exported(model).eval(),
        (torch.zeros(2, 3, SIZE, SIZE),),
        buffer,
        input_names=["pictures"],
        output_names=list(OUTPUTS),
        dynamic_axes={name: {0: "batch"} for name in ("pictures", *OUTPUTS)},
        opset_version=OPSET,
        dynamo=False,  # the other exporter needs one more package and gains nothing for plain convolutions
    )
    return buffer.getvalue()


def labels(output: str, sha256: str) -> dict[str, object]:
    """The labels file of one output."""
    common = {
        "licence": "Apache-2.0",
        "size": [SIZE, SIZE],
        "activation": "softmax",
        "output": output,
        "embedding": "embedding",
        "sha256": sha256,
    }
    if output == "style":
        return {
            "name": "demo world, styles",
            "labels": list(data.STYLES),
            "covers": "which of the demo world's six drawing styles a picture is in",
            "blind_to": "everything but the demo world's pictures",
            **common,
        }
    return {
        "name": "demo world, concepts",
        "labels": list(data.CONCEPTS),
        "groups": {SUPPRESSED_CLASS: list(data.SUPPRESSED)},
        "block": {SUPPRESSED_CLASS: 0.5},
        "covers": f"{len(data.CONCEPTS)} concepts of the demo world, {len(data.SUPPRESSED)} of them vehicles",
        "blind_to": "everything but the demo world's pictures",
        **common,
    }


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    content = onnx_bytes(detector.load(ASSETS / DETECTOR))
    sha256 = hashlib.sha256(content).hexdigest()
    atomic.write(ASSETS / DETECTOR_ONNX, content)
    for output, file in (("concept", DETECTOR_CONCEPTS), ("style", DETECTOR_STYLES)):
        plain_json.write(labels(output, sha256), ASSETS / file)
    logger.info("%s: %d bytes, SHA-256 %s", DETECTOR_ONNX, len(content), sha256)


if __name__ == "__main__":
    main()
