"""What may leave, in the real ComfyUI as it runs: what each kind of policy lets through, and what only shows then."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from modular_lora_guard.operators import leaving
from support import audio_nodes
from support.escape_nodes import install
from support.gate_graphs import Stub, gated_run, install_stub, part, save
from support.graphs import decode, guarded_graph, node, sampler
from support.operator_graphs import Operator, required, stopped

GATE = "[gate]\nrequired = true\n"
OPEN = "[open]\nunattested = true\n"
EXTRAS = ("images", "video", "mask", "hunyuan3d", "load_3d", "string")
TRIMMED = {"start_index": 0.0, "duration": 9.0}
_numbers = iter(range(7000, 10**9))


@pytest.fixture(scope="module", autouse=True)
def _nodes(comfy):
    """ComfyUI's own nodes of sound, video and solids, and those of the escapes."""
    mapping = comfy.nodes.NODE_CLASS_MAPPINGS
    before = dict(mapping)
    folder = Path(comfy.nodes.__file__).parent / "comfy_extras"
    for name in EXTRAS:
        asyncio.run(comfy.nodes.load_custom_node(str(folder / f"nodes_{name}.py"), module_parent="comfy_extras"))
    audio_nodes.load(comfy)
    install(mapping, lambda: None)
    inputs = Path(comfy.folder_paths.get_input_directory())
    inputs.mkdir(parents=True, exist_ok=True)
    audio_nodes.write_sound(inputs / "tone.flac")
    yield
    mapping.clear()
    mapping.update(before)


@pytest.fixture
def detector(comfy, monkeypatch) -> Stub:
    stub = install_stub(comfy, monkeypatch)
    stub.score = lambda image: 0.0
    return stub


@pytest.fixture
def gated(operator: Operator, sha256, detector) -> Operator:
    """A policy that asks for the safety LoRA and a gate."""
    operator.write(required(sha256("safety.safetensors")) + GATE)
    return operator


def behind_gate(**more: dict) -> dict:
    """A guarded image of its own behind a gate, and ``more``."""
    number = next(_numbers)
    made = gated_run(action="blur", threshold=0.2 + number / 1e6)
    made["latent"]["inputs"]["batch_size"] = 1
    made["sample"]["inputs"]["seed"] = number
    return made | more


def test_each_name_is_one_of_comfyuis_own(comfy) -> None:
    root = Path(comfy.nodes.__file__).parent
    files = [
        root / "nodes.py",
        root / "custom_nodes" / "websocket_image_save.py",
        *(root / "comfy_extras").glob("*.py"),
    ]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    tables = (leaving.SHOWING, leaving.SOURCES, leaving.SOUND_EDITS, leaving.DECODERS)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    assert [name for name in names if f'"{name}"' not in text] == []


def test_a_judged_image_its_report_and_a_film_with_the_users_own_sound_leave(gated, comfy) -> None:
    graph = behind_gate(
        preview=node("PreviewImage", images=["gate", 0]),
        said=node("PreviewAny", source=["gate", 4]),
        load=node("LoadAudio", audio="tone.flac"),
        trim=node("TrimAudioDuration", audio=["load", 0], **TRIMMED),
        keep=node("SaveAudio", audio=["trim", 0], filename_prefix="tone"),
        film=node("CreateVideo", images=["gate", 0], audio=["trim", 0], fps=6.0),
        film_file=node("SaveVideo", video=["film", 0], filename_prefix="film", format="auto", codec="auto"),
        parts=node("GetVideoComponents", video=["film", 0]),
        again=node("PreviewAudio", audio=["parts", 1]),
    )
    gated.run(graph)
    (kept,) = comfy.output.glob("tone_*.flac")
    original = Path(comfy.folder_paths.get_input_directory()) / "tone.flac"
    assert np.array_equal(audio_nodes.samples(kept), audio_nodes.samples(original))
    assert list(comfy.output.glob("film_*.mp4"))


def test_an_image_that_went_into_the_gate_leaves_only_where_it_was_let_pass(gated, detector) -> None:
    graph = behind_gate()
    gated.run(graph)
    graph["save"] = save(["decode", 0], filename_prefix="same")
    gated.run_graph(graph)  # not flagged: the pixels are the same before and behind the gate
    detector.score = lambda image: 1.0
    graph = behind_gate()
    gated.run(graph)
    graph["save"] = save(["decode", 0], filename_prefix="other", save_flagged=True)
    stopped(gated, graph, "refused.gate.required")


