"""The counters, as Prometheus' own parser reads them."""

from __future__ import annotations

import sys

import pytest
from modular_lora_guard.operators.counters import Counters
from support.errors import refuses


def figures(counters: Counters) -> dict[tuple[str, ...], float]:
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(counters.text().decode())
        for sample in family.samples
    }


def test_lines_of_the_record_add_up() -> None:
    counters = Counters()
    counters.count("run", {"attestation": {"status": "guarded; edited: ImageScale"}, "seconds": 2.5})
    counters.count("run", {"attestation": {"status": "guarded"}, "seconds": 0.5})
    counters.count("refused", {"rule": "nodes.sampling", "reason": "x"})
    counters.count("refused", {"rule": "", "more": {"nodes.sampling": 3, 'odd "rule"\n': 1}})
    counters.count("gate", {"answers": ["pass", "review", "block", "block"], "labels": {"FACE": 3}, "seconds": 0.1})
    counters.count("policy", {})
    counters.count_sent("delivered")
    found = figures(counters)
    assert found["modular_lora_runs_total", "guarded"] == 2
    assert found["modular_lora_run_seconds_sum",] == 3.0
    assert found["modular_lora_run_seconds_count",] == 2
    assert found["modular_lora_run_seconds_bucket", "1.0"] == 1
    assert found["modular_lora_refusals_total", "nodes.sampling"] == 4
    assert found["modular_lora_refusals_total", 'odd "rule"\n'] == 1
    assert [found["modular_lora_gate_images_total", a] for a in ("pass", "review", "block")] == [1, 1, 2]
    assert found["modular_lora_gate_flags_total", "FACE"] == 3
    assert found["modular_lora_webhook_total", "delivered"] == 1


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with refuses("counters.not-installed", "prometheus-client"):
        Counters()
