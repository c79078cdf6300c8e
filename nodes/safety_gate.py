"""Safety Gate, and Guarded Sample and Gate: every image of a batch is judged before it goes on."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..comfy_host import gating
from ..comfy_host import patcher as host
from ..comfy_host.answers import answer
from ..comfy_host.gating import Gate, Judged, checked
from ..comfy_host.node_report import CATEGORY, blocked
from ..comfy_host.retries import Job, draw_until_clear
from ..gate.report import format_found, format_gate, format_limits, to_json
from ..modular_lora.guard.activity import in_words
from ..modular_lora.guard.report import format_attestation
from ..modular_lora.guard.summary import run_line
from ..modular_lora.provenance.ledger import known
from .sample import conditioning_inputs, latent_inputs, sampler_inputs, seed_input
from .search_words import found_by
from .sockets import GateSocket, model_input


def _gate_input() -> io.Input:
    tip = "From Gate Settings; without it, the best detector that is installed, its own thresholds, and blur."
    return GateSocket.Input("gate", optional=True, tooltip=tip)


def _outputs() -> list[io.Output]:
    return [
        io.Image.Output(
            "images_out",
            display_name="images",
            tooltip="The images. Those that the gate did not change are bit for bit the same; withheld ones "
            "are missing.",
        ),
        io.Boolean.Output("flagged", display_name="flagged", tooltip="Whether any image of the batch was flagged."),
        io.Mask.Output(
            "masks",
            display_name="masks",
            tooltip="One mask per image: 1 where something was found, enlarged as the settings say.",
        ),
        io.String.Output(
            "findings",
            display_name="findings",
            tooltip="JSON: detector, settings, and each image's flag, labels, scores and boxes (pixels).",
        ),
        io.String.Output("report", display_name="report", tooltip="Counts of what was found and what was done."),
        io.Boolean.Output(
            "flags",
            display_name="flags",
            is_output_list=True,
            tooltip="One flag per image, as a list: a connected node runs once for each.",
        ),
    ]


def _result(judged: Judged, gate: Gate, run: tuple[str, ...] = (), details: str = "") -> io.NodeOutput:
    """What both nodes give; ``run``: lines on the sampling, ``details``: its attestation in words."""
    outcome, detector, settings = judged.outcome, gate.detector, gate.settings
    line, *found = format_found(outcome, settings)
    shown = answer(line, "\n".join((*found, *run, *format_limits(detector))), judged.verdicts)
    report = "\n".join(filter(None, (format_gate(outcome, detector, settings, gate.second), *run, details)))
    images, masks = judged.images, torch.from_numpy(outcome.masks)
    if images is None:  # nothing goes on, and the job ends well: the verdict says why
        images = masks = blocked(None)
    findings = to_json(outcome, detector, settings)
    return io.NodeOutput(images, any(outcome.flags), masks, findings, report, list(outcome.flags), ui=shown)


class SafetyGate(io.ComfyNode):
    """Between the decode and the save: looks at every image of the batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraGate",
            **found_by(
                "nsfw",
                "nudenet",
                "safety checker",
                "censor",
                "nudity",
                "blur",
                "moderation",
                "content filter",
            ),
            display_name="Safety Gate",
            category=f"{CATEGORY}/gate",
            description="Asks a detector about every image of a batch and acts on those that it flags; the report "
            "says what the detector covers and what it does not.",
            inputs=[io.Image.Input("images", tooltip="Images to judge, all of the batch."), _gate_input()],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, gate=None) -> io.NodeOutput:
        gate = checked(gate)
        return _result(gating.judge(images, gate), gate)


class SampleAndGate(io.ComfyNode):
    """Sampler, decode and gate in one, so that flagged images can be drawn again one by one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraSampleAndGate",
            **found_by("nsfw", "nudenet", "safety checker", "retry", "resample", "censor", "moderation"),
            display_name="Guarded Sample and Gate",
            category=f"{CATEGORY}/gate",
            description="Guarded KSampler, Guarded VAE Decode and Safety Gate in one. Flagged images are sampled "
            "again, one by one, with a new seed; the action is applied to those that are still flagged at the last "
            "try. No latent and no preview leaves the node.",
            inputs=[
                model_input(),
                io.Vae.Input("vae", tooltip="The VAE that turns latents into images."),
                seed_input("Seed of the noise. A retry uses seed + retry × batch size + index in the batch."),
                *sampler_inputs(),
                *conditioning_inputs(),
                *latent_inputs(),
                io.Int.Input(
                    "max_tries",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="How often an image is sampled at most, the first time included.",
                ),
                _gate_input(),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        latent_image,
        denoise,
        max_tries,
        gate=None,
    ) -> io.NodeOutput:
        gate, patcher = checked(gate), host.unwrap(model)
        gating.check(gate)
        job = Job(patcher, vae, (steps, cfg, sampler_name, scheduler), positive, negative, latent_image, denoise)
        drawn = draw_until_clear(job, seed, max_tries, gate)
        judged = gating.judge(drawn.images, drawn.gate, chosen=gate)
        line, details = run_line(drawn.attested), format_attestation(drawn.attested)
        activity = in_words([known(image).run for image in drawn.images])
        return _result(judged, drawn.gate, (drawn.tries, *filter(None, (line, activity))), details)
