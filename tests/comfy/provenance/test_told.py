"""Where it can be read what is known of images that stock nodes save: on the guard, over HTTP and in the files."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.drop_in import guarded, ordinary
from support.edit_graphs import edit, sources
from support.errors import refuses
from support.gate_graphs import part
from support.graphs import decode, node, sampler
from support.operator_graphs import stopped
from support.told import KEY, answer, run


def saved(prefix: str) -> dict:
    """Two guarded images, one of them scaled, and one of no guarded run, each saved by Save Image."""
    graph = sources()
    graph["latent"]["inputs"]["batch_size"] = 2
    graph["scaled"] = edit("ImageScale", {"image": ["decode2", 0]})
    graph["plain"] = decode(sampled := ["unguarded", 0], "VAEDecode")
    graph[sampled[0]] = sampler(["ckpt", 0])
    for name, images in (("whole", ["decode", 0]), ("edited", ["scaled", 0]), ("stock", ["plain", 0])):
        graph[name] = node("SaveImage", images=images, filename_prefix=f"{prefix}_{name}")
    return graph


def entries(comfy, prefix: str) -> list[dict | None]:
    """What each file says of its own pixels, found by their hash; None: nothing."""
    found = []
    for path in sorted(comfy.output.glob(f"{prefix}_*.png")):
        image = Image.open(path)
        digest = hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
        found.append(json.loads(image.text[KEY]).get(digest))
    return found


def test_files_of_save_image_say_what_is_known_of_their_pixels(comfy, loras):
    run(comfy, saved("png"), "png", extra_pnginfo={"workflow": {"nodes": []}})
    assert [one["status"] for one in entries(comfy, "png_whole")] == ["guarded"] * 2
    assert [one["said"] for one in entries(comfy, "png_edited")] == ["guarded; edited: ImageScale"] * 2
    assert [one["said"] for one in entries(comfy, "png_stock")] == ["not guarded"] * 2
    (first, _) = entries(comfy, "png_whole")
    assert [lora["name"] for lora in first["loras"]] == ["safety.safetensors"]
    text = Image.open(next(comfy.output.glob("png_whole_*.png"))).text
    assert json.loads(text["workflow"]) == {"nodes": []}


def test_a_client_that_sends_nothing_along_gets_the_entry_from_save_image_too(comfy, loras):
    run(comfy, saved("bare"), "bare")
    assert [one["status"] for one in entries(comfy, "bare_whole")] == ["guarded"] * 2


def test_a_clients_own_entry_is_taken_out_with_a_guard_in_the_graph_and_without(comfy, loras):
    forged = {KEY: {"0" * 64: {"status": "guarded"}}, "modular_lora_attestation": {"status": "guarded"}}
    forged |= {f"{name}\0more": value for name, value in forged.items()}
    run(comfy, saved("forged"), "forged", extra_pnginfo=dict(forged))
    text = Image.open(next(comfy.output.glob("forged_stock_*.png"))).text
    assert "0" * 64 not in json.loads(text[KEY])
    assert set(text) == {"prompt", KEY}
    graph = {"out": node("Outside", seed=1, size=64)}
    graph["save"] = node("SaveImage", images=["out", 0], filename_prefix="alone")
    run(comfy, graph, "alone", extra_pnginfo=dict(forged))
    assert set(Image.open(next(comfy.output.glob("alone_*.png"))).text) == {"prompt"}


def test_the_guard_node_shows_it_above_its_report_when_the_run_ends(comfy, loras):
    graph = saved("event")
    graph["guard"]["inputs"]["accept_merged"] = True  # so that it runs again and shows its report
    run(comfy, graph, "event")
    verdict, _, report = comfy.server.texts["guard"].partition("\n\n")
    assert sorted(verdict.splitlines()) == [  # the executor chooses which is saved first
        "2 of 6 images (SaveImage edited): guarded; edited: ImageScale",
        "2 of 6 images (SaveImage stock): not guarded",
        "2 of 6 images (SaveImage whole): guarded",
    ]
    assert report.startswith("The model is guarded by 1 safety LoRA")


def test_the_route_answers_for_a_clients_own_prompts(comfy, loras):
    run(comfy, saved("route"), "route-1")
    status, said = answer("route-1", "test")
    assert status == 200
    images = sorted(said["images"], key=lambda one: one["node"])  # the executor chooses which is saved first
    assert [(one["node"], one["status"]) for one in images] == [
        *[("edited", "guarded; edited: ImageScale")] * 2,
        *[("stock", "not guarded")] * 2,
        *[("whole", "guarded")] * 2,
    ]
    assert images[0]["edits"] == ["ImageScale"]
    found = {entry["pixels_sha256"] for entry in entries(comfy, "route_whole")}
    assert {one["pixels_sha256"] for one in images[4:]} == found
    for prompt_id, client in (("route-1", "other"), ("route-1", None), ("route-1", ""), ("unknown", "test")):
        assert answer(prompt_id, client)[0] == 404


EVENT = "modular_lora.report"
OPEN = "[guard]\nrequired = []\n[open]\nunattested = true\n"


def reports(comfy) -> dict[str, str]:
    """What was sent to be shown on the Guard node, by where it stands there."""
    sent = [data for event, data in comfy.server.messages if event == EVENT]
    assert {data["node"] for data in sent} <= {"guard"}
    return {key: text for data in sent for key, text in data.items() if key != "node"}


def test_a_run_is_told_to_the_client_that_queued_it_and_to_nobody_where_none_did(comfy, loras):
    graph = guarded(ordinary(("task.safetensors", 0.5)))
    comfy.server.readers.clear()
    run(comfy, graph, "mine")
    assert set(reports(comfy)) == {"run", "above"}
    assert comfy.server.readers == ["test"] * 2
    graph["sample"]["inputs"]["seed"] += 1
    run(comfy, graph, "nobodys", client_id=None)
    assert reports(comfy) == {}
    assert comfy.server.readers == ["test"] * 2


@pytest.mark.parametrize("told", ["full", "brief", "none"])
def test_a_policy_cuts_what_is_sent_to_the_guard_node_and_told_at_the_route_as_it_does_the_history(
    told, operator, comfy, loras
):
    operator.write(f'{OPEN}[history]\nverdict = "{told}"\n')
    graph = guarded(ordinary(("task.safetensors", 0.5)))
    graph["sample"]["inputs"]["seed"] = 40 + len(told)
    run(comfy, graph, told)
    sent, (status, said) = reports(comfy), answer(told, "test")
    if told == "none":
        assert (sent, status, set(said)) == ({}, 404, {"error"})
        return
    assert sent["run"].startswith("Guarded: the safety LoRA ran in ")
    assert ("task.safetensors at 0.5" in sent["run"]) == (told == "full")
    above = {"full": "1 of 1 images (SaveImage save): guarded", "brief": "1 of 1 images attested"}
    assert sent["above"] == above[told]
    assert [one["status"] for one in said["images"]] == ["guarded"]
    assert ("activity" in said["images"][0]) == (told == "full")


def test_what_is_known_of_the_prompts_of_several_images_stands_once_under_their_statuses(comfy):
    """Counted are the images themselves, however many nodes each came to."""
    told, attestation = part(comfy, "comfy_host.told"), part(comfy, "modular_lora.provenance.attestation")
    kept = attestation.Attestation("guarded", "p", "SD15", "b", False, (), {})
    kept = kept.of(activity={"s": attestation.Activity(0.05, "kept")})
    wrote = [told.Wrote("7", "SaveImage", {"guarded": 2, "not guarded": 1}), told.Wrote("8", "Preview", {"guarded": 2})]
    assert told.in_words(wrote, [kept, None, kept]).splitlines() == [
        "4 of 5 images (SaveImage 7, Preview 8): guarded",
        "1 of 5 images (SaveImage 7): not guarded",
        "the safety LoRA acted weakly on images 1 and 3: their prompts are not about the concept (activity 0.05)",
    ]


@pytest.mark.parametrize(("client", "told"), [("mine", "full"), ("mine", "brief"), ("mine", "none"), (None, "full")])
def test_how_far_a_training_is_goes_to_the_client_that_queued_it_and_is_cut_alike(client, told, operator, comfy):
    """Its data set's file names and captions are in it."""
    operator.write(f'{OPEN}[history]\nverdict = "{told}"\n')
    running, progress = part(comfy, "comfy_host.running"), part(comfy, "comfy_host.progress")
    watch = progress.NodeWatch(SimpleNamespace(hidden=SimpleNamespace(unique_id="7")))
    comfy.server.readers.clear()
    comfy.server.texts.clear()
    token = running.current.set(running.Prompt("training", client, {}))
    try:
        watch.say("cat.png: a cat")
        watch.stage("reading images", 2, 2)
    finally:
        running.current.reset(token)
    shown = {"full": "reading images: 2 of 2\ncat.png: a cat", "brief": "reading images: 2 of 2"}
    assert comfy.server.texts.get("7") == (shown.get(told) if client else None)
    assert set(comfy.server.readers) == ({"mine"} if client and told != "none" else set())


