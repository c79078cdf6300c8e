"""Task LoRAs made to cancel a safety LoRA where each layer's weights do not show it; for measurements and tests.

All take and give layers as kohya factors: layer name -> (down r in, up out r), alpha folded into up. They know the
safety LoRA's file and W0, as whoever has the files does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]


def factors(path: Path) -> Factors:
    """Linear layers of a kohya file, in float64."""
    tensors = load_file(path)
    found = {}
    for name in sorted({key.partition(".")[0] for key in tensors}):
        down, up = (tensors[f"{name}.lora_{which}.weight"].double() for which in ("down", "up"))
        scale = float(tensors.get(f"{name}.alpha", torch.tensor(down.shape[0]))) / down.shape[0]
        found[name] = down.flatten(1), up.flatten(1) * scale
    return found


def save(path: Path, layers: Factors, metadata: Mapping[str, str] | None = None) -> Path:
    """As a kohya file in float32, alpha equal to the rank."""
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {f"{name}.lora_down.weight": down.float(), f"{name}.lora_up.weight": up.float()}
        tensors[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, dict(metadata or {}))
    return path


def only(layers: Factors, ending: str) -> Factors:
    """The layers whose names end so, for example attn2_to_v."""
    return {name: pair for name, pair in layers.items() if name.endswith(ending)}


def negated(safety: Factors) -> Factors:
    """The safety file at -1 under another name: net strength 0."""
    return {name: (down, -up) for name, (down, up) in safety.items()}


def against_inputs(safety: Factors, moments: Mapping[str, Tensor]) -> Factors:
    """dW_t = -dW_s + c dW_s C^-1, C (in in) the second moments of a layer's inputs, c so that <dW_t, dW_s> = 0.

    Net strength stays 1 in every layer; on inputs like those that C is of, the safety LoRA is gone.
    """
    made = {}
    for name, (down, up) in safety.items():
        C = moments[name].double()
        C = C + 1e-6 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        away = torch.linalg.solve(C, down.T).T  # down C^-1
        gram = up.T @ up
        c = torch.trace(gram @ down @ down.T) / torch.trace(gram @ away @ down.T)
        made[name] = c * away - down, up
    return made


def moments(model, clip, modules: Mapping[str, nn.Module], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Second moments (in in) of layers' inputs while ComfyUI's loaded base draws these prompts."""
    import comfy.sample

    found: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module, inputs):
            x = inputs[0].detach().double()
            x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
            x = x.reshape(-1, x.shape[-1])
            found[name] = found.get(name, 0) + x.T @ x

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        with torch.inference_mode():
            for i, prompt in enumerate(prompts):
                empty, noise = (
                    torch.zeros(1, 4, 8, 8),
                    torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)),
                )
                conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
                settings = (8, 3.0, "euler", "simple", *conds, empty)
                comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=i)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def behind_values(safety: Factors, weights: Mapping[str, Tensor], heads: int) -> Factors:
    """A change of to_out alone, -W_out P, P the projector on what the up matrix of to_v adds to each head."""
    made = {}
    for name, (_, up) in only(safety, "_to_v").items():
        out = f"{name.removesuffix('_to_v')}_to_out_0"
        Q = _heads(up, heads)
        made[out] = Q.T, -weights[out].double() @ Q
    return made


def before_queries(safety: Factors, weights: Mapping[str, Tensor], heads: int) -> Factors:
    """A change of to_k alone, -P W_k: keys lose what the up matrix of to_q adds to each head's queries."""
    made = {}
    for name, (_, up) in only(safety, "_to_q").items():
        keys = f"{name.removesuffix('_to_q')}_to_k"
        Q = _heads(up, heads)
        made[keys] = Q.T @ weights[keys].double(), -Q
    return made


def _heads(up: Tensor, heads: int) -> Tensor:
    """An orthonormal basis (out heads·r) of what the columns of ``up`` span within each head's rows."""
    each = []
    for rows in up.chunk(heads):
        U, S, _ = torch.linalg.svd(rows, full_matrices=False)
        least = 1e-9 * S.max().clamp(min=1e-30)
        each.append(U[:, least < S])
    return torch.block_diag(*each)
