"""What is known of an image goes on through honest work, and never gets better than the truth."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.edit_graphs import EDITS, GUARDED, MASKS, OUTSIDE, Laundering, edit, show, sources
from support.graphs import decode, guarded_graph, node, sampler

_every: dict = {}  # (edit, input from outside or None) -> what it made, and of which kind


@pytest.fixture(scope="module")
def status(comfy):
    """What is known of each image, latent or mask of an output, in words."""
    pack = importlib.import_module("modular_lora_guard.modular_lora.provenance.edits")
    ledger = comfy.ledger

    def of(output, kind: str) -> list[str]:
        found = []
        for row in pack.rows(output["samples"] if kind == "latent" else output, kind):
            source = pack.source(row)
            run = source.runs[0] if source.runs else None
            found.append(ledger.Known(run, None, source.through).status if source.runs != () else "blank")
        return found

    return of


@pytest.fixture
def run_every(comfy, loras, run_graph) -> dict:
    """Every edit of guarded inputs, and every edit with one of its inputs from outside, run once in one prompt."""
    if not _every:
        _every.update(_run_every(run_graph))
    return _every


def _run_every(run_graph) -> dict:
    graph = sources()
    names = {}
    for kind, (takes, _, gives) in EDITS.items():
        links, used = {}, {"image": 0, "latent": 0, "mask": 0}
        for key, of in takes.items():
            choice = MASKS[1:] * 2 if of == "mask" else GUARDED[of]
            links[key], used[of] = choice[used[of]], used[of] + 1
        for changed in (None, *takes):
            name = f"{kind}.{changed}"
            graph[name] = edit(kind, links | ({changed: OUTSIDE[takes[changed]]} if changed else {}))
            show(graph, f"show.{name}", [name, 0])
            names[kind, changed] = name, gives
    made = run_graph(graph)
    return {key: (made[name][0], gives) for key, (name, gives) in names.items()}


def test_every_type_on_the_list_is_run_here(comfy):
    following = importlib.import_module("modular_lora_guard.comfy_host.following")
    assert set(following.EDITS) == set(EDITS)


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_of_guarded_images_is_named(run_every, status, kind):
    made, gives = run_every[kind, None]
    before = "ImageToMask, " if "mask" in EDITS[kind][0].values() else ""
    expected = "blank" if kind == "SolidMask" else f"guarded; edited: {before}{kind}".replace(f"{kind}, {kind}", kind)
    said = status(made, gives)
    if kind in ("ImageBatch", "LatentBatch"):  # images of one size are the very ones that were guarded
        expected = "guarded"
    edits = [sorted(one.partition("edited: ")[2].split(", ")) for one in said]
    assert [one.partition(";")[0] for one in said] == [expected.partition(";")[0]] * len(said)
    assert edits == [sorted(expected.partition("edited: ")[2].split(", "))] * len(said)


@pytest.mark.parametrize(("kind", "changed"), [(kind, key) for kind, (takes, *_) in EDITS.items() for key in takes])
def test_an_edit_with_one_input_from_outside_is_not_guarded(run_every, status, kind, changed):
    made, gives = run_every[kind, changed]
    said = status(made, gives)
    if kind in ("ImageBatch", "LatentBatch"):
        assert sorted(said) == ["guarded", "not guarded"]
    else:
        assert said == ["not guarded"] * len(said)


def test_images_of_a_batch_keep_what_is_known_of_each(run_graph, loras, status):
    graph = sources()
    graph["batch"] = node("ImageBatch", image1=["decode", 0], image2=["outside", 0])
    graph["edit"] = edit("ImageScale", {"image": ["batch", 0]})
    graph["other"] = edit("ImageScale", {"image": ["outside", 0]})
    graph["sizes"] = node("ImageBatch", image1=["edit", 0], image2=["decode2", 0])  # the second is made as wide
    show(graph, "show", ["sizes", 0])
    said = status(run_graph(graph)["sizes"][0], "image")
    assert said == ["guarded; edited: ImageScale", "not guarded", "not guarded"]


def test_a_node_that_nobody_vouches_for_launders_nothing(comfy, run_graph, loras, status):
    graph = sources()
    graph["load"] = node("LoadBeside", image=["decode", 0], file=3)
    graph["again"] = edit("ImageScaleBy", {"image": ["load", 0]})
    graph["copy"] = edit("ImageScaleBy", {"image": ["decode", 0]})
    graph["written"] = node("EditInPlace", image=["copy", 0], file=4)
    graph["same"] = node("AnyPass", value=["decode", 0])
    graph["encoded"] = edit("VAEEncode", {"pixels": ["load", 0]})
    graph["decoded"] = decode(["encoded", 0])
    for name in ("again", "written", "same", "decoded"):
        graph[f"show.{name}"] = node("PreviewAny", source=[name, 0])
    made = run_graph(graph)
    assert status(made["load"][0], "image") == ["passed through LoadBeside: not vouched for"]
    assert status(made["again"][0], "image") == ["passed through LoadBeside: not vouched for"]
    assert status(made["written"][0], "image") == ["passed through EditInPlace: not vouched for"]
    assert status(made["same"][0], "image") == ["guarded"]  # the very pixels
    assert status(made["encoded"][0], "latent") == ["passed through LoadBeside: not vouched for"]
    why = "Unattested: the latent passed through LoadBeside, for which nobody vouches"
    assert made["decoded"][1].splitlines()[0] == why
    assert comfy.ledger.known(made["decoded"][0][0]).through == ("LoadBeside",)


class Pipe:
    """As a detailer's pipe: what it gives has the prompt in it beside what it made of an image."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",), "positive": ("CONDITIONING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE", "PIPE"), "run", "test"

    def run(self, image, positive):
        return image * 0.5, (image, positive)


