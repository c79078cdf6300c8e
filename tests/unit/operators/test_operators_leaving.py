"""What may leave, decided of a graph before it runs: by node type, and by where each link comes from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.operators import leaving
from support.graphs import node
from support.policy_graphs import FACTS, guarded, refused

GATE = "[gate]\nrequired = true"
OPEN = "[open]\nunattested = true"
CLOSING = {"guard": "", "gate": GATE, "gate alone": f"{GATE}\n{OPEN}"}  # policies under which something is judged


def judged(**more: dict) -> dict:
    """A guarded graph whose images pass a gate; what ``more`` adds is to be refused, or not."""
    graph = guarded() | {"gate": node("ModularLoraGate", images=["decode", 0])}
    graph["save"] = node("SaveImage", images=["gate", 0])
    return graph | more


def named(key: str, *kinds: str) -> str:
    return f"[nodes]\n{key} = [{', '.join(map(repr, kinds))}]"


@pytest.mark.parametrize("policy", CLOSING)
def test_what_is_judged_leaves_through_every_type_that_is_known_to_show_images(policy: str) -> None:
    assert refused(judged(), CLOSING[policy]) == {}
    for kind in ("SaveImage", "PreviewAny", "ModularLoraSaveImage"):
        slot = "source" if kind == "PreviewAny" else "images"
        assert refused(judged(save=node(kind, **{slot: ["gate", 0]})), CLOSING[policy]) == {}


@pytest.mark.parametrize("policy", CLOSING)
@pytest.mark.parametrize("kind", ["OtherSave", "SaveNew"])
def test_types_that_nobody_knows_take_nothing_that_may_hold_an_image(kind: str, policy: str) -> None:
    for source in ("gate", "decode", "sample", "latent"):
        graph = judged(out=node(kind, images=[source, 0]))
        assert set(refused(graph, CLOSING[policy])) == {"out"}, source
    assert refused(judged(out=node(kind, filename_prefix="x")), CLOSING[policy]) == {}
    assert refused(judged(out=node(kind, images=["gate", 0])), CLOSING[policy], named("showing", kind)) == {}
    assert refused(judged(out=node(kind, images=["gate", 0])), CLOSING[policy], named("trusted", kind)) == {}
    assert refused(judged(out=node(kind, images=["gate", 0])), f"{OPEN}\n{named('allow', *FACTS)}") == {}


def test_showing_answers_for_images_alone_and_trusted_for_everything() -> None:
    for source, passes in (("gate", True), ("decode", False), ("sample", False)):
        graph = judged(out=node("OtherSave", images=[source, 0]))
        assert ("out" not in refused(graph, GATE, named("showing", "OtherSave"))) == passes
        assert refused(graph, GATE, named("trusted", "OtherSave")) == {}


@pytest.mark.parametrize("policy", CLOSING)
def test_nodes_that_send_to_a_company_take_no_image_although_they_are_no_outputs(policy: str) -> None:
    graph = judged(api=node("Sends", image=["gate", 0]), show=node("PreviewAny", source=["api", 1]))
    assert "api" in refused(graph, CLOSING[policy])
    assert "api" not in refused(graph, CLOSING[policy], named("showing", "Sends"))
    graph["api"]["inputs"] = {"prompt": "a cat"}
    assert refused(graph, CLOSING[policy]) == {}


SOUNDS = {
    "a waveform decoded from the image's latent": {"s": node("VAEDecodeAudio", samples=["sample", 0])},
    "the same, trimmed": {
        "d": node("VAEDecodeAudio", samples=["sample", 0]),
        "s": node("TrimAudioDuration", audio=["d", 0]),
    },
    "the same, through any-type nodes": {
        "d": node("VAEDecodeAudio", samples=["sample", 0]),
        "s": node("OtherAny", value=["d", 0]),
    },
    "speech of another pack": {"s": node("Speech", text="a cat")},
    "the same, beside a file": {
        "d": node("VAEDecodeAudio", samples=["sample", 0]),
        "f": node("LoadAudio", audio="x"),
        "s": node("Switch", a=["f", 0], b=["d", 0]),
    },
    "the sound of a video that was made of it": {
        "d": node("VAEDecodeAudio", samples=["sample", 0]),
        "v": node("CreateVideo", images=["gate", 0], audio=["d", 0]),
        "c": node("GetVideoComponents", video=["v", 0]),
        "s": node("Any", value=["c", 1]),
    },
}


@pytest.mark.parametrize("kind", ["SaveAudio", "PreviewAudio"])
@pytest.mark.parametrize("sound", SOUNDS)
def test_sound_of_unknown_origin_does_not_leave_where_a_gate_must_judge(sound: str, kind: str) -> None:
    graph = judged(**SOUNDS[sound], out=node(kind, audio=["s", 0]))
    assert refused(graph, GATE) == {"out": {"gate.required"}}
    video = node("CreateVideo", images=["gate", 0], audio=["s", 0])
    graph |= {"video": video, "out": node("SaveVideo", video=["video", 0])}
    assert refused(graph, GATE) == {"out": {"gate.required"}}


def test_sound_of_a_file_leaves_edited_or_in_a_video_and_that_of_a_trusted_type() -> None:
    graph = judged(load=node("LoadAudio", audio="x"), trim=node("TrimAudioDuration", audio=["load", 0]))
    graph["out"] = node("SaveAudio", audio=["trim", 0])
    graph["video"] = node("CreateVideo", images=["gate", 0], audio=["trim", 0])
    graph["film"] = node("SaveVideo", video=["video", 0])
    assert refused(graph, GATE) == {}
    graph["load"] = node("Speech", text="a cat")
    assert refused(graph, GATE) == {"out": {"gate.required"}, "film": {"gate.required"}}
    assert refused(graph, GATE, named("trusted", "Speech")) == {}
    graph["load"] = node("GetVideoComponents", video=["file", 0])
    graph["trim"]["inputs"]["audio"] = ["load", 1]
    assert refused(graph | {"file": node("LoadVideo", file="x")}, GATE) == {}


@pytest.mark.parametrize("policy", CLOSING)
def test_masks_do_not_leave(policy: str) -> None:
    graph = judged(mask=node("ImageToMask", image=["gate", 0]), out=node("MaskPreview", mask=["mask", 0]))
    assert set(refused(graph, CLOSING[policy])) == {"out"}


def test_latents_and_solids_leave_only_where_no_gate_must_judge() -> None:
    graph = judged(
        voxel=node("VAEDecodeHunyuan3D", samples=["sample", 0]), mesh=node("VoxelToMesh", voxel=["voxel", 0])
    )
    graph |= {"solid": node("SaveGLB", mesh=["mesh", 0]), "file": node("SaveLatent", samples=["sample", 0])}
    assert refused(graph, GATE) == {"solid": {"gate.required"}, "file": {"gate.required"}}
    assert refused(graph) == {}  # what it was made by shows when it runs


@pytest.mark.parametrize("policy", CLOSING)
def test_text_that_another_pack_makes_of_an_image_is_shown_by_nobody(policy: str) -> None:
    graph = judged(text=node("Base64", image=["decode", 0]), out=node("PreviewAny", source=["text", 0]))
    assert set(refused(graph, CLOSING[policy])) == {"out"}
    assert refused(graph, CLOSING[policy], named("trusted", "Base64")) == {}
    longer = node("StringConcatenate", string_a="x", string_b=["text", 0])
    graph |= {"longer": longer, "out": node("PreviewAny", source=["longer", 0])}
    assert set(refused(graph, CLOSING[policy])) == {"out"}
    graph["out"] = node("SaveImage", images=["gate", 0], undeclared=["longer", 0])
    assert set(refused(graph, CLOSING[policy])) == {"out"}


def test_a_file_name_is_text_too() -> None:
    graph = judged(text=node("Base64", image=["decode", 0]), load=node("LoadAudio", audio="x"))
    graph["out"] = node("SaveAudio", audio=["load", 0], filename_prefix=["text", 0])
    assert refused(graph, GATE) == {"out": {"gate.required"}}


@pytest.mark.parametrize("policy", CLOSING)
def test_text_and_numbers_that_hold_no_image_are_shown(policy: str) -> None:
    graph = judged(size=node("GetImageSize", image=["decode", 0]), out=node("PreviewAny", source=["size", 0]))
    assert refused(graph, CLOSING[policy]) == {}
    graph["out"] = node("PreviewAny", source=["guard", 2])
    assert refused(graph, CLOSING[policy]) == {}
    graph["out"] = node("OtherShow", text=["guard", 2])
    assert refused(graph, CLOSING[policy]) == {}


def test_where_nothing_is_judged_every_type_shows() -> None:
    graph = judged(out=node("OtherSave", images=["decode", 0], latent=["sample", 0]))
    assert refused(graph, OPEN) == {}
    assert refused(graph, required="") == {}


BETWEEN = ["OtherAny", "Any", "Switch", "Matched", "Edit", "ImageInvert", "ImageToMask", "Base64", "VAEDecodeAudio"]
ENDS = [
    "OtherSave",
    "SaveNew",
    "OtherShow",
    "SaveAudio",
    "PreviewAudio",
    "MaskPreview",
    "SaveLatent",
    "SaveGLB",
    "Sends",
]


@given(st.lists(st.sampled_from(BETWEEN), max_size=5), st.sampled_from(ENDS), st.randoms())
def test_no_wiring_brings_what_no_gate_judged_to_a_node_that_shows_it(kinds: list[str], end: str, random) -> None:
    """Random wiring between an unjudged latent or image and whatever shows."""
    graph, sources = judged(), ["decode"]
    for i, kind in enumerate(kinds):
        graph[f"n{i}"] = node(kind, **{name: [random.choice(sources), 0] for name in FACTS[kind].inputs})
        sources.append(f"n{i}")
    graph["out"] = node(end, **{next(iter(FACTS[end].inputs)): [sources[-1], 0]})
    if end == "Sends":
        graph["needs"] = node("PreviewAny", source=["out", 1])
    mistyped = "Base64" in kinds and end in leaving.SHOWING  # text in the place of sound: no server takes it
    assert "out" in refused(graph, GATE) or mistyped