def test_where_reporting_is_allowed_what_is_reported_leaves(operator, sha256, detector) -> None:
    operator.write(required(sha256("safety.safetensors")) + f'{GATE}actions = ["report", "blur"]\n')
    detector.score = lambda image: 1.0
    graph = behind_gate()
    graph["settings"]["inputs"]["action"] = "report"
    graph["save"] = save(["gate", 0], save_flagged=True)
    operator.run(graph)


def test_without_a_gate_the_latent_of_a_guarded_run_leaves_with_its_mask_left_out(enforced, comfy) -> None:
    graph = guarded_graph()
    graph["sample"]["inputs"]["seed"] = next(_numbers)
    graph["file"] = node("SaveLatent", samples=["masked", 0], filename_prefix="kept")
    graph["mask"] = node("SolidMask", value=1.0, width=64, height=64)
    graph["masked"] = node("SetLatentNoiseMask", samples=["sample", 0], mask=["mask", 0])
    enforced.run(graph)
    assert list(comfy.output.glob("kept_*.latent"))


def test_without_a_gate_an_outside_latent_leaves_neither_as_file_nor_as_sound(enforced) -> None:
    outside = {"width": 64, "height": 64, "batch_size": 1}
    graph = guarded_graph()
    graph["other"] = node("EmptyLatentImage", **outside)
    graph["out"] = node("SaveLatent", samples=["other", 0], filename_prefix="x")
    stopped(enforced, graph, "refused.open.unattested")
    graph["sound"] = node("VAEDecodeAudio", samples=["other", 0], vae=["ckpt", 2])
    graph["out"] = node("PreviewAudio", audio=["sound", 0])
    stopped(enforced, graph, "refused.open.unattested")


def test_runs_are_noted_of_what_comfyuis_own_nodes_make_of_their_latents(enforced, comfy) -> None:
    module = part(comfy, "comfy_host.enforcement.leaving")
    graph = guarded_graph()
    graph["sample"]["inputs"]["seed"] = next(_numbers)
    graph["sound"] = node("VAEDecodeAudio", samples=["sample", 0], vae=["ckpt", 2])
    graph["quiet"] = node("AudioAdjustVolume", audio=["sound", 0], volume=-3)
    graph["film"] = node("CreateVideo", images=["decode", 0], audio=["quiet", 0], fps=6.0)
    graph["parts"] = node("GetVideoComponents", video=["film", 0])
    graph["said"] = node("PreviewAny", source=["parts", 2])
    made = enforced.run(graph)
    for name, slot in (("sound", 0), ("quiet", 0), ("parts", 1)):
        (run,) = module.origin(module._Sound(made[name][slot]["waveform"]))
        assert run.status == "guarded"
        assert module.origin(module._Sound(made[name][slot]["waveform"] + 1)) is None


def test_runs_are_noted_of_the_solids_that_comfyuis_own_nodes_make_of_their_latents(enforced, comfy) -> None:
    from comfy_api.latest._util import VOXEL

    module, policy = (
        part(comfy, "comfy_host.enforcement.leaving"),
        part(comfy, "comfy_host.enforcement.policy").current(),
    )
    kinds = comfy.nodes.NODE_CLASS_MAPPINGS
    latent = enforced.run(guarded_graph())["sample"][0]
    voxel = VOXEL(torch.rand(1, 4, 4, 4))
    voxel.voxel_colors, voxel.resolution = None, 256  # 0.33.0 has these two itself
    decoder, mesher = (module.node_of(kinds[name]) for name in ("VAEDecodeHunyuan3D", "VoxelToMeshBasic"))
    module.given_out(policy, decoder, {"samples": [latent]}, ([[voxel]], {}, False))
    mesh = kinds["VoxelToMeshBasic"].execute(voxel, 0.5).result[0]
    module.given_out(policy, mesher, {"voxel": [voxel]}, ([[mesh]], {}, False))
    for solid in (voxel, mesh):
        (run,) = module.origin(solid)
        assert run.status == "guarded"
    voxel.resolution = 128
    mesh.texture = torch.rand(1, 4, 4, 3)  # an image
    assert module.origin(voxel) is None
    assert module.origin(mesh) is None


def test_a_gate_alone_lets_any_judged_image_leave_and_shows_none_on_the_way(
    operator, detector, previews, monkeypatch
) -> None:
    from comfy import utils

    shown: list = []
    operator.write(f"[guard]\nrequired = []\n{GATE}{OPEN}")
    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: shown.append(preview))
    graph = behind_gate()
    graph["sample"] = sampler(["ckpt", 0], seed=next(_numbers))
    graph["decode"] = decode(["sample", 0], "VAEDecode")
    graph["save"] = node("SaveImage", images=["gate", 0], filename_prefix="free")
    operator.run(graph)
    assert shown
    assert not any(shown)
    shown.clear()
    operator.remove()
    graph["sample"]["inputs"]["seed"] = next(_numbers)
    operator.run_graph(graph)
    assert any(shown)  # as it was


