"""Images that a gate answered "review": kept where the policy says, for a person, whatever the gate's action is."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import torch

from ..modular_lora.errors import GuardError
from ..modular_lora.provenance import ledger
from . import saving
from .enforcement import policy as policies


def keep(images: torch.Tensor, answers: Sequence[str]) -> list[str]:
    """Write the originals among images (b h w 3) that a person should decide about.

    Args:
        images: As they came to the gate.
        answers: The gate's, one each.

    Returns:
        Names of the files; none where no policy names a folder.

    Raises:
        GuardError: Where one cannot be written: it must not be lost.
    """
    policy = policies.current()
    if policy is None or policy.review_folder is None:
        return []
    names = []
    for i in (i for i, answer in enumerate(answers) if answer == "review"):
        folder, name = policy.review_folder, f"{uuid.uuid4().hex}.png"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            saving.write(folder / name, images[i], ledger.known(images[i]))
        except OSError as error:
            raise GuardError(
                f"{folder}: an image for a person to decide about cannot be written ({error.strerror or error}): "
                "free space or mend its permissions.",
                code="review.not-written",
            ) from error
        names.append(name)
    return names
