"""Scales that a file states outside its tensors: what its metadata says of each layer, held against what is used.

A layer with an alpha counts alpha / rank, one without counts 1, as in ComfyUI. Trainers that write no alpha state the
scale in the metadata: diffusers and PEFT (``lora_adapter_metadata``: lora_alpha / r, over the root of r where
use_rslora is set, by layer where there are patterns; LoHa's and LoKr's alpha / r), SimpleTuner and others (the same
names as plain keys), kohya (``ss_network_alpha`` / ``ss_network_dim``). Where a layer has an alpha, that is its scale
and the metadata is not asked (resized files keep that of the file they were made of), but for two layouts in which
the alpha says otherwise: a LoKr of whole factors has no rank to divide it by, and sd-scripts' ``split_qkv`` joins
layers to one of three or four times the rank under the alpha of each.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from ..errors import GuardError, shown
from .formats import Adapter, LoraLayer, Scaled
from .names import PEFT, is_text

Scale = Literal["refuse", "tensors", "metadata"]  # what counts where a safety LoRA's tensors and metadata give two

_FIELDS = {  # name in the metadata -> what it is
    **dict.fromkeys(("lora_alpha", "network_alpha", "alpha"), "alpha"),
    **dict.fromkeys(("r", "rank", "lora_rank", "network_dim"), "rank"),
    **{name: name for name in ("use_rslora", "alpha_pattern", "rank_pattern")},
}
_PLAIN = re.compile(r"\^?[\w.\\-]+\$?")  # a pattern that is a name: others are not run, since they come out of a file
_SPLIT = re.compile(r".*(_qkv|_linear1)")
_CLOSE = 4e-3  # of two scales that are one: an alpha may be stored in bf16


@dataclass(frozen=True)
class Stated:
    """The scale of a layer by the file's metadata; None where it contradicts itself or cannot be read."""

    scale: float | None
    said: str
    bias: bool = False  # whether the layer's change of the bias is scaled as well (PEFT's lora_bias)


@dataclass(frozen=True)
class _Field:
    name: str  # as in the metadata
    value: Any


_Component: TypeAlias = "dict[str, _Field]"  # alpha, rank, use_rslora, ... -> what is said of it


def stated_scales(
    metadata: Mapping[str, str], layers: Mapping[str, Adapter], roles: Mapping[str, Mapping[str, str]]
) -> dict[str, Stated]:
    """What the metadata states of the layers whose own scale is another one, by layer.

    Args:
        metadata: Of the file.
        layers: Of the file, as they are used.
        roles: Layer -> role -> name of the tensor.
    """
    if not metadata:
        return {}
    found, components, kohya = {}, _components(metadata), _kohya(metadata)
    for name, layer in layers.items():
        if not isinstance(base := layer.inner, Scaled):
            continue
        if base.alpha is None:
            said = [_of_component(fields, name, prefix, base) for prefix, fields in _for_layer(components, name)]
            said += [_of_kohya(kohya, base)]
            bias = any(fields for _, fields in _for_layer(components, name))
        else:
            said, bias = [_beside_alpha(kohya, name, base)], False
        if one := _one([s for s in said if s is not None]):
            of_peft = roles.get(name, {}).get("diff_b", "").endswith(".bias")
            if one.scale is None or not math.isclose(one.scale, base.scale, rel_tol=_CLOSE):
                found[name] = replace(one, bias=bias and of_peft)
    return found


def remark(stated: Mapping[str, Stated], layers: Mapping[str, Adapter], chosen: Scale) -> str:
    """One line for the node where layers are used at another scale than the metadata states; "" where none is."""
    if not stated:
        return ""
    (one, count), *more = Counter(stated.values()).most_common()
    name = next(name for name, said in stated.items() if said == one)
    first = f" (first {shown(name)})" if more else ""
    if chosen == "metadata":
        return f"{len(stated)} of {len(layers)} layers{first} act at the scale that the metadata states: {_words(one)}"
    used = layers[name].inner.scale
    line = f"{len(stated)} of {len(layers)} layers{first} act at scale {used:g}, as ComfyUI's own loader reads them"
    line += f", and the metadata states {_words(one)}"
    if chosen == "refuse" and not more and count == len(layers) and one.scale:
        line += f": if it was trained so, give {one.scale / used:.4g} times the strength"
    return line


def rescaled(layer: Adapter, said: Stated) -> Adapter:
    """A layer at the scale that the metadata states; ValueError where that is not one number."""
    if said.scale is None:
        raise ValueError(f"its metadata states no one scale ({said.said}): choose the one of its tensors")
    return layer.rescaled(said.scale, said.bias)


def check_scale(name: str, stated: Mapping[str, Stated], layers: Mapping[str, Adapter], chosen: Scale) -> None:
    """GuardError for a safety LoRA whose tensors and metadata give two scales, unless one of them was chosen.

    At a quarter of what was trained it would still count as whole.
    """
    if stated and chosen == "refuse":
        what = f"Safety LoRA {name}: {remark(stated, layers, 'tensors')}"
        where = "scale on Load Safety LoRA, else safety_scale"
        raise GuardError(f"{what}: choose the one that it was trained with ({where})", code="lora.two-scales")


def _words(said: Stated) -> str:
    return f"{'no one scale' if said.scale is None else format(said.scale, 'g')} ({said.said})"


def _one(said: list[Stated]) -> Stated | None:
    """Statements of one layer as one."""
    if len({s.scale for s in said}) < 2:
        return said[0] if said else None
    return Stated(None, "; ".join(s.said for s in said))


