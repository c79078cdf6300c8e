"""Weights that come inside installed packages, found without importing the packages."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path


def file_of(package: str, name: str) -> Path | None:
    """File ``name`` in the folder of an installed package, or None."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / name).is_file():
            return path
    return None


def version_of(distribution: str) -> str:
    """The installed version, "" where its metadata is missing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
