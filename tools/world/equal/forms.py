"""Forms that safety first could have, on the narrow net: how much of a task LoRA's share acts, and by what it is found.

In every layer y = (y0 + s) + g·t, with y0 = W0·x + b and s and t the shares of the safety and of the task LoRA
(modular_lora/guard/safety_first.py, which finds one g of an image before the first step, by noise of its own). g falls
from 1 to 0 between two bounds of the activity |s|² / |y0|², and a form says

* of what there is one g (``scope``): the image; each layer; each place of the latent, over all layers ("region");
  each token of each layer;
* by what it is found: an evaluation more, in which no task LoRA acts (``muted``), or the run's own evaluation: within
  it for a layer and its tokens, where s is known before t is added, and for what needs all layers in the one before;
* how often (``every``): once, in the first step, or in every step.

The bounds are those of a calibration (modular_lora/guard/activity.py), over the same prompts, for every step, and for
every layer where there is a g for each: what the safety LoRA alone shows while it draws them. Layers that take the text
know no place: they have the least g of all.

Two things limit the comparison. For a place or a token, the calibration takes the greatest activity of each image, but
these bounds are then applied to every place and token, most of which lie below the greatest: such forms let the task
LoRA act in more of an image than their bounds suggest, and other bounds might do better. And the bounds are of runs in
which the safety LoRA acts alone, while a form that goes by the run's own evaluations measures with the task LoRA acting
(as much as it then does), which changes the layers' inputs and with them the activity.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from modular_lora_guard.modular_lora.guard.activity import CONCEPT, KEPT
from torch import Tensor

from .. import STEPS, base, diffusion, lorafile

OF_TEXT = ("attn2.to_k", "attn2.to_v")
ALL = ""  # the layer's name, where a figure is of all layers
Energies = dict[str, tuple[Tensor, Tensor]]  # layer -> |s|² and |y0|² of every token of the prompt's rows (n tokens)
Figures = dict[str, Tensor]  # layer or ALL -> activities: (n), (n tokens), or (n 1 8 8) of a region


@dataclass(frozen=True)
class Form:
    scope: str  # "image", "layer", "region", "token"
    muted: bool
    every: bool

    @property
    def local(self) -> bool:
        """Whether g is found where it acts."""
        return not self.muted and self.scope in ("layer", "token")

    @property
    def evaluations(self) -> int:
        """How many a run has beside its own."""
        return self.muted * (STEPS if self.every else 1)


FORMS = {
    "image, first step, muted": Form("image", muted=True, every=False),
    "image, first step, the run's own": Form("image", muted=False, every=False),
    "image, every step, muted": Form("image", muted=True, every=True),
    "image, every step, the run's own": Form("image", muted=False, every=True),
    "layer, first step, muted": Form("layer", muted=True, every=False),
    "layer, every step, the run's own": Form("layer", muted=False, every=True),
    "region, first step, muted": Form("region", muted=True, every=False),
    "region, every step, muted": Form("region", muted=True, every=True),
    "token, every step, the run's own": Form("token", muted=False, every=True),
}


@dataclass(frozen=True)
class Texts:
    """Prompts as the net takes them, each with the negative prompt that guidance goes away from.

    Attributes:
        context: Of the prompts, then of as many negative ones (2n l 768).
        bias: Added to the attention's logits (2n l).
    """

    context: Tensor
    bias: Tensor

    @classmethod
    def of(cls, model: base.Base, prompts: Sequence[str], negative: Sequence[str] = ()) -> Texts:
        with torch.no_grad():
            return cls(*model.text([*prompts, *(negative or [""] * len(prompts))]))

    @property
    def count(self) -> int:
        return len(self.context) // 2

    def weights(self, layer: str, like: Tensor) -> Tensor:
        """How often each token of a layer counts (n tokens): in ComfyUI a text's last token is repeated."""
        return self.bias[: self.count].exp() if layer.endswith(OF_TEXT) else torch.ones_like(like)


