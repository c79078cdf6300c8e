"""Puts the package ``modular_lora_guard`` on the path and brings the real ComfyUI up in this process.

``MODULAR_LORA_COMFYUI`` names ComfyUI's folder and ``MODULAR_LORA_WORLD`` the folder of the expanded demo world, both
set by ``run.py test``. The pack's nodes are loaded by ComfyUI's own loader, as from custom_nodes.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hashlib
import html
import importlib
import inspect
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
COMFYUI, WORLD = os.environ.get("MODULAR_LORA_COMFYUI"), os.environ.get("MODULAR_LORA_WORLD")
EXTRA_NODES = (
    "nodes_custom_sampler",
    "nodes_model_merging",
    "nodes_hooks",
    "nodes_lora_extract",
    "nodes_freelunch",
    "nodes_hypertile",
    "nodes_perpneg",
    "nodes_differential_diffusion",
    "nodes_model_advanced",
    "nodes_pag",
    "nodes_sag",
    "nodes_torch_compile",
    "nodes_easycache",
    "nodes_attention_multiply",
    "nodes_primitive",
    "nodes_preview_any",
    "nodes_tomesd",
    "nodes_hypernetwork",
    "nodes_latent",
    "nodes_cond",
    "nodes_slg",
    "nodes_images",
    "nodes_mask",
    "nodes_post_processing",
    "nodes_upscale_model",
    "nodes_rebatch",
    "nodes_wan",
)

sys.path += [str(ROOT / "importable"), str(Path(__file__).parent)]  # modular_lora_guard; support, shared by the tests
from modular_lora_guard.tools.demo.client import Client  # noqa: E402
from modular_lora_guard.tools.demo.server import Server  # noqa: E402
from modular_lora_guard.tools.demo.settings import DemoWorld  # noqa: E402
from support import small_world  # noqa: E402
from support.graphs import GraphError, keeping_code, layers_of, save_lora  # noqa: E402
from support.kohya_place import place  # noqa: E402, F401 - a fixture
from support.pack_nodes import NODES  # noqa: E402
from support.plain import assert_plain  # noqa: E402

# The same examples every time, however busy the machine; `--hypothesis-profile default` tries others.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
# `run.py check`: few examples, also where a test asks for more of them (see `_fewer_examples`).
settings.register_profile("dev", settings.get_profile("suite"), max_examples=20)
settings.load_profile("suite")
COMFYUI_FIXTURES = {"comfy", "world"}  # tests that use neither, nor have one of these marks, are marked "unit"
COMFYUI_MARKS = ("server", "browser", "needs_comfyui")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test, with its fixtures, starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="long trials whole; without it, samples with fixed seeds")
    parser.addoption("--update-messages", action="store_true", help="write tests/unit/snapshots/messages.txt anew")


@pytest.fixture(scope="session")
def extent(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How far a long trial goes: ``extent(sample, whole)``."""
    return lambda sample, whole: whole if request.config.getoption("--all") else sample


def _sampled(items: list[pytest.Item]) -> set[pytest.Item]:
    """What is left out of tests that are marked ``sampled(n)``: all but n cases, drawn with a fixed seed."""
    groups: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            groups.setdefault((item.path, item.originalname), []).append(item)
    left: set[pytest.Item] = set()
    for cases in groups.values():
        (count,) = cases[0].get_closest_marker("sampled").args
        left |= set(cases) - set(random.Random(0).sample(cases, min(count, len(cases))))
    return left


def _is_unit(item: pytest.Item) -> bool:
    """Whether a test needs no ComfyUI and no demo world."""
    return not (COMFYUI_FIXTURES & set(item.fixturenames) or any(map(item.get_closest_marker, COMFYUI_MARKS)))


def _fewer_examples(items: list[pytest.Item]) -> None:
    """The profile's number of examples as an upper bound; the attribute is where hypothesis keeps `@settings`."""
    kept = "_hypothesis_internal_use_settings"
    for item in items:
        test = getattr(item.obj, "__func__", item.obj)
        own = getattr(test, kept, None)
        if own is not None and own.max_examples > settings.default.max_examples:
            setattr(test, kept, settings(own, max_examples=settings.default.max_examples))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long trials as samples unless --all is given; files with a slow test first: the longest must not begin last."""
    for item in filter(_is_unit, items):
        item.add_marker("unit")
    if config.getoption("hypothesis_profile") == "dev":
        _fewer_examples(items)
    if not config.getoption("--all") and (left := _sampled(items)):
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """The thousands of collected tests stay until the end: no collection of garbage need look through them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last line of a run in which the tests of the front end did not run says so."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    skipped = [one for one in reporter.stats.get("skipped", ()) if "browser" in getattr(one, "keywords", ())]
    if skipped:
        why = skipped[0].longrepr[2] if isinstance(skipped[0].longrepr, tuple) else ""
        reporter.write_line(f"NOT TESTED: {len(skipped)} tests of the front end in a browser. {why}", red=True)