class FancySave:
    """A saver of another pack: what it tells the page of ``files`` files, in an order of its own."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"images": ("IMAGE",), "files": ("INT", {"default": 2})}})
    RETURN_TYPES, OUTPUT_NODE, FUNCTION, CATEGORY = (), True, "save", "tests"

    def save(self, images, files):
        return {"ui": {"images": [{"filename": f"{i}.png", "subfolder": "", "type": "temp"} for i in range(files)]}}


def test_a_node_that_saves_answers_with_a_verdict_on_each_image_and_names_its_file_where_that_is_known(
    comfy, loras, monkeypatch
):
    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "FancySave", FancySave)
    graph = saved("verdict")
    graph["fancy"] = node("FancySave", images=["scaled", 0], files=2)
    graph["film"] = node("FancySave", images=["scaled", 0], files=1)
    run(comfy, graph, "verdict")
    outputs = {data["node"]: data["output"] for event, data in comfy.server.messages if event == "executed"}
    said = {name: outputs[name]["modular_lora"] for name in ("whole", "edited", "stock", "fancy")}
    assert "modular_lora" not in outputs["film"]
    assert {name: [(one["attested"], one["status"]) for one in some] for name, some in said.items()} == {
        "whole": [(True, "guarded")] * 2,
        "edited": [(True, "guarded; edited: ImageScale")] * 2,
        "stock": [(False, "unattested")] * 2,
        "fancy": [(True, "guarded; edited: ImageScale")] * 2,
    }
    assert [one["file"] for one in said["whole"]] == outputs["whole"]["images"]
    assert [one["file"] for one in said["fancy"]] == [None, None]
    assert [one["filename"] for one in outputs["fancy"]["images"]] == ["0.png", "1.png"], "as the node has them"


def test_under_a_policy_a_named_edit_may_leave_and_what_is_not_vouched_for_may_not(enforced, comfy):
    graph = {name: one for name, one in saved("policy").items() if name not in ("stock", "plain", "unguarded")}
    for name in [name for name, one in graph.items() if one["class_type"] in ("TinyUpscaler", "Outside")]:
        del graph[name]
    for name in ("plainmask", "imagemask"):
        del graph[name]
    enforced.run_graph(graph)
    assert [one["said"] for one in entries(comfy, "policy_edited")] == ["guarded; edited: ImageScale"] * 2
    graph["load"] = node("LoadBeside", image=["decode", 0], file=1)
    graph["whole"]["inputs"]["images"] = ["load", 0]
    stopped(enforced, graph, "refused.open.unattested")


def test_under_a_policy_every_run_behind_an_image_must_satisfy_it(enforced, run_graph, loras):
    """An image put together of two runs, of which one lacks the safety LoRA that is required."""
    graph = sources()
    graph["other"] = node("ModularLoraLoadSafety", lora_name="other.safetensors", strength=1.0)
    graph["guard2"] = node("ModularLoraGuardModel", model=["ckpt", 0], safety_lora=["other", 0])
    graph["sample2"]["inputs"]["model"] = ["guard2", 0]
    graph["both"] = edit("ImageStitch", {"image1": ["decode", 0], "image2": ["decode2", 0]})
    graph["save"] = node("SaveImage", images=["both", 0], filename_prefix="two")
    with refuses("refused.guard.required"):
        enforced.run_graph(graph)


def test_an_ordinary_graph_with_a_hires_fix_behind_guard_is_told_the_same(comfy, loras):
    graph = guarded(ordinary(("task.safetensors", 0.7)))
    graph["bigger"] = edit("LatentUpscale", {"samples": ["sample", 0]})
    graph["second"] = sampler(graph["sample"]["inputs"]["model"], latent_image=["bigger", 0], denoise=0.5)
    graph["decode2"] = node("VAEDecode", samples=["second", 0], vae=["guard", 2])
    graph["scaled"] = edit("ImageScaleBy", {"image": ["decode2", 0]})
    for name, images in (("save", "decode"), ("save2", "decode2"), ("save3", "scaled")):
        graph[name] = node("SaveImage", images=[images, 0], filename_prefix=f"dropin_{name}_")
    run(comfy, graph, "dropin")
    assert [one["status"] for name in ("save", "save2") for one in entries(comfy, f"dropin_{name}_")] == ["guarded"] * 2
    assert [one["said"] for one in entries(comfy, "dropin_save3_")] == ["guarded; edited: ImageScaleBy"]
    said = {line.partition("): ")[2] for line in comfy.server.texts["guard"].splitlines()[:2]}
    assert said == {"guarded", "guarded; edited: ImageScaleBy"}
