"""Work for the thread that runs prompts, between two of them: ComfyUI's loaded models belong to that thread.

It waits for prompts in ``execution.PromptQueue.get``, which comes back without one when it is woken
(``main.prompt_worker`` then asks again).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from server import PromptServer

_jobs: deque[tuple[Future, Callable[[], Any]]] = deque()


def ask(job: Callable[[], Any]) -> Future:
    """Have a job done as soon as no prompt runs; what it returns or raises is the future's."""
    future: Future = Future()
    _jobs.append((future, job))
    queue = PromptServer.instance.prompt_queue
    with queue.mutex:
        queue.not_empty.notify_all()
    return future


def is_busy() -> bool:
    """Whether a prompt runs."""
    return bool(PromptServer.instance.prompt_queue.currently_running)


def between(original: Callable) -> Callable:
    """Around ``PromptQueue.get``: first what was asked for."""

    @functools.wraps(original)
    def get(self, *args, **kwargs):
        do()
        return original(self, *args, **kwargs)

    return get


def do() -> None:
    """Everything that waits."""
    while _jobs:
        future, job = _jobs.popleft()
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise
