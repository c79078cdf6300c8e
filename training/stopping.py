"""Ctrl+C, SIGTERM and the end of the host's process while something trains: what is half done is finished first.

Signals reach Python's main thread alone. Where the training runs in another one (ComfyUI's worker), the interpreter's
end waits for the step in hand and for what is kept after it, and, under `unwound`, until everything is put back.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
WAITING = b"stopping: the step in hand is finished and a state is kept; once more ends it at once\n"


class Stopped(KeyboardInterrupt):
    """A signal, or the end of the process, that was waited for."""


class Stopping:
    """Made by `stopping`; `whole` are the parts that a signal waits for, everywhere else it raises Stopped."""

    def __init__(self) -> None:
        self._asked = 0  # signals so far
        self._waits = 0  # signals that the part in hand waits for
        self._done = threading.Event()

    @contextmanager
    def whole(self, signals: int = 1, then: bool = True) -> Iterator[None]:
        """So many signals wait until the end of this part, and then, unless ``then`` is False, one raises Stopped."""
        before, self._waits = self._waits, max(self._waits, signals)
        try:
            yield
        finally:
            self._waits = before
        if then and self._asked > self._waits:
            raise Stopped

    def check(self) -> None:
        """Raise Stopped where something was heard: for what runs beside the main thread, which nothing interrupts."""
        if self._asked:
            raise Stopped

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._asked += 1
        if self._asked > self._waits:
            raise Stopped
        if self._asked == 1:
            with suppress(OSError):
                os.write(2, WAITING)  # no log record: this may have interrupted the writing of one

    def _end(self) -> None:
        """Called at the interpreter's end, while other threads still run; Ctrl+C ends the wait."""
        self._asked += 1
        self._done.wait()


@contextmanager
def stopping() -> Iterator[Stopping]:
    """Signals are heard while inside; handlers are put back, and signals that were ignored stay so."""
    made = Stopping()
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in heard:
            signal.signal(number, made._hear)
        if not main:
            atexit.register(made._end)
        yield made
    finally:
        made._done.set()
        if not main:
            atexit.unregister(made._end)
        for number, handler in heard.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def unwound(ask: Callable[[], None]) -> Iterator[None]:
    """In a thread beside the main one: the interpreter's end calls ``ask`` and waits until what is inside is over.

    The thread then stays where it is: one that goes on beside an interpreter that is being taken down aborts the whole
    process when it next comes back to Python from the middle of PyTorch. What asks through `stopping` inside comes
    first, so that a state is kept before ``ask`` is called. In the main thread nothing is to be waited for.
    """
    if threading.current_thread() is threading.main_thread():
        yield
        return
    ending, over = threading.Event(), threading.Event()

    def end() -> None:
        ending.set()
        ask()
        over.wait()

    atexit.register(end)
    try:
        yield
    finally:
        over.set()
        atexit.unregister(end)
        if ending.is_set():
            threading.Event().wait()  # for good: the process ends
