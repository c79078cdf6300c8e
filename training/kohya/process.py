"""A training script as a child process: its progress, its previews, and its end, with all its children."""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

import psutil

from ...modular_lora.errors import GuardError
from ...modular_lora.util.endings import ending, remedy
from ..loop import Watch
from ..stopping import Stopping, stopping
from .entry import MARK

logger = logging.getLogger("modular_lora")
POLL = 0.2  # seconds between looks at interrupt and previews
GRACE = 10.0  # seconds to end in after SIGTERM
PATIENCE = 3  # steps to keep a state in, beside GRACE
TAIL = 60  # lines of stderr in an error: torch adds some twenty of its own where one of several processes fails
_BAR = re.compile(r"^(?P<what>[^|\r\n]*?):?\s*\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+) \[(?P<rest>[^\]]*)")
_LOSS = re.compile(r"\b(?:avr_)?loss=(?P<loss>[-+.\d]+(?:e[-+]?\d+)?|nan|inf)", re.IGNORECASE)


@dataclass
class Progress:
    """What the output of a child says so far."""

    losses: list[float] = field(default_factory=list)  # one a step: sd-scripts' moving average
    total: int = 0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    pending: bool = False  # the last step is not said yet
    shown: str = ""  # loss of the last bar
    refusal: str = ""  # the guard's own words, where it stopped the script
    previews: list[Path] = field(default_factory=list)
    longest: float = 0.0  # seconds between two steps
    _at: float = 0.0  # when the last step was seen

    def read(self, line: str, watch: Watch) -> None:
        """One line of stdout or stderr; tqdm's bars become steps and stages, the rest is kept for an error."""
        bar = _BAR.search(line)
        if bar is None:
            if line.startswith(MARK) and not self.refusal:
                self.refusal = line.removeprefix(MARK).rstrip()
            if line.strip():
                self.tail.append(line.rstrip())
            return
        if bar["what"].strip() != "steps":
            watch.stage(bar["what"].strip() or "preparing", int(bar["done"]), int(bar["total"]))
            return
        loss = _LOSS.search(bar["rest"])
        self._step(int(bar["done"]), int(bar["total"]), loss["loss"] if loss else "", watch)

    def _step(self, done: int, total: int, loss: str, watch: Watch) -> None:
        """A bar of the training. It is often drawn twice a step, first with the loss of the step before."""
        if done > len(self.losses):
            now = time.monotonic()
            self.longest, self._at = max(self.longest, now - self._at if self.losses else 0.0), now
            self.flush(watch)
            before = self.losses[-1:] or [math.nan]
            self.losses += before * (done - len(self.losses))
            self.total, self.pending = total, True
            stale = loss in ("", self.shown)
        else:
            stale = not loss
        if not stale and done:
            self.losses[-1] = float(loss)
            self.flush(watch)
        self.shown = loss

    def flush(self, watch: Watch) -> None:
        """Say the last step, if it was not said yet."""
        if self.pending:
            self.pending = False
            watch.step(len(self.losses), self.total, self.losses)


def run(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path, samples: Path, watch: Watch, stop: Path | None = None
) -> Progress:
    """Run ``argv`` (no shell) to its end and give what it said; ``samples`` is where its previews appear.

    Whatever ``watch`` raises (its ``check`` is asked a few times a second), Ctrl+C and SIGTERM end the child with all
    its children, and are raised once they are gone. With ``stop``, a file that the child looks for before every step,
    it gets to keep a state of its last step first; a second interrupt does not wait for that. GuardError where the
    child fails: its own words if the guard stopped it, else the last lines of its output.
    """
    with stopping() as signals:
        return _run(argv, env, cwd, samples, watch, stop, signals)


