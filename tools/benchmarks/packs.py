"""A trial of the node Guard with other packs in a real server: rows of docs/figures/packs_<ComfyUI's version>.json.

    python -m tools.benchmarks.packs PACKS --comfyui COMFYUI --world WORLD [--python PYTHON] [--only WORD] [--attach]
        [--record]

PACKS is a folder with checkouts of the packs, each under the name that the file's rows begin with, and PYTHON an
interpreter that has what ComfyUI and the packs ask for. All packs go into one server's custom_nodes.
Every graph of pack_graphs.py is run with *Guard* in it, with the safety LoRA merged by ComfyUI's own loader in that
place, and as it is. A row says what Save Image's file tells of the image (`result`), by how many of 255 levels it
differs from the merge's at most (`levels`), and by how many that of the graph without the safety LoRA does (`without`);
where the guarded run failed, why, unless the graph fails by itself. With ``--attach`` the graph is guarded without a
node and as it is, by the line for people at home in guard.txt, which is taken away for the other two runs; the rows
go to packs_attach_<version>.json. ComfyUI looks at the line once a second and then drops what it kept of runs before.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from modular_lora_guard.operators import home
from modular_lora_guard.tools.bootstrap.console import RunError
from modular_lora_guard.tools.demo import base
from modular_lora_guard.tools.demo.client import Client, ClientError, Failed
from modular_lora_guard.tools.demo.graphs import Graph
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from PIL import Image

from . import pack_graphs
from .bench import parser
from .figures import record
from .pack_graphs import Case

COMMAND = "python -m tools.benchmarks.packs PACKS --comfyui COMFYUI --world WORLD {}--record"
KEY = "modular_lora_images"
IN_FORCE = "ModularLoraInForce"  # a node in the list while the line is in force
HELPERS = Path(__file__).with_name("pack_nodes.py")


class Run(NamedTuple):
    """Images (n h w c) and what their files say of each."""

    images: np.ndarray
    said: tuple[str, ...]


def completed(graph: Graph, info: dict[str, Any]) -> Graph:
    """The graph with the server's own values for widgets that it leaves out, and numbers for ids, as some packs ask."""
    made = {}
    for name, one in graph.items():
        declared = info.get(one["class_type"], {}).get("input", {}).get("required", {})
        values = {key: value for key, spec in declared.items() if (value := _value(spec)) is not None}
        links = {key: [_id(value[0]), value[1]] for key, value in one["inputs"].items() if _is_link(value, graph)}
        made[_id(name)] = one | {"inputs": values | one["inputs"] | links}
    return made


def _id(name: str) -> str:
    return str(int.from_bytes(name.encode(), "big") % 10**9)


def _is_link(value: object, graph: Graph) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] in graph


def _value(spec: list) -> Any:
    kind, options = spec[0], spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices:
        return choices[0]
    return {"STRING": "", "BOOLEAN": False}.get(kind) if isinstance(kind, str) else None


def outcome(client: Client, case: Case, info: dict[str, Any], safety: str, line: Path | None) -> dict[str, object]:
    """What the trial says of one use of a pack; ``line``: the file of the line that attaches the guard, or None."""
    if missing := {one["class_type"] for one in case.graph.values()} - info.keys():
        return {"result": f"not run: {', '.join(sorted(missing))} did not load"}
    try:
        ours = guarded(client, case, info, safety, line)
    except ClientError as error:
        return {"result": _failed(client, case, info, error)}
    merge = run(client, completed(pack_graphs.merged(case, safety), info))
    alone = run(client, completed(case.graph, info))
    said = ", ".join(dict.fromkeys(ours.said))
    return {"result": said, "levels": _levels(ours, merge), "without": _levels(alone, merge)}


def guarded(client: Client, case: Case, info: dict[str, Any], safety: str, line: Path | None) -> Run:
    """The guarded run: with the node Guard, or with the line in force and the graph as it is."""
    if line is None:
        return run(client, completed(pack_graphs.guarded(case, safety), info))
    line.parent.mkdir(exist_ok=True)
    line.write_text(f"always: {safety}\n", encoding="utf-8")
    try:
        _heeded(client, in_force=True)
        return run(client, completed(case.graph, info))
    finally:
        line.unlink()
        _heeded(client, in_force=False)


def _heeded(client: Client, in_force: bool, patience: float = 30) -> None:
    """Wait until the server's node list says that every model is guarded, or no longer says so."""
    deadline = time.monotonic() + patience
    while bool(client.get_json(f"/object_info/{IN_FORCE}")) != in_force:
        if time.monotonic() > deadline:
            raise RunError(
                f"the line {'put in' if in_force else 'taken out'} was not heeded within {patience:.0f} s",
                code="command.no-answer",
            )
        time.sleep(0.2)
    time.sleep(0.5)  # the queue's thread drops what it kept


def _levels(one: Run, other: Run) -> int:
    return int(np.abs(one.images.astype(int) - other.images.astype(int)).max())


