"""One worker of an audit: opens a painter once and draws what it is handed. Runs by its path, outside the driver.

Requests and answers are plain values, since the driver's classes need not be the worker's: inside ComfyUI the pack goes
by the name of its folder. Only what registers the pack is imported here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT, PACK = Path(__file__).resolve().parent.parent, "modular_lora_guard"
logger = logging.getLogger("modular_lora")


class Worker:
    """Answers requests; its painter is open from the first one until ``close``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """``spec`` is a PainterSpec as a dict."""
        self.spec, self.stack, self.painter = spec, contextlib.ExitStack(), None

    def answer(self, request: dict[str, Any] | None) -> dict[str, Any]:
        """Pictures and the painter's origin for a Unit as a dict, the origin for None; else "error" with a text."""
        register()
        try:
            return self._draw(request)
        except Exception as error:  # the driver ends the audit with it
            if isinstance(error, importlib.import_module("modular_lora_guard.modular_lora.errors").GuardError):
                return {"error": str(error)}
            logger.error("%s", traceback.format_exc())
            return {"error": f"A worker failed ({type(error).__name__}: {error}): its traceback is in the log."}

    def _draw(self, request: dict[str, Any] | None) -> dict[str, Any]:
        plan = importlib.import_module("modular_lora_guard.audit.plan")
        if self.painter is None:
            open_painter = getattr(importlib.import_module(f"{PACK}.{self.spec['module']}"), self.spec["function"])
            self.painter = self.stack.enter_context(open_painter(**self.spec["arguments"]))
        answer: dict[str, Any] = {"origin": vars(plan.Origin.of(self.painter))}
        if request is not None:
            arm = plan.Arm(**(request["arm"] | {"parts": tuple(plan.Part(**p) for p in request["arm"]["parts"])}))
            items = [plan.Item(**item) for item in request["items"]]
            paint = importlib.import_module("modular_lora_guard.audit.engines").paint
            answer["pictures"] = paint(self.painter, arm, items, plan.Sampling(**request["sampling"]))
        return answer

    def close(self) -> None:
        self.stack.close()


def register() -> None:
    """Make the pack importable, and take this file's own folder off the path."""
    own, importable = str(ROOT / "audit"), str(ROOT / "importable")
    sys.path[:] = [*(entry for entry in sys.path if entry not in (own, importable)), importable]


def main() -> None:
    """Pickles of plain values from the driver's pipe, answers into another, until the driver closes its end."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)  # not ComfyUI's start-up
    logging.getLogger("modular_lora").setLevel(logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the driver's, which then closes the pipe
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    worker = Worker(pickle.load(requests))
    with contextlib.closing(worker), contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pickle.dump(worker.answer(pickle.load(requests)), answers)
            answers.flush()


if __name__ == "__main__":
    main()
