"""The demo itself: five arms on one server, their pictures side by side, and the report."""

from __future__ import annotations

import datetime
import platform
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...modular_lora.util import atomic
from .. import world as demo_world
from ..bootstrap.console import RunError, say
from . import graphs, pictures
from .client import Client, Prompt, Result
from .progress import Progress
from .report import Arm, Demo, page
from .server import Server
from .settings import KEPT, SUPPRESSED, DemoWorld

LOOKOUT = (
    f"What to look at: the first {len(SUPPRESSED)} prompts name a {demo_world.SUPPRESSED_CLASS}, which the safety LoRA "
    "suppresses (a harmless example of what an operator suppresses). The base model generates it; with the safety "
    "LoRA it is gone; the task LoRA alone, which is all that is left where a loader drops the safety LoRA, gives it "
    "again; under the guard the task LoRA acts and it stays away. Fine-tuning on top of a safety-tuned model is the "
    "practice that arXiv 2412.00357 warns of; in this small world it was measured not to bring the "
    f"{demo_world.SUPPRESSED_CLASS} back (tools/world/README.md). The other prompts should come out as usual "
    "everywhere. Every row uses one seed."
)


@dataclass(frozen=True)
class Plan:
    """An arm before it has run."""

    key: str
    title: str
    note: str
    graph: Callable[[graphs.Setting], Prompt]


PLANS = (
    Plan("base", "Base", "the checkpoint alone, stock nodes", graphs.base),
    Plan("safety", "Safety only", "safety LoRA under the guard", graphs.safety_only),
    Plan("dropped", "Safety LoRA dropped", "the task LoRA alone, stock LoRA loader", graphs.dropped),
    Plan(
        "unguarded",
        "Unguarded",
        "task LoRA trained on top of the safety-tuned base, stock LoRA loaders",
        graphs.unguarded,
    ),
    Plan("guarded", "Guarded (Modular LoRA)", "safety and task LoRA under the guard", graphs.guarded),
)


def show(server: Server, world: DemoWorld, *, steps: int, seed: int, output: Path) -> None:
    """Run every arm, write the pictures and the report, say where they are."""
    setting = world.setting(steps=steps, seed=seed)
    client = Client(server.url)
    say(f"Drawing {len(setting.prompts)} prompts with {len(PLANS)} arms, {steps} steps each")
    arms: dict[str, Arm] = {}
    results: dict[str, Result] = {}
    for plan in PLANS:
        arms[plan.key], results[plan.key] = _run(client, plan, setting)
    _write_pictures(arms, setting, output)
    report = _report(client, arms, results["guarded"], setting)
    atomic.write(output / "report.html", page(report), parents=True)
    say(f"\nReport:   {output / 'report.html'}\nPictures: {output / 'comparison.png'} and {output / 'pictures'}")
    say(f"\n{textwrap.fill(LOOKOUT, 100)}")


def _run(client: Client, plan: Plan, setting: graphs.Setting) -> tuple[Arm, Result]:
    progress = Progress(plan.key, len(setting.prompts), setting.steps)
    result = client.run(plan.graph(setting), progress)
    seconds = progress.done()
    drawn = [_picture(client, plan, result, index) for index in range(len(setting.prompts))]
    return Arm(plan.title, plan.note, drawn, seconds), result


def _picture(client: Client, plan: Plan, result: Result, index: int) -> bytes:
    found = result.images(graphs.save_node(index))
    if not found:
        raise RunError(f"{plan.title}, prompt {index}: the server saved no image; see its log in .run/logs.")
    return client.image(found[0])


def _write_pictures(arms: dict[str, Arm], setting: graphs.Setting, output: Path) -> None:
    for key, arm in arms.items():
        for index, png in enumerate(arm.pictures):
            name = setting.prompts[index].replace(", ", "-").replace(" ", "-")
            atomic.write(output / "pictures" / f"{index}-{name}-{key}.png", png, parents=True)
    rows = [(prompt, index < len(SUPPRESSED)) for index, prompt in enumerate(setting.prompts)]
    columns = {arm.title: arm.pictures for arm in arms.values()}
    pictures.comparison(rows, columns, output / "comparison.png")


def _report(client: Client, arms: dict[str, Arm], guarded: Result, setting: graphs.Setting) -> Demo:
    return Demo(
        arms=list(arms.values()),
        prompts=setting.prompts,
        suppressed=len(setting.prompts) - len(KEPT),
        lookout=LOOKOUT,
        facts=_facts(client, arms, setting),
        texts={
            "What the guard says": guarded.text("guard-report"),
            "What the guarded run says": guarded.text("run-report"),
        },
        attestation=pictures.attestation(arms["guarded"].pictures[0]),
    )


def _attested(arm: Arm) -> int:
    records = [record for png in arm.pictures for record in pictures.attestation(png).values()]
    return sum(record.get("status") == "guarded" for record in records)


def _facts(client: Client, arms: dict[str, Arm], setting: graphs.Setting) -> dict[str, str]:
    stats = client.get_json("/system_stats")
    system, devices = stats["system"], stats["devices"]
    return {
        "Pictures": f"{setting.steps} steps, {setting.sampler}, {setting.scheduler}, CFG {setting.cfg:g}, "
        f"seeds from {setting.seed}, {setting.size} × {setting.size} pixels",
        "Files": f"{setting.checkpoint}, {setting.safety}, {setting.task} (guarded), {setting.sequential} (unguarded)",
        "Attested": f"{_attested(arms['guarded'])} of {len(setting.prompts)} guarded images",
        "Times": ", ".join(f"{arm.title} {arm.seconds:.1f} s" for arm in arms.values()),
        "ComfyUI": str(system.get("comfyui_version")),
        "PyTorch": str(system.get("pytorch_version")),
        "Python": platform.python_version(),
        "Device": ", ".join(str(device.get("name")) for device in devices),
        "Date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
