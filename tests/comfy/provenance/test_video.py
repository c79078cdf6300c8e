"""Films of a guarded model of video: what is known of their frames, what the file says, and how it is checked."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import new_executor
from PIL import Image, ImageSequence
from support.graphs import node
from support.told import KEY, answer, run
from support.video_toys import EXTRAS, FRAMES, SAFETY, VideoLoader, film, guarded, merged, write_loras

WHOLE = {"guarded": FRAMES}


@pytest.fixture(scope="module", autouse=True)
def nodes(comfy) -> Iterator[None]:
    before = set(comfy.nodes.NODE_CLASS_MAPPINGS)
    folder = Path(comfy.nodes.__file__).parent / "comfy_extras"
    for name in EXTRAS:
        asyncio.run(comfy.nodes.load_custom_node(str(folder / f"nodes_{name}.py"), module_parent="comfy_extras"))
    comfy.nodes.NODE_CLASS_MAPPINGS["VideoLoader"] = VideoLoader
    write_loras(comfy)
    yield
    for name in set(comfy.nodes.NODE_CLASS_MAPPINGS) - before:
        del comfy.nodes.NODE_CLASS_MAPPINGS[name]


def savers() -> dict:
    """Every node of ComfyUI's that writes frames into one file."""
    images, fps = ["decode", 0], {"fps": 6.0}
    return {
        "webm": node("SaveWEBM", images=images, codec="vp9", crf=32.0, filename_prefix="film", **fps),
        "webp": node(
            "SaveAnimatedWEBP",
            images=images,
            lossless=True,
            quality=80,
            method="default",
            filename_prefix="film_webp",
            **fps,
        ),
        "apng": node("SaveAnimatedPNG", images=images, compress_level=4, filename_prefix="film_apng", **fps),
    }


@pytest.fixture(scope="module")
def saved(comfy) -> dict[str, Path]:
    """The files of a guarded film, of a client that sent nothing along: what the node wrote, by its id."""
    run(comfy, guarded(film("whole") | savers()), "film")
    return {one["node"]: comfy.output / one["files"][0]["filename"] for one in answer("film", "test")[1]["nodes"]}


def said(path: Path) -> dict:
    """What a film says of its frames, whatever its form."""
    if path.suffix == ".png":
        data = path.read_bytes()
        start = data.index(b"comf" + KEY.encode()) + 4
        size = int.from_bytes(data[start - 8 : start - 4], "big")
        return json.loads(data[start : start + size].partition(b"\0")[2])
    if path.suffix == ".webp":
        with Image.open(path) as image:
            texts = [str(value).partition(":") for value in image.getexif().values()]
        return json.loads(next(rest for name, _, rest in texts if name == KEY))
    import av

    with av.open(str(path)) as container:
        found = {name.lower(): value for name, value in container.metadata.items()}  # Matroska has names in capitals
    return json.loads(found[KEY])


def frames(path: Path) -> list[str]:
    """SHA-256 of each frame's 8-bit pixels, as a player shows them."""
    if path.suffix in (".png", ".webp"):
        with Image.open(path) as image:
            shown = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    else:
        import av

        with av.open(str(path)) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() for pixels in shown]


def test_every_frame_is_the_merges_and_attested(comfy, run_graph):
    graph = film()
    ours, merge, alone = (run_graph(made)["decode"][0].clone() for made in (guarded(graph), merged(graph), graph))
    assert len(ours) == FRAMES
    assert [comfy.ledger.known(frame).status for frame in ours] == ["guarded"] * FRAMES
    assert (merge - alone).abs().max() > 8 / 255
    assert (ours - merge).abs().max() <= 1 / 255
    record = comfy.ledger.known(ours[0]).record()
    assert [lora["name"] for lora in record["loras"] if lora["role"] == "safety"] == [SAFETY]


@pytest.mark.parametrize("form", ["webp", "apng"])
def test_a_film_without_loss_says_of_each_of_its_frames_what_is_known(saved, form):
    entries, shown = said(saved[form]), frames(saved[form])
    assert len(shown) == FRAMES
    assert [entries[digest]["said"] for digest in shown] == ["guarded"] * FRAMES


