"""Safety Gate, and Guarded Sample and Gate: every picture of a batch is judged before it goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..comfy_host import patcher as host
from ..comfy_host.enforcement import policy as policies
from ..comfy_host.node_report import CATEGORY, show
from ..gate.errors import GateError
from ..gate.gate import Outcome, run
from ..gate.report import format_gate, to_json
from ..modular_lora.errors import GuardError
from ..modular_lora.guard.report import format_attestation
from ..modular_lora.provenance import ledger
from ..modular_lora.provenance.attestation import GateRecord, tensor_sha256
from .decode import decode
from .gate_settings import Gate, checked
from .sample import MAX_SEED, conditioning_inputs, latent_inputs, sampler_inputs, seed_input
from .sockets import GateSocket, model_input

SUBSTITUTED = {"replace": "replaced by the gate", "empty": "emptied by the gate"}  # action -> status: no run made it


def _gate_input() -> io.Input:
    tip = "From Gate Settings; without it, the best detector that is installed, its own thresholds, and blur."
    return GateSocket.Input("gate", optional=True, tooltip=tip)


def _outputs() -> list[io.Output]:
    return [
        io.Image.Output("images_out", display_name="images", tooltip="The pictures; those not acted on as they came."),
        io.Boolean.Output("flagged", display_name="flagged", tooltip="Whether any picture of the batch was flagged."),
        io.Mask.Output("masks", display_name="masks", tooltip="One a picture: 1 where something was found, grown."),
        io.String.Output(
            "findings",
            display_name="findings",
            tooltip="JSON: detector, settings, and each picture's flag, labels, scores and boxes (pixels).",
        ),
        io.String.Output("report", display_name="report", tooltip="What was found and done, counted."),
        io.Boolean.Output(
            "flags",
            display_name="flags",
            is_output_list=True,
            tooltip="One flag a picture, as a list: what is connected runs once for each.",
        ),
    ]


def outcome_of(pictures: torch.Tensor, gate: Gate) -> Outcome:
    """See gate.gate.run; pictures b h w 3."""
    return run(pictures.detach().float().cpu().numpy(), gate.detector, gate.settings, gate.replacement)


def _reporting(gate: Gate) -> Gate:
    return replace(gate, settings=replace(gate.settings, action="report"))


def judge(pictures: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, Outcome]:
    """Pictures (b h w 3) as the gate hands them on, and what it found; what it decided is remembered by content.

    A picture that the gate changed keeps its run's attestation, and the record says that the gate changed it; what it
    put in a picture's place is not called guarded. RefusedError for a gate that is looser than the operator's policy.
    """
    policies.check_gate(gate.settings, gate.settings_sha256, gate.detector)
    outcome = outcome_of(pictures, gate)
    out = pictures.clone() if any(outcome.changed) else pictures
    for i in np.flatnonzero(outcome.changed):
        out[i] = torch.from_numpy(outcome.pictures[i]).to(out)
    if gate.settings.action == "replace" and any(outcome.changed):
        _check_replacement(out[outcome.changed.index(True)], gate)
    for before, after, flagged, changed in zip(pictures, out, outcome.flags, outcome.changed, strict=True):
        _remember(before, after, gate, flagged, changed)
    policies.record_gate(gate.settings_sha256, gate.detector, outcome)
    return out, outcome


def _check_replacement(picture: torch.Tensor, gate: Gate) -> None:
    """GateError where the gate flags what it was given to put in a flagged picture's place (h w 3)."""
    if any(outcome_of(picture[None], _reporting(gate)).flags):
        raise GateError(f"replacement: {gate.detector.name} flags it too: connect another picture.")


def _remember(before: torch.Tensor, after: torch.Tensor, gate: Gate, flagged: bool, changed: bool) -> None:
    source, detector, action = tensor_sha256(before), gate.detector, gate.settings.action
    record = GateRecord(detector.name, detector.sha256, gate.settings_sha256, action, flagged, changed, source)
    ledger.record_gate(record, after, SUBSTITUTED.get(action, ""))


def _result(
    node: type[io.ComfyNode], pictures: torch.Tensor, outcome: Outcome, gate: Gate, before: str = "", after: str = ""
) -> io.NodeOutput:
    report = "\n".join(filter(None, (before, format_gate(outcome, gate.detector, gate.settings), after)))
    show(node, report)
    findings = to_json(outcome, gate.detector, gate.settings)
    masks = torch.from_numpy(outcome.masks)
    return io.NodeOutput(pictures, any(outcome.flags), masks, findings, report, list(outcome.flags))