def test_a_prompt_that_went_beside_a_guarded_image_says_nothing_of_other_images(
    comfy, run_graph, loras, status, monkeypatch
):
    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "Pipe", Pipe)
    graph = sources()
    graph["pipe"] = node("Pipe", image=["decode", 0], positive=["pos", 0])
    show(graph, "show", ["pipe", 0])
    assert status(run_graph(graph)["pipe"][0], "image") == ["passed through Pipe: not vouched for"]
    graph["plain"] = sampler(["ckpt", 0])
    graph["decoded"] = decode(["plain", 0], "VAEDecode")
    show(graph, "show2", ["decoded", 0])
    assert status(run_graph(graph)["decoded"][0], "image") == ["not guarded"]


def test_a_class_of_another_pack_under_a_listed_name_is_not_vouched_for(comfy, run_graph, loras, status, monkeypatch):
    beside = comfy.nodes.NODE_CLASS_MAPPINGS["LoadBeside"]
    kind = type("Replaced", (beside,), {"INPUT_TYPES": classmethod(lambda cls: {"required": {"image": ("IMAGE",)}})})
    kind.run = lambda self, image, **_: beside.run(self, image, 9)
    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "ImageFlip", kind)
    graph = sources()
    graph["replaced"] = node("ImageFlip", image=["decode", 0])
    show(graph, "show", ["replaced", 0])
    assert status(run_graph(graph)["replaced"][0], "image") == ["passed through ImageFlip: not vouched for"]