@pytest.fixture(scope="module", autouse=True)
def _give_back() -> Iterator[None]:
    """After a file, freed memory goes back to the system: glibc keeps gigabytes of it, in every worker."""
    yield
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # not in musl
        trim(0)


class _Server:
    """What the executor and the nodes ask of the server when there is none."""

    def __init__(self):
        self.client_id, self.last_node_id, self.last_prompt_id, self.messages, self.texts = "test", None, None, [], {}
        self.readers = []  # the clients that the pack's own messages were for; None: every page that is open

    def send_sync(self, event, data, sid=None):
        """What web/report.js shows on a node is kept with what else is read there."""
        self.messages.append((event, data))
        if event == "executed" and "text" in (data["output"] or {}):
            self.texts[data["node"]] = "\n\n".join(data["output"]["text"])
        elif event == "modular_lora.report":
            self.readers.append(sid)
            over = data.get("above") or data.get("run")
            shown = (over, self.texts.get(data["node"])) if over else (data["text"],)
            self.texts[data["node"]] = "\n\n".join(filter(None, shown))

    def send_progress_text(self, text, node_id, sid=None):
        """The front end puts the text into the page as HTML; kept is what is read there."""
        self.readers.append(sid)
        self.texts[node_id] = html.unescape(text)


@pytest.fixture(scope="session")
def comfy(tmp_path_factory) -> SimpleNamespace:
    """The real ComfyUI, its executor and the pack, in this process on the CPU."""
    if not COMFYUI or not WORLD:
        pytest.skip("MODULAR_LORA_COMFYUI and MODULAR_LORA_WORLD are not set: run the tests with `python3 run.py test`")
    base = tmp_path_factory.mktemp("comfyui")
    execution, folder_paths, nodes, server = _import_comfyui(base)
    server.PromptServer.instance = stub = _Server()
    for name in ("checkpoints", "loras", "safety_loras"):
        (base / "models" / name).mkdir(parents=True)
        folder_paths.folder_names_and_paths[name] = ([str(base / "models" / name)], {".safetensors"})
    folder_paths.models_dir = str(base / "models")
    folder_paths.set_output_directory(str(base / "output"))
    asyncio.run(_load_nodes(nodes))
    small_world.accept()
    small_world.write(
        Path(WORLD) / "demo_world_sd15.safetensors", base / "models" / "checkpoints" / "world.safetensors"
    )
    pack = lambda name: importlib.import_module(f"modular_lora_guard.{name}")  # noqa: E731
    space = SimpleNamespace(
        base=base,
        loras=base / "models" / "loras",
        output=base / "output",
        nodes=nodes,
        execution=execution,
        server=stub,
        host=pack("comfy_host.patcher"),
        anatomy=pack("comfy_host.introspection"),
        ledger=pack("modular_lora.provenance.ledger"),
        folder_paths=folder_paths,
        host_guard=pack("modular_lora.guard.build"),
        host_files=pack("modular_lora.files.reader"),
    )
    space.executor = new_executor(space)
    return space


def _import_comfyui(base: Path) -> list:
    """ComfyUI's own top-level modules; `utils` before `nodes`, which puts another `utils` on the path."""
    sys.path.insert(0, COMFYUI)
    importlib.import_module("comfy.options").enable_args_parsing(False)
    args = importlib.import_module("comfy.cli_args").args
    args.cpu, args.base_directory = True, str(base)
    importlib.import_module("utils.install_util")
    return [importlib.import_module(name) for name in ("execution", "folder_paths", "nodes", "server")]


async def _load_nodes(nodes) -> None:
    extras = Path(COMFYUI) / "comfy_extras"
    for name in EXTRA_NODES:
        if (extras / f"{name}.py").exists():
            await nodes.load_custom_node(str(extras / f"{name}.py"), module_parent="comfy_extras")
    await nodes.load_custom_node(str(ROOT / "tests" / "support" / "helper_nodes.py"), module_parent="custom_nodes")
    if not await nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"):
        raise RuntimeError("ComfyUI could not load the pack; its log above says why")


@pytest.fixture
def matrix(request):
    """Notes a row of docs/figures/FILE: what was tried, how it came out, in which test, with which largest error.

    ``max_error`` is the largest |guarded - merged| over the largest |merged - base|.
    `python -m tools.benchmarks.matrix` runs the tests with MODULAR_LORA_FIGURES set and writes the files.
    """

    def note(file: str, name: str, status: str, max_error: float | None = None) -> None:
        test = request.node.nodeid.partition("[")[0]
        row = {"name": name, "status": status, "test": test, "max_error": max_error}
        if path := os.environ.get("MODULAR_LORA_FIGURES"):
            with open(path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"file": file, **row}) + "\n")

    return note


