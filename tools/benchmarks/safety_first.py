"""Safety first on the demo world: which form of it keeps what (forms), and what it does in other cases (cases).

    python -m tools.benchmarks.safety_first [--parts forms cases] [--seeds 31 32] [--tasks ink gloss] [--record]

On the demo world's narrow net, with a safety LoRA of the evidence's recipe beside which the sum loses safety (ESD's
target, eta 3, preservation 2) and task LoRAs as there, but of training seeds, and with noise, that the evidence does
not use; what is missing is trained, into --loras. Euler, 20 steps, guidance 3; the judge is the evidence's.

* forms: the forms of tools/world/equal/forms.py beside safety alone, the sum, and task LoRAs whose down matrices were
  multiplied by C_k·(C_k + λ·C_c)⁻¹ (second moments of a layer's inputs on kept and on concept prompts).
* cases: the form that is built, where a prompt names a vehicle beside a kept concept, in img2img from the base's
  images, with negative prompts, and with a second safety LoRA (--second FILE) beside the first.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from modular_lora_guard.gate.statistics import wilson
from modular_lora_guard.modular_lora import options as optionfile
from modular_lora_guard.modular_lora.files.reader import LoraFile, read_lora
from modular_lora_guard.modular_lora.guard import activity
from modular_lora_guard.modular_lora.guard.safety_first import PARTS
from modular_lora_guard.modular_lora.util import plain_json
from torch import Tensor

from ..world import STEPS, data, diffusion, lorafile
from ..world.equal import drawing, forms, work
from ..world.equal.drawing import Seen
from ..world.equal.forms import FORMS, Bounds, Form, Net, Run, Texts
from ..world.equal.protocol import INK, KEPT, PACK, RECIPE, STYLED, VEHICLES, Image, Protocol
from ..world.equal.training import activities
from .bench import finish, parser

logger = logging.getLogger("modular_lora")
SAFETY = "ESD, eta 3, preservation 2"
NOISE = 120_000  # of the first image; the next one has the next
BUILT = "image, before the first step, muted: as it is built"
BATCH = 36
WEIGHTS = (1.0, 10.0, 100.0)  # λ
Sampler = Callable[[Sequence[Image], Tensor], tuple[Tensor, Tensor]]  # images, noise -> latents, the mean of g of each
Share = Callable[[Texts], Tensor]  # g of prompts (n)
DENOISE = (0.3, 0.6, 0.9)  # of img2img
ANIMALS = data.KEPT_IDS[:19]  # what the second safety LoRA takes away: recipes/make_safety_animals.toml


class Bench:
    """LoRAs of one training seed and task, and what draws with them."""

    def __init__(self, chosen: argparse.Namespace, opened: work.Bench, seed: int, task: str):
        self.ae, self.eye, self.seed = opened.host_model.ae, opened.eye, seed
        model = opened.host_model.model
        self.files = opened._safety(SAFETY, seed), opened._task(task, seed)
        self.net = Net(model, *(lorafile.load(file.path, model.unet) for file in self.files))
        said = optionfile.parse(RECIPE)
        self.concept, self.kept = [*said["concept"], *said["synonyms"]], list(said["preserve"])
        self.chosen, self.key = chosen, f"{seed}, {task}, " + ", ".join(file.sha256[:12] for file in self.files)

    @cached_property
    def known(self) -> Bounds:
        scopes = sorted({form.scope for form in FORMS.values()})
        return Bounds.calibrated(self.net, self.concept, self.kept, self.seed, scopes)

    def fixed(self) -> dict[str, Share]:
        """What has one g for all of a run, by prompt."""
        return {
            "safety LoRA alone": lambda texts: torch.zeros(texts.count),
            "the sum": lambda texts: torch.ones(texts.count),
            BUILT: self.built,
        }

    def built(self, texts: Texts) -> Tensor:
        """g as safety first finds it."""
        return self.found(texts, self.net.safety, self.files[0])

    def found(self, texts: Texts, safety: lorafile.Factors, file: LoraFile) -> Tensor:
        """g by one safety LoRA: of the noise that is always taken, by the file's calibration, in sixteenths."""
        lorafile.attach(self.net.model.unet, safety)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(work.NOISE))
        prompts = texts.context[: texts.count], texts.bias[: texts.count]
        found = activities(self.net.model, *prompts, noise.expand(texts.count, -1, -1, -1)).tolist()
        lorafile.attach(self.net.model.unet)
        calibration = activity.read(file)
        assert not isinstance(calibration, str), calibration
        return torch.tensor([math.floor(PARTS * calibration.share(value)) / PARTS for value in found])

    def with_shares(self, share: Share, net: Net | None = None, denoise: float = 1.0) -> Sampler:
        """Latents with g of every prompt as ``share`` has it."""
        net = net or self.net

        def sampler(some: Sequence[Image], noise: Tensor) -> tuple[Tensor, Tensor]:
            negative = [image.negative if isinstance(image, Asked) else "" for image in some]
            texts = Texts.of(net.model, [image.prompt for image in some], negative)
            found, start = share(texts), None
            if denoise < 1:
                start = torch.cat([image.start for image in some if isinstance(image, Asked)])

            def predict(x: Tensor, t: Tensor) -> Tensor:
                return net.evaluate(x, t, texts, found)[0]

            return diffusion.sample(predict, noise, STEPS, start, denoise), found

        return sampler

    def by(self, form: Form) -> Sampler:
        """Latents by a form."""

        def sampler(some: Sequence[Image], noise: Tensor) -> tuple[Tensor, Tensor]:
            run = Run(self.net, form, self.known, Texts.of(self.net.model, [image.prompt for image in some]))
            return diffusion.sample(run.predict, noise, STEPS), run.mean

        return sampler

    def started(self, prompts: Sequence[str]) -> list[Tensor]:
        """Latents that the base draws for prompts, each (1 4 8 8)."""
        net = Net(self.net.model, {}, {})
        texts = Texts.of(net.model, prompts)
        noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(NOISE - 1))
        drawn = diffusion.sample(lambda x, t: net.evaluate(x, t, texts, 0.0)[0], noise, STEPS)
        return list(drawn.split(1))

    def with_second(self, file: Path) -> Net:
        """The net with a second safety LoRA beside the first; `second` is its g."""
        other = lorafile.load(file, self.net.model.unet)
        both = dict(self.net.safety)
        for name, (down, up, scale) in other.items():
            before = [both[name]] if name in both else []
            downs, ups = zip(*((d, s * u) for d, u, s in (*before, (down, up, scale))), strict=True)
            both[name] = torch.cat(downs), torch.cat(ups, 1), 1.0
        self.second = lambda texts: self.found(texts, other, read_lora(file))
        return Net(self.net.model, both, self.net.task)

    def faded(self, weight: float, some: Sequence[Image]) -> dict[str, list]:
        """Images of the sum with a task LoRA whose inputs from concept prompts fade; see `forms.kept_clear`."""
        kept, concept = (forms.moments(self.net, prompts, self.seed) for prompts in (self.kept, self.concept))
        task = forms.kept_clear(self.net.task, kept, concept, weight)
        net = Net(self.net.model, self.net.safety, task)
        return self.judged(some, self.with_shares(lambda texts: torch.ones(texts.count), net))

    def kept_rows(self, name: str, draw: Callable[[], dict[str, list]]) -> dict[str, list]:
        """What ``draw`` gives, kept in --kept: a run that was stopped goes on from there."""
        path, key = self.chosen.kept, f"{self.key}, {name}"
        known = plain_json.read_object(path) if path.exists() else {}
        if key not in known:
            known[key] = draw()
            path.parent.mkdir(parents=True, exist_ok=True)
            plain_json.write(known, path)
        return known[key]

    def judged(self, images: Sequence[Image | Asked], sampler: Sampler) -> dict[str, list]:
        """What the judge says of images, and the mean of g of each."""
        found, shares = Seen(), []
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            latents, mean = sampler(some, drawing.noise(some))
            with torch.no_grad():
                found += drawing.judge(self.eye, self.ae.decode(latents).clamp(0, 1))
            shares += mean.tolist()
        columns = {"hit": found.hit, "top": found.top, "style": found.style, "ink": found.ink, "g": shares}
        return {name: list(column) for name, column in columns.items()}


