"""Weights while a policy is in force: which files a model was made of, and none from a folder that requests write to.

ComfyUI's loaders find a file by ``folder_paths.get_full_path`` and read it by ``comfy.utils.load_torch_file``
(``comfy.clip_vision`` holds a name of its own for it), textual inversions by ``comfy.sd1_clip.load_embed``; hooks.py
wraps them in what is defined here. What a node read while it ran is what the models that it gives were made of; a model
that comes from a node which read nothing has no file that is known.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch

from ...modular_lora.files.reader import sha256_file
from ...modular_lora.util.file_state import find_file_state
from ...operators.policy import OperatorPolicy
from ...operators.rules import RefusedError
from . import policy as policies

ENDINGS = ("", ".safetensors", ".pt", ".bin")  # with which load_embed looks for an embedding
Read = dict[Path, Any]  # file -> its state when it was read

_reading: contextvars.ContextVar[Read | None] = contextvars.ContextVar("modular_lora_reading", default=None)
_made: weakref.WeakKeyDictionary[torch.nn.Module, Read] = weakref.WeakKeyDictionary()  # of what a model was made


def written() -> tuple[str, ...]:
    """Folders that a request can write to (uploads, user data, nodes that save), with what links in them lead to.

    Links are followed where they lie in the folder itself, and where a folder of models is one.
    """
    names = ("output", "input", "temp", "user")
    roots = [os.path.abspath(getattr(folder_paths, f"get_{name}_directory")()) for name in names]
    found = dict.fromkeys(map(os.path.realpath, roots))
    for root in filter(os.path.isdir, roots):
        with os.scandir(root) as entries:
            found |= dict.fromkeys(os.path.realpath(e.path) for e in entries if e.is_symlink() and e.is_dir())
    for paths, _ in folder_paths.folder_names_and_paths.values():
        inside = (path for path in map(os.path.abspath, paths) if any(_is_below(path, root) for root in roots))
        found |= dict.fromkeys(map(os.path.realpath, inside))
    return tuple(found)


def _is_below(path: str, folder: str) -> bool:
    """Whether a path is the folder or lies in it."""
    path, folder = os.path.normcase(path), os.path.normcase(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))


def uploaded(path: str | os.PathLike[str], folders: Iterable[str] | None = None) -> str | None:
    """The folder that requests can write to from which a file would be read, links followed; None: from no such."""
    real = os.path.realpath(path)
    return next((folder for folder in folders or written() if _is_below(real, folder)), None)


def check_place(path: str | os.PathLike[str]) -> None:
    """RefusedError for weights in a folder that requests can write to."""
    if folder := uploaded(path):
        what = f"{os.path.basename(path)} would be read from {folder}, a folder that requests can write to"
        raise RefusedError("weights", what, "ask the operator to put it into a folder of models")


class Choices:
    """Names in drop-downs that stand for weights which a request can have written; each is looked up once."""

    def __init__(self) -> None:
        self._folders: tuple[str, ...] = written()
        self._known: dict[str, str | None] = {}

    def uploaded(self, name: str) -> str | None:
        """The folder, if every kind of model that has a file of this name would read it from such a folder."""
        if name not in self._known:
            self._known[name] = self._look(name)
        return self._known[name]

    def _look(self, name: str) -> str | None:
        found = []
        for kind, (paths, endings) in folder_paths.folder_names_and_paths.items():
            fits = not endings or "folder" in endings or os.path.splitext(name)[1].lower() in endings
            if fits and kind != "custom_nodes" and any(uploaded(path, self._folders) for path in paths):
                found.append(kind)
        if not any(self._first(kind, name) for kind in found):
            return None  # as nearly every name
        places = [self._first(kind, name) for kind in folder_paths.folder_names_and_paths]
        inside = [uploaded(path, self._folders) for path in places if path]
        return inside[0] if inside and all(inside) else None

    def _first(self, kind: str, name: str) -> str | None:
        """The file, or folder of files, that loaders of a kind of model read (folder_paths.get_full_path)."""
        relative = os.path.relpath(os.path.join("/", name), "/")
        paths = (os.path.join(path, relative) for path in folder_paths.folder_names_and_paths[kind][0])
        return next(filter(os.path.exists, paths), None)


# What a model was made of


@contextmanager
def reading() -> Iterator[Read]:
    """What a node reads while it runs."""
    read: Read = {}
    token = _reading.set(read)
    try:
        yield read
    finally:
        _reading.reset(token)


def end(policy: OperatorPolicy, read: Read, made: Any) -> None:
    """Remember of what a node's models were made; RefusedError where the policy does not name one of their files."""
    for value in models(made):
        if isinstance(value, asyncio.Task):
            value.add_done_callback(lambda done: _remember(read, done.result()) if _ended_well(done) else None)
        else:
            _remember(read, value)
            check_base(policy, value)


