"""The activity of a safety LoRA that is being trained, on its own prompts: what its file says of itself.

Measured as guard/activity.py says, from noise at the noisiest timestep, on the network with its adapters: of every
adapted layer y0 = W0·x + b is read by a hook, and z = ΔW·x: of a LoRA scale · B A x, of others y − y0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ...modular_lora.errors import GuardError
from ...modular_lora.guard import activity
from ..adapters import Adapters
from ..forms import ADAPTER
from ..model import HostModel
from ..options import SafetyOptions
from ..seeds import role_seed
from . import sampling
from .erasure import Erasure

MOST = 32  # prompts of either kind


class Made(NamedTuple):
    """The metadata ("" where there is no calibration), and a line for the report."""

    metadata: str
    line: str


def calibration(host_model: HostModel, options: SafetyOptions, adapters: Adapters, erasure: Erasure) -> Made:
    """The calibration on the prompts that are trained, or why there is none.

    Its rows are of no training step: (concept prompts + preserved prompts) × noises, without gradient.
    """
    found, kept = ([term.prompt for term in terms if term.prompt] for terms in (erasure.erased, erasure.kept))
    found, kept = (list(dict.fromkeys(prompts))[:MOST] for prompts in (found, kept))
    noises = max(2, -(-activity.LEAST_MEASURED // max(1, min(len(found), len(kept)))))
    seed = role_seed(options.seed, "calibration")
    try:
        for name, prompts in (("concept", found), ("preserved", kept)):
            activity.check_prompts(name, len(prompts))
        with torch.no_grad(), erasure.saved_weights():
            values = [_measured(host_model, options, adapters, erasure, prompts, noises) for prompts in (found, kept)]
        latent = host_model.latent_shape(options.train_size, options.train_size)
        made = activity.calibrate(host_model.base_sha256, 1.0, latent, seed, *values)
    except GuardError as error:
        return Made("", f"none, {error}")
    rows = noises * (len(found) + len(kept))
    return Made(activity.encode(made), f"AUC {made.auc:.3f} on the trained prompts, {rows} network rows")


def _measured(
    host_model: HostModel,
    options: SafetyOptions,
    adapters: Adapters,
    erasure: Erasure,
    prompts: Sequence[str],
    noises: int,
) -> list[list[float]]:
    """The activity on every prompt, noise by noise."""
    seed = role_seed(options.seed, "calibration")
    found = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed)  # the same noises for every prompt
        x = sampling.noise(host_model, (options.train_size, options.train_size), [generator] * noises)
        t = torch.full((noises,), len(host_model.schedule) - 1, device=x.device)
        with _heard(adapters) as energies:
            host_model.predict(x, t, erasure.prompts([prompt] * noises))
        ratios = [z / y0 for z, y0 in energies.values() if z.any()]  # a layer that is zero is not in the file
        found.append(torch.stack(ratios).double().mean(0).tolist() if ratios else [0.0] * noises)
    return found


@contextmanager
def _heard(adapters: Adapters) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """|z|² and |y0|² of every row, by layer, as the network runs meanwhile."""
    energies: dict[str, tuple[Tensor, Tensor]] = {}
    base: dict[str, Tensor] = {}
    hooks = []

    def note(name: str, z: Tensor, scale: float = 1.0) -> None:
        energies[name] = scale**2 * _energy(z), _energy(base[name])

    def on_base(name: str):
        return lambda module, inputs, output: base.update({name: output})

    def on_up(name: str, scale: float):
        return lambda module, inputs, output: note(name, output, scale)

    def on_layer(name: str):
        return lambda module, inputs, output: note(name, output - base[name])

    try:
        for name, layer in adapters.layers.items():
            hooks.append(layer.base_layer.register_forward_hook(on_base(name)))
            if adapters.form.thin:
                hooks.append(layer.lora_B[ADAPTER].register_forward_hook(on_up(name, adapters.scale(name))))
            else:
                hooks.append(layer.register_forward_hook(on_layer(name)))
        yield energies
    finally:
        for hook in hooks:
            hook.remove()


def _energy(t: Tensor) -> Tensor:
    """Sum of squares of every row (b ...), float32."""
    return t.detach().float().flatten(1).square().sum(1)
