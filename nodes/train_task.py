"""Train Task LoRA: a LoRA of captioned images, trained on W0 alone."""

from __future__ import annotations

from comfy_api.latest import io

from ..comfy_host.model_folders import LORA_FOLDER, model_folder
from ..comfy_host.progress import NodeWatch, going_on
from ..comfy_host.training_files import data_set_option, data_set_state, inside, published, state_to_resume, work_folder
from ..modular_lora.files.reader import read_lora
from ..modular_lora.guard.build import SafetyLora, TaskLora
from ..modular_lora.places import check_writable
from ..training.options import TaskOptions
from .load import handles
from .search_words import found_by
from .sockets import SafetySocket, TaskOptionsSocket, TaskSocket
from .training import GROUP, OUTPUTS, RESUME, data_set_input, loaded_inputs, of_this_machine, option_inputs, outcome
from .training_options import asked, files_of, options_input, preset_input, steps_input


class TrainTaskLora(io.ComfyNode):
    """A task LoRA on W0; the safety LoRA is recorded, shown in previews, and out of the training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModularLoraTrainTask",
            **found_by("train lora", "lora training", "kohya", "sd-scripts", "fine-tune", "finetune", "dreambooth"),
            display_name="Train Task LoRA",
            category=GROUP,
            description="Trains a LoRA on captioned images, on the pretrained weights alone. The safety LoRA is "
            "frozen and detached: it is attached for previews only, so that they show what will be served.",
            inputs=[
                *loaded_inputs(),
                SafetySocket.Input("safety_lora", optional=True, tooltip="The safety LoRA it will be used with."),
                options_input(TaskOptionsSocket, "Task"),
                preset_input(TaskOptions),
                data_set_input(),
                *option_inputs(TaskOptions, ("output_name",)),
                steps_input(),
                *option_inputs(TaskOptions, ("seed",)),
                RESUME,
            ],
            outputs=[
                TaskSocket.Output("task_lora", display_name="task_lora", tooltip="The new LoRA, for Guard Model."),
                *OUTPUTS,
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, data_set, **_):
        return data_set_state(data_set)

    @classmethod
    def execute(cls, model, clip, vae, data_set, safety_lora=(), options=None, resume=False, **given):
        from ..comfy_host import trainer_model  # what trains is imported when it does: ComfyUI's start is shorter by it
        from ..training.kohya import engine as kohya
        from ..training.kohya.checkout import find_engine
        from ..training.task.train import train_task

        safety, name = handles(safety_lora, SafetyLora), given["output_name"]
        ours = {
            "output_dir": str(work_folder(name)),
            "resume": state_to_resume(name, resume),
            **data_set_option(data_set),
        }
        wanted = asked(cls, TaskOptions, given, options, lambda: trainer_model.preset_group(model), **ours)
        made, handed = wanted.options, wanted.handed
        data, watch = inside(made), NodeWatch(cls)
        check_writable(model_folder(LORA_FOLDER), "loras folder")
        with going_on(cls, name):
            if handed.engine == "kohya":
                base = trainer_model.kohya_base(model, clip, handed.ckpt_name, made, files_of(handed.kohya_files))
                found = kohya.train_task(find_engine(), made, base, watch, safety, data=data)
                trained = of_this_machine(found)
            else:
                with trainer_model.opened(model, clip, vae, made, made.network_train_text_encoder) as opened:
                    trained = train_task(opened, made, watch, safety, engine=trainer_model.ENGINE, data=data)
            path = published(trained.lora.path, LORA_FOLDER)
        return outcome(cls, trained, path, TaskLora(read_lora(path), 1.0, 1.0), watch, wanted.lines)
