"""What leaves a real ComfyUI server over HTTP under a policy with a gate: sound, texts, nodes that expand."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from modular_lora_guard.tools.demo import base, graphs
from modular_lora_guard.tools.demo.client import Client, Failed, Rejected, Result
from modular_lora_guard.tools.demo.graphs import Graph, node
from modular_lora_guard.tools.demo.server import Server
from modular_lora_guard.tools.demo.settings import DemoWorld
from modular_lora_guard.tools.world import DETECTOR_CONCEPTS, DETECTOR_ONNX
from support.audio_nodes import samples, write_sound

pytestmark = pytest.mark.server
COMFYUI, WORLD = os.environ.get("MODULAR_LORA_COMFYUI"), os.environ.get("MODULAR_LORA_WORLD")
PACK = '''import importlib.util, pathlib, sys, types

import nodes


class Let:
    """A node of another pack: expands to a node that gets what it was given, and gives a number."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("IMAGE,LATENT",), "kind": ("STRING",), "slot": ("STRING",)}}

    def run(self, value, kind, slot):
        if kind == "PreviewAudio":
            value = {"waveform": value.movedim(-1, 1).flatten(2)[:, :2], "sample_rate": 16000}
        inputs = {slot: value, "filename_prefix": "let"}
        return {"result": (1,), "expand": {"let.0": {"class_type": kind, "inputs": inputs}}}


NODE_CLASS_MAPPINGS = {"Let": Let}
if "SaveAudio" not in nodes.NODE_CLASS_MAPPINGS:  # for want of torchaudio, of which they need resampling alone
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    path = pathlib.Path(nodes.__file__).parent / "comfy_extras" / "nodes_audio.py"
    spec = importlib.util.spec_from_file_location("nodes_audio", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["torchaudio"]
    for name, kind in module.NODE_CLASS_MAPPINGS.items():
        kind.RELATIVE_PYTHON_MODULE = "comfy_extras.nodes_audio"  # as ComfyUI's own loader notes
        nodes.NODE_CLASS_MAPPINGS[name] = kind
'''


@pytest.fixture(scope="module")
def server(world: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("leaving")
    place = folder / "base"
    base.prepare(place, checkpoint=world.checkpoint, loras=world.loras, safety=world.safety)
    pack = place / "custom_nodes" / "other_pack"
    pack.mkdir()
    (pack / "__init__.py").write_text(PACK, encoding="utf-8")
    write_sound(place / "input" / "tone.flac")
    policy = place / "user" / "__modular_lora" / "policy.toml"
    policy.parent.mkdir()
    sha256 = hashlib.sha256(world.safety.read_bytes()).hexdigest()
    policy.write_text(f'[guard]\nrequired = [{{sha256 = "{sha256}"}}]\n[gate]\nrequired = true\n', encoding="utf-8")
    with Server(Path(COMFYUI or ""), sys.executable, place, log=folder / "server.log", cpu=True) as running:
        yield running


def flagged(world: DemoWorld) -> Graph:
    """A guarded image that the gate flags, as every score counts, and blurs."""
    graph = graphs.guarded(world.setting(steps=2, seed=11, prompts=("gloss, cat face",)))
    files = {"classifier": DETECTOR_ONNX, "labels": DETECTOR_CONCEPTS, "preset": "none"}
    how = {"threshold": 0.0001, "classes": "", "action": "blur", "provider": "CPU"}
    graph["settings"] = node("ModularLoraGateSettings", detector="classifier", **files, **how)
    graph["gate"] = node("ModularLoraGate", images=["decode-0", 0], gate=["settings", 0])
    graph["flagged"] = node("PreviewAny", source=["gate", 1])
    graph[graphs.save_node(0)] = node("PreviewImage", images=["gate", 0])
    return graph


def _run(client: Client, graph: Graph) -> Result:
    return client.run(graph, timeout=300)


def test_what_the_gate_made_of_an_image_and_the_users_own_sound_leave(
    server: Server, client: Client, world: DemoWorld
) -> None:
    graph = flagged(world)
    graph["load"] = node("LoadAudio", audio="tone.flac")
    graph["keep"] = node("SaveAudio", audio=["load", 0], filename_prefix="tone")
    result = _run(client, graph)
    assert result.text("flagged") == "True"
    assert len(result.images(graphs.save_node(0))) == 1
    (kept,) = (server.base / "output").glob("tone_*.flac")
    assert (samples(kept) == samples(server.base / "input" / "tone.flac")).all()


SOUND = {"sound": node("VAEDecodeAudio", samples=["sampler-0", 0], vae=["checkpoint", 2])}
QUEUED = {  # nodes; the last is refused
    "saved as sound": {**SOUND, "out": node("SaveAudio", audio=["sound", 0], filename_prefix="x")},
    "previewed as sound": {**SOUND, "out": node("PreviewAudio", audio=["sound", 0])},
    "printed as sound": {**SOUND, "out": node("PreviewAny", source=["sound", 0])},
    "printed as image": {"out": node("PreviewAny", source=["decode-0", 0])},
    "printed as latent": {"out": node("PreviewAny", source=["sampler-0", 0])},
    "sound track": {
        **SOUND,
        "film": node("CreateVideo", images=["gate", 0], audio=["sound", 0], fps=6.0),
        "out": node("SaveVideo", video=["film", 0], filename_prefix="x", format="auto", codec="auto"),
    },
}


@pytest.mark.parametrize("way", QUEUED)
def test_an_image_in_another_form_is_answered_with_400(way: str, client: Client, world: DemoWorld) -> None:
    with pytest.raises(Rejected) as caught:
        client.submit(flagged(world) | QUEUED[way])
    assert caught.value.status == 400
    (error,) = caught.value.body["node_errors"]["out"]["errors"]
    assert "(policy: gate.required)" in error["details"]


@pytest.mark.parametrize(
    ("kind", "slot", "source"),
    [
        ("SaveImage", "images", "decode-0"),
        ("PreviewImage", "images", "decode-0"),
        ("PreviewAny", "source", "decode-0"),
        ("PreviewAudio", "audio", "decode-0"),
        ("SaveLatent", "samples", "sampler-0"),
    ],
)
def test_what_the_gate_flagged_does_not_leave_through_a_node_that_expands(
    kind: str, slot: str, source: str, server: Server, client: Client, world: DemoWorld
) -> None:
    _run(client, flagged(world))  # judged before
    graph = flagged(world)
    graph["let"] = node("Let", value=[source, 0], kind=kind, slot=slot)
    graph["n"] = node("EmptyImage", width=64, height=64, batch_size=["let", 0], color=0)
    graph["size"] = node("GetImageSize", image=["n", 0])
    graph["said"] = node("PreviewAny", source=["size", 2])
    with pytest.raises(Failed, match=r"policy: gate\.required"):
        _run(client, graph)
    assert not list((server.base / "output").glob("**/let*"))
