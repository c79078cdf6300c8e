"""Train Safety LoRA: a LoRA that takes a concept away, trained from prompts alone."""

from __future__ import annotations

from comfy_api.latest import io

from ..comfy_host.model_folders import SAFETY_FOLDER, model_folder
from ..comfy_host.progress import NodeWatch, going_on
from ..comfy_host.training_files import published, state_to_resume, work_folder
from ..modular_lora.files.reader import read_lora
from ..modular_lora.guard.build import SafetyLora
from ..modular_lora.places import check_writable
from ..training.options import SafetyOptions
from .search_words import found_by
from .sockets import SafetyOptionsSocket, SafetySocket
from .training import GROUP, OUTPUTS, RESUME, loaded_inputs, of_this_machine, option_inputs, outcome
from .training_options import asked, files_of, options_input, preset_input, steps_input


class TrainSafetyLora(io.ComfyNode):
    """A safety LoRA that erases a concept given by prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraTrainSafety",
            **found_by("train lora", "erase concept", "concept erasure", "unlearning", "esd", "leco", "sdd", "nsfw"),
            display_name="Train Safety LoRA",
            category=GROUP,
            description="Trains a LoRA that erases a concept, from prompts alone (ESD, SDD or LECO), and keeps what "
            "is listed under preserve as the base has it.",
            inputs=[
                *loaded_inputs(),
                options_input(SafetyOptionsSocket, "Safety"),
                preset_input(SafetyOptions),
                *option_inputs(SafetyOptions, ("output_name", "concept", "preserve")),
                steps_input(),
                *option_inputs(SafetyOptions, ("seed",)),
                RESUME,
            ],
            outputs=[
                SafetySocket.Output(
                    "safety_lora", display_name="safety_lora", tooltip="The new LoRA, for Guard Model."
                ),
                *OUTPUTS,
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip, vae, options=None, resume=False, **given):
        from ..comfy_host import trainer_model  # what trains is imported when it does: ComfyUI's start is shorter by it
        from ..training.kohya import engine as kohya
        from ..training.kohya.checkout import find_engine
        from ..training.safety.train import train_safety

        name = given["output_name"]
        ours = {"output_dir": str(work_folder(name)), "resume": state_to_resume(name, resume)}
        wanted = asked(cls, SafetyOptions, given, options, lambda: trainer_model.preset_group(model), **ours)
        made, handed, watch = wanted.options, wanted.handed, NodeWatch(cls)
        check_writable(model_folder(SAFETY_FOLDER), f"{SAFETY_FOLDER} folder")
        with going_on(cls, name):
            if handed.engine == "kohya":
                base = trainer_model.kohya_base(model, clip, handed.ckpt_name, made, files_of(handed.kohya_files))
                trained = of_this_machine(kohya.train_safety(find_engine(), made, base, watch))
            else:
                with trainer_model.opened(model, clip, vae, made) as opened:
                    trained = train_safety(opened, made, watch, engine=trainer_model.ENGINE)
            path = published(trained.lora.path, SAFETY_FOLDER)
        return outcome(cls, trained, path, SafetyLora(read_lora(path), 1.0), watch, wanted.lines)
