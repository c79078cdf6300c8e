"""Make Safety LoRA: words in, a safety LoRA out, in closed form."""

from __future__ import annotations

from comfy_api.latest import io

from ..comfy_host.answers import answer
from ..comfy_host.model_folders import SAFETY_FOLDER, model_folder
from ..comfy_host.training_files import published, work_folder
from ..modular_lora.files.reader import read_lora
from ..modular_lora.guard.build import SafetyLora
from ..modular_lora.guard.summary import warnings
from ..modular_lora.places import check_writable
from ..training.safety.closed.options import MakeOptions
from .sockets import SafetySocket
from .training import GROUP, gathered, more_input, option_inputs, saved_as

OPTIONS = (
    "output_name", "concept", "synonyms", "guide", "preserve", "everything_else", "method", "tokens", "network_dim",
    "save_precision",
)  # fmt: skip


class MakeSafetyLora(io.ComfyNode):
    """A safety LoRA made of words alone, without training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraMakeSafety",
            display_name="Make Safety LoRA",
            category=GROUP,
            description="Makes a LoRA that takes a concept away, from words alone and without training: the layers "
            "that take the text answer to the concept as to the guide, and to what is preserved as before.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint's MODEL, straight from its loader; it is not changed."),
                io.Clip.Input("clip", tooltip="The checkpoint's CLIP."),
                *option_inputs(MakeOptions, OPTIONS),
                more_input("make-safety"),
            ],
            outputs=[
                SafetySocket.Output(
                    "safety_lora", display_name="safety_lora", tooltip="The new LoRA, for Guard Model."
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Rank, what the kept prompts leave room for, how far kept and erased words moved.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, more_options="", **values) -> io.NodeOutput:
        from ..comfy_host import text_inputs, trainer_model  # imported when it runs, as what trains
        from ..training.safety.closed.make import make_safety

        ours = {"output_dir": str(work_folder(values["output_name"]))}
        made = gathered(MakeOptions, values, more_options, **ours)
        check_writable(model_folder(SAFETY_FOLDER), f"{SAFETY_FOLDER} folder")
        made_lora = make_safety(text_inputs.opened(model, clip), made, engine=trainer_model.ENGINE)
        path = published(made_lora.lora.path, SAFETY_FOLDER)
        line = f"A safety LoRA of {len(made_lora.lora.layers)} layers was made."
        report = f"{line}\n{saved_as(path)}\n{made_lora.report}"
        more = "\n".join((saved_as(path), *warnings(made_lora.report), made_lora.calibrated))
        return io.NodeOutput((SafetyLora(read_lora(path), 1.0),), report, ui=answer(line, more))
