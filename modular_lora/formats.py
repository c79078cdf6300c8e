"""The formats of LoRA files: what parts of a layer belong together and fit, and what layer they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import (
    Adapter,
    BiasedLayer,
    DiffLayer,
    DoraLayer,
    LohaLayer,
    LokrLayer,
    LoraLayer,
    OftLayer,
    SetLayer,
    WideLoraLayer,
)
from .errors import LoraFileError, shown
from .names import FACTORS, FORMS, FULL, LOHA, LOKR, LORA, NORM, OFT, READS, SET, Names

RANK_LIMIT = 4096
TUCKER_LIMIT = 2**30  # numbers in the products of a file's Tucker layers
DAMAGED = "the file is damaged: download it again"

_WHOLE = {  # form -> sets of roles, one of which must be there and nothing else of this form
    LORA: ({"down", "up"}, {"down", "up", "mid"}),
    LOHA: (set(FACTORS[:4]), set(FACTORS[:6])),
    LOKR: tuple(
        first | second
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    ),
    OFT: ({"oft_blocks"},),
    FULL: ({"diff"},),
    SET: ({"set"},),
    NORM: ({"w_norm"}, {"w_norm", "b_norm"}),
}


class Entry(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the first tensor's
    end: int


Roles = Mapping[str, str]  # role -> tensor name


def check_layers(layers: Mapping[str, Roles], entries: Mapping[str, Entry], name: str) -> None:
    """Raise LoraFileError for a layer of the file `name` that lacks a part, mixes forms or whose shapes do not fit."""
    sound = set()  # roles and shapes that passed: a file has few of them
    for layer, roles in layers.items():
        shapes = {role: entries[tensor].shape for role, tensor in roles.items()}
        if (key := (*shapes, *shapes.values())) in sound:
            continue
        try:
            _check_whole(roles)
            _check_shapes(shapes)
        except ValueError as error:
            raise LoraFileError(f"{name}: layer {shown(layer)}: {error}") from None
        sound.add(key)


def make_layers(
    names: Names, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], name: str
) -> dict[str, Adapter]:
    """The layers of the file `name`, checked before by `check_layers`; LoraFileError for an alpha below 0 and the like.

    ``tensors`` has every tensor but the alphas.
    """
    result: dict[str, Adapter] = {}
    expanded = 0
    for layer, roles in names.layers.items():
        parts = {role: tensors[tensor] for role, tensor in roles.items() if role != "alpha"}
        alpha = alphas[roles["alpha"]] if "alpha" in roles else None
        if alpha is not None and not 0 <= alpha < math.inf:
            _check_alpha(alpha, parts, f"{name}: layer {shown(layer)}")
        if len(parts) == 2 and "down" in parts and layer != names.wide:  # nearly all there are
            result[layer] = LoraLayer(layer, parts["down"], parts["up"], alpha)
            continue
        if "mid" in parts:
            expanded += parts["down"].numel() * math.prod(parts["mid"].shape[2:])
            if expanded > TUCKER_LIMIT:
                what = f"its Tucker layers hold more than {TUCKER_LIMIT} numbers"
                raise LoraFileError(f"{name}: layer {shown(layer)}: {what}: convert it to LoCon without Tucker form")
            parts["down"] = _tucker(parts["down"], parts.pop("mid"))
            if not parts["down"].isfinite().all():
                raise LoraFileError(f"{name}: layer {shown(layer)}: its Tucker product overflows: train the LoRA again")
        for role in ("dora_scale", "magnitude", "set"):
            if role in parts and not parts[role].float().any():
                raise LoraFileError(f"{name}: layer {shown(layer)}: {role} is 0, it would erase the weight: {DAMAGED}")
        result[layer] = _layer(layer, parts, alpha, layer == names.wide)
    return result


def _check_alpha(alpha: float, parts: Mapping[str, Tensor], subject: str) -> None:
    """LoraFileError for an alpha below 0 or not finite, unless nothing is scaled by it (LoKr of whole factors)."""
    if alpha < 0:
        raise LoraFileError(f"{subject}: alpha is {alpha}, below 0: set a negative strength")
    if not {"lokr_w1", "lokr_w2"} <= parts.keys():
        raise LoraFileError(f"{subject}: alpha is {alpha}: train or convert the LoRA again")


def _check_whole(roles: Roles) -> None:
    """ValueError where the parts of a layer are not those of one form, and what may stand beside it."""
    forms = sorted({FORMS[role] for role in roles if role in FORMS})
    if len(forms) > 1:
        raise ValueError(f"is {' and '.join(forms)} in one: keep one of them")
    if not forms and "diff_b" not in roles:
        raise ValueError(f"has only {' and '.join(sorted(roles))}, no weights: save it whole")
    form = forms[0] if forms else FULL
    own = {role for role in roles if role in FORMS}
    if forms and own not in _WHOLE[form]:
        needed = " or ".join(" and ".join(sorted(group)) for group in _WHOLE[form])
        raise ValueError(f"has only {' and '.join(sorted(own))}, needs {needed}: save it whole")
    beside = {"dora_scale", "magnitude"} & roles.keys()
    if len(beside) > 1 or (beside and form not in (LORA, LOHA, LOKR)) or ("magnitude" in beside and form != LORA):
        raise ValueError(f"is {form} with {' and '.join(sorted(beside))}, which no trainer makes: {DAMAGED}")
    if {"diff_b", "b_norm"} <= roles.keys():
        raise ValueError("has two changes of the bias, diff_b and b_norm: keep one of them")
    if form == NORM and "alpha" in roles:
        raise ValueError(f"is a {form} with an alpha, which no trainer makes: {DAMAGED}")


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where the shapes of a layer's parts do not fit together."""
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        raise ValueError(f"alpha has shape {list(shapes['alpha'])}, one number is needed: {DAMAGED}")
    out = None
    if "down" in shapes:
        out = _check_lora(shapes["down"], shapes["up"], shapes.get("mid"))
    elif "hada_w1_a" in shapes:
        out = _check_loha(shapes)
    elif "lokr_w2" in shapes or "lokr_w2_a" in shapes:
        out = _check_lokr(shapes)
    elif "oft_blocks" in shapes:
        out = _check_oft(shapes["oft_blocks"])
    elif "diff" in shapes:
        _demand(len(shapes["diff"]) > 0, f"diff has shape {list(shapes['diff'])}, a weight's is needed")
    if len(shapes) > 2:
        _check_beside(shapes, out)
    if "set" in shapes:
        _demand(len(shapes) == 1 and len(shapes["set"]) > 0, f"set_weight {list(shapes['set'])} is no weight by itself")
    for role in ("diff_b", "w_norm", "b_norm"):
        if role in shapes:
            fits = len(shapes[role]) == 1 and out in (None, shapes[role][0])
            _demand(fits, f"{role} has shape {list(shapes[role])}, {out or 'a'} numbers in one row are needed")


