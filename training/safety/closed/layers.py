"""Which layers of a model have an input that the text alone fixes: the model is asked, no table is kept.

An evaluation at one noise, latent size and timestep, another at others, and one with other text tell for every linear
layer what its input depends on. Only where it is the text alone can a LoRA that is made of texts be exact: a layer
behind a joint attention sees text that is mixed with the image already, and a timestep's modulation moves its input
from step to step.

Of these layers those are taken whose outputs carry the text on. Both candidates are tried, by giving the layers what
they gave for the other text and looking how much of the way to the other text's prediction this goes:

* layers that share one input: the keys and values of cross-attention;
* the layers in front, whose inputs no other such layer made: context embedders, caption projections.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ....modular_lora.errors import GuardError

Ask = Literal["text", "other noise", "other text"]
Run = Callable[[Ask], Tensor]  # one evaluation; gives the network's prediction
SAME = 1e-5  # relative difference that rounding explains
ALIKE = 0.02  # shares of the text's effect that are taken for equal


@dataclass(frozen=True, eq=False)
class TextInput:
    """An input that the text alone fixes, and the layers that take it."""

    layers: tuple[str, ...]  # module paths
    width: int
    tokens: int  # rows it has for the prompt that was asked with


@dataclass(frozen=True)
class TextLayers:
    """What was found in a model.

    ``share``: of the effect that another text has on the prediction, how much passes through the layers of ``inputs``
    (1: all). ``mixed``: layers that see text which something else has changed already, with as many tokens as the text.
    """

    inputs: tuple[TextInput, ...]
    share: float
    mixed: tuple[str, ...]
    others: tuple[str, ...]  # fixed by the text as well, and not chosen

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for one in self.inputs for path in one.layers)


@dataclass(eq=False)
class _Seen:
    """Inputs and outputs of layers in one evaluation, in the order of their calls."""

    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    prediction: Tensor = field(default_factory=lambda: torch.zeros(()))


def find(module: nn.Module, paths: Sequence[str], run: Run) -> TextLayers:
    """The layers among ``paths`` (linear, by path in ``module``) that a LoRA made of texts can be exact on.

    Raises GuardError, with the names of those that see mixed text, where there is none.
    """
    asks: tuple[Ask, ...] = ("text", "other noise", "other text")
    first, noise, text = (_seen(module, paths, run, ask) for ask in asks)
    ran = [path for path in paths if first.inputs.get(path)]
    moved = [path for path in ran if not _same(first.inputs[path], text.inputs.get(path))]
    fixed = [path for path in moved if _same(first.inputs[path], noise.inputs.get(path))]
    rows = {first.inputs[path][0].shape[-2] for path in fixed if first.inputs[path][0].dim() > 2}
    mixed = tuple(
        path
        for path in moved
        if path not in fixed and first.inputs[path][0].dim() > 2 and first.inputs[path][0].shape[-2] in rows
    )
    if not fixed:
        raise GuardError(
            f"No layer of this model has an input that the text alone fixes: {len(moved)} of {len(ran)} linear layers "
            "see the text, and all see it mixed with the image or the timestep (first: "
            f"{', '.join(moved[:3]) or 'none'}), where what is kept could not be held: train a safety LoRA for this "
            "model instead.",
            code="make.no-text-layers",
        )
    chosen, share = _chosen(module, fixed, run, first, text)
    inputs = tuple(
        TextInput(tuple(group), first.inputs[group[0]][0].shape[-1], _rows(first.inputs[group[0]]).shape[0])
        for group in _groups(chosen, first)
    )
    return TextLayers(inputs, share, mixed, tuple(path for path in fixed if path not in chosen))


def named(found: TextLayers, wanted: Iterable[str]) -> TextLayers:
    """The part of ``found`` whose paths hold one of the texts ``wanted``, all of it where none is given.

    Raises GuardError for a text that only names layers which see mixed text, or none at all.
    """
    wanted = tuple(wanted)
    if not wanted:
        return found
    for text in wanted:
        if any(text in path for path in found.paths):
            continue
        if mixed := [path for path in (*found.mixed, *found.others) if text in path]:
            raise GuardError(
                f"layers: {text!r} names {mixed[0]}, whose input is not the text alone or comes from a layer that is "
                f"taken already: a LoRA made of texts is not exact there. Name some of {', '.join(found.paths[:3])}, "
                "...",
                code="make.mixed-input",
            )
        raise GuardError(
            f"layers: no layer is called {text!r}; there are {', '.join(found.paths[:3])}, ...",
            code="make.no-such-layer",
        )
    inputs = (
        TextInput(tuple(p for p in one.layers if any(text in p for text in wanted)), one.width, one.tokens)
        for one in found.inputs
    )
    return TextLayers(tuple(one for one in inputs if one.layers), found.share, found.mixed, found.others)


def read(module: nn.Module, inputs: Sequence[TextInput], run: Callable[[], object]) -> list[Tensor]:
    """The rows (tokens width, float64, CPU) of every input in one evaluation, which is stopped once all are seen."""
    found: dict[int, Tensor] = {}

    def look(number: int):
        def hook(layer, args):
            found[number] = _rows([args[0]])
            if len(found) == len(inputs):
                raise _Enough

        return hook

    hooks = [module.get_submodule(one.layers[0]).register_forward_pre_hook(look(i)) for i, one in enumerate(inputs)]
    try:
        run()
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [found[i] for i in range(len(inputs))]


class _Enough(BaseException):
    """All inputs are seen: nothing behind them needs to be evaluated."""


def _chosen(module: nn.Module, fixed: list[str], run: Run, first: _Seen, text: _Seen) -> tuple[list[str], float]:
    """The layers to change, and the share of the text's effect that passes through them."""
    everything = _seen(module, fixed, run, "text", text.outputs)
    front = [path for path in fixed if _same(first.inputs[path], everything.inputs.get(path))]
    sets = [front, *(group for group in _groups(fixed, first) if len(group) > 1 and set(group) != set(front))]
    shares = [_share(_seen(module, one, run, "text", text.outputs), first, text) for one in sets]
    best = max(shares)
    number = max(i for i, share in enumerate(shares) if share >= best - ALIKE)  # shared inputs before those in front
    return sets[number], shares[number]


