"""The ready check in the real ComfyUI: what it shows, and that it says no where guard or hooks are not whole."""

from __future__ import annotations

import importlib

import pytest
from support.errors import refuses
from support.operator_graphs import required
from support.small_unet import small_unet

PLACE = "modular_lora_guard.comfy_host"


@pytest.fixture
def ready(comfy):
    return importlib.import_module(f"{PLACE}.enforcement.ready")


def test_a_tiny_run_shows_that_the_policy_refuses_and_the_guard_acts(enforced, ready) -> None:
    said = ready.prove()
    assert said["refused"] == "guard.required"
    assert said["guarded"].startswith("guarded, 1 evaluations")
    line = enforced.record()[-1]
    assert (line["kind"], line["guarded"]) == ("ready", said["guarded"])
    assert not [one for one in enforced.record() if one["kind"] in ("run", "refused")], "it is no run of anybody's"


def test_a_required_safety_lora_must_be_there(operator, ready) -> None:
    operator.write(required("f" * 64))
    with refuses("ready.safety-lora-missing", "f" * 16):
        ready.prove()


def test_without_the_hooks_it_is_not_ready(enforced, ready, monkeypatch) -> None:
    from comfy import model_base, samplers

    for owner, name in ((samplers.CFGGuider, "sample"), (model_base.BaseModel, "apply_model")):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    with refuses("ready.not-refused"):
        ready.prove()


def test_a_guard_that_does_not_act_as_the_merge_does_is_not_ready(enforced, ready, monkeypatch) -> None:
    base, guarded, _ = ready._models()
    other = small_unet()
    other.model.diffusion_model.out[2].weight.data *= 1.1
    monkeypatch.setattr(ready, "_models", lambda: (base, guarded, other))
    with refuses("ready.not-guarded", "off by"):
        ready.prove()
    monkeypatch.undo()
    ready.prove()


def test_without_a_policy_there_is_nothing_to_prove(operator, ready) -> None:
    with refuses("ready.no-policy"):
        ready.prove()