def _check_lora(down: tuple[int, ...], up: tuple[int, ...], mid: tuple[int, ...] | None) -> int:
    """The number of outputs of a sound pair."""
    dims = len(down), len(up)
    if dims not in ((2, 2), (4, 4), (2, 4), (4, 2), (3, 3), (5, 5)) or math.prod(up[2:]) != 1:
        raise ValueError(f"down {list(down)} and up {list(up)} are no Linear or convolution pair: {READS}")
    _demand(down[0] == up[1], f"rank is {down[0]} in down and {up[1]} in up")
    _check_rank(down[0])
    if mid is not None:
        fits = len(mid) == 4 and mid[:2] == (down[0], down[0]) and math.prod(down[2:]) == 1
        _demand(fits, f"mid {list(mid)} does not go between down {list(down)} and up {list(up)}")
    return up[0]


def _check_loha(shapes: Mapping[str, tuple[int, ...]]) -> int:
    first = _check_product(shapes, "hada_w1_a", "hada_w1_b", "hada_t1")
    second = _check_product(shapes, "hada_w2_a", "hada_w2_b", "hada_t2")
    _demand(first == second, f"its two products are {list(first)} and {list(second)}")
    return first[0]


def _check_lokr(shapes: Mapping[str, tuple[int, ...]]) -> int:
    whole = [shapes.get("lokr_w1"), shapes.get("lokr_w2")]
    first = _check_product(shapes, "lokr_w1_a", "lokr_w1_b", None) if whole[0] is None else whole[0]
    second = _check_product(shapes, "lokr_w2_a", "lokr_w2_b", "lokr_t2") if whole[1] is None else whole[1]
    fits = len(first) == 2 and 2 <= len(second) <= 5
    _demand(fits, f"its factors {list(first)} and {list(second)} are those of no Linear or convolution")
    return first[0] * second[0]