def _seen(
    module: nn.Module, paths: Iterable[str], run: Run, ask: Ask, give: Mapping[str, list[Tensor]] | None = None
) -> _Seen:
    """One evaluation; ``give``: what the layers give instead of their own, call by call."""
    seen = _Seen()
    with _hooked(module, paths, seen, give):
        seen.prediction = run(ask).detach().double().cpu()
    return seen


@contextmanager
def _hooked(module: nn.Module, paths: Iterable[str], seen: _Seen, give: Mapping[str, list[Tensor]] | None) -> Iterator:
    def after(path: str):
        def hook(layer, args, output):
            number = len(seen.inputs[path])
            seen.inputs[path].append(args[0].detach().clone())
            seen.outputs[path].append(output.detach().clone())
            return None if give is None else give[path][number].clone()  # some models add to it in place

        return hook

    hooks = [module.get_submodule(path).register_forward_hook(after(path)) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _groups(paths: Iterable[str], seen: _Seen) -> list[list[str]]:
    """Layers by their input: those whose inputs are one tensor's values, in the order of ``paths``."""
    groups: list[list[str]] = []
    for path in paths:
        same = next((g for g in groups if _same(seen.inputs[g[0]], seen.inputs[path])), None)
        if same is None:
            groups.append([path])
        else:
            same.append(path)
    return groups


def _same(one: list[Tensor], other: list[Tensor] | None) -> bool:
    if other is None or len(one) != len(other):
        return False
    return all(
        a.shape == b.shape and float((a - b).double().norm()) <= SAME * float(a.double().norm())
        for a, b in zip(one, other, strict=True)
    )


def _share(given: _Seen, first: _Seen, text: _Seen) -> float:
    """1 − ‖prediction with the layers' outputs exchanged − the other text's‖ / ‖both texts' difference‖."""
    effect = float((text.prediction - first.prediction).norm())
    return 1.0 - float((given.prediction - text.prediction).norm()) / max(effect, 1e-300)


def _rows(calls: Sequence[Tensor]) -> Tensor:
    """The rows of all calls' inputs (tokens width), float64 on the CPU."""
    return torch.cat([call.detach().double().cpu().reshape(-1, call.shape[-1]) for call in calls])
