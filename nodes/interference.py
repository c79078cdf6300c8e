"""LoRA Interference: how safety and task LoRAs overlap, layer by layer, as a table and a picture."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw

from ..comfy_host import introspection
from ..comfy_host.node_report import CATEGORY, show
from ..modular_lora.errors import GuardError
from ..modular_lora.guard.build import GuardLimits, SafetyLora, TaskLora, build_part
from ..modular_lora.guard.interference import Interference
from ..modular_lora.guard.report import format_interference
from .load import handles, stacked
from .search_words import found_by
from .sockets import SafetySocket, StackSocket, TaskSocket

WIDTH, ROW, LABEL, MIDDLE = 900, 12, 480, 690
BACKGROUND, INK, GRID = (250, 250, 248), (40, 40, 40), (210, 210, 205)
NEGATIVE, POSITIVE = (200, 60, 50), (50, 120, 190)


class LoraInterference(io.ComfyNode):
    """A report only: it changes nothing and refuses nothing that fits the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraInterference",
            **found_by("compare lora", "lora conflict", "cosine", "lora similarity", "analyse lora", "analyze lora"),
            display_name="LoRA Interference",
            category=f"{CATEGORY}/load",
            description="Cosine, energy overlap and net safety strength of safety and task LoRAs on every layer. A "
            "negative cosine across layers is the mark of a task LoRA trained on top of a safety-tuned model (arXiv "
            "2412.00357).",
            inputs=[
                io.Model.Input("model", tooltip="The model that gives the layers their names; it is not changed."),
                SafetySocket.Input("safety_lora", tooltip="From Load Safety LoRA."),
                TaskSocket.Input("task_lora", optional=True, tooltip="From Load Task LoRA."),
                StackSocket.Input("lora_stack", optional=True, tooltip="Task LoRAs from another pack's stacker."),
            ],
            outputs=[
                io.String.Output("table", display_name="table", tooltip="One line per layer."),
                io.Image.Output(
                    "picture",
                    display_name="picture",
                    tooltip="Cosine of safety and task on every layer; one image per safety LoRA.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, safety_lora, task_lora=(), lora_stack=()) -> io.NodeOutput:
        safety, tasks = handles(safety_lora, SafetyLora), (*handles(task_lora, TaskLora), *stacked(lora_stack))
        part = build_part("model", introspection.model_info(model), safety, tasks, GuardLimits(), enforce=False)
        for line in (line for line in part.lines if line.refusal):
            raise GuardError(line.refusal)
        table = "\n\n".join(format_interference(lora.name, result) for lora, result in part.interference)
        show(cls, "\n".join(line for line in table.splitlines() if line.startswith(("interference", "WARNING"))))
        return io.NodeOutput(table, _pictures([_draw(lora.name, result) for lora, result in part.interference]))


def _draw(name: str, result: Interference) -> Image.Image:
    """A bar per layer: cosine from -1 (left, red) to +1 (right, blue)."""
    picture = Image.new("RGB", (WIDTH, ROW * (len(result.layers) + 3)), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    title = f"{name}: mean cosine {result.mean_cosine:+.4f}, net strength {result.net_strength:.3f}"
    draw.text((8, 4), title, fill=INK)
    half = WIDTH - MIDDLE - 10
    for x in (MIDDLE - half, MIDDLE, MIDDLE + half):
        draw.line((x, 2 * ROW, x, picture.height), fill=GRID)
    for i, layer in enumerate(result.layers):
        y = ROW * (i + 2)
        draw.text((8, y), layer.layer.removeprefix("diffusion_model.").removesuffix(".weight")[-76:], fill=INK)
        x = MIDDLE + round(half * layer.cosine)
        draw.rectangle((min(x, MIDDLE), y + 2, max(x, MIDDLE), y + ROW - 3), fill=NEGATIVE if x < MIDDLE else POSITIVE)
    return picture


def _pictures(pictures: list[Image.Image]) -> torch.Tensor:
    """As one IMAGE batch (b h w c, float32 0..1), the shorter ones padded below."""
    height = max((p.height for p in pictures), default=ROW)
    batch = np.full((len(pictures) or 1, height, WIDTH, 3), BACKGROUND, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        batch[i, : picture.height] = np.asarray(picture)
    return torch.from_numpy(batch).float() / 255.0