@pytest.mark.parametrize("form", ["save", "webm"])
def test_a_film_with_loss_says_it_of_frames_that_it_no_longer_shows(saved, form):
    """So that by the file alone it is not attested: only its own hash tells, at the server that wrote it."""
    entries, shown = said(saved[form]), frames(saved[form])
    assert [one["said"] for one in entries.values()] == ["guarded"] * FRAMES
    assert len(shown) == FRAMES
    assert not set(shown) & set(entries)


def test_the_route_names_every_film_by_the_hash_of_its_file(saved):
    status, told = answer("film", "test")
    assert status == 200
    assert {one["node"]: one["said"] for one in told["nodes"]} == dict.fromkeys(("save", "webm", "webp", "apng"), WHOLE)
    for one in told["nodes"]:
        (file,) = one["files"]
        assert file["sha256"] == hashlib.sha256(saved[one["node"]].read_bytes()).hexdigest()


def test_edits_of_frames_are_named_and_what_is_read_from_a_film_is_not_guarded(comfy, saved):
    shutil.copy(saved["save"], Path(comfy.folder_paths.get_input_directory()) / "loaded.mp4")
    graph = guarded(film("small"))
    graph["parts"] = node("GetVideoComponents", video=["film", 0])
    scale = {"upscale_method": "bilinear", "width": 48, "height": 48, "crop": "disabled"}
    graph["smaller"] = node("ImageScale", image=["parts", 0], **scale)
    graph["small"] = node("CreateVideo", images=["smaller", 0], fps=6.0)
    graph["save"]["inputs"]["video"] = ["small", 0]
    graph["file"] = node("LoadVideo", file="loaded.mp4")
    graph["again"] = node("SaveVideo", video=["file", 0], filename_prefix="again", format="auto", codec="auto")
    graph["seen"] = node("GetVideoComponents", video=["file", 0])
    graph["copy"] = node("CreateVideo", images=["seen", 0], fps=6.0)
    graph["redone"] = node("SaveVideo", video=["copy", 0], filename_prefix="redone", format="auto", codec="auto")
    run(comfy, graph, "edits")
    told = {one["node"]: one for one in answer("edits", "test")[1]["nodes"]}
    assert told["save"]["said"] == {"guarded; edited: ImageScale": FRAMES}
    assert told["redone"]["said"] == {"not guarded": FRAMES}
    assert "again" not in told
    assert said(next(comfy.output.glob("again_*.mp4"))) == {}  # Save Video copies what a loaded file says of itself


def test_films_run_as_they_are_under_a_policy_that_attaches(comfy, operator, run_graph):
    sha256 = hashlib.sha256((comfy.loras / SAFETY).read_bytes()).hexdigest()
    one = f'{{sha256 = "{sha256}", file = "{SAFETY}", min_net_strength = 0.9}}'
    operator.write(f'[guard]\nattach = "always"\nrequired = [{one}]\n')
    graph = film()
    assert operator.queue(graph) == {}
    ours = run_graph(copy.deepcopy(graph), new_executor(comfy))["decode"][0].clone()
    assert [comfy.ledger.known(frame).status for frame in ours] == ["guarded"] * FRAMES
    operator.remove()
    assert (ours - run_graph(merged(graph), new_executor(comfy))["decode"][0]).abs().max() <= 1 / 255


def test_of_more_frames_than_are_told_the_counts_are_whole(comfy):
    graph = guarded(film("beside"))
    graph["plain"] = node("EmptyImage", width=16, height=16, batch_size=520, color=0)
    graph["long"] = node("SaveAnimatedPNG", images=["plain", 0], compress_level=0, filename_prefix="long", fps=6.0)
    run(comfy, graph, "long")
    told = answer("long", "test")[1]
    assert {one["node"]: one["said"] for one in told["nodes"]} == {"save": WHOLE, "long": {"not guarded": 520}}
    assert len(told["images"]) == 512
    lines = comfy.server.texts["guard"].splitlines()
    assert any(line.startswith("520 of 529 images (SaveAnimatedPNG long): not guarded") for line in lines)
