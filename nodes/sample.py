"""Guarded KSampler, its Advanced form and Guarded Guider: the stock samplers on a model that must be guarded."""

from __future__ import annotations

from comfy_api.latest import io

from ..comfy_host import patcher as host
from ..comfy_host.answers import answer
from ..comfy_host.node_report import CATEGORY
from ..comfy_host.stock import MAX_SEED, cfg_guider, sampler_names, scheduler_names
from ..modular_lora.guard.activity import in_words
from ..modular_lora.guard.report import format_attestation
from ..modular_lora.guard.summary import run_line
from ..modular_lora.provenance.ledger import latent_runs
from .search_words import found_by
from .sockets import model_input

MAX_STEP = 10_000


def conditioning_inputs() -> list[io.Input]:
    made = "encoded with Guard Model's CLIP output"
    return [
        io.Conditioning.Input("positive", tooltip=f"What to generate, {made}."),
        io.Conditioning.Input("negative", tooltip=f"What to leave out, {made}."),
    ]


def sampler_inputs() -> list[io.Input]:
    cfg = "Classifier-free guidance scale: how closely the image follows the prompt."
    return [
        io.Int.Input("steps", default=20, min=1, max=MAX_STEP, tooltip="Number of denoising steps."),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=cfg),
        io.Combo.Input("sampler_name", sampler_names(), tooltip="Sampling algorithm."),
        io.Combo.Input("scheduler", scheduler_names(), tooltip="How the noise is removed over the steps."),
    ]


def latent_inputs() -> list[io.Input]:
    part = "1 starts from noise; less keeps part of the latent image."
    return [
        io.Latent.Input("latent_image", tooltip="Latent to denoise; its size is the size of the image."),
        io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=part),
    ]


def seed_input(tooltip: str = "Seed of the noise.", name: str = "seed") -> io.Input:
    return io.Int.Input(name, default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def _outputs() -> list[io.Output]:
    return [
        io.Latent.Output(
            "latent", display_name="latent", tooltip="The sampled latent; decode it with Guarded VAE Decode."
        ),
        io.String.Output(
            "report",
            display_name="report",
            tooltip="Attestation of this run: evaluations, branch calls, hashes, strengths.",
        ),
    ]


def _run(model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent, **options) -> io.NodeOutput:
    patcher = host.unwrap(model)
    out = host.common_ksampler(
        patcher, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent, **options
    )
    attested = host.attestation(patcher)
    line, activity = run_line(attested), in_words(latent_runs(out["samples"]))
    report = "\n".join(filter(None, (line, format_attestation(attested), activity)))
    return io.NodeOutput(out, report, ui=answer(line, activity))


class GuardedKSampler(io.ComfyNode):
    """The stock KSampler, attested."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraKSampler",
            **found_by("ksampler", "safe sampler", "sampler"),
            display_name="Guarded KSampler",
            category=f"{CATEGORY}/sample",
            description="KSampler for a guarded model: the same result as the stock node, and a check that every "
            "branch ran.",
            inputs=[
                model_input(),
                seed_input(),
                *sampler_inputs(),
                *conditioning_inputs(),
                *latent_inputs(),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
    ) -> io.NodeOutput:
        settings = (seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image)
        return _run(model, *settings, denoise=denoise)


class GuardedKSamplerAdvanced(io.ComfyNode):
    """The stock KSampler (Advanced), attested."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        switch = ["enable", "disable"]
        return io.Schema(
            node_id="ModularLoraKSamplerAdvanced",
            **found_by("ksampler advanced", "safe sampler", "two passes"),
            display_name="Guarded KSampler (Advanced)",
            category=f"{CATEGORY}/sample",
            description="KSampler (Advanced) for a guarded model, and a check that every branch ran.",
            inputs=[
                model_input(),
                io.Combo.Input("add_noise", switch, tooltip="Add noise to the latent first."),
                seed_input(name="noise_seed"),
                *sampler_inputs(),
                *conditioning_inputs(),
                io.Latent.Input("latent_image", tooltip="Latent to denoise."),
                io.Int.Input("start_at_step", default=0, min=0, max=MAX_STEP, tooltip="First step of this run."),
                io.Int.Input(
                    "end_at_step", default=MAX_STEP, min=0, max=MAX_STEP, tooltip="Step at which this run ends."
                ),
                io.Combo.Input(
                    "return_with_leftover_noise", switch[::-1], tooltip="Leave the remaining noise in the latent."
                ),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        add_noise,
        noise_seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        latent_image,
        start_at_step,
        end_at_step,
        return_with_leftover_noise,
    ) -> io.NodeOutput:
        settings = (noise_seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image)
        return _run(
            model,
            *settings,
            disable_noise=add_noise == "disable",
            start_step=start_at_step,
            last_step=end_at_step,
            force_full_denoise=return_with_leftover_noise == "disable",
        )


class GuardedGuider(io.ComfyNode):
    """A CFG guider on a guarded model, for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraGuider",
            **found_by("cfg guider", "cfgguider", "sampler custom advanced"),
            display_name="Guarded Guider",
            category=f"{CATEGORY}/sample",
            description="CFG guider on a guarded model, for SamplerCustomAdvanced; the run is checked and attested as "
            "in the Guarded KSampler, and Guarded VAE Decode shows the report.",
            inputs=[
                model_input(),
                *conditioning_inputs(),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance scale.",
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg) -> io.NodeOutput:
        return io.NodeOutput(cfg_guider(host.unwrap(model), positive, negative, cfg))
