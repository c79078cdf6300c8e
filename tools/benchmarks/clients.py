"""Two clients that sample at once in one ComfyUI server under a policy: rows of docs/figures/reliability.json.

    python3 -m tools.benchmarks.reliability clients --comfyui COMFYUI --world WORLD [--prompts 180] --record

Each client has a websocket of its own and queues the same prompts in another order, so that they interleave. Every
prompt has its own seed, text and strengths. An image is as it must be when its attestation says "guarded", names its
own prompt's LoRAs and strengths, holds the SHA-256 of its pixels and is the one that the record has for that prompt's
id (for any, where ComfyUI still had the other client's result of the same prompt); when the graph in the file is its
own; and when the other client's image of that prompt has the same pixels, which no other prompt's has. An hour of
images at 20 seconds each is 180 prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from modular_lora_guard.modular_lora.provenance import attested
from modular_lora_guard.modular_lora.util.hashing import hash_file
from modular_lora_guard.tools.demo import base, graphs
from modular_lora_guard.tools.demo.client import Client, ClientError
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from PIL import Image

from .bench import finish, parser

LEAST = 0.5  # net strength that the policy asks for
WORDS = ("cat face", "pizza", "cactus", "guitar", "racing car", "helicopter", "sailboat", "tractor")
_log = logging.getLogger("modular_lora")


@dataclass(frozen=True)
class Job:
    """What one prompt asks for."""

    seed: int
    text: str
    safety: float
    task: float


@dataclass(frozen=True)
class Drawn:
    """What came back of a job, and what is wrong with it; "" nothing."""

    job: Job
    pixels: str
    wrong: str


def jobs(count: int, seed: int) -> list[Job]:
    rng = Random(seed)
    strengths = [(round(rng.uniform(0.9, 1.4), 3), round(rng.uniform(0.2, 0.6), 3)) for _ in range(count)]
    return [Job(1000 + i, f"gloss, {rng.choice(WORDS)}", *both) for i, both in enumerate(strengths)]


def graph(setting, job: Job, client: int) -> dict:
    made = graphs.guarded(dataclasses.replace(setting, seed=job.seed, prompts=(job.text,)))
    made["safety"]["inputs"]["strength"] = job.safety
    made["task"]["inputs"] |= {"strength_model": job.task, "strength_clip": job.task}
    made[graphs.save_node(0)]["inputs"]["filename_prefix"] = f"client{client}"
    return made


def draw(url: str, setting, mine: Sequence[Job], client: int, book: Path) -> list[Drawn]:
    """One client: its jobs one after the other."""
    connection, drawn = Client(url), []
    for job in mine:
        made = graph(setting, job, client)
        try:
            result = connection.run(made, timeout=300)
            (reference,) = result.images("save-0")
            drawn.append(judge(job, made, connection.image(reference), result.prompt_id, book))
        except (ClientError, ValueError) as error:
            drawn.append(Drawn(job, "", f"no image: {error}"))
    return drawn


def judge(job: Job, made: dict, png: bytes, prompt_id: str, book: Path) -> Drawn:
    with Image.open(io.BytesIO(png)) as image:
        said, sent = json.loads(image.text[attested.KEY]), json.loads(image.text["prompt"])
        pixels = np.array(image.convert("RGB"))
    problems = []
    if said["status"] != "guarded":
        problems.append(f"reads {said['status']}")
    if _strengths(said) != {"safety": job.safety, "task": job.task}:
        problems.append(f"names the strengths {_strengths(said)}")
    if not attested.pixels(pixels).items() <= said.items():
        problems.append("is attested for other pixels")
    if any(sent.get(name, {}).get("inputs") != node["inputs"] for name, node in made.items()):
        problems.append("carries another graph")
    runs = _lines(book)  # ComfyUI may have kept what the other client's prompt of the same job made
    own = [line for line in runs if line.get("prompt_id") == prompt_id]
    same = ("loras", "net_strength", "embeddings_sha256", "evaluations", "firings")
    if not any(all(line["attestation"][key] == said[key] for key in same) for line in own or runs):
        problems.append(f"is not what the record has for its prompt ({len(own)} runs)")
    return Drawn(job, hashlib.sha256(pixels.tobytes()).hexdigest(), "; ".join(problems))


def _strengths(said: dict[str, Any]) -> dict[str, float]:
    return {lora["role"]: lora["strength_model"] for lora in said["loras"]}


def _lines(book: Path) -> list[dict]:
    texts = (file.read_text(encoding="utf-8") for file in sorted(book.glob("record-*.jsonl")))
    return [line for text in texts for line in map(json.loads, text.splitlines()) if line["kind"] == "run"]


def both(server, setting, count: int, seed: int, book: Path) -> list[Drawn]:
    """Everything that two clients drew at once, pairs compared."""
    wanted = jobs(count, seed)
    orders = [Random(seed + client).sample(wanted, count) for client in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(draw, server.url, setting, mine, i, book) for i, mine in enumerate(orders)]
        drawn = [one for part in work for one in part.result()]
    return compared(drawn)


def compared(drawn: Sequence[Drawn]) -> list[Drawn]:
    """The same prompt's images must be the same, and no other prompt's."""
    pixels: dict[Job, set[str]] = {}
    owners: dict[str, set[Job]] = {}
    for one in drawn:
        pixels.setdefault(one.job, set()).add(one.pixels)
        owners.setdefault(one.pixels, set()).add(one.job)
    found = []
    for one in drawn:
        more = ["the other client got another image"] * (len(pixels[one.job]) > 1)
        more += ["another prompt got this image"] * (len(owners[one.pixels]) > 1)
        found.append(dataclasses.replace(one, wrong="; ".join(filter(None, (one.wrong, *more)))))
    return found


def enforced(folder: Path, safety: Path) -> Path:
    """Put a policy that asks for this safety LoRA into ComfyUI's folder; where its record goes."""
    place = folder / "user" / "__modular_lora"
    place.mkdir(parents=True)
    wanted = f'[guard]\nrequired = [{{sha256 = "{hash_file(safety)}", min_net_strength = {LEAST}}}]\n'
    (place / "policy.toml").write_text(wanted, encoding="utf-8")
    return place / "record"


