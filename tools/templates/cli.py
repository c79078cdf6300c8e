"""The command: ``workflows/*.json`` with room for every node, ``workflows/*.jpg``, and ``subgraphs/*.json``.

It needs what ``run.py test`` has set up, by the same variables: ComfyUI, the demo world, a Chromium with
playwright-core, and the newest front end.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..bootstrap.paths import ROOT
from ..demo import base
from ..demo.client import Client
from ..demo.server import Server
from ..demo.settings import DemoWorld
from . import cards, layout
from .definitions import ABOUT, BLUEPRINTS, BUILT
from .graph import blueprint, refreshed, to_prompt, workflow

WORKFLOWS, SUBGRAPHS = ROOT / "workflows", ROOT / "subgraphs"
SCRIPT = ROOT / "tests" / "support" / "front_end" / "template.mjs"
TITLE = "Modular LoRA Guard"  # of the templates in the template browser: locales/en/main.json
SECONDS = 900  # for one run on busy cores

Json = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Build what is defined in definitions.py; lay out every template by what the front ends draw; make the cards."""
    parser = argparse.ArgumentParser(prog="python -m tools.templates", description=main.__doc__)
    parser.add_argument("--only", choices=["build", "layout", "pictures"], help="one of the three steps")
    parser.add_argument("--template", action="append", choices=list(ABOUT), help="this one only; may be repeated")
    options = parser.parse_args(arguments)
    names = options.template or list(ABOUT)
    steps = [options.only] if options.only else ["build", "layout", "pictures"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "build" in steps:
            with running(folder) as server:
                build(Client(server.url).get_json("/object_info"), names)
        if "layout" in steps:
            arrange(folder, names)
        if "pictures" in steps:
            with running(folder) as server:
                card(Client(server.url), names)
    return 0


@contextmanager
def running(folder: Path, front_end: str | None = None) -> Iterator[Server]:
    """A ComfyUI with the pack and the demo world; ``front_end`` is the folder of another front end."""
    world = DemoWorld.at(Path(os.environ["MODULAR_LORA_WORLD"]))
    base.prepare(folder / "base", checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    extra = ["--front-end-root", front_end] if front_end else []
    comfyui, log = Path(os.environ["MODULAR_LORA_COMFYUI"]), folder / "server.log"
    with Server(comfyui, sys.executable, folder / "base", log=log, cpu=True, extra=extra) as server:
        yield server


def build(schemas: Json, names: Sequence[str]) -> None:
    """The workflows and blueprints that are defined in definitions.py, and the inputs that the pack's nodes have now.

    Every note begins with title and sentence.
    """
    ours = {name: schema for name, schema in schemas.items() if name.startswith("ModularLora")}
    for name, (graph, columns, note) in BUILT.items():
        if name in names:
            save(WORKFLOWS / f"{name}.json", workflow(graph, columns, note, schemas))
    for name in names:
        saved = refreshed(load(name), ours)
        text = next(one for one in saved["nodes"] if one["type"] == "MarkdownNote")["widgets_values"]
        head = f"## {name.lstrip('0123456789 ')}\n\n{ABOUT[name].sentence}\n\n"
        text[0] = head + text[0].removeprefix(head)
        save(WORKFLOWS / f"{name}.json", saved)
    SUBGRAPHS.mkdir(exist_ok=True)
    for name, (graph, about) in BLUEPRINTS.items():
        save(SUBGRAPHS / f"{name}.json", blueprint(name, graph, about, schemas))


def arrange(folder: Path, names: Sequence[str]) -> None:
    """Room for every node as the pinned front end and the newest draw it, before and after a run."""
    newest = os.environ["MODULAR_LORA_FRONT_END"]
    seen = [visit(folder, names, None, nodes2=False), visit(folder, names, newest, nodes2=True)]
    for name in names:
        states = [look["seen"][name][when] for look in seen for when in ("loaded", "ran")]
        saved = load(name)
        save(WORKFLOWS / f"{name}.json", layout.arrange(saved, layout.room(saved, states)))


def visit(folder: Path, names: Sequence[str], front_end: str | None, nodes2: bool) -> Json:
    """Every template opened and run in a front end."""
    shots = folder / f"shots-{nodes2}"
    shots.mkdir(exist_ok=True)
    with running(folder, front_end) as server:
        asked: Json = {"url": server.url, "pack": TITLE, "folder": str(shots), "nodes2": nodes2, "help": None}
        asked |= {"workflows": list(names), "run": list(names), "seconds": SECONDS}
        command = [os.environ["MODULAR_LORA_NODE"], str(SCRIPT), json.dumps(asked)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def card(client: Client, names: Sequence[str]) -> None:
    """Each template's image: its title, its sentence, and what a run of it gave."""
    for name in names:
        graph, shown = to_prompt(load(name)), ABOUT[name].shown
        result = client.run(graph, timeout=3600)
        keys = [key for kind in shown for key, one in graph.items() if one["class_type"] == kind]
        found = [client.image(reference) for key in keys for reference in result.images(key)]
        images = [Image.open(io.BytesIO(one)).convert("RGB") for one in found]
        cards.card(name.lstrip("0123456789 "), ABOUT[name].sentence, images).save(WORKFLOWS / f"{name}.jpg", quality=88)
        print(f"{name}: {len(images)} images")


def load(name: str) -> Json:
    return dict(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")))


def save(path: Path, content: Json) -> None:
    """As ASCII: ComfyUI 0.3.75 reads a blueprint in the system's own encoding."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
