"""What accelerate starts in the child process: the pack beside sd-scripts, then one of its scripts, unchanged.

``python entry.py CHECKOUT/train_network.py --pretrained_model_name_or_path ...``: the checkout's folder comes
first on the path, previews get the safety LoRA as a forward branch and leave all random numbers alone, and a training
state that is saved says what it was trained on. An error of the guard is one line on stderr, with `MARK` before it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any

PACK = "modular_lora_guard"
NETWORK = f"{PACK}.training.kohya.network"
MARK = "modular_lora: "
STOP = "MODULAR_LORA_STOP"  # environment variable: a file that is looked for before every step
PREVIEWS = {  # script -> where it draws one preview
    "train_network.py": ("library.train_util", "sample_image_inference"),
    "sdxl_train_network.py": ("library.train_util", "sample_image_inference"),
    "flux_train_network.py": ("library.flux_train_utils", "sample_image_inference"),
    "sd3_train_network.py": ("library.sd3_train_utils", "sample_image_inference"),
    "lumina_train_network.py": ("library.lumina_train_util", "sample_image_inference"),
    "anima_train_network.py": ("library.anima_train_utils", "_sample_image_inference"),
}
OWN_PREVIEWS = {"hunyuan_image_train_network.py": "sample_image_inference"}  # where the script itself has it


def import_network() -> None:
    """The network module, with the pack on the path; nothing of it needs ComfyUI, pydantic or a TOML reader."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "importable"))
    importlib.import_module(NETWORK)


def guard_previews(script: str) -> None:
    """Wrap the function that draws one preview; sd-scripts looks it up by name at every prompt.

    A script that has it itself has made it by the time that it makes its trainer's class.
    """
    if script in OWN_PREVIEWS:
        trainer = importlib.import_module("train_network").NetworkTrainer

        def made(cls: Any) -> None:
            _guard(cls.sample_images.__globals__, OWN_PREVIEWS[script], script)

        trainer.__init_subclass__ = classmethod(made)
    elif script in PREVIEWS:  # train_leco.py draws none
        module, name = PREVIEWS[script]
        _guard(vars(importlib.import_module(module)), name, module)


def _guard(names: dict[str, Any], name: str, where: str) -> None:
    """The function of that name in a module's names, with the safety LoRAs attached and random numbers left alone."""
    network, preview = (importlib.import_module(f"{PACK}.training.kohya.{n}") for n in ("network", "preview"))
    draw = names.get(name)
    if draw is None:
        sys.exit(f"{MARK}{where} has no {name}: this version of sd-scripts draws previews elsewhere, use another.")

    @functools.wraps(draw)
    def guarded(*args, **kwargs):
        with preview.random_state_kept(), network.previewing():
            return draw(*args, **kwargs)

    names[name] = guarded


def describe_states() -> None:
    """Every training state that accelerate saves gets a note of what it was trained on, written last."""
    accelerate, network = (
        importlib.import_module("accelerate"),
        importlib.import_module(NETWORK),
    )
    save = accelerate.Accelerator.save_state

    @functools.wraps(save)
    def described(self, output_dir=None, *args, **kwargs):
        folder = save(self, output_dir, *args, **kwargs)
        if self.is_main_process:
            network.record_state(folder or output_dir)
        return folder

    accelerate.Accelerator.save_state = described


def spare_frozen_models() -> None:
    """A model of which nothing is trained is not given to DistributedDataParallel, which refuses it.

    accelerate (1.6.0, 1.15.0) looks before it does so on GPUs, and does not with several processes on a CPU; sd-scripts
    gives it the frozen U-Net.
    """
    accelerate = importlib.import_module("accelerate")
    prepare = accelerate.Accelerator.prepare_model

    @functools.wraps(prepare)
    def prepared(self, model, device_placement=None, evaluation_mode=False):
        frozen = not any(weight.requires_grad for weight in model.parameters())
        return prepare(self, model, device_placement, evaluation_mode or frozen)

    accelerate.Accelerator.prepare_model = prepared


def stop_at_steps() -> None:
    """Before a step, where the file that `STOP` names has come to be: a state of the last step, and the end.

    A step of several processes is not stopped so: they would have to agree on it.
    """
    if not (name := os.environ.get(STOP)):
        return
    accelerate = importlib.import_module("accelerate")
    network = importlib.import_module(NETWORK)
    made: list = []
    prepare = accelerate.Accelerator.prepare

    @functools.wraps(prepare)
    def remembered(self, *args, **kwargs):
        made[:] = [self]
        return prepare(self, *args, **kwargs)

    def before_step() -> None:
        if made and made[0].num_processes == 1 and os.path.exists(name):
            network.keep_state(made[0].save_state)
            sys.exit(0)

    accelerate.Accelerator.prepare = remembered
    network.before_step = before_step  # type: ignore[attr-defined]  # a ModuleType declares no names


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)  # instead of our own folder
    import_network()
    guard_error = importlib.import_module(f"{PACK}.modular_lora.errors").GuardError
    try:
        describe_states()
        spare_frozen_models()
        stop_at_steps()
        guard_previews(script.name)
        runpy.run_path(str(script), run_name="__main__")
    except guard_error as error:
        sys.exit(f"{MARK}{error}")


if __name__ == "__main__":
    main()