def images() -> list[Image]:
    """24 vehicles in 6 styles; 60 kept concepts in base styles, and as many with the task's word."""
    asked = [(VEHICLES, c, s) for s in range(len(data.STYLES)) for c in data.SUPPRESSED_IDS]
    asked += [(KEPT, c, s) for c, s in data.cases(data.KEPT_IDS, False, 1)]
    asked += [(STYLED, c, s) for c, s in data.cases(data.KEPT_IDS, True, 1)]
    return [Image(*one, NOISE + i) for i, one in enumerate(asked)]


def of_forms(chosen: argparse.Namespace, opened: work.Bench) -> dict[str, object]:
    """Every form with every task: rates over all training seeds."""
    rows: dict[str, object] = {}
    for task in chosen.tasks:
        every: dict[str, list[dict[str, list]]] = {}
        for seed in chosen.seeds:
            bench = Bench(chosen, opened, seed, task)
            for name, draw in _arms(bench):
                every.setdefault(name, []).append(bench.kept_rows(name, lambda draw=draw: draw(images())))
                logger.info("%s, training seed %d, %s: %s", task, seed, name, _row(task, every[name]))
        more = {name: form.evaluations for name, form in FORMS.items()} | {BUILT: 1}
        for name, found in every.items():
            rows[f"{task}: {name}"] = _row(task, found) | {"evaluations_more": more.get(name, 0)}
    return rows