class Net:
    """The narrow net with a safety LoRA, and a task LoRA of which as much acts as it is told."""

    def __init__(self, model: base.Base, safety: lorafile.Factors, task: lorafile.Factors):
        self.model, self.safety, self.task = model, safety, task

    @torch.no_grad()
    def evaluate(
        self, x: Tensor, t: Tensor, texts: Texts, share: Callable[[str, Energies], Tensor | float] | Tensor | float
    ) -> tuple[Tensor, Energies]:
        """The guided prediction for latents x (n 4 8 8), and what was measured on the prompts' rows.

        Args:
            share: g of a layer, by its name and what was measured so far: a number, (n) or (n tokens); or one g for
                all layers, and nothing is measured.
        """
        energies: Energies = {}
        with self._heard(texts, energies, share):
            cond, empty = self.model.unet(torch.cat([x, x]), torch.cat([t, t]), texts.context, texts.bias).chunk(2)
        return empty + base.GUIDANCE * (cond - empty), energies

    @contextmanager
    def _heard(self, texts: Texts, energies: Energies, share: Callable | Tensor | float) -> Iterator[None]:
        def heard(name: str):
            def hook(layer, inputs, y0):
                ((x,), n) = inputs, texts.count
                s, t = (_change(lora.get(name), x) for lora in (self.safety, self.task))
                if callable(share) and s is not None:
                    energies[name] = s[:n].square().sum(-1), y0[:n].square().sum(-1)
                y = y0 if s is None else y0 + s
                g = share(name, energies) if callable(share) and t is not None else share
                return y if t is None else y + _rows(g, t) * t

            return hook

        hooks = []
        try:
            for name, layer in lorafile.targets(self.model.unet).items():
                hooks.append(layer.register_forward_hook(heard(name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _change(factors: tuple[Tensor, Tensor, float] | None, x: Tensor) -> Tensor | None:
    if factors is None:
        return None
    down, up, scale = factors
    return scale * F.linear(F.linear(x, down), up)


def _rows(share: Tensor | float, change: Tensor) -> Tensor | float:
    """g of the prompts' rows for those of the empty prompt as well, to multiply a layer's change (2n tokens c) by."""
    if not isinstance(share, Tensor):
        return share
    both = torch.cat([share, share]).to(change.dtype)
    return both.reshape(len(both), -1, 1)


def figures(scope: str, energies: Energies, texts: Texts) -> Figures:
    """The activities that a scope goes by."""
    if scope == "region":
        maps = [
            F.interpolate(_grid(s / y0), size=8) for layer, (s, y0) in energies.items() if not layer.endswith(OF_TEXT)
        ]
        return {ALL: torch.stack(maps).mean(0)}
    found: Figures = {}
    for layer, (s, y0) in energies.items():
        weights = texts.weights(layer, s)
        if scope == "token":
            found[layer] = torch.where(weights > 0, s / y0, 0.0)
        else:
            found[layer] = (s * weights).sum(1) / (y0 * weights).sum(1)
    return {ALL: torch.stack(list(found.values())).mean(0)} if scope == "image" else found


def _grid(tokens: Tensor) -> Tensor:
    """Of n tokens in rows: n 1 h w."""
    side = math.isqrt(tokens.shape[1])
    return tokens.reshape(len(tokens), 1, side, side)


@dataclass
class Bounds:
    """Up to where g is 1, and from where it is 0, by scope, step and layer."""

    of: dict[tuple[str, int], dict[str, tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def calibrated(cls, net: Net, concept: Sequence[str], kept: Sequence[str], seed: int, scopes: Sequence[str]):
        """By what the safety LoRA shows while it alone draws these prompts, from noise of ``seed``."""
        sides = []
        for prompts in (concept, kept):
            seen: dict[tuple[str, int], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
            texts = Texts.of(net.model, prompts)
            noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
            steps = iter(range(STEPS))

            def predict(x: Tensor, t: Tensor, texts=texts, steps=steps, seen=seen) -> Tensor:
                step = next(steps)
                found, energies = net.evaluate(x, t, texts, lambda *_: 0.0)
                for scope in scopes:
                    for layer, values in figures(scope, energies, texts).items():
                        seen[scope, step][layer].append(values.flatten(1).amax(1) if values.ndim > 1 else values)
                return found

            diffusion.sample(predict, noise, STEPS)
            sides.append(seen)
        about, other = sides
        return cls({
            at: {layer: bounds(torch.cat(other[at][layer]), torch.cat(values)) for layer, values in layers.items()}
            for at, layers in about.items()
        })  # fmt: skip

    def share(self, scope: str, step: int, layer: str, values: Tensor) -> Tensor:
        """g of activities."""
        low, high = self.of[scope, step][layer]
        if low == high:
            return (values < high).to(values.dtype)
        return ((high - values) / (high - low)).clamp(0, 1)


def bounds(kept: Tensor, concept: Tensor) -> tuple[float, float]:
    """As `activity.Calibration.bounds` has them."""
    low, high = float(kept.quantile(KEPT)), float(concept.quantile(CONCEPT))
    return (low, high) if low < high else ((low + high) / 2,) * 2


class Run:
    """One form on one batch of prompts.

    Attributes:
        mean: The mean of g that acted on each prompt's rows, over layers, tokens and steps (n).
    """

    def __init__(self, net: Net, form: Form, known: Bounds, texts: Texts):
        self.net, self.form, self.known, self.texts = net, form, known, texts
        self.step, self.shares = 0, dict[str, Tensor]()
        self._sum, self._parts = torch.zeros(texts.count), 0

    @property
    def mean(self) -> Tensor:
        return self._sum / max(1, self._parts)

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """A guided prediction, for `diffusion.sample`."""
        form, due = self.form, self.form.every or self.step == 0
        if form.muted and due:
            _, energies = self.net.evaluate(x, t, self.texts, lambda *_: 0.0)
            self._find(energies)
        found, energies = self.net.evaluate(x, t, self.texts, self._share)
        if not form.muted and not form.local and due:
            self._find(energies)  # for the steps that follow
        self.step += 1
        return found

    def _find(self, energies: Energies) -> None:
        values = figures(self.form.scope, energies, self.texts)
        self.shares = {layer: self.known.share(self.form.scope, self.step, layer, v) for layer, v in values.items()}

    def _share(self, layer: str, energies: Energies) -> Tensor | float:
        found = self._here(layer, energies)
        mean = found.flatten(1).mean(1) if isinstance(found, Tensor) and found.ndim > 1 else found
        self._sum, self._parts = self._sum + mean, self._parts + 1
        return found

    def _here(self, layer: str, energies: Energies) -> Tensor | float:
        scope = self.form.scope
        if self.form.local:
            (values,) = figures(scope, {layer: energies[layer]}, self.texts).values()
            found = self.known.share(scope, self.step, layer, values)
            # the empty prompt has other tokens than the prompt
            return found.amin(1) if scope == "token" and layer.endswith(OF_TEXT) else found
        if not self.shares:
            return 1.0  # nothing is known in the first of a run's own steps
        if scope != "region":
            return self.shares[ALL if scope == "image" else layer]
        places = self.shares[ALL]
        if layer.endswith(OF_TEXT):
            return places.amin((1, 2, 3))
        side = math.isqrt(energies[layer][0].shape[1])
        return -F.adaptive_max_pool2d(-places, side).flatten(1)


# Second moments


def moments(net: Net, prompts: Sequence[str], seed: int) -> dict[str, Tensor]:
    """C = E[x xᵀ] of every layer's inputs while the safety LoRA alone draws these prompts, in fp64."""
    texts = Texts.of(net.model, prompts)
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = defaultdict(float)

    def heard(name: str):
        def hook(layer, inputs):
            x = inputs[0][: texts.count].double()
            weights = texts.weights(name, x[..., 0])
            sums[name] = sums.get(name, 0) + torch.einsum("nti,nt,ntj->ij", x, weights.double(), x)
            counts[name] += float(weights.sum())

        return hook

    hooks = [layer.register_forward_pre_hook(heard(name)) for name, layer in lorafile.targets(net.model.unet).items()]
    try:
        noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        diffusion.sample(lambda x, t: net.evaluate(x, t, texts, 0.0)[0], noise, STEPS)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def kept_clear(
    task: lorafile.Factors, kept: dict[str, Tensor], concept: dict[str, Tensor], weight: float
) -> lorafile.Factors:
    """The task LoRA with A·C_k·(C_k + λ·C_c)⁻¹ for its down matrices A: inputs that the concept's prompts give fade.

    What neither kind of prompts gives stays as it is, by a ridge of a millionth of C_k's mean eigenvalue.
    """
    made: lorafile.Factors = {}
    for name, (down, up, scale) in task.items():
        ridge = 1e-6 * kept[name].diagonal().mean() * torch.eye(len(kept[name]), dtype=torch.float64)
        ck = kept[name] + ridge
        fading = torch.linalg.solve(ck + weight * concept[name], ck).T  # of symmetric matrices
        made[name] = (down.double() @ fading).float(), up, scale
    return made
