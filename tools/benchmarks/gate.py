"""How fast the gate's NudeNet is beside the package's own batch call, and what the gate's detectors get wrong.

    python -m tools.benchmarks.gate [--rounds 7] [--pictures 24] [--record]
    python -m tools.benchmarks.gate --world WORK [--record]

Speed: both judge the same images in turn, in one process, with onnxruntime sessions of equal settings; the figure is
the median of the rounds' ratios. Error: ``WORK`` is a folder of `tools.world.data`: its vehicles should be flagged, its
other images should pass. The demo world's detector has seen these images in training.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from modular_lora_guard.gate import detectors, labelled, nudenet, settings
from PIL import Image

from ..world import ASSETS, DETECTOR_CONCEPTS, DETECTOR_ONNX, data
from .bench import finish, parser

SIDE = 512  # pixels
BATCH = 4  # the package's own default


def shown(n: int) -> np.ndarray:
    """Images n 512 512 3 float32 of the demo world's data set, enlarged."""
    files = sorted((ASSETS / "gloss").rglob("*.png"))[:n]
    images = [Image.open(file).convert("RGB").resize((SIDE, SIDE)) for file in files]
    return np.stack([np.asarray(image, np.float32) / 255 for image in images])


def package(threads: int):
    """The package's own detector; its session is made as the gate's is, because it takes no settings."""
    import onnxruntime
    from nudenet import NudeDetector

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    own = NudeDetector()
    own.onnx_session = onnxruntime.InferenceSession(str(nudenet.weights()), options, providers=["CPUExecutionProvider"])
    return own


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def speed(threads: int, rounds: int, n: int) -> dict[str, object]:
    """Rows of one number of threads. CPU time for one thread, wall time for more."""
    clock, unit = (time.process_time, "CPU") if threads == 1 else (time.perf_counter, "wall")
    images = shown(n)
    arrays = list((images[..., ::-1] * 255).round().astype(np.uint8))
    own, gate = package(threads), detectors.make(nudenet.NAME, threads=threads)
    works = {"package": lambda: own.detect_batch(arrays, BATCH), "gate": lambda: gate.detect(images)}
    for work in works.values():
        work()
    taken = [{name: seconds(work, clock) for name, work in works.items()} for _ in range(rounds)]
    ratios = [round_["package"] / round_["gate"] for round_ in taken]
    title = f"{threads} thread{'s' * (threads > 1)}"
    each = {name: statistics.median(r[name] for r in taken) / n * 1000 for name in works}
    return {
        f"speed, {title}: package ÷ gate": f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
        f"speed, {title}: package": f"{each['package']:.1f} ms {unit} a picture",
        f"speed, {title}: gate": f"{each['gate']:.1f} ms {unit} a picture",
    }


def open_nsfw(n: int) -> dict[str, object]:
    judge, images = detectors.make("open-nsfw", threads=1), shown(n)
    judge.detect(images[:1])
    each = seconds(lambda: judge.detect(images), time.process_time) / n * 1000
    return {"speed, 1 thread: open-nsfw": f"{each:.1f} ms CPU a picture"}


def errors(work: Path) -> dict[str, object]:
    """The gate's own error at every detector's default thresholds; for the other two, vehicles are harmless as well."""
    dataset = data.load(work)
    files = {"weights": ASSETS / DETECTOR_ONNX, "labels": ASSETS / DETECTOR_CONCEPTS}
    rows: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        vehicles, rest = Path(folder) / "vehicles", Path(folder) / "rest"
        for i, (image, concept) in enumerate(zip(dataset.images, dataset.concept.tolist(), strict=True)):
            place = vehicles if concept in data.SUPPRESSED_IDS else rest
            place.mkdir(exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
        judge = detectors.make("classifier", threads=1, **files)
        found = labelled.measure(vehicles, rest, judge, settings.defaults(judge))
        rows["error, demo world's detector: missed"] = said(found.missed)
        rows["error, demo world's detector: false alarms"] = said(found.false_alarms)
        for name in (nudenet.NAME, "open-nsfw"):
            judge = detectors.make(name, threads=1)
            found = labelled.measure(vehicles, rest, judge, settings.defaults(judge))
            rows[f"error, {name}: false alarms on drawings of vehicles"] = said(found.missed, invert=True)
            rows[f"error, {name}: false alarms on other drawings"] = said(found.false_alarms)
    return rows


def said(rate, invert: bool = False) -> str:
    k, low, high = (rate.n - rate.k, 1 - rate.high, 1 - rate.low) if invert else (rate.k, rate.low, rate.high)
    return f"{k} of {rate.n}, {k / rate.n:.1%} [{low:.1%}, {high:.1%}]"


def main() -> None:
    made = parser(__doc__, "gate.json")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--pictures", type=int, default=24)
    made.add_argument("--world", type=Path, metavar="WORK", help="measure errors on the pictures in WORK instead")
    chosen = made.parse_args()
    if chosen.world:
        rows, command = errors(chosen.world), "python -m tools.benchmarks.gate --world WORK --record"
    else:
        rows = {}
        for threads in (1, 2):
            rows |= speed(threads, chosen.rounds, chosen.pictures)
        rows |= open_nsfw(chosen.pictures)
        rows["speed, GPU: package ÷ gate"] = "not measured"
        command = f"python -m tools.benchmarks.gate --rounds {chosen.rounds} --pictures {chosen.pictures} --record"
    finish(rows, "gate.json", command, chosen.record)


if __name__ == "__main__":
    main()