def _ended_well(task: asyncio.Task) -> bool:
    return not task.cancelled() and task.exception() is None


def _remember(read: Read, made: Any) -> None:
    for value in models(made):
        if read and (module := _module(value)) is not None:
            _made.setdefault(module, dict(read))


def models(value: Any, depth: int = 6) -> Iterator[Any]:
    """Models, and results that are still to come, in what a node got or gave: pipes are lists and dicts of them."""
    if isinstance(value, asyncio.Task) or _module(value) is not None:
        yield value
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from models(item, depth - 1)
    elif depth and isinstance(value, Mapping):
        yield from models(list(value.values()), depth)


def _module(value: Any) -> torch.nn.Module | None:
    """The weights of a diffusion model, text encoder or VAE (attributes of ComfyUI's classes)."""
    if isinstance(value, comfy.model_patcher.ModelPatcher):
        value = value.model
    if isinstance(value, comfy.model_base.BaseModel):
        return value
    if isinstance(value, comfy.sd.CLIP):
        return value.cond_stage_model
    return getattr(value, "first_stage_model", None) if isinstance(value, comfy.sd.VAE) else None


def check_base(policy: OperatorPolicy, value: Any) -> tuple[str, ...]:
    """SHA-256 of the files of a diffusion model, text encoder or VAE; RefusedError for one that is not named.

    Nothing is asked, or hashed, where the policy names none.
    """
    module, allow = _module(value), policy.base.allow
    if allow is None or module is None:
        return ()
    kinds = {comfy.sd.CLIP: "text encoder", comfy.sd.VAE: "VAE"}
    what = next((said for kind, said in kinds.items() if isinstance(value, kind)), "diffusion model")
    read = _made.get(module)
    if read is None and (read := _reading.get()):
        read = _made.setdefault(module, dict(read))  # used in the very node that loads it
    if not read:
        raise RefusedError("base.allow", f"the file of the {what} is not known", "load it with a loader of ComfyUI's")
    return tuple(_named(what, path, state, allow) for path, state in read.items())


def _named(what: str, path: Path, state: Any, allow: tuple[str, ...]) -> str:
    """The file's SHA-256, which is worked out again whenever its entry changes (a hard link to it, its permissions).

    Such a change alone leaves contents, size and time of writing as they were when the file was read.
    """
    now = find_file_state(path)
    if now is None or state is None or now._replace(changed=0) != state._replace(changed=0):
        raise RefusedError("base.allow", f"the file of the {what}, {path.name}, was changed", "load it again")
    if (sha256 := sha256_file(path)) not in allow:
        said = f"the {what} was made of {path.name} (sha256 {sha256[:16]}), which the operator has not named"
        raise RefusedError("base.allow", said, "use one that is named under [base]")
    return sha256


# Around ComfyUI's functions


def loading(original: Callable) -> Callable:
    """Around the reading of a file of weights, wherever it is asked for."""

    def load_torch_file(ckpt, *args, **kwargs):
        if policies.current() is None:
            return original(ckpt, *args, **kwargs)
        check_place(ckpt)
        path = Path(os.path.realpath(ckpt))
        state = find_file_state(path)
        loaded = original(ckpt, *args, **kwargs)
        if (read := _reading.get()) is not None:
            read[path] = state
        return loaded

    return load_torch_file


def finding(original: Callable) -> Callable:
    """Around the search for a file by its name, where a node runs: packs read files by readers of their own."""

    def get_full_path(*args, **kwargs):
        path = original(*args, **kwargs)
        if path and _reading.get() is not None and policies.current() is not None:
            check_place(path)
        return path

    return get_full_path


def embedding(original: Callable) -> Callable:
    """Around the loading of a textual inversion that a prompt names."""

    def load_embed(embedding_name, embedding_directory, *args, **kwargs):
        if policies.current() is not None:
            folders = [embedding_directory] if isinstance(embedding_directory, str) else embedding_directory
            tree = (root for folder in folders for root, _, _ in os.walk(folder, followlinks=True))
            paths = (os.path.join(root, embedding_name) + ending for root in tree for ending in ENDINGS)
            for path in filter(os.path.isfile, paths):
                check_place(path)
        return original(embedding_name, embedding_directory, *args, **kwargs)

    return load_embed


def using(original: Callable) -> Callable:
    """Around the use of a text encoder or VAE, which a node may have loaded by itself."""

    def use(self, *args, **kwargs):
        if (policy := policies.current()) is not None:
            check_base(policy, self)
        return original(self, *args, **kwargs)

    return use
