"""Links to folders, which Windows lets nobody but administrators make as symbolic links."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_folder(source: Path, link: Path) -> None:
    """A symbolic link, on Windows a junction, and a copy where neither can be made."""
    if link.exists() and link.samefile(source):
        return
    remove(link)
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        if os.name == "nt":
            import _winapi

            _winapi.CreateJunction(str(source), str(link))
        else:
            link.symlink_to(source, target_is_directory=True)
    except OSError:
        shutil.copytree(source, link, ignore=shutil.ignore_patterns(".git", ".run", "demo_output", "__pycache__"))


def remove(path: Path) -> None:
    """Remove a link without its target, or a folder that is a copy of ours."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        try:
            path.rmdir()  # an empty folder or a junction
        except OSError:
            shutil.rmtree(path)