def _run(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    samples: Path,
    watch: Watch,
    stop: Path | None,
    signals: Stopping,
) -> Progress:
    progress, known = Progress(), set(_images(samples))
    child = _start(argv, env, cwd)
    lines: queue.Queue[str | None] = queue.Queue()
    pipes = [pipe for pipe in (child.stdout, child.stderr) if pipe is not None]
    readers = [threading.Thread(target=_feed, args=(pipe, lines), daemon=True) for pipe in pipes]
    sizes: dict[Path, int] = {}
    try:
        for reader in readers:
            reader.start()
        open_pipes, until = len(readers), math.inf
        while child.poll() is None or (open_pipes and time.monotonic() < until):
            if child.poll() is not None:  # a worker that it left behind may keep the pipes open
                until = min(until, time.monotonic() + GRACE)
            signals.check()
            watch.check()
            open_pipes -= _drain(lines, progress, watch)
            _new_previews(samples, known, sizes, progress, watch)
        progress.flush(watch)
        _new_previews(samples, known, dict(_sizes(samples)), progress, watch)
    except BaseException:
        if stop and progress.losses:  # before the first step there is nothing to keep
            logger.warning("stopping: sd-scripts keeps a state before its next step; once more ends it at once")
            stop.touch()
            _wait(child, lines, progress, watch)
        raise
    finally:
        end_tree(child)
        for reader, pipe in zip(readers, pipes, strict=True):
            if reader.ident is not None:
                reader.join(GRACE)
            pipe.close()
    if child.returncode:
        raise GuardError(progress.refusal or _failure(child.returncode, progress.tail), code="kohya.failed")
    return progress


def _wait(child: subprocess.Popen, lines: queue.Queue[str | None], progress: Progress, watch: Watch) -> None:
    """Until the child has ended, or for as long as a few of its steps took."""
    until = time.monotonic() + GRACE + PATIENCE * progress.longest
    while child.poll() is None and time.monotonic() < until:
        watch.check()
        _drain(lines, progress, watch)


def end_tree(child: subprocess.Popen) -> None:
    """End a child and all its descendants: SIGTERM, then after `GRACE` SIGKILL; returns when they are gone."""
    family = []
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(child.pid)
        family = [*root.children(recursive=True), root] if child.poll() is None else []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=GRACE)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE)
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # whoever was born in between
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _start(argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> subprocess.Popen:
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP
    try:
        return subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=sys.platform != "win32",
            creationflags=flags,
        )
    except OSError as error:
        raise GuardError(f"{argv[0]}: cannot be started ({error.strerror}): check the interpreter.") from error


def _feed(pipe: BufferedReader, lines: queue.Queue[str | None]) -> None:
    """Lines of a pipe, None at its end. tqdm writes \\r before a bar and nothing after it, so "]" ends a line, too."""
    rest = b""
    with suppress(ValueError, OSError):  # closed while read
        while block := pipe.read1(65536):
            *whole, rest = re.split(rb"[\r\n]", rest + block)
            if rest.endswith(b"]"):
                whole, rest = [*whole, rest], b""
            for line in whole:
                lines.put(line.decode("utf-8", "replace"))
    lines.put(rest.decode("utf-8", "replace"))
    lines.put(None)


def _drain(lines: queue.Queue[str | None], progress: Progress, watch: Watch) -> int:
    """Lines of the next `POLL` seconds; how many pipes ended."""
    ended, until = 0, time.monotonic() + POLL
    while (left := until - time.monotonic()) > 0 and ended < 2:
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            break
        if line is None:
            ended += 1
        else:
            progress.read(line, watch)
    return ended


def _images(folder: Path) -> Iterable[Path]:
    return sorted(folder.glob("*.png")) if folder.is_dir() else []


def _sizes(folder: Path) -> Iterable[tuple[Path, int]]:
    for path in _images(folder):
        with suppress(OSError):
            yield path, path.stat().st_size


def _new_previews(folder: Path, known: set[Path], sizes: dict[Path, int], progress: Progress, watch: Watch) -> None:
    """Images that have stopped growing since the last look."""
    for path, size in list(_sizes(folder)):
        if path not in known and size and sizes.get(path) == size:
            known.add(path)
            progress.previews.append(path)
            watch.sample(len(progress.losses), [path])
        sizes[path] = size


def _failure(code: int, tail: Iterable[str]) -> str:
    output = "\n".join(tail) or "(none)"
    again = remedy(code, "")
    return f"sd-scripts {ending(code)}; last output:\n{output}" + (f"\n{again}" if again else "")