class Halved:
    """Of another pack: an honest edit."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "test"

    def run(self, image):
        return (image[:, ::2, ::2],)


class Other(Halved):
    """Another class that goes by the same name."""


def test_another_packs_class_is_vouched_for_while_its_source_is_the_one_that_was_tried(
    comfy, run_graph, loras, status, monkeypatch
):
    pack_edits = importlib.import_module("modular_lora_guard.comfy_host.pack_edits")
    monkeypatch.setitem(pack_edits.SOURCES, "Halved", (pack_edits.source_sha256(Halved),))
    graph = sources()
    graph["halved"] = node("Halved", image=["decode", 0])
    graph["outside2"] = node("Halved", image=["outside", 0])
    show(graph, "show", ["halved", 0])
    show(graph, "show2", ["outside2", 0])
    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "Halved", Halved)
    made = run_graph(graph)
    assert status(made["halved"][0], "image") == ["guarded; edited: Halved"]
    assert status(made["outside2"][0], "image") == ["not guarded"]
    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "Halved", Other)
    graph["other"] = node("Halved", image=["decode2", 0])  # ComfyUI keeps the object of a node that it has run
    show(graph, "show3", ["other", 0])
    assert status(run_graph(graph)["other"][0], "image") == ["passed through Halved: not vouched for"]


def test_what_ran_before_keeps_what_is_known_of_it(run_graph, loras, status):
    graph = sources()
    graph["edit"] = edit("ImageRotate", {"image": ["decode", 0]})
    graph["scaled"] = edit("ImageScaleBy", {"image": ["edit", 0]})
    show(graph, "show", ["scaled", 0])
    run_graph(graph)
    graph["scaled"]["inputs"]["scale_by"] = 1.5  # nothing before it runs again
    made = run_graph(graph)["scaled"][0]
    assert status(made, "image") == ["guarded; edited: ImageRotate, ImageScaleBy"]


def test_without_a_guard_in_the_graph_no_node_is_looked_at(comfy, run_graph, loras, monkeypatch):
    pack = importlib.import_module("modular_lora_guard.comfy_host.following")
    monkeypatch.setattr(pack.edits, "follow", lambda *_: pytest.fail("a node was followed"))
    run_graph({"out": node("Outside", seed=1, size=64), "show": node("PreviewImage", images=["out", 0])})


def second(latent: list, **changes) -> dict:
    return sampler(["guard", 0], "ModularLoraKSampler", latent_image=latent, seed=11, **changes)


def started(run_graph, graph: dict, latent: list, denoise: float = 0.4) -> str:
    """Status of a second guarded run from a latent of the graph."""
    graph["second"] = second(latent, denoise=denoise)
    show(graph, "show.second", ["second", 0])
    report = run_graph(graph)["second"][1].splitlines()[1]
    return report.rpartition(": ")[0]  # what follows are counts


def test_a_hires_fix_of_a_guarded_latent_is_guarded(run_graph, loras):
    graph = sources()
    graph["bigger"] = edit("LatentUpscale", {"samples": ["sample", 0]})
    assert run_graph(graph | {"show": node("PreviewAny", source=["bigger", 0])})
    assert started(run_graph, graph, ["bigger", 0]) == "guarded"


def test_a_second_pass_names_the_edits_before_it(run_graph, loras):
    graph = sources()
    graph["scaled"] = edit("ImageScaleBy", {"image": ["decode", 0]})
    graph["encoded"] = edit("VAEEncode", {"pixels": ["scaled", 0]})
    graph["second"] = second(["encoded", 0], denoise=0.4)
    show(graph, "show", ["second", 0])
    report = run_graph(graph)["second"][1]
    line, details, *_ = report.splitlines()
    assert details.startswith("guarded; edited: ImageScaleBy, VAEEncode: ")
    assert line.endswith("Edited on the way by ImageScaleBy, VAEEncode.")


def test_what_came_from_outside_stays_so(comfy, run_graph, loras, status):
    """Whatever is sampled, encoded or resized after it, however little or much is denoised."""
    graph = sources()
    graph["encoded"] = edit("VAEEncode", {"pixels": ["outside", 0]})
    graph["first"] = second(["encoded", 0], denoise=1.0)
    graph["picture"] = decode(["first", 0])
    graph["scaled"] = edit("ImageScaleBy", {"image": ["picture", 0]})
    graph["again"] = edit("VAEEncode", {"pixels": ["scaled", 0]})
    graph["bigger"] = edit("LatentUpscaleBy", {"samples": ["first", 0]})
    show(graph, "show", ["picture", 0])
    show(graph, "show2", ["bigger", 0])
    said = "guarded, outside start; edited: ImageScaleBy, VAEEncode"
    assert started(run_graph, graph, ["again", 0], 0.9) == said
    made = run_graph(graph)
    said = "guarded throughout, started from an outside picture"
    assert comfy.ledger.known(made["picture"][0][0]).status == said
    assert status(made["scaled"][0], "image") == [f"{said}; edited: ImageScaleBy"]
    assert started(run_graph, graph, ["bigger", 0], 0.9) == "guarded, outside start"
    graph["half"] = node(
        "ImageCompositeMasked", destination=["decode", 0], source=["picture", 0], x=8, y=8, resize_source=False
    )
    show(graph, "show3", ["half", 0])
    assert status(run_graph(graph)["half"][0], "image") == [f"{said}; edited: ImageCompositeMasked"]


def test_a_mask_that_holds_an_image_is_a_start_from_outside(run_graph, loras):
    graph = sources()
    graph["feather"] = edit("FeatherMask", {"mask": ["plainmask", 0]})
    for name, mask in (("drawn", ["outside", 2]), ("even", ["plainmask", 0]), ("feathered", ["feather", 0])):
        graph[name] = node("SetLatentNoiseMask", samples=["sample", 0], mask=mask)
    assert started(run_graph, graph, ["drawn", 0]) == "guarded, outside start"
    assert started(run_graph, graph, ["even", 0]) == "guarded"
    assert started(run_graph, graph, ["feathered", 0]) == "guarded, outside start"
    graph["empty"] = node("SetLatentNoiseMask", samples=["latent", 0], mask=["outside", 2])
    assert started(run_graph, graph, ["empty", 0], 1.0) == "guarded, outside start"  # a stencil is an image


def test_an_image_of_two_runs_has_the_worst_status_and_names_both(comfy, run_graph, loras):
    graph = sources()
    graph["other"] = node("ModularLoraLoadSafety", lora_name="other.safetensors", strength=1.0)
    graph["guard2"] = node("ModularLoraGuardModel", model=["ckpt", 0], safety_lora=["other", 0])
    graph["sample2"]["inputs"]["model"] = ["guard2", 0]
    graph["both"] = edit("ImageStitch", {"image1": ["decode", 0], "image2": ["decode2", 0]})
    show(graph, "show", ["both", 0])
    run = comfy.ledger.known(run_graph(graph)["both"][0][0]).run
    assert run.status == "guarded; edited: ImageStitch"
    assert {lora.name for one in run.runs for lora in one.safety} == {"safety.safetensors", "other.safetensors"}
    assert len(comfy.ledger.known(run_graph(graph)["both"][0][0]).record()["others"]) == 1


def custom(model: list, **changes) -> dict:
    """SamplerCustomAdvanced, ended before the noise is gone: its two outputs differ."""
    return {
        "noise": node("RandomNoise", noise_seed=3),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=model, scheduler="normal", steps=4, denoise=1.0),
        "split": node("SplitSigmas", sigmas=["sigmas", 0], step=2),
        "guider": node("ModularLoraGuider", model=model, positive=["pos", 0], negative=["neg", 0], cfg=2.0),
        "custom": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["split", 0],
            latent_image=["latent", 0],
        ),
        "left": decode(["custom", 0]),
        "clean": decode(["custom", 1]),
        "show.left": node("PreviewAny", source=["left", 1]),
        "show.clean": node("PreviewAny", source=["clean", 1]),
    } | changes


def test_the_denoised_latent_is_bound_like_the_result(run_graph, loras):
    graph = guarded_graph()
    graph["asmodel"] = node("ModularLoraGuardedAsModel", guarded_model=["guard", 0])
    made = run_graph(graph | custom(["asmodel", 0]))
    assert not torch.equal(made["custom"][0]["samples"], made["custom"][1]["samples"])
    assert all("\nguarded: " in made[name][1] for name in ("left", "clean"))
    plain = node("CFGGuider", model=["ckpt", 0], positive=["pos", 0], negative=["neg", 0], cfg=2.0)
    made = run_graph(graph | custom(["ckpt", 0], guider=plain))
    assert all(made[name][1].startswith("Unattested: ") for name in ("left", "clean"))


@pytest.mark.slow
def test_no_image_is_laundered_through_random_edits(comfy, loras, run_graph, status, extent):
    """The reference is the graph's form alone: what has anything else behind it must not read guarded."""
    tried = 0
    for seed in range(extent(6, 200)):
        trial = Laundering(seed)
        values = list(trial.values())
        made = run_graph(trial.graph)
        for name, kind, value in values:
            for said in status(made[name][0], kind):
                tried += 1
                if not value.honest:
                    assert not said.startswith("guarded"), (seed, name, said, trial.graph)
                elif value.runs:
                    assert said.startswith("guarded; edited: "), (seed, name, said, trial.graph)
                    assert set(said.partition("edited: ")[2].split(", ")) <= value.edits, (seed, name, said)
                else:
                    assert said == "blank", (seed, name, said)
    assert tried > extent(20, 700)