class SafetyGate(io.ComfyNode):
    """Between the decode and the save: looks at every picture of the batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraGate",
            display_name="Safety Gate",
            category=f"{CATEGORY}/gate",
            description="Asks a detector about every picture of a batch and acts on those that it flags; the report "
            "says what the detector covers and what it does not.",
            inputs=[io.Image.Input("images", tooltip="Pictures to judge, all of the batch."), _gate_input()],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images, gate=None) -> io.NodeOutput:
        gate = checked(gate)
        pictures, outcome = judge(images, gate)
        return _result(cls, pictures, outcome, gate)


class SampleAndGate(io.ComfyNode):
    """Sampler, decode and gate in one, so that flagged pictures can be drawn again one by one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraSampleAndGate",
            display_name="Guarded Sample and Gate",
            category=f"{CATEGORY}/gate",
            description="Guarded KSampler, Guarded VAE Decode and Safety Gate in one. Flagged pictures are drawn "
            "again, each by itself with a new seed; what is flagged at the last try too is acted on. No latent and no "
            "preview leaves the node.",
            inputs=[
                model_input(),
                io.Vae.Input("vae", tooltip="The VAE that turns latents into pictures."),
                seed_input("Seed of the noise; of a retry it is seed + retry × batch size + index in the batch."),
                *sampler_inputs(),
                *conditioning_inputs(),
                *latent_inputs(),
                io.Int.Input("max_tries", default=3, min=1, max=100, tooltip="Times that a picture is drawn at most."),
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
        policies.check_gate(gate.settings, gate.settings_sha256, gate.detector)
        job = _Job(patcher, vae, (steps, cfg, sampler_name, scheduler), positive, negative, latent_image, denoise)
        if max_tries > 1:
            job.check_hints()
        shots = job.draw(seed)
        attested, tries, n = format_attestation(host.attestation(patcher)), [1] * len(shots), len(shots)
        pending = _flagged(shots, range(n), gate)
        for retry in range(1, max_tries):
            for i in pending:
                (shots[i],) = job.of(i).draw((seed + retry * n + i) & MAX_SEED)
                tries[i] += 1
            pending = _flagged(shots, pending, gate)
        final = _sparing(gate, all_flagged=len(pending) == n)
        pictures, outcome = judge(torch.cat(shots), final)
        return _result(cls, pictures, outcome, final, _tried(tries, pending, spared=final is not gate), attested)


@dataclass(frozen=True)
class _Job:
    """What is to be drawn. A shot is what one latent decodes to: f h w c, f 1, or the frames of a video."""

    patcher: Any
    vae: Any
    sampler: tuple  # steps, cfg, sampler, scheduler
    positive: list
    negative: list
    latent: dict
    denoise: float

    def draw(self, seed: int) -> list[torch.Tensor]:
        """The shots, as Guarded KSampler and Guarded VAE Decode make them, attested as there."""
        out = host.common_ksampler(
            self.patcher, seed, *self.sampler, self.positive, self.negative, self.latent, denoise=self.denoise
        )
        pictures, _ = decode(self.vae, out["samples"])
        return list(pictures.reshape(len(out["samples"]), -1, *pictures.shape[1:]))

    def of(self, i: int) -> _Job:
        """The same for one latent of the batch alone, with what of the conditioning belongs to it."""
        n = len(self.latent["samples"])
        single = {key: value for key, value in self.latent.items() if key != "batch_index"}
        single |= {key: _row(single[key], i) for key in ("samples", "noise_mask") if key in single}
        return replace(
            self, latent=single, positive=_single(self.positive, i, n), negative=_single(self.negative, i, n)
        )

    def check_hints(self) -> None:
        """GuardError where a ControlNet has a hint a picture: a retry could not tell which is its own."""
        most = max(
            (len(hint) for _, options in (*self.positive, *self.negative) for hint in _hints(options)), default=0
        )
        if most > 1 and len(self.latent["samples"]) > 1:
            raise GuardError(
                f"A ControlNet has {most} hint pictures for one batch, and retries draw single pictures: give it one "
                "hint, or set max_tries to 1."
            )


def _hints(options: dict) -> Iterable[torch.Tensor]:
    """Hints of a conditioning's ControlNets (attributes of ControlBase: 0.3.75, newer by reading)."""
    control = options.get("control")
    while control is not None:
        if (hint := getattr(control, "cond_hint_original", None)) is not None:
            yield hint
        control = getattr(control, "previous_controlnet", None)


def _single(conditioning: list, i: int, n: int) -> list:
    """Conditioning of picture i of n: ComfyUI repeats a shorter batch, and takes one of n as a prompt a picture."""
    own = lambda v: _row(v, i) if isinstance(v, torch.Tensor) and v.ndim > 1 and len(v) == n else v  # noqa: E731
    return [[_row(made, i), {key: own(value) for key, value in options.items()}] for made, options in conditioning]


def _row(batch: torch.Tensor, i: int) -> torch.Tensor:
    """Row i as a batch of one; a shorter batch is repeated, as ComfyUI does (repeat_to_batch_size)."""
    i %= len(batch)
    return batch[i : i + 1]


def _flagged(shots: list[torch.Tensor], asked: Iterable[int], gate: Gate) -> list[int]:
    """Which of the ``asked`` shots have a flagged picture."""
    if not (asked := list(asked)):
        return []
    report = _reporting(gate)
    flags = np.reshape(outcome_of(torch.cat([shots[i] for i in asked]), report).flags, (len(asked), -1))
    return [i for i, any_flagged in zip(asked, flags.any(1), strict=True) if any_flagged]


def _sparing(gate: Gate, all_flagged: bool) -> Gate:
    """The gate, with empty in place of block, which would take all for one; where no picture is left, block stays."""
    if gate.settings.action != "block" or all_flagged:
        return gate
    return replace(gate, settings=replace(gate.settings, action="empty"))


def _tried(tries: list[int], pending: list[int], spared: bool) -> str:
    """Tries of every picture that took more than one, counted from 1; what becomes of those still flagged."""
    lines = [f"{sum(tries)} tries for {len(tries)} pictures"]
    for i, n in enumerate(tries):
        if n > 1:
            lines.append(f"  picture {i + 1} {'still flagged' if i in pending else 'passed'} at try {n}")
    if spared:
        lines.append("  block: what is still flagged is left empty, so that the others pass")
    return "\n".join(lines)