def _check_product(shapes: Mapping[str, tuple[int, ...]], left: str, right: str, tucker: str | None) -> tuple[int, ...]:
    """Shape of left @ right, or of its Tucker product (left r out, right r in, tucker r r k k: out in k k)."""
    a, b, t = shapes[left], shapes[right], shapes.get(tucker)
    what = f"{left} {list(a)}, {right} {list(b)}" + (f" and {tucker} {list(t)}" if t else "")
    _demand(len(a) == len(b) == 2, f"{what} are no matrices")
    if t is None:
        _demand(a[1] == b[0], f"{what} do not multiply")
        _check_rank(b[0])
        return a[0], b[1]
    _demand(len(t) == 4 and t[:2] == (a[0], b[0]), f"{what} do not multiply")
    _check_rank(max(t[:2]))
    return a[1], b[1], *t[2:]


def _check_oft(blocks: tuple[int, ...]) -> int:
    if len(blocks) == 4:
        raise ValueError(f"is BOFT: {READS}")
    _demand(len(blocks) == 3 and blocks[1] == blocks[2], f"oft_blocks {list(blocks)} are no square blocks")
    return blocks[0] * blocks[1]


def _check_beside(shapes: Mapping[str, tuple[int, ...]], out: int | None) -> None:
    """What DoRA adds to a layer of `out` outputs."""
    if (scale := shapes.get("dora_scale")) is not None:
        long = [i for i, size in enumerate(scale) if size > 1]
        fits = len(scale) >= 2 and long in ([], [0], [1]) and (long != [0] or scale[0] == out)
        _demand(fits, f"dora_scale {list(scale)} is neither a number an output ({out}) nor a number an input")
    elif "magnitude" in shapes:
        found = shapes["magnitude"]
        fits = math.prod(found) == max(found, default=0) == out
        _demand(fits, f"magnitude {list(found)} is not a number an output ({out})")


def _check_rank(rank: int) -> None:
    if rank > RANK_LIMIT:
        raise ValueError(f"rank {rank}, at most {RANK_LIMIT} allowed: resize the LoRA")


def _demand(fits: bool, problem: str) -> None:
    if not fits:
        raise ValueError(f"{problem}: {DAMAGED}")


def _layer(name: str, parts: dict[str, Tensor], alpha: float | None, wide: bool) -> Adapter:
    if "set" in parts:
        return SetLayer(name, parts["set"])
    if "w_norm" in parts:
        return DiffLayer(name, parts["w_norm"], parts.get("b_norm", parts.get("diff_b")))
    bias = parts.pop("diff_b", None)
    if "diff" in parts or not parts:
        return DiffLayer(name, parts.get("diff"), bias)
    changed = _changed(name, parts, alpha, wide)
    if "dora_scale" in parts:
        changed = DoraLayer(name, changed, parts["dora_scale"], of_sum=False)
    elif "magnitude" in parts:
        changed = DoraLayer(name, changed, parts["magnitude"].flatten(), of_sum=True)
    return changed if bias is None else BiasedLayer(name, changed, bias)


def _changed(name: str, parts: Mapping[str, Tensor], alpha: float | None, wide: bool) -> Adapter:
    if "down" in parts:
        return (WideLoraLayer if wide else LoraLayer)(name, parts["down"], parts["up"], alpha)
    if "oft_blocks" in parts:
        return OftLayer(name, parts["oft_blocks"], alpha)
    kind, roles = (LohaLayer, FACTORS[:6]) if "hada_w1_a" in parts else (LokrLayer, FACTORS[6:])
    return kind(name, *(parts.get(role) for role in roles), alpha)


def _tucker(down: Tensor, mid: Tensor) -> Tensor:
    """down (r in [1 1]) and the kernel after it (mid, r r k k) as one kernel, r in k k in fp32."""
    return torch.einsum("omkl,mi->oikl", mid.float(), down.float().flatten(1))