def _failed(client: Client, case: Case, info: dict[str, Any], error: ClientError) -> str:
    try:
        run(client, completed(case.graph, info))
    except ClientError as own:
        return f"not run: fails without the guard: {_short(own)}"
    return f"refused at {error.kind}: {_short(error)}" if isinstance(error, Failed) else f"refused: {_short(error)}"


def _short(error: ClientError) -> str:
    text = " ".join(str(getattr(error, "reason", error)).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def run(client: Client, graph: Graph) -> Run:
    """Run a graph, and read what "save" wrote."""
    result = client.run(graph, timeout=600)
    files = [client.image(reference) for reference in result.images(_id("save"))]
    if not files:
        raise ClientError("nothing was saved")
    read = [_read(file) for file in files]
    return Run(np.stack([pixels for pixels, _ in read]), tuple(said for _, said in read))


def _read(file: bytes) -> tuple[np.ndarray, str]:
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        entries, pixels = json.loads(image.info.get(KEY, "{}")), np.asarray(image)
    entry = entries.get(hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest())
    return pixels, entry["said"] if entry else "nothing said"


def commit(folder: Path) -> str:
    """Commit and day of a checkout; "" where it is none."""
    command = ["git", "-C", folder, "log", "-1", "--format=%h, %cs"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if (folder / ".git").exists() else ""


def lay_out(folder: Path, packs: Path, world: DemoWorld) -> None:
    """ComfyUI's base directory with the packs, copied: they write into their own folders."""
    base.prepare(folder, checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    for pack in sorted(path for path in packs.iterdir() if path.is_dir()):
        shutil.copytree(pack, folder / "custom_nodes" / pack.name, ignore=shutil.ignore_patterns(".git"))
    shutil.copyfile(HELPERS, folder / "custom_nodes" / "pack_trial.py")
    to_gguf(world.checkpoint, folder / "models" / "unet" / "trial.gguf")
    for kind in ("upscale_models", "controlnet"):  # a name for lists that may not be empty; nobody reads them
        (folder / "models" / kind).mkdir(exist_ok=True)
        (folder / "models" / kind / "trial.safetensors").touch()


def to_gguf(checkpoint: Path, to: Path) -> None:
    """The checkpoint's U-Net as ComfyUI-GGUF reads one: matrices in blocks of 8 bits, the rest in 32-bit floats."""
    import gguf
    from safetensors.torch import load_file

    to.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(to), arch="sd1")
    prefix, q8 = "model.diffusion_model.", gguf.GGMLQuantizationType.Q8_0
    for key, tensor in load_file(checkpoint).items():
        values = tensor.float().numpy()
        if key.startswith(prefix) and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(key.removeprefix(prefix), gguf.quants.quantize(values, q8), raw_dtype=q8)
        elif key.startswith(prefix):
            writer.add_tensor(key.removeprefix(prefix), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def trial(
    options: argparse.Namespace, url: str, safety: str, line: Path | None
) -> Iterator[tuple[Case, dict[str, object]]]:
    client = Client(url)
    info = json.loads(client.get("/object_info", timeout=600))
    for case in pack_graphs.cases():
        if not options.only or any(word.lower() in f"{case.pack}: {case.use}".lower() for word in options.only):
            yield case, outcome(client, case, info, safety, line)


def version(comfyui: Path) -> str:
    return (comfyui / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]


def main(arguments: list[str]) -> int:
    made = parser(__doc__ or "", "packs_VERSION.json")
    made.add_argument("packs", type=Path)
    made.add_argument("--comfyui", type=Path, required=True)
    made.add_argument("--world", type=Path, required=True, help="folder of the expanded demo world")
    made.add_argument("--python", default=sys.executable)
    made.add_argument("--only", nargs="+", default=[], metavar="WORD", help="uses whose name holds one of these")
    made.add_argument("--attach", action="store_true", help="guard every model without a node")
    options = made.parse_args(arguments)
    world, label = DemoWorld.at(options.world), version(options.comfyui)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lay_out(folder / "base", options.packs, world)
        os.environ["XDG_CONFIG_HOME"] = str(folder / "config")  # else a pack finds what it kept of an earlier trial
        log = options.packs / f"server_{label}.log"
        with Server(options.comfyui, options.python, folder / "base", log=log, cpu=True) as server:
            line = folder / "base" / "user" / "__modular_lora" / home.FILE if options.attach else None
            for case, said in trial(options, server.url, world.safety.name, line):
                name = f"{case.pack}: {case.use}"
                sys.stdout.write(f"{name}: {said}\n")
                sys.stdout.flush()
                if options.record:  # each at once: a server may end on the way
                    file = f"packs_{'attach_' if options.attach else ''}{label}.json"
                    source = COMMAND.format("--attach " if options.attach else "")
                    record(file, {name: {"commit": commit(options.packs / case.pack)} | said}, source)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
