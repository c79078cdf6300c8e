"""Training state on disk: written beside, then renamed, so that a killed process leaves a whole state or none."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..modular_lora.errors import GuardError
from ..modular_lora.util import atomic, plain_json

DESCRIPTION, TENSORS = "state.json", "state.pt"
MAY_CHANGE = {"max_train_steps", "max_train_epochs"}  # a finished training can be gone on with


def save_state(folder: Path, fingerprint: dict[str, str], state: dict[str, Any]) -> None:
    """``folder`` with state.json (what the run was) and state.pt (tensors and numbers)."""
    with atomic.replacing_folder(folder) as part:
        with open(part / TENSORS, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        plain_json.write(fingerprint, part / DESCRIPTION)


def check_state(folder: Path) -> None:
    """GuardError where no training state can be at ``folder``; `load_state` looks at what is in it."""
    if not folder.is_dir():
        raise GuardError(f"resume {folder}: is not a folder: name the -state folder of the training to go on with.")


def load_state(
    folder: Path, fingerprint: Mapping[str, str], defaults: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], str]:
    """What `save_state` wrote, and how many steps that run was to have.

    ``defaults``: what an option was where the state does not have its name, since it is from before there was one.
    GuardError where the state is damaged or of another run, with what differs.
    """
    try:
        saved = plain_json.read_object(folder / DESCRIPTION)
        state = torch.load(folder / TENSORS, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise GuardError(
            f"resume {folder.name}: no whole training state ({error}): choose another one.", code="resume.no-state"
        ) from error
    saved = {**(defaults or {}), **saved}
    for name in sorted((set(saved) | set(fingerprint)) - MAY_CHANGE):
        if saved.get(name) != fingerprint.get(name):
            raise GuardError(
                f"resume {folder.name}: {name} was {saved.get(name)!r} and is {fingerprint.get(name)!r} now: set it "
                "back, or start anew with network_weights.",
                code="resume.changed",
            )
    return state, saved.get("max_train_steps", "")