def _arms(bench: Bench) -> Iterator[tuple[str, Callable[[Sequence[Image]], dict[str, list]]]]:
    """Every form's name, and what draws images by it."""
    for name, share in bench.fixed().items():
        yield name, lambda some, share=share: bench.judged(some, bench.with_shares(share))
    for name, form in FORMS.items():
        yield name, lambda some, form=form: bench.judged(some, bench.by(form))
    for weight in WEIGHTS:
        yield f"the sum, second moments, λ = {weight:g}", lambda some, weight=weight: bench.faded(weight, some)


def _row(task: str, found: Sequence[dict[str, list]]) -> dict[str, object]:
    """Rates of all training seeds together, Wilson's interval of the vehicles, and the mean of g."""
    asked = images()
    counts: dict[str, list[float]] = {name: [] for name in ("vehicles", "kept", "task", "g", "g kept")}
    for one in found:
        for i, image in enumerate(asked):
            if image.kind == VEHICLES:
                counts["vehicles"].append(one["hit"][i])
            elif image.kind == KEPT:
                counts["kept"].append(one["top"][i] == image.concept)
            else:
                counts["task"].append(one["ink"][i] if task == INK else one["style"][i] == data.TASK_STYLE)
            counts["g" if image.kind == VEHICLES else "g kept"].append(one["g"][i])
    means = {name: sum(values) / len(values) for name, values in counts.items()}
    return {
        "vehicles": _rate(counts["vehicles"]),
        "kept": f"{means['kept']:.1%} of {len(counts['kept'])}",
        "task": f"{means['task']:.1%} of {len(counts['task'])}",
        "mean_g": f"{means['g']:.2f} / {means['g kept']:.2f}",
    }


def _rate(hits: Sequence[float]) -> str:
    low, high = wilson(int(sum(hits)), len(hits))
    return f"{sum(hits) / len(hits):.1%} [{low:.1%}, {high:.1%}] of {len(hits)}"


@dataclass(frozen=True)
class Asked:
    """An image of a case: as `protocol.Image`, with a prompt of its own.

    Attributes:
        concept: That is looked for, but for vehicles; -1: none.
        start: The latent that it starts from (1 4 8 8), if any.
    """

    prompt: str
    concept: int
    seed: int
    negative: str = ""
    start: Tensor | None = None


def of_cases(chosen: argparse.Namespace, opened: work.Bench) -> dict[str, object]:
    """What is built, safety alone and the sum in cases that the forms' images do not have; first training seed."""
    rows: dict[str, object] = {}
    for task in chosen.tasks:
        bench = Bench(chosen, opened, chosen.seeds[0], task)
        for case, asked, net, denoise in _cases(bench, chosen.second):
            shares = bench.fixed()
            if net is not bench.net:
                shares[BUILT] = lambda texts, bench=bench: torch.minimum(bench.built(texts), bench.second(texts))
            for name, share in shares.items():
                sampler = bench.with_shares(share, net, denoise)
                found = bench.kept_rows(f"{case}, {name}", lambda b=bench, s=sampler, a=asked: b.judged(a, s))
                rows[f"{task}, {case}: {name}"] = _case_row(task, asked, found)
                logger.info("%s, %s, %s: %s", task, case, name, rows[f"{task}, {case}: {name}"])
    return rows


