"""Task LoRAs made to cancel a safety LoRA where each layer's weights do not show it; for measurements and tests.

All take and give layers as kohya factors: layer name -> (down r in or r in k k, up out r or out r 1 1), alpha folded
into up. They know the safety LoRA's file and W0, as whoever has the files does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]


def factors(path: Path) -> Factors:
    """Layers of a kohya file, in float64."""
    tensors = load_file(path)
    found = {}
    for name in sorted({key.partition(".")[0] for key in tensors}):
        down, up = (tensors[f"{name}.lora_{which}.weight"].double() for which in ("down", "up"))
        scale = float(tensors.get(f"{name}.alpha", torch.tensor(down.shape[0]))) / down.shape[0]
        found[name] = down, up * scale
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


def against_inputs(safety: Factors, moments: Mapping[str, Tensor], ridge: float = 1e-6) -> Factors:
    """dW_t = -dW_s + c dW_s C^-1, C a layer's second moments, c so that <dW_t, dW_s> = 0; other layers are left out.

    Net strength stays 1 in every layer; on inputs like those that C is of, the safety LoRA is gone.

    Args:
        moments: layer name -> C (in·k·k in·k·k).
        ridge: what C's diagonal is raised by, of its mean: the smaller, the larger dW_t may grow.
    """
    made = {}
    for name, (down, up) in safety.items():
        if name not in moments:
            continue
        D, U, C = down.flatten(1), up.flatten(1), moments[name].double()
        C = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        away = torch.linalg.solve(C, D.T).T  # D C^-1
        gram = U.T @ U
        c = torch.trace(gram @ D @ D.T) / torch.trace(gram @ away @ D.T)
        made[name] = (c * away - D).reshape(down.shape), up
    return made


@contextmanager
def moments(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Second moments (in·k·k in·k·k, float64) of what these layers read meanwhile, by the names of ``modules``."""
    found: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module, inputs):
            x = inputs[0].detach().double()
            if isinstance(module, nn.Conv2d):
                x = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
            x = x.reshape(-1, x.shape[-1])
            found[name] = found.get(name, 0) + x.T @ x

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def drawn(model, clip, prompts: Sequence[str]) -> None:
    """ComfyUI's loaded base draws these prompts."""
    import comfy.sample

    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            empty, noise = (
                torch.zeros(1, 4, 8, 8),
                torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)),
            )
            conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
            settings = (8, 3.0, "euler", "simple", *conds, empty)
            comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=i)


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
