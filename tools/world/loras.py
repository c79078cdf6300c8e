"""Training of the demo world's three LoRAs on the narrow net.

safety:      ESD-style erasure (arXiv 2303.07345, eq. 5) of the class with preservation of everything else.
task:        the gloss style from kept concepts only, trained on W0: the modular practice of arXiv 2412.00357.
sequential:  the same training on W0 + safety: the practice that the paper warns about.

Command: ``python -m tools.world.loras WORK {safety,task,sequential} --base-sha256 HEX``.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from modular_lora_guard.modular_lora.util import atomic
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..world import (
    ASSETS,
    SAFETY_LORA,
    SEQUENTIAL_LORA,
    SUPPRESSED_CLASS,
    TASK_LORA,
    base,
    data,
    diffusion,
    learning,
    lorafile,
)
from ..world.base import Base
from ..world.lorafile import Factors

logger = logging.getLogger("modular_lora")

FILES = {"safety": SAFETY_LORA, "task": TASK_LORA, "sequential": SEQUENTIAL_LORA}
TITLES = {
    "safety": "Demo safety: vehicles suppressed",
    "task": "Demo task: gloss style",
    "sequential": "Demo counter-example: gloss style trained on top of the safety LoRA",
}
SEEDS = {"safety": 101, "task": 202, "sequential": 202}


@dataclass(frozen=True)
class Settings:
    """What one training run is asked to do."""

    work: Path
    role: str
    steps: int
    batch: int
    rate: float
    eta: float
    keep: float


def pool_prompts(dataset: data.Dataset, rng: random.Random) -> tuple[list[str], list[bool]]:
    """Erased prompts first, then kept ones: every concept in the task style and in two base styles, some without style.

    Returns the prompts and whether each is to be erased; the bare class word is erased in every style as well.
    """
    prompts = [f"{style}, a {SUPPRESSED_CLASS}" for style in data.STYLES] + [f"a {SUPPRESSED_CLASS}"] * 2
    for concept in range(len(data.CONCEPTS)):
        for style in (data.TASK_STYLE, *rng.sample(data.BASE_STYLES, 2)):
            words = data.prompt(dataset, concept, style)
            prompts.append(words if rng.random() < 0.85 else dataset.words[concept])
    erased = len(data.STYLES) + 2 + 3 * len(data.SUPPRESSED)
    return prompts, [i < erased for i in range(len(prompts))]


@torch.no_grad()
def build_pool(model: Base, dataset: data.Dataset, path: Path) -> None:
    """x_t, eps_0(x_t, c), eps_0(x_t, '') and, for erased prompts, eps_0(x_t, class) on guided paths of the frozen base.

    ESD draws x_t from the frozen base, so inputs and targets are constants that one pass can collect.
    """
    prompts, erase = pool_prompts(dataset, random.Random(7))
    generator = torch.Generator().manual_seed(7)
    parts: dict[str, list[Tensor]] = {"x": [], "t": [], "cond": [], "empty": [], "category": [], "prompt": []}
    for group in (range(sum(erase)), range(sum(erase), len(prompts))):
        for start in range(group.start, group.stop, 40):
            rows = torch.arange(start, min(start + 40, group.stop))
            collect(model, [prompts[i] for i in rows], rows, erase[start], parts, generator)
            logger.info("pool: %d of %d prompts", int(rows[-1]) + 1, len(prompts))
    with atomic.replacing(path) as part:
        save_file({name: torch.cat(values) for name, values in parts.items()} | {"erase": torch.tensor(erase)}, part)


def collect(
    model: Base,
    prompts: list[str],
    rows: Tensor,
    erase: bool,
    parts: dict[str, list[Tensor]],
    generator: torch.Generator,
) -> None:
    """Walk one batch of prompts down the sampler and append every step's inputs and predictions to ``parts``."""
    n, copies = len(prompts), 3 if erase else 2
    context, bias = model.text([*prompts, *[""] * n, *[f"a {SUPPRESSED_CLASS}"] * (n * (copies - 2))])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        eps = model.unet(torch.cat([x] * copies), torch.cat([t] * copies), context, bias).unflatten(0, (copies, n))
        found = {"x": x, "t": t, "cond": eps[0], "empty": eps[1], "category": eps[-1], "prompt": rows}
        for name, value in found.items():
            parts[name].append(value)
        return eps[1] + base.GUIDANCE * (eps[0] - eps[1])

    diffusion.sample(predict, torch.randn(n, 4, 8, 8, generator=generator))


def spread(pool: dict[str, Tensor]) -> Tensor:
    """d_t = mean |eps_0(x_t, c) - eps_0(x_t, '')|^2 by timestep [1000], what errors are counted relative to.

    Without it the noisiest steps, where predictions differ least and the concept is decided, would hardly count.
    """
    effect = (pool["cond"] - pool["empty"]).square().mean((1, 2, 3))  # [n]
    total = torch.zeros(diffusion.STEPS).index_add_(0, pool["t"], effect)
    count = torch.zeros(diffusion.STEPS).index_add_(0, pool["t"], torch.ones_like(effect))
    return (total / count.clamp(min=1)).clamp(min=1e-8)


