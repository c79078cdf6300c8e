"""ONNX files, run through onnxruntime: pinned by SHA-256, on named providers, in batches of bounded size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..modular_lora.errors import one_line
from ..modular_lora.util.file_state import FileState, file_state
from .errors import GateError

CPU = "CPUExecutionProvider"
CHUNK = 8  # images a forward; more is no faster on a CPU and takes memory
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class Runner:
    """One network of one image input. Sessions are shared between runners of the same file and settings.

    ``providers`` are onnxruntime's names in order of preference; the CPU comes last of itself. What is not there is
    said in ``notes``. ``threads`` is the number of CPU threads of one operator, 0 for onnxruntime's own choice.
    Raises GateError where the file is missing, is not the pinned one, or cannot be loaded.
    """

    def __init__(self, file: str | Path, sha256: str = "", providers: Sequence[str] = (), threads: int = 0):
        self.file = Path(file)
        if not self.file.is_file():
            raise GateError(
                f"{self.file.name or 'weights'}: no such file in {self.file.parent}: check the path.",
                code="gate.no-weights",
            )
        wanted, pinned = tuple(dict.fromkeys((*providers, CPU))), sha256.strip().lower()
        self.session, self.sha256 = _load(self.file, file_state(self.file), pinned, wanted, int(threads))
        used = self.session.get_providers()
        self.device = used[0]
        self.notes = tuple(
            f"execution provider {name} is unavailable; using {self.device}" for name in wanted if name not in used
        )
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(i.name for i in inputs)
            raise GateError(f"{self.file.name}: {len(inputs)} inputs ({names}), a detector has one: export it so.")
        self.input = inputs[0]
        self.outputs = tuple(output.name for output in self.session.get_outputs())
        if self.input.type not in TYPES:
            raise GateError(f"{self.file.name}: input is {self.input.type}, must be float: export it with float input.")

    @property
    def fixed_batch(self) -> int:
        """The batch size that the file is exported for; 0 where any will do."""
        return self.input.shape[0] if self.input.shape and isinstance(self.input.shape[0], int) else 0

    @property
    def chunk(self) -> int:
        return self.fixed_batch or CHUNK

    def run(self, batch: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Named outputs, float32, for a batch of at most ``chunk`` inputs. Raises GateError, also for NaN and ∞."""
        n, size = len(batch), self.fixed_batch
        if size > n:
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - n, 0)])
        try:
            results = self.session.run(
                list(outputs), {self.input.name: batch.astype(TYPES[self.input.type], copy=False)}
            )
        except Exception as error:  # onnxruntime's own classes share no base but Exception
            raise GateError(
                f"{self.file.name}: does not run ({one_line(error)}): check the file and its input."
            ) from error
        results = [np.asarray(result, np.float32)[:n] for result in results]
        for name, result in zip(outputs, results, strict=True):
            if not np.isfinite(result).all():
                raise GateError(
                    f"{self.file.name}: output {name} is not finite: a score of it would hide what it saw.",
                    code="gate.output-not-finite",
                )
        return results


def chunks(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Images b h w 3, a few at a time, clipped to 0..1 as saving clips them.

    Raises GateError for another shape, integers, and values that are not finite: no detector sees what is there.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not np.issubdtype(images.dtype, np.floating):
        shape = "×".join(map(str, images.shape))
        raise GateError(
            f"images are {shape} {images.dtype}, must be b×h×w×3 float32: remove the alpha channel.",
            code="gate.images-form",
        )
    if 0 in images.shape[1:3]:
        raise GateError(
            f"images are {images.shape[1]}×{images.shape[2]} pixels: there is nothing to judge.",
            code="gate.images-empty",
        )
    for start in range(0, len(images), size):
        part = images[start : start + size].astype(np.float32, copy=False)
        low, high = part.min(), part.max()
        if not np.isfinite([low, high]).all():
            first = start + int(np.flatnonzero(~np.isfinite(part).all((1, 2, 3)))[0])
            raise GateError(
                f"image {first + 1} has pixels that are not numbers: decode it in float32.",
                code="gate.images-not-finite",
            )
        yield part if low >= 0 and high <= 1 else np.clip(part, 0, 1)


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images 0..1 as uint8, rounded, so that images read from files come out as they were."""
    return np.rint(images * 255).astype(np.uint8)


def onnxruntime() -> Any:
    """The package, imported when it is needed first."""
    try:
        import onnxruntime
    except ImportError as error:
        raise GateError(f"onnxruntime cannot be imported ({one_line(error)}): pip install onnxruntime.") from error
    return onnxruntime


@lru_cache(maxsize=8)
def _load(file: Path, state: FileState, pinned: str, providers: tuple[str, ...], threads: int) -> tuple[Any, str]:
    """Session and SHA-256 of a file; ``state`` is there so that a changed file is loaded anew.

    What is loaded are the bytes that were hashed; so the weights lie in the file itself, not in another beside it.
    """
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if pinned and found != pinned:
        raise GateError(
            f"{file.name}: SHA-256 is {found}, expected {pinned}: use the file that was released.",
            code="gate.other-sha256",
        )
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings about providers come as notes
    options.intra_op_num_threads = threads
    there = [name for name in providers if name in ort.get_available_providers()]
    try:
        session = ort.InferenceSession(content, options, providers=there)
        session.disable_fallback()  # a device that fails in the middle is an error, not a silent change to the CPU
        return session, found
    except Exception as error:  # onnxruntime's own classes share no base but Exception
        raise GateError(
            f"{file.name}: onnxruntime cannot load it ({one_line(error)}): check the file.",
            code="gate.weights-unreadable",
        ) from error
