"""What the save nodes write under a policy with a certificate, in the real ComfyUI, by c2pa's own reader."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import c2pa
import numpy as np
import pytest
from modular_lora_guard.modular_lora.provenance import attested, credentials, marking
from modular_lora_guard.modular_lora.provenance.credentials import Claim
from modular_lora_guard.operators import policy
from PIL import Image
from support.certificates import authority, signer
from support.errors import refuses
from support.gate_graphs import gated_run, install_stub, part
from support.graphs import guarded_graph, node


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates: of a host and of a camera, and those of the authorities that they come from."""
    folder = tmp_path_factory.mktemp("certificates")
    signer(folder, "host", authority(folder, "root"))
    signer(folder, "camera", authority(folder, "cameras"))
    return folder


@pytest.fixture
def certified(comfy, place, tmp_path, monkeypatch) -> Path:
    """A policy in force that names a certificate; the root's."""
    path = tmp_path / policy.FILE
    table = (
        f'[credentials]\ncertificate = "{(place / "host.crt").as_posix()}"\nkey = "{(place / "host.key").as_posix()}"\n'
    )
    path.write_text(f"[guard]\nrequired = []\n[open]\nunattested = true\n{table}")
    found = part(comfy, "operators.policy").load(path)
    monkeypatch.setattr(part(comfy, "comfy_host.saving").policies, "current", lambda: found)
    return place / "root.crt"


def library_says(path: Path, root: Path) -> tuple[str, dict, c2pa.Reader]:
    settings = {"verify": {"remote_manifest_fetch": False}, "trust": {"trust_anchors": root.read_text()}}
    context = c2pa.Context.from_dict(settings)
    reader = c2pa.Reader(attested.MIMES[path.suffix], io.BytesIO(path.read_bytes()), context=context)
    return reader.get_validation_state(), reader.get_active_manifest(), reader


def actions(manifest: dict) -> list[dict]:
    return [
        one for a in manifest["assertions"] if a["label"].startswith("c2pa.actions") for one in a["data"]["actions"]
    ]


def written(comfy, prefix: str) -> list[Path]:
    return sorted(file for file in comfy.output.glob(f"{prefix}_*") if file.suffix != ".json")


def test_a_png_is_signed_over_its_text_and_keeps_its_pixels(comfy, certified, run_graph, loras):
    graph = guarded_graph()
    graph["edit"] = node("ImageFlip", image=["decode", 0], flip_method="y-axis: horizontally")
    graph["save"]["inputs"] |= {"images": ["edit", 0], "filename_prefix": "certified"}
    pixels = run_graph(graph)["edit"][0][0].numpy()
    (path,) = written(comfy, "certified")
    state, manifest, _ = library_says(path, certified)
    assert state == "Trusted"
    assert actions(manifest) == [
        {"action": "c2pa.created", "digitalSourceType": marking.TRAINED},
        {"action": "c2pa.edited", "description": "ImageFlip"},
    ]
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.clip(pixels * 255.0, 0, 255).astype(np.uint8))
        assert {attested.KEY, marking.KEYWORD, "prompt"} <= set(image.text)
    found = attested.verify(path, {}, [certified])
    assert (found.record["status"], found.credentials.signer) == ("guarded; edited: ImageFlip", "host")
    assert comfy.server.texts["save"].startswith("1 of 1 images attested; Content Credentials of host in 1 of 1")


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_a_lossy_file_carries_all_of_it_inside(format, comfy, certified, run_graph, loras, monkeypatch):
    install_stub(comfy, monkeypatch).score = lambda image: 1.0
    graph = gated_run(action="blur")
    graph["save"]["inputs"] |= {"filename_prefix": f"certified_{format}", "format": format}
    run_graph(graph)
    files = written(comfy, f"certified_{format}")
    assert len(files) == 3
    for path in files:
        assert attested.KEY not in path.with_suffix(".json").read_text()
        state, manifest, _ = library_says(path, certified)
        assert state == "Trusted"
        assert actions(manifest)[-1] == {"action": "c2pa.edited", "description": "gate: blur"}
        found = attested.verify(path, {}, [certified])
        assert found.record["gate"]["detector"] == "stub 1"
        said = {one["label"]: one["data"] for one in manifest["assertions"]}
        assert json.loads(said[credentials.LABEL]["json"]) == found.record


