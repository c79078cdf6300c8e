"""One worker of an audit: opens a pipeline once and draws what it is handed, in a process that the driver started.

Requests and answers are plain values, since the driver's classes need not be the worker's: inside ComfyUI the pack goes
by the name of its folder.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from ..modular_lora.errors import GuardError
from .engines import paint
from .plan import Arm, Item, Origin, Part, Pipeline, Sampling

logger = logging.getLogger("modular_lora")


class Worker:
    """Answers requests; its pipeline is open from the first one until ``close``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """``spec`` is a PipelineSpec as a dict."""
        self.spec, self.stack = spec, contextlib.ExitStack()
        self.pipeline: Pipeline | None = None  # from the first request on

    def answer(self, request: dict[str, Any] | None) -> dict[str, Any]:
        """Images and the pipeline's origin for a Unit as a dict, the origin for None; else "error" with a text."""
        try:
            return self._draw(request)
        except GuardError as error:  # the driver ends the audit with it
            return {"error": str(error)}
        except Exception as error:
            logger.error("%s", traceback.format_exc())
            return {"error": f"A worker failed ({type(error).__name__}: {error}): its traceback is in the log."}

    def _draw(self, request: dict[str, Any] | None) -> dict[str, Any]:
        if self.pipeline is None:
            module = importlib.import_module(f"..{self.spec['module']}", __package__)
            self.pipeline = self.stack.enter_context(getattr(module, self.spec["function"])(**self.spec["arguments"]))
        answer: dict[str, Any] = {"origin": vars(Origin.of(self.pipeline))}
        if request is not None:
            arm = Arm(**(request["arm"] | {"parts": tuple(Part(**part) for part in request["arm"]["parts"])}))
            items = [Item(**item) for item in request["items"]]
            answer["pictures"] = paint(self.pipeline, arm, items, Sampling(**request["sampling"]))
        return answer

    def close(self) -> None:
        self.stack.close()


def serve(spec: dict[str, Any], driver: Connection) -> None:
    """The work of a process: a request, an answer, until the driver closes its end or is gone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)  # not ComfyUI's start-up
    logging.getLogger("modular_lora").setLevel(logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the driver's, which then ends its workers
    os.dup2(2, 1)  # what libraries print must not get into the command's report
    with contextlib.closing(Worker(spec)) as worker, contextlib.suppress(EOFError, OSError):
        while True:
            driver.send(worker.answer(driver.recv()))
