"""Guard: one node behind the checkpoint loader, and the rest of the workflow stays as it is."""

from __future__ import annotations

from comfy_api.latest import io

from ..comfy_host import drop_in
from ..comfy_host.answers import answer
from ..comfy_host.enforcement import policy as policies
from ..comfy_host.model_folders import SAFETY_FOLDERS, lora_path
from ..comfy_host.node_report import CATEGORY, blocked
from ..modular_lora.files.cache import kept_sha256
from ..modular_lora.guard.build import GuardLimits, SafetyLora
from ..modular_lora.provenance.attestation import SUM
from .load import handles, read, safety_inputs, safety_problem
from .search_words import found_by
from .sockets import SafetySocket, combine_input, guard_report

NONE = "Guard gives no {0}, because none is connected to it: connect the checkpoint's {0}."


class Guard(io.ComfyNode):
    """MODEL, CLIP and VAE -> the same, guarded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraGuard",
            **found_by(
                "safety", "safety lora", "nsfw", "safe mode", "protect", "child safe", "censor", "guardrail", "drop-in"
            ),
            display_name="Guard",
            category=CATEGORY,
            description="Put it behind the checkpoint loader, or behind LoRA loaders, and leave the rest of the "
            "workflow as it is: LoRAs of any loader are kept beside the weights, together with the safety LoRA, and "
            "what any sampler and VAE Decode make of it is checked and attested.",
            inputs=[
                io.Model.Input("model", tooltip="From the checkpoint loader, or from LoRA loaders behind it."),
                *safety_inputs("Strength of the safety LoRA on U-Net and text encoder; must be above 0."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="From the checkpoint loader, or from LoRA loaders behind it."
                ),
                io.Vae.Input("vae", optional=True, tooltip="The VAE that decodes: it binds the attestation to images."),
                SafetySocket.Input(
                    "safety_lora", optional=True, tooltip="Further safety LoRAs, from Load Safety LoRA."
                ),
                combine_input(),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model", tooltip="The guarded model, for any node."),
                io.Clip.Output("clip_out", display_name="clip", tooltip="The guarded CLIP: encode prompts with it."),
                io.Vae.Output("vae_out", display_name="vae", tooltip="The VAE: images that it decodes are attested."),
                guard_report(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None, strength=None) -> bool | str:
        return safety_problem(lora_name, strength) or True

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_):
        return kept_sha256(lora_path(lora_name, *SAFETY_FOLDERS)), policies.fingerprint()

    @classmethod
    def execute(cls, model, lora_name, strength, clip=None, vae=None, safety_lora=(), combine=SUM) -> io.NodeOutput:
        own = SafetyLora(read(lora_path(lora_name, *SAFETY_FOLDERS), SAFETY_FOLDERS), strength)
        safety = (own, *handles(safety_lora, SafetyLora))
        limits = GuardLimits(combine=combine)
        made = drop_in.attach(model, clip, vae, safety, limits, node_id=cls.hidden.unique_id or "")
        policies.check_attached(made.model, made.clip, safety)
        line, _, more = made.summary.partition("\n")
        text = made.clip if clip is not None else blocked(NONE.format("CLIP"))
        decoder = made.vae if vae is not None else blocked(NONE.format("VAE"))
        return io.NodeOutput(made.model, text, decoder, f"{line}\n{made.report}", ui=answer(line, more))
