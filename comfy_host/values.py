"""Values of nodes with some of what is in them exchanged: in lists, tuples, mappings, and the objects of other packs.

What holds something that is exchanged is copied, as a pack may keep its own, and so is what holds that; all else stays.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

DEPTH = 8  # of containers and objects inside one another
MOST = 100_000  # things that are looked at in one value; what lies beyond is hidden, as in a class of C
PLAIN = (str, int, float, type(None))
HOSTS = ("comfy", "comfy_api", "comfy_execution", "torch", "numpy", "PIL", "builtins", "asyncio", "_asyncio")
OURS = "modular_lora_guard"


def exchange(value: Any, fits: Callable[[Any], bool], make: Callable[[list], Mapping[int, Any]]) -> Any:
    """A value with other things in the place of those that fit; the value itself where there are none.

    Args:
        value: Anything that a node takes or gives.
        fits: Whether a thing may be exchanged; what fits is not looked into.
        make: All that fits, each once, in their order -> what comes in their place, by ``id``.
    """
    seen, holders, found = _looked_into(value, fits)
    others = make(found) if found else {}
    dirty, waiting = set(others), list(others)
    while waiting:
        new = holders.get(waiting.pop(), set()) - dirty
        dirty |= new
        waiting.extend(new)
    return _rebuilt(value, dirty, dict(others)) if dirty and seen else value


def _looked_into(value: Any, fits: Callable[[Any], bool]) -> tuple[dict[int, Any], dict[int, set[int]], list]:
    """What was seen, by ``id`` (kept: the place of what is gone is given to the next), what holds it, and what fits."""
    seen: dict[int, Any] = {id(value): value}
    holders: dict[int, set[int]] = {}
    found, waiting = [], deque([(value, 0)])
    while waiting and len(seen) < MOST:
        one, depth = waiting.popleft()
        if fits(one):
            found.append(one)
            continue
        for _, part in _parts(one) if depth < DEPTH else ():
            if isinstance(part, PLAIN):
                continue
            holders.setdefault(id(part), set()).add(id(one))
            if id(part) not in seen:
                seen[id(part)] = part
                waiting.append((part, depth + 1))
    return seen, holders, found


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a container or an object of another pack holds, each with its key, place or name."""
    if isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, Mapping):
        yield from list(value.items())
    elif _is_pipe(value):
        yield from list(vars(value).items())


def _is_pipe(value: Any) -> bool:
    """An object whose attributes may hold models: of a class that is neither ours, nor ComfyUI's, nor a library's."""
    kind = type(value)
    own = kind.__module__.partition(".")[0] not in HOSTS and not kind.__module__.startswith(OURS)
    return own and hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module | torch.Tensor)


def _rebuilt(value: Any, dirty: set[int], made: dict[int, Any]) -> Any:
    """``made``: what there is already, by the ``id`` of what it is in the place of."""
    if id(value) in made or id(value) not in dirty:
        return made.get(id(value), value)
    try:
        if isinstance(value, tuple):
            items = [_rebuilt(one, dirty, made) for one in value]
            new = value._make(items) if hasattr(value, "_make") else type(value)(items)
            return made.setdefault(id(value), new)
        new = made[id(value)] = copy.copy(value)  # first: it may hold itself
    except Exception:  # a class of another pack may refuse to be copied: what it holds stays hidden
        return made.setdefault(id(value), value)
    for key, one in _parts(value):
        if (part := _rebuilt(one, dirty, made)) is one:
            continue
        if isinstance(value, list | Mapping):
            new[key] = part
        else:
            object.__setattr__(new, key, part)  # of frozen dataclasses too
    return new
