"""The first lines of the reports: what a person reads of runs and batches."""

from __future__ import annotations

import dataclasses

import pytest
from modular_lora_guard.modular_lora.guard.summary import once, per_image, run_line
from modular_lora_guard.modular_lora.provenance.attestation import Attestation, LoraRecord

SAFETY, OTHER = (LoraRecord("safety", f"{name}.safetensors", name * 64, 1.0, 1.0) for name in "ab")
TASKS = tuple(LoraRecord("task", f"{name}.safetensors", name * 64, 1.0, 1.0) for name in "cd")
RUN = Attestation("guarded", "pack", "SD15", "0" * 64, False, (SAFETY, *TASKS), {SAFETY.sha256: 1.0}, 84, 20, 1680)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "Guarded: the safety LoRA ran in all 20 evaluations of the model. 2 task LoRAs."),
        ({"loras": (SAFETY,)}, "Guarded: the safety LoRA ran in all 20 evaluations of the model. No task LoRA."),
        ({"evaluations": 1}, "Guarded: the safety LoRA ran in the one evaluation of the model. 2 task LoRAs."),
        (
            {"loras": (SAFETY, OTHER, TASKS[0])},
            "Guarded: 2 safety LoRAs ran in all 20 evaluations of the model. 1 task LoRA.",
        ),
        ({"net_strength": {}}, "Guarded: the safety LoRA acted on the text encoder alone. 2 task LoRAs."),
        (
            {"status": "guarded, merged base, outside start"},
            "Guarded, on a base with merged LoRAs or models, from a start that no guarded run made: the safety LoRA "
            "ran in all 20 evaluations of the model. 2 task LoRAs.",
        ),
        ({"status": "replaced by the gate"}, "Replaced by the gate: no run made this image."),
        (
            {"status": "not sampled", "evaluations": 0},
            "Not sampled: denoise 0, or no step to do, so this is what went into the sampler.",
        ),
    ],
)
def test_a_run_in_one_line(changes: dict, line: str) -> None:
    said = run_line(dataclasses.replace(RUN, **changes))
    assert said == line
    assert not any(lora.name in said or lora.sha256 in said for lora in RUN.loras)


def test_a_batch_has_a_line_for_each_image_only_where_they_differ() -> None:
    assert per_image(["good", "good"]) == "good"
    assert per_image(["good", "good", "bad", "good"]) == "Images 1 to 2: good\nImage 3: bad\nImage 4: good"
    assert per_image([]) == ""


def test_details_that_all_images_share_are_said_once() -> None:
    assert once(["a\nb", "a\nb"]) == "a\nb"
    assert once(["base\nimage 1\nend", "base\nimage 2\nend"]) == "base\nend\nimage 1: image 1\nimage 2: image 2"
