"""What an operator's own machines may ask over HTTP: counters, and whether this server guards; and the webhook.

Both routes are there where the policy names a token, and answer nobody else.
"""

from __future__ import annotations

import asyncio
import datetime
import hmac
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from aiohttp import web
from server import PromptServer

from ...modular_lora.errors import GuardError
from ...operators.counters import Counters, NoCounters
from ...operators.policy import OperatorPolicy, PolicyError
from ...operators.webhook import Destination, Sender
from . import idle, ready
from . import policy as policies

METRICS, READY = "/modular_lora/metrics", "/modular_lora/ready"
PATIENCE = 30.0  # seconds in which an idle server must have been tried
TEXT = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format

log = logging.getLogger("modular_lora")


@dataclass
class _Answer:
    """What a ready check found under one policy."""

    state: str  # of the policy
    said: Mapping[str, Any]
    ready: bool
    at: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    )
    clock: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        return time.monotonic() - self.clock


class Monitor:
    """The counters, the last ready check and the sender of one server."""

    def __init__(self) -> None:
        self._kept: _Answer | None = None
        self._asked: Future | None = None
        self._lock = threading.Lock()
        self._sender = Sender(_destination, self._sent)

    @cached_property
    def counters(self) -> Counters:
        """Made with the first line that is counted, not at ComfyUI's start; NoCounters without the package."""
        return Counters()

    def listen(self, policy: OperatorPolicy | None, kind: str, said: Mapping[str, Any]) -> None:
        """Count a line of the record, and send it where it is a refusal."""
        try:
            with self._lock, suppress(NoCounters):
                self.counters.count(kind, said)
            if kind == "refused" and policy is not None and policy.webhook.url:
                self._sender.send("modular_lora.refused", {**said, "policy": policy.sha256})
        except Exception:  # nobody waits for this, and nothing of a run hangs on it
            log.exception("A line of the record was not counted or sent.")

    def _sent(self, outcome: str) -> None:
        with self._lock, suppress(NoCounters):
            self.counters.count_sent(outcome)

    async def metrics(self, request: web.Request) -> web.Response:
        if (refused := _refused(request)) is not None:
            return refused
        try:
            with self._lock:
                counters = self.counters
        except NoCounters as error:
            return web.json_response({"error": str(error)}, status=501)
        return web.Response(body=counters.text(), headers={"Content-Type": TEXT})

    async def ready(self, request: web.Request) -> web.Response:
        if (refused := _refused(request)) is not None:
            return refused
        policy = policies.current()
        if policy is None:  # it went meanwhile
            return _none()
        kept = self._kept if self._kept is not None and self._kept.state == policy.state else None
        if kept is not None and kept.ready and kept.age < policy.monitor.ready_seconds:
            return _told(kept)
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = idle.ask(lambda: self._try(policy))
            asked = self._asked
        if kept is not None and idle.is_busy():  # it is tried when the prompt has ended
            return _told(kept)
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(asked)), PATIENCE)
        except asyncio.TimeoutError:
            busy = "a prompt runs, and nothing was tried under this policy yet: ask again"
            dead = f"the thread that runs prompts did nothing for {PATIENCE:g} s: restart the server"
            return web.json_response({"ready": False, "why": busy if idle.is_busy() else dead}, status=503)
        return _told(self._kept) if self._kept is not None else _none()

    def _try(self, policy: OperatorPolicy) -> None:
        try:
            self._kept = _Answer(policy.state, ready.prove(), True)
        except Exception as error:
            if not isinstance(error, GuardError):
                log.exception("The ready check could not be made.")
            why = str(error) if isinstance(error, GuardError) else f"{type(error).__name__}: {error}"
            self._kept = _Answer(policy.state, {"why": why}, False)


def register() -> None:
    """Add the routes and listen to the record; a server without routes (a test's) has none."""
    if (routes := getattr(PromptServer.instance, "routes", None)) is not None:
        monitor = Monitor()
        policies.listeners.append(monitor.listen)
        routes.get(METRICS)(monitor.metrics)
        routes.get(READY)(monitor.ready)


def _destination() -> Destination | None:
    """Where refusals go now."""
    policy = policies.current()
    return (policy.webhook.url, policy.secret(policy.webhook.secret)) if policy and policy.webhook.url else None


def _refused(request: web.Request) -> web.Response | None:
    """The answer to who has not the token; None: who asks may know."""
    try:
        policy = policies.current()
        if policy is None or not policy.monitor.token:
            return _none()
        token = policy.secret(policy.monitor.token)
    except PolicyError:  # the token is not known; that nothing is sampled, every prompt's answer says too
        return web.json_response({"ready": False, "why": "the policy cannot be read: see the log"}, status=503)
    kind, _, sent = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer" and hmac.compare_digest(sent.strip().encode("utf-8", "surrogateescape"), token):
        return None
    return web.json_response({"error": "a token is needed"}, status=401, headers={"WWW-Authenticate": "Bearer"})


def _none() -> web.Response:
    return web.json_response({"error": "No policy opens this address (monitor.token)."}, status=404)


def _told(kept: _Answer) -> web.Response:
    said = {"ready": kept.ready, "checked": kept.at, "age_seconds": round(kept.age, 1), **kept.said}
    return web.json_response(said, status=200 if kept.ready else 503)