@pytest.fixture
def run_graph(comfy):
    """Runs an API-format graph through validation and the executor: {node id: outputs}, or GraphError.

    What any node of the pack shows on itself, in whatever test, is held to be plain.
    """

    def run(graph: dict, executor=None) -> dict:
        comfy.server.messages.clear()
        valid, error, outputs, node_errors = asyncio.run(comfy.execution.validate_prompt("test", graph, None))
        if not valid or node_errors:
            raise GraphError("validation", f"{error} {node_errors}")
        executor = executor or comfy.executor  # stock caching: the checkpoint is loaded once
        executor.execute(graph, "test", {"client_id": "test"}, outputs)
        failed = next((d for e, d in comfy.server.messages if e == "execution_error"), None)
        if failed:
            raise GraphError("execution", failed["exception_message"], failed["node_type"], executor.code)
        for node, text in comfy.server.texts.items():
            if graph.get(node, {}).get("class_type", "").startswith("ModularLora"):
                assert_plain(text)
        return {n: _outputs(executor, n) for n in graph}

    return run


def new_executor(comfy):
    """A PromptExecutor with an empty cache."""
    execution, sizes = comfy.execution, {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    return keeping_code(execution.PromptExecutor(comfy.server, execution.CacheType.CLASSIC, cache_args=sizes))


async def _value(awaitable):
    return await awaitable


def _outputs(executor, node_id: str):
    entry = executor.caches.outputs.get(node_id)
    if inspect.isawaitable(entry):  # 0.33.0
        entry = asyncio.run(_value(entry))
    values = getattr(entry, "outputs", entry[1] if isinstance(entry, tuple | list) else None)
    return None if values is None else tuple(v[0] if v else None for v in values)


@pytest.fixture(scope="session")
def loaded(comfy):
    """(MODEL, CLIP, VAE) of the demo world, loaded once by ComfyUI's own loader."""
    return comfy.nodes.CheckpointLoaderSimple().load_checkpoint("world.safetensors")


@pytest.fixture(scope="session")
def trained(comfy) -> str:
    """Name of a checkpoint with the demo world's own U-Net, for tests that ask what it has learnt."""
    name = "trained.safetensors"
    path = comfy.base / "models" / "checkpoints" / name
    small_world.write(Path(WORLD) / "demo_world_sd15.safetensors", path, narrow=False)
    comfy.folder_paths.filename_list_cache.clear()
    return name


@pytest.fixture(scope="session")
def loras(comfy, loaded) -> SimpleNamespace:
    """Random LoRA files of large effect, under kohya names, in ComfyUI's loras folder."""
    model, clip, _ = loaded
    unet = dict(layers_of(comfy.anatomy.model_info(model), "lora_unet_"))
    text = dict(layers_of(comfy.anatomy.clip_info(clip), "lora_te_"))
    made = {
        "safety.safetensors": (unet, 4, 1),
        "task.safetensors": (unet, 8, 2),
        "other.safetensors": (unet, 3, 3),
        "safety_te.safetensors": (unet | text, 4, 4),
        "task_te.safetensors": (unet | text, 4, 5),
    }
    for name, (layers, rank, seed) in made.items():
        save_lora(comfy.loras / name, layers, rank, seed)
    return SimpleNamespace(unet=unet, text=text, folder=comfy.loras)


@pytest.fixture(scope="module")
def packs(comfy, loras) -> Iterator[None]:
    """Stand-ins for nodes of other packs, and the LoRA files that they load."""
    before = set(comfy.nodes.NODE_CLASS_MAPPINGS)
    comfy.nodes.NODE_CLASS_MAPPINGS |= NODES
    yield
    for name in set(comfy.nodes.NODE_CLASS_MAPPINGS) - before:
        del comfy.nodes.NODE_CLASS_MAPPINGS[name]


@pytest.fixture
def operator(comfy, loras, run_graph):
    """Writes policies where this ComfyUI reads them; the record goes with them."""
    from support.operator_graphs import Operator

    one = Operator(comfy, run_graph)
    shutil.rmtree(one.path.parent / "record", ignore_errors=True)
    yield one
    one.remove()
    shutil.rmtree(one.path.parent / "record", ignore_errors=True)


@pytest.fixture
def sha256(loras):
    """Of a file in the loras folder."""
    return lambda name: hashlib.sha256((loras.folder / name).read_bytes()).hexdigest()


@pytest.fixture
def previews(comfy, monkeypatch) -> None:
    """Pictures are shown while they are sampled."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(latent_preview, "default_preview_method", LatentPreviewMethod.Latent2RGB, raising=False)  # 0.33


@pytest.fixture
def enforced(operator, sha256):
    """A policy that asks for the safety LoRA at 0.9."""
    from support.operator_graphs import required

    operator.write(required(sha256("safety.safetensors")))
    return operator


@pytest.fixture(scope="session")
def world() -> DemoWorld:
    """The demo world's files, for tests that start a server of their own (fixture ``server``)."""
    if not COMFYUI or not WORLD:
        pytest.skip("MODULAR_LORA_COMFYUI and MODULAR_LORA_WORLD are not set: run the tests with `python3 run.py test`")
    return DemoWorld.at(Path(WORLD))


@pytest.fixture
def client(server: Server) -> Client:
    """Of the test module's own server, which must still run."""
    server.check()
    return Client(server.url)
