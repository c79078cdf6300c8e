"""LoRA files of one layer in every form that ComfyUI's loader hands over, and that loader."""

from __future__ import annotations

import torch


def stock(model, path, strength: float):
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    return load_lora_for_models(model, None, load_torch_file(str(path)), strength, 0.0)[0]


def random(generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5


def linear(name: str, spec, form: str, g, W0: torch.Tensor) -> dict[str, torch.Tensor]:
    """One layer of a file in a form, by kohya's and LyCORIS' names; a DoRA's lengths are near those of W0 (out in)."""
    out, fan = spec.weight_shape
    if form in ("dora", "dora_columns"):
        lengths = W0.float().norm(dim=1 if form == "dora" else 0, keepdim=True)
        made = {"lora_up.weight": random(g, out, 2) / 3, "lora_down.weight": random(g, 2, fan)}
        scale = lengths * (1 + torch.rand(lengths.shape, generator=g))
        return {f"{name}.{k}": v for k, v in made.items()} | {f"{name}.dora_scale": scale}
    made = {
        "loha": lambda: {
            f"hada_w{i}_{ab}": random(g, *((out, 2) if ab == "a" else (2, fan))) for i in "12" for ab in "ab"
        },
        "lokr": lambda: {"lokr_w1": random(g, 2, 2), "lokr_w2": random(g, out // 2, fan // 2) / 4},
        "lokr_factors": lambda: {
            "lokr_w1": random(g, 2, 2),
            "lokr_w2_a": random(g, out // 2, 3),
            "lokr_w2_b": random(g, 3, fan // 2),
            "alpha": torch.tensor(2.0),
        },
        "oft": lambda: {"oft_blocks": random(g, 4, out // 4, out // 4) / 9},
        "diff": lambda: {"diff": random(g, out, fan) / 3},
        "half": lambda: {"lora_up.weight": random(g, out, 2).half(), "lora_down.weight": random(g, 2, fan).half()},
    }[form]()
    return {f"{name}.{k}": v for k, v in made.items()}


FORMS = ("loha", "lokr", "lokr_factors", "oft", "dora", "dora_columns", "diff", "half")
