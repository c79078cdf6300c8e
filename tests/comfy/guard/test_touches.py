"""Everything that comfy_host/versions.py names is there in the ComfyUI that runs the tests."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap

import pytest
from modular_lora_guard.comfy_host.versions import NEWER, OLDER, TOUCHES

NAMES = sorted({touch.name: touch.seen for touch in TOUCHES}.items(), key=lambda item: item[0])


def is_set_by(kind: type, name: str) -> bool:
    """Whether a class sets an attribute of its objects."""
    for base in kind.__mro__[:-1]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for node in ast.walk(tree):
            is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            if is_own and isinstance(node.ctx, ast.Store) and node.attr == name:
                return True
    return False


def is_there(path: str) -> bool:
    """Whether a path of modules and attributes leads to something; the last part may be an attribute of objects."""
    first, *rest = path.split(".")
    found, where = importlib.import_module(first), first
    for name in rest:
        if inspect.ismodule(found) and not hasattr(found, name):
            try:
                importlib.import_module(f"{where}.{name}")
            except ModuleNotFoundError:
                return False
        if not hasattr(found, name):
            return name == rest[-1] and inspect.isclass(found) and is_set_by(found, name)
        found, where = getattr(found, name), f"{where}.{name}"
    return True


@pytest.mark.parametrize(("name", "seen"), NAMES, ids=[name for name, _ in NAMES])
def test_what_is_touched_is_there(name, seen, comfy):
    from comfyui_version import __version__

    version = __version__ if __version__ in (OLDER, NEWER) else NEWER
    if version not in seen:
        pytest.skip(f"{name} was not seen in {version}")
    assert is_there(name)


@pytest.mark.parametrize(
    "name", ["comfy.model_patcher.ModelPatcher.no_such_name", "comfy.no_such_module", "nodes.VAEDecode.decode.more"]
)
def test_what_is_not_there_is_noticed(name, comfy):
    assert not is_there(name)
