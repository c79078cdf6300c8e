"""The demo itself: every arm on one server, their images side by side, and the report, kept after each arm."""

from __future__ import annotations

import datetime
import platform
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...modular_lora.util import atomic, plain_json
from .. import world as demo_world
from ..bootstrap.console import RunError, say
from ..bootstrap.paths import ROOT
from ..world import data
from . import graphs, images
from .client import Client, Prompt, Result
from .judge import activity, seen
from .progress import Progress
from .report import Arm, Demo, ShownImage, page
from .server import Server
from .settings import CONCEPTS, KEPT, SUPPRESSED, DemoWorld

LOOKOUT = (
    f"What to look at: the first {len(SUPPRESSED)} prompts name a {demo_world.SUPPRESSED_CLASS}, which the safety LoRA "
    "suppresses (a harmless example of what an operator suppresses). The base model generates it; with the safety "
    "LoRA nearly all are gone; the task LoRA alone, which is all that is left where a loader drops the safety LoRA, "
    "gives them again. Unguarded is the practice that arXiv 2412.00357 warns of: the task LoRA was trained on top of "
    "the safety-tuned model, without a single vehicle, and brings some of them back. Under the guard the same "
    "training, done on the plain model, acts beside the safety LoRA; under safety first it gives way where the safety "
    "LoRA acts. The last column has a safety LoRA that was made of words alone, without training. The other prompts "
    "should come out as usual everywhere. Under each picture stands what the world's detector finds in it, and, where "
    "the guard ran, the safety LoRA's activity on its prompt; where stock loaders merge the LoRAs, none can be "
    "measured."
)
CHOICE = (
    "How it was chosen: the LoRAs are those of the evidence's first training seed (docs/evidence.md), with a safety "
    "recipe under which fine-tuning brings vehicles back in part while other concepts stay right; under another one, "
    "LECO with preservation, it brought none back. Prompts and seeds go by a rule and not by their pictures: every "
    f"second of the world's {len(data.SUPPRESSED_IDS)} vehicles and every thirtieth of its "
    f"{len(data.KEPT_IDS)} other concepts, in its own order, one seed a row, counted on from the first; nothing was "
    "left out or drawn again. The vehicles' style was chosen by the evidence's counts, as one in which most come back "
    "(twemoji: 6 of 24 unguarded, 1 with the safety LoRA alone). So these pictures show what happens, not how often. "
    "The detector knows no nothing, and calls some blobs a vehicle."
)
COUNTED = "The last row has the evidence's counts, over all six styles."
EVIDENCE = ROOT / "docs" / "figures" / "evidence.json"
RECIPE, OF_WORDS = "ESD, eta 3, preservation 2", "null space, of words"  # of the evidence


@dataclass(frozen=True)
class Plan:
    """An arm before it has run."""

    key: str
    title: str
    note: str
    graph: Callable[[graphs.Setting], Prompt]
    counted: tuple[str, str]  # recipe and arm of the evidence


PLANS = (
    Plan("base", "Base", "the checkpoint alone, stock nodes", graphs.base, (RECIPE, "base")),
    Plan("safety", "Safety only", "safety LoRA under the guard", graphs.safety_only, (RECIPE, "safety")),
    Plan(
        "dropped",
        "Safety LoRA dropped",
        "the task LoRA alone, stock LoRA loader",
        graphs.dropped,
        (RECIPE, "task"),
    ),
    Plan(
        "unguarded",
        "Unguarded",
        "task LoRA trained on top of the safety-tuned base, stock LoRA loaders",
        graphs.unguarded,
        (RECIPE, "sequential"),
    ),
    Plan(
        "guarded",
        "Guarded (Modular LoRA)",
        "safety and task LoRA under the guard, their sum",
        graphs.guarded,
        (RECIPE, "modular"),
    ),
    Plan("first", "Guarded, safety first", "the same two files", graphs.safety_first, (RECIPE, "safety_first")),
    Plan(
        "words",
        "Guarded, of words",
        "safety LoRA made of words in closed form, their sum",
        graphs.of_words,
        (OF_WORDS, "modular"),
    ),
)


def show(server: Server, world: DemoWorld, *, steps: int, seed: int, output: Path) -> None:
    """Run every arm, a graph each; write images and report after each one, and say where they are.

    What was drawn is kept where a later arm fails, takes too long or is interrupted. The arm that was being drawn is
    not: its graph has ended without a record.
    """
    setting = world.demo(steps=steps, seed=seed)
    client = Client(server.url)
    say(f"Drawing {len(setting.prompts)} prompts with {len(PLANS)} arms, {steps} steps each")
    arms: dict[str, Arm] = {}
    results: dict[str, Result] = {}
    kept = 0
    try:
        for plan in PLANS:
            arms[plan.key], results[plan.key] = _run(client, plan, setting)
            _write_images(arms, setting, output)
            report = _report(client, arms, results.get("guarded"), setting)
            atomic.write(output / "report.html", page(report), parents=True)
            kept += 1
    finally:
        if kept < len(PLANS):
            say(_stopped(kept, output))
    say(f"\nReport:   {output / 'report.html'}\nPictures: {output / 'comparison.png'} and {output / 'pictures'}")
    say(f"\n{textwrap.fill(LOOKOUT, 100)}\n\n{textwrap.fill(CHOICE, 100)}")


