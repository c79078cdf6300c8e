"""How files that are not what they should be are read: rows of docs/figures/reliability.json.

    python3 -m tools.benchmarks.reliability files --record
    python3 -m tools.benchmarks.reliability faults CHECKPOINT --comfyui COMFYUI --record (faults.py)
    python3 -m tools.benchmarks.reliability escapes --comfyui COMFYUI --world WORLD --record (escapes.py)
    python3 -m tools.benchmarks.reliability mutations --comfyui COMFYUI --world WORLD --record (escapes.py)
    python3 -m tools.benchmarks.reliability clients --comfyui COMFYUI --world WORLD --record (clients.py)

10,000 different corrupted LoRA files of a seeded corpus (corrupted.py) go through read_lora. 7,900 are no
LoRA for any reader and are read as they are. 2,000 are sound files with flipped bits or overwritten bytes, which may
well be a LoRA with other weights: these are read against the SHA-256 of the file that was released, as a policy pins
it. A hundredth are sound files that are written over, with as many bytes, whenever their tensors are about to be
read. Refused is a file whose reading ends in LoraFileError, one printable line that names it; anything else is not.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from random import Random
from unittest import mock

from modular_lora_guard.modular_lora.errors import LoraFileError
from modular_lora_guard.modular_lora.files.reader import read_lora

from ..world import ASSETS, SAFETY_LORA
from . import clients, corrupted, escapes, faults
from .bench import finish, parser

FILE = "reliability.json"
OTHERS = {  # parts with options of their own
    "faults": faults.main,
    "escapes": escapes.main,
    "mutations": escapes.mutations,
    "clients": clients.main,
}
_log = logging.getLogger("modular_lora")


@dataclass
class Count:
    """What became of the files of a corpus."""

    tried: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    unclear: Counter[str] = field(default_factory=Counter)  # another error, or a message that does not serve
    survived: int = 0  # damaged files that are a LoRA where nothing is pinned
    slowest: float = 0.0  # seconds of processor time

    @property
    def not_refused(self) -> int:
        return self.accepted.total() + self.unclear.total()


def outcome(path: Path, pinned: str | None) -> str:
    """ "refused", "accepted" or "unclear: ..." of one file."""
    try:
        read_lora(path, expected_sha256=pinned)
    except LoraFileError as error:
        message = str(error)
        clear = message.isprintable() and message.startswith(f"{path.name}: ") and len(message) < 1000
        return "refused" if clear else f"unclear: {message[:200]!r}"
    except Exception as error:  # whatever else comes is what this looks for
        return f"unclear: {type(error).__name__}: {error}"
    return "accepted"


def read_corpus(count: Count, files, pin: bool, folder: Path) -> None:
    path = folder / "a.safetensors"
    for kind, sound, raw in files:
        path.write_bytes(sound.raw)
        if (whole := outcome(path, None)) != "accepted":
            raise RuntimeError(f"the sound file that {kind} corrupts is {whole}")  # the corpus would show nothing
        path.write_bytes(raw)
        begun = time.process_time()
        found = outcome(path, hashlib.sha256(sound.raw).hexdigest() if pin else None)
        count.slowest = max(count.slowest, time.process_time() - begun)
        count.tried[kind] += 1
        if found != "refused":
            _log.error("%s: %s", kind, found)
            (count.accepted if found == "accepted" else count.unclear)[kind] += 1
        if pin and (alone := outcome(path, None)) != "refused":
            if alone != "accepted":
                _log.error("%s: %s", kind, alone)
                count.unclear[kind] += 1
            count.survived += 1


def read_changing(count: Count, rng: Random, files: int, folder: Path) -> None:
    """Files that are written over in every reading; an unpinned mixture of two would be a LoRA that nobody released."""
    path, opened = folder / "a.safetensors", Path.open
    for _ in range(files):
        sound = corrupted.sound_file(rng, ASSETS)
        path.write_bytes(sound.raw)
        contents = cycle([corrupted.other_values(rng, sound), sound.raw])
        written = lambda *args, contents=contents: corrupted.WrittenOver(opened(*args), contents)  # noqa: E731
        begun = time.process_time()
        with mock.patch.object(Path, "open", written):
            found = outcome(path, None)
        count.slowest = max(count.slowest, time.process_time() - begun)
        count.tried["written over while read"] += 1
        if found != "refused":
            _log.error("written over while read: %s", found)
            (count.accepted if found == "accepted" else count.unclear)["written over while read"] += 1


def run(broken: int, heavy: int, damaged: int, seed: int) -> Count:
    """Read that many files of KINDS, HEAVY and DAMAGE, and as many as HEAVY's that change meanwhile."""
    count, rng = Count(), Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        read_corpus(count, corrupted.corpus(rng, corrupted.KINDS, broken, ASSETS), False, folder)
        read_corpus(count, corrupted.corpus(rng, corrupted.HEAVY, heavy, ASSETS), False, folder)
        read_corpus(count, corrupted.corpus(rng, corrupted.DAMAGE, damaged, ASSETS), True, folder)
        read_changing(count, rng, heavy, folder)
    return count


def peak_mib() -> float:
    """Most memory that this process ever held, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every file was refused, else 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in OTHERS:
        return OTHERS[given[0]](given[1:])
    made = parser(__doc__, FILE)
    made.add_argument("part", choices=["files", *OTHERS])
    made.add_argument("--files", type=int, default=10_000, help="how many files (10000)")
    made.add_argument("--seed", type=int, default=1, help="of the corpus (1)")
    chosen = made.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    damaged, heavy = chosen.files // 5, chosen.files // 100
    outcome(ASSETS / SAFETY_LORA, None)  # imports what is imported once
    before, begun = peak_mib(), time.process_time()
    count = run(chosen.files - damaged - 2 * heavy, heavy, damaged, chosen.seed)
    seconds = time.process_time() - begun
    kinds = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in count.tried.items())
    rows = {
        "corrupted files tried": count.tried.total(),
        "corrupted files not refused": count.not_refused,
        "corrupted files: kinds": kinds,
        "corrupted files: read against a pinned SHA-256": damaged,
        "corrupted files: of these still a LoRA, with other weights, where nothing is pinned": count.survived,
        "corrupted files: most memory above that of reading one sound file, MiB": round(peak_mib() - before),
        "corrupted files: slowest refusal, processor seconds": round(count.slowest, 2),
        "corrupted files: processor seconds for all, with making them": round(seconds),
    }
    command = f"python3 -m tools.benchmarks.reliability files --files {chosen.files} --seed {chosen.seed}"
    finish(rows, FILE, command, chosen.record)
    return int(count.not_refused > 0)


if __name__ == "__main__":
    sys.exit(main())
