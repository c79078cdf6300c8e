"""Which ComfyUI runs: an existing one if the user has named it, else the bundled one."""

from __future__ import annotations

import configparser
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import environment, from_git, paths
from .console import RunError
from .process import output_of

VARIABLE = "COMFYUI_PATH"
PYTHON_VARIABLE = "COMFYUI_PYTHON"
NEEDED = "import torch, torchvision, aiohttp, safetensors, PIL"


@dataclass(frozen=True)
class Host:
    """A ComfyUI with the interpreter that runs it."""

    folder: Path
    python: Path
    origin: str  # how it was chosen, for the user
    bundled: bool  # run.py's own, in an environment that it may write to

    @property
    def version(self) -> str:
        source = self.folder / "comfyui_version.py"
        text = source.read_text(encoding="utf-8") if source.exists() else ""
        found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
        return found.group(1) if found else "of unknown version"


def comfy_cli_config(variables: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """comfy-cli's settings file."""
    home = Path(variables.get("USERPROFILE" if platform == "win32" else "HOME") or Path.home())
    folder = {
        "win32": home / "AppData" / "Local" / "comfy-cli",
        "darwin": home / "Library" / "Application Support" / "comfy-cli",
    }.get(platform, home / ".config" / "comfy-cli")
    return folder / "config.ini"


def comfy_cli_workspace(config: Path) -> Path | None:
    """The default workspace that the user set in comfy-cli, if it still is a ComfyUI."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(config, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return None
    named = parser.defaults().get("default_workspace", "").strip()
    return Path(named) if named and is_comfyui(Path(named)) else None


def is_comfyui(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("main.py", "nodes.py", "comfy", "comfy_api"))


def own_python(folder: Path) -> Path | None:
    """The interpreter that an installed ComfyUI brings along."""
    environments = [environment.python_of(folder / name) for name in ("venv", ".venv")]
    portable = [place / "python_embeded" / "python.exe" for place in (folder, folder.parent)]
    return next((python for python in [*environments, *portable] if python.exists()), None)


def existing(variables: Mapping[str, str] = os.environ) -> Host | None:
    """The ComfyUI that COMFYUI_PATH or comfy-cli names; an empty COMFYUI_PATH asks for the bundled one."""
    named = variables.get(VARIABLE)
    if named is not None and not named.strip():
        return None
    if named:
        folder, origin = Path(named).expanduser().resolve(), VARIABLE
        if not is_comfyui(folder):
            raise RunError(f"{VARIABLE}={named}: no ComfyUI there (main.py, nodes.py, comfy/). Correct the path.")
    else:
        workspace = comfy_cli_workspace(comfy_cli_config(variables))
        if workspace is None:
            return None
        folder, origin = workspace.resolve(), "comfy-cli's default workspace"
    chosen = variables.get(PYTHON_VARIABLE)
    python = Path(chosen) if chosen else own_python(folder) or Path(sys.executable)
    output_of(
        [python, "-c", NEEDED],
        subject=f"{python}, which should run ComfyUI in {folder} ({origin})",
        remedy=f"Set {PYTHON_VARIABLE} to the interpreter of that ComfyUI, or add --bundled.",
    )
    return Host(folder, python, origin, bundled=False)


def _bundled(python: Path) -> Host:
    return Host(paths.COMFYUI, python, f"installed by run.py; {environment.COMFYUI_AGE}", bundled=True)


def find(*, bundled: bool, ref: str | None = None) -> Host:
    """The ComfyUI to use, installed if need be; ``ref`` asks for one out of git (see from_git.py)."""
    if ref is not None:
        return _of_git(ref)
    found = None if bundled else existing()
    if found is not None:
        return found
    return _bundled(environment.ensure_bundled())


def _of_git(ref: str) -> Host:
    python, folder, commit = from_git.ensure(ref)
    origin = f"--comfyui-git {ref}, commit {commit[:10]}; delete {folder.parent} to fetch it anew"
    return Host(folder, python, origin, bundled=True)
