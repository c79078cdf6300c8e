"""LoRAs that a host holds as changes of weights and has not merged yet: read, checked and used as files are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from ..branches.layer_spec import bias_key
from ..errors import GuardError, LoraFileError, shown
from ..tensor_hashing import tensor_sha256
from .formats import Adapter, check_layers, make_layers
from .matching import Match
from .reader import DTYPES, LoraFile
from .target import Target

TEXT = "text_encoder."  # in front of the names of a text encoder's layers: matching.is_text knows them by it


@dataclass(frozen=True)
class Change:
    """One change of a weight or bias: its tensors by the roles that they have in files (formats/), and its place."""

    key: str
    parts: Mapping[str, Tensor]
    alpha: float | None = None
    offset: tuple[int, int, int] | None = None  # dim, start, length of the slice
    rearrange: Callable[[Tensor], Tensor] | None = None
    wide: bool = False  # a LoRA that gives the weight more inputs

    @property
    def name(self) -> str:
        """What stands for a layer's name in a file."""
        return self.key if self.offset is None else f"{self.key}[{self.offset[1]}+{self.offset[2]}, {self.offset[0]}]"


def pending_lora(
    name: str,
    model: Sequence[Change],
    text: Sequence[Change],
    note: str,
    factors: Mapping[str, float] = MappingProxyType({}),
    file: LoraFile | None = None,
) -> LoraFile:
    """The changes of one LoRA as a file would give them.

    Its SHA-256 is that of ``file``, where one is known that holds exactly these values, else that of its values and
    places.

    Args:
        name: for reports and errors.
        model: changes of the diffusion model, no two of them of one place.
        text: the same of its text encoders.
        note: a line for the report.
        factors: of the strength, by the layers' names (`layer_name`), where not all have the whole of it.
        file: the file that the values were read from, and that still holds them.

    Raises:
        LoraFileError: parts that do not fit, or values that are not finite.
    """
    layers: dict[str, Adapter] = {}
    places: dict[str, tuple] = {}
    for is_text, changes in ((False, model), (True, text)):
        for change in changes:
            layer = layer_name(change, is_text)
            layers[layer] = _layer(layer, change, name)
            places[layer] = (change.key, change.offset, change.rearrange)
    targets = {layer: Target(*place) for layer, place in places.items()}
    content = content_sha256(layers, targets)
    if factors:
        content = hashlib.sha256(f"{content} {sorted(factors.items())}".encode()).hexdigest()
    path, sha256, metadata = (file.path, file.sha256, file.metadata) if file else (Path(name), content, {})
    return LoraFile(
        path, name, sha256, metadata, layers, (note,), places=places, factors=dict(factors), content=content
    )


def layer_name(change: Change, is_text: bool) -> str:
    """The name under which a change stands among the layers of `pending_lora`."""
    return (TEXT if is_text else "") + change.name


def _layer(layer: str, change: Change, name: str) -> Adapter:
    tensors = {role: _plain(tensor, f"{name}: layer {shown(layer)}: {role}") for role, tensor in change.parts.items()}
    roles = {role: role for role in tensors} | ({} if change.alpha is None else {"alpha": "alpha"})
    check_layers({layer: roles}, {role: tuple(tensor.shape) for role, tensor in tensors.items()} | {"alpha": ()}, name)
    alphas = {} if change.alpha is None else {"alpha": change.alpha}
    return make_layers({layer: roles}, layer if change.wide else None, tensors, alphas, name)[layer]


def _plain(tensor: Tensor, what: str) -> Tensor:
    """On the CPU, in a dtype that files have."""
    tensor = tensor.detach().to("cpu")
    tensor = tensor if tensor.dtype in DTYPES.values() else tensor.float()
    if not tensor.float().isfinite().all():
        raise LoraFileError(
            f"{what} holds values that are not finite: train or convert the LoRA again", code="file.not-finite"
        )
    return tensor


def content_sha256(layers: Mapping[str, Adapter], targets: Mapping[str, Target]) -> str:
    """SHA-256 of what the layers with a target hold and where it goes, whatever they are called."""
    pieces = [piece for name, target in targets.items() for piece in _pieces(layers[name], target)]
    return hashlib.sha256("\n".join(sorted(pieces)).encode()).hexdigest()


def _pieces(adapter: Adapter, target: Target) -> Iterator[str]:
    for key, part in zip((target.key, bias_key(target.key)), adapter.split(), strict=True):
        if part is not None:
            yield f"{key} {target.offset} {part.content(tensor_sha256)}"


def check_not_safety(safety: tuple[LoraFile, Match], pending: tuple[LoraFile, Match]) -> None:
    """GuardError where a pending LoRA is a safety LoRA by its values, as a file is that is loaded in both roles."""
    digests = [content_sha256(lora.layers, match.targets) for lora, match in (safety, pending) if match.targets]
    if len(digests) == 2 and digests[0] == digests[1]:
        raise GuardError(
            f"{pending[0].name} holds the values of the safety LoRA {safety[0].name}, so one can cancel the other: "
            "leave it out of the loader before the guard.",
            code="lora.both-roles",
        )