def test_a_type_that_is_named_as_showing_is_judged_although_it_is_no_output(operator, sha256, detector) -> None:
    operator.write(required(sha256("safety.safetensors")) + f'{GATE}[nodes]\nshowing = ["EscTell"]\n')
    graph = behind_gate(tell=node("EscTell", value=["gate", 0]))
    graph["n"] = node("EmptyImage", width=64, height=64, batch_size=["tell", 0], color=0)
    graph["size"] = node("GetImageSize", image=["n", 0])
    graph["said"] = node("PreviewAny", source=["size", 2])
    operator.run(graph)
    graph["edit"] = node("ImageInvert", image=["decode", 0])
    graph["tell"]["inputs"]["value"] = ["edit", 0]
    assert "tell" in operator.queue(graph)
    stopped(operator, graph, "refused.open.unattested")


def test_weights_are_not_written_by_a_node_that_another_expands_to(enforced) -> None:
    graph = guarded_graph()
    graph["let"] = node("EscLet", value=["ckpt", 2], into="VAESave", slot="vae", form="plain")
    graph["n"] = node("EmptyImage", width=64, height=64, batch_size=["let", 0], color=0)
    graph["size"] = node("GetImageSize", image=["n", 0])
    graph["said"] = node("PreviewAny", source=["size", 2])
    stopped(enforced, graph, "refused.nodes.allow")


def test_another_packs_node_under_a_known_name_is_not_known(gated, comfy, monkeypatch) -> None:
    mapping = comfy.nodes.NODE_CLASS_MAPPINGS
    monkeypatch.setitem(mapping, "SaveImage", type("SaveImage", (mapping["PreviewImage"],), {"__module__": "theirs"}))
    graph = behind_gate()
    graph["show"] = node("SaveImage", images=["gate", 0], filename_prefix="x")
    assert set(gated.queue(graph)) == {"show"}
    stopped(gated, graph, "refused.gate.required", "SaveImage")


def test_a_loop_of_containers_ends(gated, comfy) -> None:
    module = part(comfy, "comfy_host.enforcement.leaving")
    loop: list = [torch.zeros(1)]
    loop.append(loop)
    loop.append({"again": loop, "text": "x", "numbers": [1, 2.0, None, True]})
    assert len(list(module._leaves(loop))) == 1


class Fresh(Mapping):
    """Makes what it holds anew each time."""

    def __getitem__(self, key: str) -> dict:
        return {"x": torch.zeros(1)}

    def __iter__(self):
        return iter(("a", "b"))

    def __len__(self) -> int:
        return 2


def test_what_is_made_while_it_is_looked_at_is_not_taken_for_something_seen(comfy) -> None:
    module = part(comfy, "comfy_host.enforcement.leaving")
    assert len(list(module._leaves([Fresh() for _ in range(50)]))) == 100


@pytest.mark.parametrize("slow", [0, 1])
def test_a_coroutine_that_shows_is_stopped_whichever_run_of_a_list_does(slow, gated, comfy, monkeypatch) -> None:
    """Of two runs of one node the one ends at once, the other later."""

    async def run(self, value, number):
        if number != slow:
            return {"result": (1,)} if slow else {"ui": {"text": ["x"]}, "result": (1,)}
        await asyncio.sleep(0.01)
        return {"ui": {"text": ["x"]}, "result": (1,)} if slow else {"result": (1,)}

    def both(self):
        return ([0, 1],)

    common = {"FUNCTION": "run", "CATEGORY": "test"}
    inputs = classmethod(lambda cls: {"required": {"value": ("IMAGE",), "number": ("INT",)}})
    mapping = comfy.nodes.NODE_CLASS_MAPPINGS
    later = {"RETURN_TYPES": ("INT",), "INPUT_TYPES": inputs, "run": run, **common}
    listed = {"RETURN_TYPES": ("INT",), "OUTPUT_IS_LIST": (True,), "run": both, **common}
    listed["INPUT_TYPES"] = classmethod(lambda cls: {"required": {}})
    monkeypatch.setitem(mapping, "Later", type("Later", (), later))
    monkeypatch.setitem(mapping, "Both", type("Both", (), listed))
    graph = behind_gate(both=node("Both"), tell=node("Later", value=["decode", 0], number=["both", 0]))
    graph["n"] = node("EmptyImage", width=64, height=64, batch_size=["tell", 0], color=0)
    graph["size"] = node("GetImageSize", image=["n", 0])
    graph["said"] = node("PreviewAny", source=["size", 2])
    stopped(gated, graph, "refused.gate.required")
