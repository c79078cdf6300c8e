"""The formats of LoRA files. A new one is one class in a file of its own, as base.py describes it, and a line here."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ...errors import LoraFileError, shown
from .base import DAMAGED, Adapter, Beside, Shapes, Unread, check_row
from .base import RANK_LIMIT as RANK_LIMIT
from .base import Scaled as Scaled
from .biased import BiasedLayer
from .diff import DiffLayer
from .dora import DoraLayer
from .loha import LohaLayer
from .lokr import LokrLayer
from .lora import LoraLayer
from .lora import WideLoraLayer as WideLoraLayer
from .norm import NormLayer
from .oft import OftLayer
from .replaced import SetLayer

FORMATS: tuple[type[Adapter], ...] = (  # what stands beside others is put around them in this order
    LoraLayer,
    LohaLayer,
    LokrLayer,
    DoraLayer,
    OftLayer,
    DiffLayer,
    NormLayer,
    SetLayer,
    BiasedLayer,
)
TUCKER_LIMIT = 2**30  # numbers in the products of a file's Tucker layers
_BESIDE = tuple(kind for kind in FORMATS if issubclass(kind, Beside))
_BY_ROLE = {role: kind for kind in FORMATS for roles in kind.whole for role in roles}

ENDINGS = {"alpha": "alpha"} | {end: role for kind in FORMATS for end, role in kind.endings.items()}
PATTERNS = tuple(pattern for kind in FORMATS for pattern in kind.patterns)
LENGTHS = {role for kind in _BESIDE for role in kind.endings.values()}
SCALED = {role for role, kind in _BY_ROLE.items() if kind.alpha_counts}
*_first, _last = [name for kind in FORMATS for name in kind.reads]
READS = f"this version reads {', '.join(_first)} and {_last}"


def check_layers(layers: Mapping[str, Mapping[str, str]], shapes: Shapes, name: str) -> None:
    """Raise LoraFileError for a layer of the file `name` that lacks a part, mixes forms or whose shapes do not fit.

    Args:
        layers: Layer -> role -> name of the tensor.
        shapes: Name of the tensor -> its shape.
        name: Of the file.
    """
    sound = set()  # roles and shapes that passed: a file has few of them
    for layer, roles in layers.items():
        found = {role: shapes[tensor] for role, tensor in roles.items()}
        if (key := (*found, *found.values())) in sound:
            continue
        try:
            _check_shapes(_whole(found), found)
        except ValueError as error:
            unread = isinstance(error, Unread)
            remedy, code = (f": {READS}", "file.unread-format") if unread else ("", "file.layer")
            raise LoraFileError(f"{name}: layer {shown(layer)}: {error}{remedy}", code=code) from None
        sound.add(key)


def make_layers(
    layers: Mapping[str, Mapping[str, str]],
    wide: str | None,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    name: str,
) -> dict[str, Adapter]:
    """The layers of the file `name`, checked before by `check_layers`; LoraFileError for an alpha below 0 and the like.

    Args:
        layers: Layer -> role -> name of the tensor.
        wide: The layer to which the file gives more inputs.
        tensors: Every tensor but the alphas, by its name.
        alphas: The alphas, by their names.
        name: Of the file.
    """
    made: dict[str, Adapter] = {}
    expanded = 0
    for layer, roles in layers.items():
        parts = {role: tensors[tensor] for role, tensor in roles.items() if role != "alpha"}
        alpha = alphas[roles["alpha"]] if "alpha" in roles else None
        kind = _kind(parts)
        expanded += kind.expanded(parts)
        try:
            if alpha is not None and not 0 <= alpha < math.inf:
                kind.refuse_alpha(alpha, parts.keys())
            if expanded > TUCKER_LIMIT:
                what = f"its Tucker layers hold more than {TUCKER_LIMIT} numbers"
                raise ValueError(f"{what}: convert it to LoCon without Tucker form")
            found = kind.read(layer, parts, alpha, layer == wide)
            for beside in _BESIDE if parts else ():
                found = beside.around(found, parts)
        except ValueError as error:
            raise LoraFileError(f"{name}: layer {shown(layer)}: {error}", code="file.layer") from None
        made[layer] = found
    return made


def _kind(roles: Mapping[str, object]) -> type[Adapter]:
    """The format of a layer by the first of its roles that tells it; a bias by itself is a full difference."""
    return next((_BY_ROLE[role] for role in roles if role in _BY_ROLE), DiffLayer)


def _whole(roles: Mapping[str, object]) -> type[Adapter]:
    """The format of a layer; ValueError where its parts are not all of one, and what may stand beside it."""
    forms = sorted({_BY_ROLE[role].form for role in roles if role in _BY_ROLE})
    if len(forms) > 1:
        raise ValueError(f"is {' and '.join(forms)} in one: keep one of them")
    if not forms and "diff_b" not in roles:
        raise ValueError(f"has only {' and '.join(sorted(roles))}, no weights: save it whole")
    kind = _kind(roles)
    own = {role for role in roles if role in _BY_ROLE}
    if forms and own not in kind.whole:
        needed = " or ".join(" and ".join(sorted(group)) for group in kind.whole)
        raise ValueError(f"has only {' and '.join(sorted(own))}, needs {needed}: save it whole")
    beside = LENGTHS & roles.keys()
    if len(beside) > 1 or not beside <= kind.beside:
        raise ValueError(f"is {kind.form} with {' and '.join(sorted(beside))}, which no trainer makes: {DAMAGED}")
    kind.check_roles(roles.keys())
    return kind


def _check_shapes(kind: type[Adapter], shapes: Shapes) -> None:
    """ValueError where the shapes of a layer's parts do not fit together."""
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        raise ValueError(f"alpha has shape {list(shapes['alpha'])}, one number is needed: {DAMAGED}")
    out = kind.check(shapes)
    for beside in _BESIDE:
        beside.check_beside(shapes, out)
    check_row("diff_b", shapes, out)