def run(comfyui: Path, world_folder: Path, folder: Path, count: int, seed: int) -> list[Drawn]:
    """Start a server in ``folder``, let two clients draw ``count`` prompts each."""
    world = DemoWorld.at(world_folder)
    base.prepare(folder / "base", checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    book = enforced(folder / "base", world.safety)
    setting = world.setting(steps=2, seed=0)
    with Server(comfyui, sys.executable, folder / "base", log=folder / "log", cpu=True) as server:
        return both(server, setting, count, seed, book)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every image is attested for its own prompt, else 1."""
    made = parser(__doc__, "reliability.json", part="clients")
    made.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    made.add_argument("--world", type=Path, required=True, help="folder of the expanded demo world")
    made.add_argument("--prompts", type=int, default=180, help="of each client (180)")
    made.add_argument("--seed", type=int, default=1, help="of the prompts (1)")
    chosen = made.parse_args(arguments)
    logging.basicConfig(format="%(message)s", force=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        drawn = run(chosen.comfyui.resolve(), chosen.world.resolve(), Path(folder), chosen.prompts, chosen.seed)
    for one in (one for one in drawn if one.wrong):
        _log.error("%s: %s", one.job, one.wrong)
    rows = {
        "two clients: prompts": len(drawn),
        "two clients: pictures not attested for their own prompt": sum(bool(one.wrong) for one in drawn),
        "two clients: seconds": round(time.monotonic() - begun),
    }
    told = f"--prompts {chosen.prompts} --seed {chosen.seed}"
    finish(rows, "reliability.json", f"python3 -m tools.benchmarks.reliability clients {told}", chosen.record)
    return int(any(one.wrong for one in drawn))


if __name__ == "__main__":
    sys.exit(main())