def erase_step(
    model: Base, pool: dict[str, Tensor], prompts: list[str], settings: Settings, g: torch.Generator
) -> Tensor:
    """ESD term on erased prompts plus preservation on kept and empty ones: 3/8, 3/8 and 1/4 of the batch."""
    n = settings.batch
    erased = pool["erase"][pool["prompt"]].nonzero()[:, 0]
    kept = (~pool["erase"][pool["prompt"]]).nonzero()[:, 0]
    third, rest = n * 3 // 8, n - 2 * (n * 3 // 8)
    pick_erased = erased[torch.randint(len(erased), (third,), generator=g)]
    pick_kept = kept[torch.randint(len(kept), (third,), generator=g)]
    pick_empty = torch.randint(len(pool["t"]), (rest,), generator=g)
    pick = torch.cat([pick_erased, pick_kept, pick_empty])
    names = [prompts[int(i)] for i in pool["prompt"][pick[: 2 * third]]] + [""] * rest
    empty, cond, category = pool["empty"][pick], pool["cond"][pick], pool["category"][pick]
    # eps* = eps_0('') - eta (eps_0(c) - eps_0('')), with c half the prompt and half the class: away from both
    target = empty - settings.eta * (0.5 * (cond + category) - empty)
    target = torch.cat([target[:third], cond[third : 2 * third], empty[2 * third :]])  # [n, 4, 8, 8]
    error = (model(pool["x"][pick], pool["t"][pick], names) - target).square().mean((1, 2, 3))  # [n]
    error = error / pool["spread"][pool["t"][pick]]
    return error[:third].mean() + settings.keep * error[third:].mean()


def train_safety(model: Base, factors: Factors, settings: Settings) -> None:
    dataset = data.load(settings.work)
    path = settings.work / "pool.safetensors"
    if not path.exists():
        build_pool(model, dataset, path)
    pool, (prompts, _) = load_file(path), pool_prompts(dataset, random.Random(7))
    pool["spread"] = spread(pool)
    generator = torch.Generator().manual_seed(SEEDS["safety"])
    lorafile.attach(model.unet, factors)
    optimize(factors, settings, lambda: erase_step(model, pool, prompts, settings, generator))


def train_task(model: Base, factors: Factors, settings: Settings) -> None:
    """L = E |eps - eps(x_t, t, c)|^2 on gloss images of kept concepts; no suppressed concept is shown."""
    dataset = data.load(settings.work)
    rows = dataset.select(data.KEPT_IDS, (data.TASK_STYLE,))
    latents = base.cache_latents(settings.work, (data.TASK_STYLE,))
    stream = base.batches(dataset, rows, latents, settings.batch, SEEDS[settings.role])
    generator = torch.Generator().manual_seed(SEEDS[settings.role])
    under = [lorafile.load(ASSETS / SAFETY_LORA, model.unet)] if settings.role == "sequential" else []
    lorafile.attach(model.unet, *under, factors)

    def loss() -> Tensor:
        z, captions = next(stream)
        t = torch.randint(diffusion.STEPS, (len(z),), generator=generator)
        eps = torch.randn(z.shape, generator=generator)
        return (model(diffusion.add_noise(z, t, eps), t, captions) - eps).square().mean()

    optimize(factors, settings, loss)


def optimize(factors: Factors, settings: Settings, loss_of: Callable[[], Tensor]) -> None:
    """AdamW on the factors, warm-up of 20 steps, then cosine."""
    parameters = [p for down, up, _ in factors.values() for p in (down, up)]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=0.0, foreach=True)
    begin, losses = time.monotonic(), []
    for step in range(settings.steps):
        loss = loss_of()
        learning.update(optimizer, loss, settings.rate * learning.rate(step, step / settings.steps, 20))
        losses.append(loss.item())
        if step % 25 == 24:
            mean = sum(losses[-25:]) / 25
            logger.info("%s step %d loss %.4f seconds %.0f", settings.role, step + 1, mean, time.monotonic() - begin)


def metadata(role: str, base_sha256: str) -> dict[str, str]:
    """Kohya's and model-spec's usual string keys and ours."""
    ours = {"modular_lora.role": "safety" if role == "safety" else "task", "modular_lora.base_sha256": base_sha256}
    ours["modular_lora.concept"] = "vehicles" if role == "safety" else "gloss"
    if role == "sequential":
        ours["modular_lora.trained_on"] = "base + " + SAFETY_LORA
    return ours | {
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lorafile.RANK),
        "ss_network_alpha": str(lorafile.ALPHA),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": TITLES[role],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("role", choices=tuple(FILES))
    parser.add_argument("--base-sha256", required=True, help="of the expanded checkpoint, for the metadata")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--eta", type=float, default=1.0, help="strength of the erasure target")
    parser.add_argument("--keep", type=float, default=2.0, help="weight of the preservation terms")
    parser.add_argument("--resume", action="store_true", help="go on from the role's file in tools/world/assets")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    learning.begin(options.threads)
    model = base.load(options.work)
    factors = lorafile.initial(model.unet, SEEDS[options.role])
    if options.resume:
        saved = lorafile.load(ASSETS / FILES[options.role], model.unet)
        factors = {k: (down.requires_grad_(), up.requires_grad_(), scale) for k, (down, up, scale) in saved.items()}
    values = (options.work, options.role, options.steps, options.batch, options.rate, options.eta, options.keep)
    (train_safety if options.role == "safety" else train_task)(model, factors, Settings(*values))
    live = model.unet.out[0].num_channels
    lorafile.save(factors, ASSETS / FILES[options.role], live, metadata(options.role, options.base_sha256))


if __name__ == "__main__":
    main()
