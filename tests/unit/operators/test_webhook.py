"""The webhook's sender against a receiver on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.operators import webhook
from modular_lora_guard.operators.policy import PolicyError
from modular_lora_guard.operators.webhook import DELIVERED, DROPPED, GIVEN_UP, Sender, signature
from support.small_proxy import receiver

SECRET = b"a secret drawn at random"


class Outcomes:
    """What became of messages, and waiting for them."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._more = threading.Condition()

    def __call__(self, outcome: str) -> None:
        with self._more:
            self.found.append(outcome)
            self._more.notify()

    def wait(self, n: int) -> list[str]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.found) >= n, timeout=120)
        return self.found


def sent(statuses: list[int], pauses: tuple[float, ...] = (0.01, 0.01)) -> tuple[list[str], list[Any]]:
    outcomes = Outcomes()
    with receiver(statuses) as (url, came):
        Sender(lambda: (url, SECRET), outcomes, pauses).send("kind", {"a": 1})
        return outcomes.wait(1), came


@pytest.mark.parametrize(
    ("statuses", "outcome", "tries"),
    [([], DELIVERED, 1), ([503, 302], DELIVERED, 3), ([500, 404, 301], GIVEN_UP, 3)],
)
def test_a_message_is_tried_again_the_same_until_it_is_taken(statuses: list[int], outcome: str, tries: int) -> None:
    found, came = sent(statuses)
    assert found == [outcome]
    assert len(came) == tries, "a redirect is not followed"
    assert len({(headers["webhook-id"], body) for headers, body in came}) == 1
    said = json.loads(came[0][1])
    assert (said["type"], said["data"]) == ("kind", {"a": 1})


@given(st.binary(min_size=16, max_size=64), st.text(max_size=40), st.binary(max_size=200))
def test_the_signature_is_that_of_standard_webhooks(secret: bytes, id: str, body: bytes) -> None:
    digest = hmac.digest(secret, id.encode("utf-8", "replace") + b".17." + body, hashlib.sha256)
    shown = b"whsec_" + base64.b64encode(secret)
    id = id.encode("utf-8", "replace").decode()
    assert signature(shown, id, "17", body) == "v1," + base64.b64encode(digest).decode()
    if not secret.startswith(b"whsec_"):
        assert signature(secret, id, "17", body) == signature(shown, id, "17", body)


def test_what_waits_goes_where_the_policy_of_then_says() -> None:
    outcomes = Outcomes()

    def broken() -> tuple[str, bytes]:
        raise PolicyError("cannot be read")

    with receiver([]) as (url, came):
        answers: list[Callable[[], Any]] = [broken, lambda: (url, SECRET), lambda: None]
        sender = Sender(lambda: answers.pop(0)(), outcomes, (0.01,))
        sender.send("kind", {"n": 1})
        outcomes.wait(1)
        sender.send("kind", {"n": 2})
        assert outcomes.wait(2) == [DELIVERED, DROPPED]
        assert [json.loads(body)["data"] for _, body in came] == [{"n": 1}]


def test_beyond_what_may_wait_messages_are_dropped_at_once_and_none_is_lost_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhook, "MOST_WAITING", 2)
    go, outcomes = threading.Event(), Outcomes()

    def later() -> None:
        assert go.wait(120)

    sender = Sender(later, outcomes)
    for n in range(6):
        sender.send("kind", {"n": n})
    go.set()
    assert outcomes.wait(6) == [DROPPED] * 6