def _stopped(kept: int, output: Path) -> str:
    """What is there of a demo that did not come to its end."""
    whole = f"{kept} of {len(PLANS)} columns were drawn"
    if not kept:
        return f"\n{whole}: nothing was written."
    return f"\n{whole} and are in {output / 'report.html'}. The next run draws all of them anew."


def _run(client: Client, plan: Plan, setting: graphs.Setting) -> tuple[Arm, Result]:
    progress = Progress(plan.key, len(setting.prompts), setting.steps)
    result = client.run(plan.graph(setting), progress)
    seconds = progress.done()
    pngs = [_image(client, plan, result, index) for index in range(len(setting.prompts))]
    said = [activity(result.outputs.get(graphs.save_node(index), {})) for index in range(len(pngs))]
    drawn = [ShownImage(*cell) for cell in zip(pngs, seen(pngs, (*CONCEPTS[0], *CONCEPTS[1])), said, strict=True)]
    return Arm(plan.title, plan.note, drawn, seconds, _counted(*plan.counted)), result


def _counted(recipe: str, arm: str) -> str:
    """Vehicles over all images of an arm in the evidence, with their interval; "" where it has not been run."""
    found = plain_json.read_object(EVIDENCE).get("recipes", {}) if EVIDENCE.is_file() else {}
    one = found.get(recipe, {}).get("arms", {}).get(arm)
    return f"{one['k']} of {one['n']} [{one['low']:.1%}, {one['high']:.1%}]" if one else ""


def _image(client: Client, plan: Plan, result: Result, index: int) -> bytes:
    found = result.images(graphs.save_node(index))
    if not found:
        raise RunError(f"{plan.title}, prompt {index}: the server saved no image; see its log in .run/logs.")
    return client.image(found[0])


def _write_images(arms: dict[str, Arm], setting: graphs.Setting, output: Path) -> None:
    """The pictures of these arms; those that a former run left of the others are taken away."""
    for index, prompt in enumerate(setting.prompts):
        name = f"{index}-{prompt.replace(', ', '-').replace(' ', '-')}"
        for key in (plan.key for plan in PLANS):
            place = output / "pictures" / f"{name}-{key}.png"
            if key in arms:
                atomic.write(place, arms[key].images[index].png, parents=True)
            else:
                place.unlink(missing_ok=True)
    rows = [(prompt, index < len(SUPPRESSED)) for index, prompt in enumerate(setting.prompts)]
    columns = {arm.title: [image.png for image in arm.images] for arm in arms.values()}
    images.comparison(rows, columns, output / "comparison.png")


def _report(client: Client, arms: dict[str, Arm], guarded: Result | None, setting: graphs.Setting) -> Demo:
    """Of the arms that are drawn; ``guarded`` is what the guarded one's graph left, once it is among them."""
    says = {"What the guard says": "guard-report", "What the guarded run says": "run-report"}
    return Demo(
        arms=list(arms.values()),
        missing=[plan.title for plan in PLANS if plan.key not in arms],
        prompts=setting.prompts,
        suppressed=len(setting.prompts) - len(KEPT),
        lookout=LOOKOUT,
        choice=" ".join([CHOICE, *[COUNTED] * any(arm.counted for arm in arms.values())]),
        facts=_facts(client, arms, setting),
        texts={title: guarded.text(node) for title, node in says.items()} if guarded else {},
        attestation=images.attestation(arms["guarded"].images[0].png) if guarded else {},
    )


def _attested(arm: Arm) -> int:
    records = [record for one in arm.images for record in images.attestation(one.png).values()]
    return sum(record.get("status") == "guarded" for record in records)


def _facts(client: Client, arms: dict[str, Arm], setting: graphs.Setting) -> dict[str, str]:
    stats = client.get_json("/system_stats")
    system, devices = stats["system"], stats["devices"]
    return {
        "Pictures": f"{setting.steps} steps, {setting.sampler}, {setting.scheduler}, CFG {setting.cfg:g}, "
        f"seeds from {setting.seed}, {setting.size} × {setting.size} pixels",
        "Files": f"{setting.checkpoint}, {setting.safety}, {setting.task} (guarded), {setting.sequential} (unguarded), "
        f"{setting.words} (made of words)",
        "Attested": f"{_attested(arms['guarded'])} of {len(setting.prompts)} guarded images"
        if "guarded" in arms
        else "the guarded column is not drawn",
        "Times": ", ".join(f"{arm.title} {arm.seconds:.1f} s" for arm in arms.values()),
        "ComfyUI": str(system.get("comfyui_version")),
        "PyTorch": str(system.get("pytorch_version")),
        "Python": platform.python_version(),
        "Device": ", ".join(str(device.get("name")) for device in devices),
        "Date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