def _components(metadata: Mapping[str, str]) -> dict[str, _Component]:
    """What is said of each part of the model ("transformer", "text_encoder"; "" for all), PEFT's own record first."""
    found: dict[str, _Component] = {}
    for said in (_json(metadata.get("lora_adapter_metadata", "")), metadata):
        for key, value in said.items():
            prefix, _, name = key.rpartition(".")
            if name in _FIELDS and not key.startswith("ss_"):
                found.setdefault(prefix, {}).setdefault(_FIELDS[name], _Field(key, value))
    return {prefix: fields for prefix, fields in found.items() if "alpha" in fields}


def _for_layer(components: Mapping[str, _Component], name: str) -> Iterator[tuple[str, _Component]]:
    """The components that speak of a layer: the one whose prefix it has, else all of its half, else the nameless."""
    bare = name.removeprefix(PEFT)
    own = [prefix for prefix in components if prefix and bare.startswith(f"{prefix}.")]
    half = [prefix for prefix in components if prefix and is_text(f"{prefix}.") == is_text(name)]
    for prefix in [max(own, key=len)] if own else half or [prefix for prefix in components if not prefix]:
        yield prefix, components[prefix]


def _of_component(fields: _Component, name: str, prefix: str, base: Scaled) -> Stated | None:
    own = name.removeprefix(PEFT).removeprefix(f"{prefix}.")
    try:
        alpha = _by_pattern(fields.get("alpha_pattern"), own) or fields["alpha"]
        rank = _by_pattern(fields.get("rank_pattern"), own) or fields.get("rank") or _Field("the rank", base.rank)
    except ValueError as error:
        return Stated(None, str(error))
    root = "use_rslora" in fields and fields["use_rslora"].value in (True, "True", "true", "1")
    return _over(alpha, rank, root)


def _by_pattern(patterns: _Field | None, layer: str) -> _Field | None:
    """What PEFT's alpha_pattern or rank_pattern says of a layer; ValueError for one that is no plain name."""
    if patterns is None:
        return None
    table = patterns.value
    if isinstance(table, str):
        table = _json(table)
    for pattern, value in table.items() if isinstance(table, dict) else ():
        if len(pattern) > 512 or not _PLAIN.fullmatch(pattern):
            raise ValueError(f"{patterns.name} {shown(pattern)}, which is not a plain name")
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        if layer == plain or layer.endswith(f".{plain}"):
            return _Field(f"{patterns.name} {plain}", value)
    return None


def _over(alpha: _Field, rank: _Field, root: bool) -> Stated | None:
    """alpha / rank, over the root of it where ``root``; None where they are no numbers."""
    a, r = _number(alpha.value), _number(rank.value)
    if a is None or not r or r < 0:
        return None
    over = f"the root of {rank.name} {r:g}" if root else f"{rank.name} {r:g}"
    return Stated(a / (math.sqrt(r) if root else r), f"{shown(alpha.name)[1:-1]} {a:g} over {over}")


def _kohya(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What sd-scripts and LyCORIS record: alpha and dim of all layers, and their network's arguments."""
    args = _json(metadata.get("ss_network_args", ""))
    return {"alpha": metadata.get("ss_network_alpha"), "dim": metadata.get("ss_network_dim"), "args": args}


def _of_kohya(kohya: Mapping[str, Any], base: Scaled) -> Stated | None:
    alpha, dim = _Field("ss_network_alpha", kohya["alpha"]), _Field("ss_network_dim", kohya["dim"])
    args = kohya["args"]
    if isinstance(base, LoraLayer) and base.down.dim() > 2 and base.down[0, 0].numel() > 1 and "conv_dim" in args:
        alpha, dim = _Field("conv_alpha", args.get("conv_alpha")), _Field("conv_dim", args["conv_dim"])
    if dim.value is None:
        dim = _Field("the rank", base.rank)
    return _over(alpha, dim, str(args.get("rs_lora")).lower() == "true")


def _beside_alpha(kohya: Mapping[str, Any], name: str, base: Scaled) -> Stated | None:
    """Of a layer whose alpha stands in the file: None unless that is one of the two layouts that need the metadata."""
    args, dim, alpha = kohya["args"], _number(kohya["dim"]), base.alpha
    if not dim or dim <= 0 or alpha is None or not math.isfinite(alpha):
        return None
    if base.rank is None:
        # LyCORIS stores the rank as alpha of whole factors, so the scale is 1; who stores the alpha divides by the rank
        ranks = [n for n in (dim, _number(args.get("conv_dim"))) if n]
        same = any(math.isclose(alpha, n, rel_tol=_CLOSE) for n in ranks)
        said = _number(kohya["alpha"])
        if same or said is None or not math.isclose(alpha, said, rel_tol=_CLOSE):
            return None
        return Stated(alpha / dim, f"the layer's alpha {alpha:g} over ss_network_dim {dim:g}")
    split = str(args.get("split_qkv")).lower() == "true" and _SPLIT.fullmatch(name)
    if isinstance(base, LoraLayer) and split and base.rank in (3 * dim, 4 * dim):
        what = f"split_qkv: the layer's alpha {alpha:g} over ss_network_dim {dim:g}, of rank {base.rank}"
        return Stated(alpha / dim, what)
    return None


def _json(text: object) -> dict[str, Any]:
    """A JSON object out of the metadata; {} for anything else."""
    try:
        found = json.loads(text) if isinstance(text, str) and text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: object) -> float | None:
    """A finite number, also as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
