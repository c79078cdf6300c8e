"""Image files that went into an image, for its Content Credentials: those that are loaded behind it in the graph."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import folder_paths
from PIL import Image

from ..modular_lora.errors import one_line
from ..modular_lora.provenance.credentials import CredentialsError, Input
from . import running

LOADERS = frozenset(("LoadImage", "LoadImageMask", "LoadImageOutput"))  # ComfyUI's own, which take a file's name
UNKNOWN = "application/octet-stream"


def behind(graph: Mapping[str, Any], node: str) -> tuple[Input, ...]:
    """The image files that are loaded behind a node, each once.

    Args:
        graph: A prompt in API format.
        node: The id of the node.

    Raises:
        CredentialsError: One of them cannot be read any more, or was written since the prompt began.
    """
    return tuple(map(_input, dict.fromkeys(_files(graph, node))))


def _files(graph: Mapping[str, Any], node: str) -> Iterator[str]:
    """What ComfyUI's loaders behind a node name."""
    waiting, seen = [node], set()
    while waiting:
        one = waiting.pop()
        if one in seen or one not in graph:
            continue
        seen.add(one)
        given = graph[one].get("inputs", {})
        waiting += [value[0] for value in given.values() if isinstance(value, list) and len(value) == 2]
        name = given.get("image")
        if graph[one].get("class_type") in LOADERS and isinstance(name, str):
            yield name


def _input(name: str) -> Input:
    try:
        path = Path(folder_paths.get_annotated_filepath(name))
        content = path.read_bytes()
        prompt = running.current.get()
        if prompt is not None and prompt.began < path.stat().st_mtime <= time.time():
            said = (
                f"input {name!r} was written while the prompt ran, so that it is not known what went in: run it again"
            )
            raise CredentialsError(said, code="credentials.input")
        with Image.open(path) as image:
            return Input(image.get_format_mimetype() or UNKNOWN, content)
    except (OSError, ValueError) as error:
        said = f"input {name!r} cannot be read again to name it ({one_line(error)}): run it again with the file there"
        raise CredentialsError(said, code="credentials.input") from error