@pytest.mark.parametrize("names", [["camera.png"], ["camera.png", "second.png"]], ids=["edited", "created of two"])
def test_an_inputs_own_credentials_are_kept(names, comfy, certified, place, run_graph, loras):
    plain = io.BytesIO()
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 30).convert("RGB").save(plain, "PNG")
    camera = credentials.signer(place / "camera.crt", place / "camera.key")
    content = credentials.sign(plain.getvalue(), "image/png", Claim("", "{}", ""), camera)
    graph = guarded_graph()
    images: list = []
    for number, name in enumerate(names):
        (Path(comfy.folder_paths.get_input_directory()) / name).write_bytes(content)
        graph[f"load{number}"] = node("LoadImage", image=name)
        images.append([f"load{number}", 0])
    if len(images) > 1:
        graph["batch"] = node("ImageBatch", image1=images[0], image2=images[1])
        images = [["batch", 0]]
    graph["encode"] = node("VAEEncode", pixels=images[0], vae=["ckpt", 2])
    graph["sample"]["inputs"] |= {"latent_image": ["encode", 0], "denoise": 0.5}
    graph["save"]["inputs"]["filename_prefix"] = f"of_{len(names)}"
    run_graph(graph)
    path = written(comfy, f"of_{len(names)}")[-1]
    state, manifest, reader = library_says(path, certified)
    assert state == "Trusted"
    relation, first = ("parentOf", "c2pa.opened") if len(names) == 1 else ("inputTo", "c2pa.created")
    assert [one["relationship"] for one in manifest["ingredients"]] == [relation] * len(names)
    assert actions(manifest)[0]["action"] == first
    assert marking.COMPOSITE in [one.get("digitalSourceType") for one in actions(manifest)]
    for one in manifest["ingredients"]:
        assert reader.get_manifest(one["active_manifest"])["signature_info"]["common_name"] == "camera"
    assert attested.verify(path, {}, [certified]).record["status"] == "guarded, outside start"


def test_an_input_that_was_written_over_while_the_prompt_ran_is_not_named(comfy):
    inputs, running = part(comfy, "comfy_host.inputs"), part(comfy, "comfy_host.running")
    folder = Path(comfy.folder_paths.get_input_directory())
    Image.new("RGB", (8, 8)).save(folder / "late.png")
    graph = {"load": node("LoadImage", image="late.png"), "save": node("SaveImage", images=["load", 0])}
    for began, named in ((2e9, True), (1e9, False)):
        token = running.current.set(running.Prompt("1", None, graph, began=began))
        try:
            if named:
                (one,) = inputs.behind(graph, "save")
                assert (one.mime, one.content) == ("image/png", (folder / "late.png").read_bytes())
            else:
                with refuses("credentials.input", "late.png"):
                    inputs.behind(graph, "save")
        finally:
            running.current.reset(token)
    (folder / "late.png").unlink()
    with refuses("credentials.input", "late.png"):
        inputs.behind(graph, "save")


def test_what_no_guarded_run_made_gets_none(comfy, certified, run_graph, loras):
    graph = guarded_graph()
    graph["edit"] = node("ImageInvert", image=["decode", 0])
    graph["save"]["inputs"] |= {"images": ["edit", 0], "filename_prefix": "nobody", "unattested": "save and say so"}
    run_graph(graph)
    (path,) = written(comfy, "nobody")
    assert b"caBX" not in path.read_bytes()
    assert marking.CODES.encode() not in path.read_bytes()
    assert "Content Credentials of host in 0 of 1" in comfy.server.texts["save"]


@pytest.mark.parametrize(("action", "marked"), [("blur", True), ("empty", False)])
def test_what_the_gate_puts_in_an_images_place_is_not_said_to_be_a_models(
    action, marked, comfy, run_graph, loras, monkeypatch
):
    install_stub(comfy, monkeypatch).score = lambda image: float(image.std() > 0.001)
    graph = gated_run(action=action)
    graph["save"]["inputs"]["filename_prefix"] = f"put_{action}"
    run_graph(graph)
    for path in written(comfy, f"put_{action}"):
        with Image.open(path) as image:
            packet = image.text.get(marking.KEYWORD, "")
        assert (marking.TRAINED in packet) == marked


def test_where_the_library_is_missing_nothing_is_saved_under_such_a_policy_and_else_nothing_changes(
    comfy, certified, run_graph, loras, monkeypatch
):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    graph = guarded_graph()
    graph["save"]["inputs"]["filename_prefix"] = "missing"
    with refuses("credentials.library", "c2pa-python"):
        run_graph(graph)
    assert not written(comfy, "missing")
    monkeypatch.setattr(part(comfy, "comfy_host.saving").policies, "current", lambda: None)
    graph["save"]["inputs"]["unattested"] = "save and say so"
    run_graph(graph)
    (path,) = written(comfy, "missing")
    with Image.open(path) as image:
        assert image.text[marking.KEYWORD].encode() == marking.packet(marking.TRAINED)
