"""Started by ``tools.benchmarks.kohya`` in sd-scripts' interpreter and folder; JSON comes in and goes out.

In: by family, a script of the checkout and its arguments. Out: by family, the names of the layers that are trained, or,
as a text, what its parser said of the arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "importable"))


def denoiser(script: str, v2: bool):
    """The script's denoiser at its own size, without weights."""
    load = importlib.import_module
    if script == "train_network.py":
        form = load("library.model_util").create_unet_diffusers_config(v2)
        return load("library.original_unet").UNet2DConditionModel(**form)
    if script == "sdxl_train_network.py":
        return load("library.sdxl_original_unet").SdxlUNet2DConditionModel()
    if script == "flux_train_network.py":
        flux = load("library.flux_models")
        return flux.Flux(flux.configs["dev"].params)
    if script == "sd3_train_network.py":
        sd3 = load("library.sd3_models")
        return sd3.create_sd3_mmdit(sd3.SD3Params(2, 24, 36864, 192, 2048, None, [], 4096, 1536, "sd3-medium"))
    if script == "lumina_train_network.py":
        return load("library.lumina_models").NextDiT_2B_GQA_patch2_Adaln_Refiner()
    if script == "hunyuan_image_train_network.py":
        return load("library.hunyuan_image_models").create_model("torch", False, None)
    form = {"max_img_h": 512, "max_img_w": 512, "max_frames": 128, "in_channels": 16, "out_channels": 16,
            "patch_spatial": 2, "patch_temporal": 1, "model_channels": 2048, "concat_padding_mask": True,
            "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True,
            "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "use_adaln_lora": True,
            "adaln_lora_dim": 256, "num_blocks": 28, "num_heads": 16, "use_llm_adapter": True}  # fmt: skip
    return load("library.anima_models").Anima(**form, attn_mode="torch", split_attn=False)


def names(script: str, *arguments: str) -> list[str] | str:
    """The trained layers of one family."""
    path, said = Path(script), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = importlib.import_module(path.stem).setup_parser().parse_args(arguments)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    importlib.import_module("library.train_util").verify_command_line_training_args(parsed)
    torch = importlib.import_module("torch")
    network = importlib.import_module("modular_lora_guard.training.kohya.network")
    with torch.device("meta"):
        unet = denoiser(path.name, bool(getattr(parsed, "v2", False)))
    given = dict(one.partition("=")[::2] for one in parsed.network_args)
    text = [torch.nn.Module()]  # a text encoder without layers: not all of the checkout's networks take none
    made = network.create_network(1.0, parsed.network_dim, parsed.network_alpha, None, text, unet, **given)
    return [lora.lora_name for lora in made.unet_loras]


def main() -> None:
    sys.path[0] = str(Path.cwd())  # instead of our own folder
    found = {family: names(*sent) for family, sent in json.load(sys.stdin).items()}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
