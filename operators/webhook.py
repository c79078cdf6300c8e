"""Refusals sent to the policy's address, signed as Standard Webhooks has it, by a thread that nobody waits for.

A message is tried again with growing pauses until the receiver answers 2xx. What a process has not delivered when it
ends is lost here; the record has it.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import heapq
import hmac
import http.client
import itertools
import json
import logging
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..modular_lora.errors import GuardError
from ..modular_lora.util import bounds

PAUSES = (1.0, 5.0, 25.0, 125.0, 625.0)  # seconds between tries; after the last try it is given up
PATIENCE = 10.0  # seconds that one try may take
MOST_WAITING = 1000  # messages; further ones are dropped and counted
DELIVERED, GIVEN_UP, DROPPED = "delivered", "given up", "dropped"

log = logging.getLogger("modular_lora")
Destination = tuple[str, bytes]  # address and secret


class _Stay(urllib.request.HTTPRedirectHandler):
    """The policy's address alone: a redirect is an error like any other answer."""

    def redirect_request(self, *args: Any) -> None:
        return None


# Without a proxy: what the environment names as one is not the policy's address.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay())


@dataclass(order=True)
class _Message:
    due: float  # by time.monotonic
    number: int
    id: str = field(compare=False)  # the same in every try, by which a receiver knows it again
    body: bytes = field(compare=False)
    tried: int = field(default=0, compare=False)


def signature(secret: bytes, id: str, stamp: str, body: bytes) -> str:
    """``v1,`` and the base64 HMAC-SHA256 of ``id.stamp.body`` (Standard Webhooks, standardwebhooks.com).

    A secret in that specification's form, ``whsec_`` and base64, is used as the bytes that it stands for.
    """
    key = base64.b64decode(secret.removeprefix(b"whsec_")) if secret.startswith(b"whsec_") else secret
    digest = hmac.new(key, b".".join((id.encode(), stamp.encode(), body)), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


class Sender:
    """Sends messages one after the other.

    Args:
        destination: Where to, asked at every try, so that a policy that changes or goes holds for what waits too; None:
            nowhere, and what waits is dropped. A GuardError counts as a try that failed.
        outcome: Told what became of each message.
        pauses: See PAUSES.
    """

    def __init__(
        self,
        destination: Callable[[], Destination | None],
        outcome: Callable[[str], None],
        pauses: tuple[float, ...] = PAUSES,
    ):
        self._destination, self._outcome, self._pauses = destination, outcome, pauses
        self._waiting: list[_Message] = []
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def send(self, type: str, data: Mapping[str, Any]) -> None:
        """Have a message sent; returns at once, and never raises for what the network does."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        body = json.dumps({"type": type, "timestamp": now, "data": bounds.bounded(data)}).encode()
        with self._changed:
            full = len(self._waiting) >= MOST_WAITING
            if not full:
                one = _Message(time.monotonic(), next(self._numbers), f"msg_{uuid.uuid4().hex}", body)
                heapq.heappush(self._waiting, one)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="modular_lora_webhook", daemon=True)
                    self._thread.start()
                self._changed.notify()
        if full:
            self._outcome(DROPPED)

    def _run(self) -> None:
        while True:
            one = self._next()
            if (became := self._tried(one)) is not None:
                self._outcome(became)
                continue
            one.due = time.monotonic() + self._pauses[one.tried - 1]
            with self._changed:
                heapq.heappush(self._waiting, one)

    def _next(self) -> _Message:
        with self._changed:
            while True:
                pause = self._waiting[0].due - time.monotonic() if self._waiting else None
                if pause is not None and pause <= 0:
                    return heapq.heappop(self._waiting)
                self._changed.wait(pause)

    def _tried(self, one: _Message) -> str | None:
        """What became of a message; None: it is to be tried again."""
        try:
            to = self._destination()
            if to is None:
                return DROPPED
            _post(*to, one)
            return DELIVERED
        except (OSError, http.client.HTTPException, ValueError, GuardError) as error:
            one.tried += 1
            if one.tried <= len(self._pauses):
                return None
            log.warning("A refusal did not reach the webhook (%s); the record has it.", error)
            return GIVEN_UP


def _post(url: str, secret: bytes, one: _Message) -> None:
    """Raises OSError for any answer but 2xx."""
    stamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "webhook-id": one.id,
        "webhook-timestamp": stamp,
        "webhook-signature": signature(secret, one.id, stamp, one.body),
    }
    request = urllib.request.Request(url, one.body, headers, method="POST")
    with _DIRECT.open(request, timeout=PATIENCE) as answer:
        answer.read(1)