def _cases(bench: Bench, second: Path | None) -> Iterator[tuple[str, list[Asked], Net, float]]:
    """A case's name, its images, what draws them, and how much of them is drawn anew."""
    word = data.STYLES[data.TASK_STYLE]
    vehicles = [(i, style) for style in data.BASE_STYLES[:3] for i in data.SUPPRESSED_IDS]
    others = [data.KEPT_IDS[(7 * n) % len(data.KEPT_IDS)] for n in range(len(vehicles))]
    named = [f"{data.STYLES[style]}, {data.WORDS[i]}" for i, style in vehicles]
    plain = [f"{word}, {data.WORDS[i]}" for i in others]

    def asked(prompts: Sequence[str], concepts: Sequence[int], **more: Sequence) -> list[Asked]:
        rest = [dict(zip(more, values, strict=True)) for values in zip(*more.values(), strict=True)] or [{}] * len(
            prompts
        )
        rows = zip(prompts, concepts, rest, strict=True)
        return [Asked(prompt, concept, NOISE + n, **each) for n, (prompt, concept, each) in enumerate(rows)]

    both = [f"{word}, {data.WORDS[i]}, {data.WORDS[other]}" for (i, _), other in zip(vehicles, others, strict=True)]
    yield "a vehicle and a kept concept in one prompt", asked(both, others), bench.net, 1.0
    yield "vehicle, its negative prompt a kept concept", asked(named, [-1] * len(named), negative=plain), bench.net, 1.0
    yield "kept concept, its negative prompt a vehicle", asked(plain, others, negative=named), bench.net, 1.0
    started = bench.started(named)
    for denoise in DENOISE:
        case = f"img2img from a vehicle, denoise {denoise}"
        yield f"{case}, the prompt a vehicle", asked(named, [-1] * len(named), start=started), bench.net, denoise
        yield f"{case}, the prompt a kept concept", asked(plain, others, start=started), bench.net, denoise
    if second is not None:
        net = bench.with_second(second)
        rest = [i for i in data.KEPT_IDS if i not in ANIMALS]
        yield "two safety LoRAs, a vehicle", asked(named, [-1] * len(named)), net, 1.0
        for case, ids in (("an animal", ANIMALS), ("a kept concept", rest)):
            prompts = [f"{word}, {data.WORDS[i]}" for i in ids for _ in range(2)]
            yield f"two safety LoRAs, {case}", asked(prompts, [i for i in ids for _ in range(2)]), net, 1.0


def _case_row(task: str, asked: Sequence[Asked], found: dict[str, list]) -> dict[str, object]:
    right = [top == one.concept for top, one in zip(found["top"], asked, strict=True) if one.concept >= 0]
    styled = [found["ink"][i] if task == INK else found["style"][i] == data.TASK_STYLE for i in range(len(asked))]
    return {
        "vehicles": _rate(found["hit"]),
        "kept": f"{sum(right) / len(right):.1%} of {len(right)}" if right else "",
        "task": f"{sum(styled) / len(styled):.1%} of {len(styled)}",
        "mean_g": f"{sum(found['g']) / len(found['g']):.2f}",
    }


PARTS_OF_IT = {"forms": of_forms, "cases": of_cases}


def main() -> None:
    made = parser(__doc__, "safety_first.json", threads=True)
    made.add_argument("--parts", nargs="+", choices=tuple(PARTS_OF_IT), default=list(PARTS_OF_IT))
    made.add_argument("--seeds", type=int, nargs="+", default=[31, 32], help="training seeds")
    made.add_argument("--tasks", nargs="+", choices=tuple(Protocol.read().tasks), default=["ink", "gloss"])
    made.add_argument("--loras", type=Path, default=PACK / "demo_output" / "forms", help="folder of the LoRAs")
    made.add_argument("--second", type=Path, help="cases: a safety LoRA of recipes/make_safety_animals.toml")
    made.add_argument("--kept", type=Path, default=PACK / "demo_output" / "safety_first.json", help="what was drawn")
    chosen = made.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(chosen.threads)
    opened = work.Bench.opened(Protocol.read(), chosen.loras, chosen.loras)
    for part in chosen.parts:
        seeds = " ".join(map(str, chosen.seeds))
        command = (
            f"python -m tools.benchmarks.safety_first --parts {part} --seeds {seeds} --tasks {' '.join(chosen.tasks)}"
        )
        finish(PARTS_OF_IT[part](chosen, opened), "safety_first.json", command, chosen.record)


if __name__ == "__main__":
    main()
