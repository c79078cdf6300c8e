"""Ranks and learning rates by patterns of layers' names.

A pattern is a regular expression that matches the whole of a layer's name, as sd-scripts' network_reg_dims and
network_reg_lrs do: of its name in the file (lora_unet_...) or of the module's path in the network. The first one that
matches counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from .adapter_options import pairs
from .adapters import Adapters
from .forms import Size
from .options import OptionError, Options

Named = Mapping[str, str]  # path of a module -> its layer's name in files


def sizes(options: Options, parts: Sequence[tuple[nn.Module, Named]]) -> dict[str, Size]:
    """Rank and alpha of the layers that have not network_dim and network_alpha, by their names in the file.

    ``parts``: networks, and what is trained of each. OptionError for a pattern that matches none of it.
    """
    matched = _matched(options.network_reg_dims, "network_reg_dims", [names for _, names in parts], whole=True)
    found = {name: Size(int(rank), options.network_alpha) for name, rank in matched.items()}
    conv = Size(options.conv_dim or options.network_dim, options.conv_alpha or options.network_alpha)
    if conv != Size(options.network_dim, options.network_alpha):
        for module, names in parts:
            for path, name in names.items():
                kernel = getattr(module.get_submodule(path), "kernel_size", (1, 1))
                if name not in found and kernel != (1, 1):
                    found[name] = conv
    return found


def groups(
    options: Options, adapters: Adapters, parts: Sequence[tuple[Named, float]]
) -> list[tuple[list[nn.Parameter], float]]:
    """The adapters' parameters by their learning rates, for the optimizer; nothing else is ever in it.

    ``parts``: what is trained of each network, and its rate where no pattern says another. OptionError as `sizes`.
    """
    own = _matched(options.network_reg_lrs, "network_reg_lrs", [names for names, _ in parts])
    found = []
    for names, usual in parts:
        by_rate: dict[float, list[str]] = {}
        for name in names.values():
            by_rate.setdefault(own.get(name, usual), []).append(name)
        found += [(adapters.parameters(layers), rate) for rate, layers in by_rate.items()]
    return found


def lines(options: Options, names: Sequence[Named]) -> list[str]:
    """How many layers have a rank or a rate of their own, for the report."""
    found = []
    for option, what in (("network_reg_dims", "rank"), ("network_reg_lrs", "learning rate")):
        given = getattr(options, option)
        values = list(_matched(given, option, names, whole=what == "rank").values()) if given else []
        counts = [f"{what} {value:g} of {values.count(value)} layers" for value in dict.fromkeys(values)]
        if counts:
            found.append(f"{option}: {', '.join(counts)}; all others have {_usual(what)}")
    return found


def _usual(what: str) -> str:
    return "network_dim, or conv_dim" if what == "rank" else "learning_rate, or text_encoder_lr"


def _matched(texts: tuple[str, ...], option: str, names: Sequence[Named], whole: bool = False) -> dict[str, float]:
    """The number of each layer that a pattern matches; OptionError for one that matches no layer."""
    found: dict[str, float] = {}
    layers = [(path, name) for part in names for path, name in part.items()]
    for pattern, value in pairs(texts, option, whole):
        matched = [name for path, name in layers if _matches(pattern, path, name)]
        if not matched:
            raise OptionError(
                f"{option}: {pattern.pattern!r} matches none of the {len(layers)} layers that are trained (e.g. "
                f"{layers[0][1]}, at {layers[0][0]}): it has to match a whole name: begin or end it with .*",
                code="option.pattern",
            )
        for name in matched:
            found.setdefault(name, value)
    return found


def _matches(pattern: re.Pattern[str], path: str, name: str) -> bool:
    return bool(pattern.fullmatch(name) or pattern.fullmatch(path))
