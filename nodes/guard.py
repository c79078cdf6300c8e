"""Guard Model, and the explicit way back to MODEL for packs that take nothing else."""

from __future__ import annotations

from comfy_api.latest import io

from ..comfy_host import patcher
from ..comfy_host.answers import answer
from ..comfy_host.enforcement import policy as policies
from ..comfy_host.node_report import CATEGORY, blocked
from ..modular_lora.guard.build import GuardLimits, SafetyLora, TaskLora
from ..modular_lora.provenance.attestation import SUM
from .load import handles, stacked
from .search_words import found_by
from .sockets import GuardedSocket, SafetySocket, StackSocket, TaskSocket, combine_input, guard_report, rarely

NO_CLIP = "Guard Model gives no CLIP, because none is connected to it: connect the checkpoint's CLIP."


class GuardModel(io.ComfyNode):
    """MODEL + safety LoRAs + task LoRAs -> GUARDED_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraGuardModel",
            **found_by("apply lora", "lora guard", "safety", "nsfw", "unmerged lora"),
            display_name="Guard Model",
            category=CATEGORY,
            description="Puts the safety LoRA and task LoRAs beside the model's weights, never into them, and checks "
            "that each of them applies. Model patches (ModelSampling, FreeU, PAG, ...) go before this node.",
            inputs=rarely(
                [
                    io.Model.Input("model", tooltip="The pretrained model (W0), from the checkpoint loader."),
                    SafetySocket.Input("safety_lora", tooltip="From Load Safety LoRA."),
                    TaskSocket.Input("task_lora", optional=True, tooltip="From Load Task LoRA."),
                    StackSocket.Input("lora_stack", optional=True, tooltip="Task LoRAs from another pack's stacker."),
                    io.Clip.Input(
                        "clip",
                        optional=True,
                        tooltip="The checkpoint's CLIP; needed where a LoRA has text-encoder layers.",
                    ),
                    io.Boolean.Input(
                        "accept_merged",
                        default=False,
                        optional=True,
                        tooltip="Accept a MODEL or CLIP that comes from a LoRA loader or a merge: LoRAs become task "
                        "LoRAs, a merge becomes part of the base, and every report of the image says so.",
                    ),
                    combine_input(),
                ],
                "accept_merged",
            ),
            outputs=[
                GuardedSocket.Output(
                    "guarded_model",
                    display_name="guarded_model",
                    tooltip="For the Guarded samplers; no merging or saving node takes it.",
                ),
                io.Clip.Output("guarded_clip", display_name="clip", tooltip="Encode every prompt with this CLIP."),
                guard_report(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return policies.fingerprint()

    @classmethod
    def execute(
        cls, model, safety_lora, task_lora=(), lora_stack=(), clip=None, accept_merged=False, combine=SUM
    ) -> io.NodeOutput:
        safety, tasks = handles(safety_lora, SafetyLora), (*handles(task_lora, TaskLora), *stacked(lora_stack))
        guarded, guarded_clip = patcher.guard(model, clip, safety, tasks, accept_merged, GuardLimits(combine=combine))
        policies.check_guarded(guarded, guarded_clip, safety, tasks)
        line, _, more = guarded.summary.partition("\n")
        if clip is None:
            guarded_clip = blocked(NO_CLIP)
        return io.NodeOutput(guarded, guarded_clip, f"{line}\n{guarded.report}", ui=answer(line, more))


class GuardedAsModel(io.ComfyNode):
    """The second barrier: a MODEL that is still guarded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraGuardedAsModel",
            **found_by("unwrap model", "to model", "convert"),
            display_name="Guarded Model as MODEL",
            category=CATEGORY,
            is_deprecated=True,
            description="Deprecated: Guard gives a guarded MODEL at once. For packs that only take MODEL (detailers, "
            "upscalers). The MODEL stays guarded: nodes that would merge, save or drop the LoRAs stop with an error.",
            inputs=[GuardedSocket.Input("guarded_model", tooltip="From Guard Model.")],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The guarded model as a MODEL.")],
        )

    @classmethod
    def execute(cls, guarded_model) -> io.NodeOutput:
        policies.check_open("guarded_as_model")
        return io.NodeOutput(patcher.unwrap(guarded_model))
