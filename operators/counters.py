"""What a server's record adds up to, in Prometheus' text format, by the package prometheus-client.

Counted are the lines of the record, those that are written and those that wait, since the process began.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..modular_lora.errors import GuardError

PACKAGE = '"prometheus-client>=0.20,<1"'
SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)  # upper bounds of a histogram's buckets
GATE_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class NoCounters(GuardError):
    """The package is not installed."""

    code = "counters.not-installed"


class Counters:
    """Counters of one process, in a registry of their own. Raises NoCounters without the package."""

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Histogram
        except ImportError as error:
            raise NoCounters(f"counters: prometheus-client is not there ({error}): pip install {PACKAGE}") from error
        self._registry = own = CollectorRegistry()
        prefix = "modular_lora"
        self._runs = Counter(
            f"{prefix}_runs", "Sampling runs that ended, by what they attest.", ["status"], registry=own
        )
        self._run_seconds = Histogram(
            f"{prefix}_run_seconds", "Seconds of a sampling run.", registry=own, buckets=SECONDS
        )
        self._refusals = Counter(
            f"{prefix}_refusals", "Refusals, by the policy's key that refused.", ["rule"], registry=own
        )
        self._images = Counter(f"{prefix}_gate_images", "Images that a gate judged.", ["answer"], registry=own)
        self._flags = Counter(
            f"{prefix}_gate_flags", "Images in which a gate found a label that it acts on.", ["label"], registry=own
        )
        self._gate_seconds = Histogram(
            f"{prefix}_gate_seconds", "Seconds in which a gate judged a batch.", registry=own, buckets=GATE_SECONDS
        )
        self._webhook = Counter(
            f"{prefix}_webhook", "Refusals sent to the webhook, by what became of them.", ["outcome"], registry=own
        )

    def count(self, kind: str, said: Mapping[str, Any]) -> None:
        """Add one line of the record: its kind and its fields."""
        if kind == "refused":
            for rule, n in (said.get("more") or {said["rule"]: 1}).items():
                self._refusals.labels(rule).inc(n)
        elif kind == "run":
            self._runs.labels(said["attestation"]["status"].partition(";")[0]).inc()  # without its edits
            self._run_seconds.observe(said["seconds"])
        elif kind == "gate":
            for answer in said["answers"]:
                self._images.labels(answer).inc()
            for label, n in said["labels"].items():
                self._flags.labels(label).inc(n)
            self._gate_seconds.observe(said["seconds"])

    def count_sent(self, outcome: str) -> None:
        """Add one message of the webhook: "delivered", "given up" or "dropped"."""
        self._webhook.labels(outcome).inc()

    def text(self) -> bytes:
        """Everything counted so far, in the text format 0.0.4."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
