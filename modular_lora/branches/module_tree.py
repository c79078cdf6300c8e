"""Where the modules of a model stand, remembered until one of them is replaced.

A model has thousands of modules, and before each run all layers of a guard are looked up anew. What was found is kept
with the model and is good as long as every module on the way to a layer is the one that it was.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True, eq=False)
class _Tree:
    """Modules of a model by path, and where each stands: among its siblings by its name; the root is in neither."""

    found: dict[str, nn.Module] = field(default_factory=dict)
    siblings: list[dict[str, nn.Module | None]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    identity: object = field(default_factory=object)

    def holds(self) -> bool:
        """Whether every module still stands where it stood; a loop that Python itself runs takes twice as long."""
        return all(map(operator.is_, map(dict.get, self.siblings, self.names), self.found.values()))

    def note(self, model: nn.Module, path: str) -> None:
        """Remember every module on the way to ``path``, and where it stands."""
        module, here = model, ""
        for name in path.split("."):
            here = f"{here}.{name}" if here else name
            if here not in self.found:
                self.found[here] = module.get_submodule(name)
                self.siblings.append(module._modules)
                self.names.append(name)
            module = self.found[here]


_trees: weakref.WeakKeyDictionary[nn.Module, _Tree] = weakref.WeakKeyDictionary()


def _tree(model: nn.Module) -> _Tree:
    known = _trees.get(model)
    if known is None or not known.holds():
        known = _trees[model] = _Tree()
    return known


def tree_identity(model: nn.Module) -> object:
    """An object that is another one as soon as a module on the way to a layer that was looked up is replaced."""
    return _tree(model).identity


def modules_at(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The modules at ``paths`` ("" is the model itself)."""
    known = _tree(model)
    for path in paths:
        if path and path not in known.found:
            known.note(model, path)
    return {path: known.found[path] if path else model for path in paths}
