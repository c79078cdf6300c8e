"""Detailers and tiled samplers of other packs: an edit where their files are known and nothing else came in."""

from __future__ import annotations

import importlib
import itertools
import sys

import pytest
from support.detailers import pack
from support.edit_graphs import show, sources
from support.graphs import decode, node

LISTED = ("Detect", *(kind.__name__ for kind in pack.SAMPLING))
_seeds = itertools.count()  # images that are alike are known alike
UNGUARDED = "passed through Detail: not vouched for"


class Unknown(pack.Middle):
    """A detector of a folder that nobody has read."""


class GiveOthers:
    """What a graph may bring besides: a detector and a hook that nobody has read, and segments of another place."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"image": ("IMAGE",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("BBOX_DETECTOR", "HOOK", "SEGS", "SEGS"), "run", "test"

    def run(self, image):
        size, (segment,) = pack.Middle().detect(image)
        drawn = segment._replace(cropped_mask=segment.cropped_mask * image[0, :32, :32, 0].numpy())
        controlled = segment._replace(control_net_wrapper=object())
        return Unknown(), lambda image: image + 0.01, (size, [drawn]), (size, [controlled])


@pytest.fixture
def nodes(comfy, loras, monkeypatch):
    """The pack's nodes in ComfyUI, and its folder among those that are known."""
    listed = importlib.import_module("modular_lora_guard.comfy_host.pack_samplers")
    known = (listed.folder_sha256(pack.Detail),)
    for name, kind in (pack.NODES | {"GiveOthers": GiveOthers}).items():
        monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, name, kind)
    for name in LISTED:
        monkeypatch.setitem(listed.FOLDERS, name, known)
    monkeypatch.setitem(listed.DETECTORS, "Middle", known)
    for name in ("Upscaler", "REGIONAL_PROMPT"):
        monkeypatch.setitem(listed.HOLDERS, name, known)
    monkeypatch.setitem(listed.image_values.HELD, "Upscaler", ("given",))
    return listed


def graph(**nodes: dict) -> dict:
    """Two guarded images, a detector, and further nodes that are shown."""
    made = sources()
    made["as_model"] = node("ModularLoraGuardedAsModel", guarded_model=["guard", 0])
    made["detector"], made["others"] = node("GiveDetector"), node("GiveOthers", image=["outside", 0])
    for name, one in nodes.items():
        made[name] = one
        show(made, f"show.{name}", [name, 0])
    return made


def detail(kind: str = "Detail", **changes) -> dict:
    links = {"image": ["decode", 0], "model": ["as_model", 0], "vae": ["ckpt", 2]}
    links |= {"positive": ["pos", 0], "negative": ["neg", 0], "seed": next(_seeds)}
    given = {"Detail": {"detector": ["detector", 0]}, "DetailSegments": {"segs": ["segments", 0]}}.get(kind, {})
    return node(kind, **links | given | changes)


def said(comfy, made: dict) -> dict[str, str]:
    return {name: comfy.ledger.known(outputs[0][0]).status for name, outputs in made.items() if name[0] == "_"}


def test_a_pack_that_takes_its_modules_out_of_those_that_python_knows_is_known_by_its_code(nodes, monkeypatch):
    """As Ultimate SD Upscale does."""
    known = nodes.folder_sha256(pack.Detail)
    monkeypatch.delitem(sys.modules, pack.Detail.__module__)
    assert nodes.folder_sha256.__wrapped__(pack.Detail) == known != ""


def test_what_a_detailer_makes_of_a_guarded_image_is_an_edit_that_is_named(comfy, run_graph, nodes):
    made = run_graph(
        graph(
            _whole=detail(),
            segments=node("Detect", image=["decode", 0], detector=["detector", 0]),
            _parts=detail("DetailSegments"),
            _tiles=detail("Tiles"),
        )
    )
    assert said(comfy, made) == {
        "_whole": "guarded; edited: Detail",
        "_parts": "guarded; edited: Detect, DetailSegments",
        "_tiles": "guarded; edited: Tiles",
    }
    first, inner = comfy.ledger.known(made["_tiles"][0][0]).run.runs
    assert (first.run_status, inner.run_status) == ("guarded", "guarded")
    before, one = comfy.ledger.known(made["decode"][0][0]).run, comfy.ledger.known(made["_whole"][0][0]).run.runs
    assert first.firings == before.firings
    assert inner.evaluations == 2 * one[1].evaluations > 0  # two tiles
    assert inner.firings == inner.layers * inner.evaluations


def test_nothing_that_comes_to_it_from_outside_is_laundered(comfy, run_graph, nodes):
    segments = {"segs": ["others", 2]}
    made = run_graph(
        graph(
            _outside=detail(image=["outside", 0]),
            _model=detail(model=["ckpt", 0]),
            _hook=detail(hook=["others", 1]),
            _detector=detail(detector=["others", 0]),
            _mask=detail("DetailSegments", **segments),
            _controlled=detail("DetailSegments", segs=["others", 3]),
            segments=node("Detect", image=["outside", 0], detector=["detector", 0]),
            _elsewhere=detail("DetailSegments"),
        )
    )
    assert said(comfy, made) == {
        "_outside": "not guarded",
        "_model": UNGUARDED,
        "_hook": UNGUARDED,
        "_detector": UNGUARDED,
        "_mask": "not guarded",
        "_controlled": "passed through DetailSegments: not vouched for",
        "_elsewhere": "not guarded",
    }


def shown() -> dict:
    """A conditioning that brings an image from outside."""
    links = {"positive": ["pos", 0], "negative": ["neg", 0], "vae": ["ckpt", 2], "pixels": ["outside", 0]}
    return node("InpaintModelConditioning", **links, mask=["outside", 2], noise_mask=False)


def tiled(run_graph, latent: list, **nodes: dict) -> dict:
    """What a tiled sampler makes of a latent, decoded by the guarded VAE decoder as "_tiled"."""
    made = graph(**nodes)
    links = {"model": ["as_model", 0], "positive": ["pos", 0], "negative": ["neg", 0], "latent": latent}
    made["tiles"], made["_tiled"] = node("TiledLatent", **links, seed=next(_seeds)), decode(["tiles", 0])
    show(made, "show.tiled", ["_tiled", 0])
    return run_graph(made)


def test_what_a_tiled_sampler_puts_together_is_an_edit_of_guarded_runs(comfy, run_graph, nodes):
    made = tiled(run_graph, ["latent", 0])
    assert said(comfy, made) == {"_tiled": "guarded; edited: TiledLatent"}
    run = comfy.ledger.known(made["_tiled"][0][0]).run
    whole = comfy.ledger.known(made["decode"][0][0]).run  # in as many steps
    assert run.evaluations == 2 * whole.evaluations > 0
    assert run.firings == run.layers * run.evaluations


def test_a_tiled_sampler_launders_neither_an_outside_latent_nor_a_masks_outlines(comfy, run_graph, nodes):
    assert said(comfy, tiled(run_graph, ["outside", 1])) == {"_tiled": "not guarded"}
    drawn = node("ImageToMask", image=["outside", 0], channel="red")
    masked = node("SetLatentNoiseMask", samples=["latent", 0], mask=["drawn", 0])
    assert said(comfy, tiled(run_graph, ["masked", 0], drawn=drawn, masked=masked)) == {"_tiled": "not guarded"}


def enlarged(run_graph, **changes) -> dict:
    """What an upscaler makes of a guarded latent, decoded as "_larger"; changes are of the upscaler's inputs."""
    made = graph(shown=shown())
    links = {"model": ["as_model", 0], "vae": ["ckpt", 2], "positive": ["pos", 0], "negative": ["neg", 0]}
    latent = changes.pop("latent", ["sample", 0])
    made["upscaler"] = node("GiveUpscaler", **links | changes, seed=next(_seeds))
    made["larger"] = node("Enlarge", latent=latent, upscaler=["upscaler", 0])
    made["_larger"] = decode(["larger", 0])
    show(made, "show.larger", ["_larger", 0])
    return run_graph(made)


def test_what_an_upscaler_makes_of_a_guarded_latent_is_an_edit_by_what_it_was_given(comfy, run_graph, nodes):
    assert said(comfy, enlarged(run_graph)) == {"_larger": "guarded; edited: Enlarge"}
    unguarded = enlarged(run_graph, model=["ckpt", 0])
    assert said(comfy, unguarded) == {"_larger": "passed through Enlarge: not vouched for"}
    outside = "guarded throughout, started from an outside picture"  # the run's own latent comes out
    assert said(comfy, enlarged(run_graph, hook=["others", 1])) == {"_larger": outside}
    assert said(comfy, enlarged(run_graph, positive=["shown", 0])) == {"_larger": f"{outside}; edited: Enlarge"}
    assert said(comfy, enlarged(run_graph, latent=["outside", 1])) == {"_larger": f"{outside}; edited: Enlarge"}


def regional(run_graph, **changes) -> dict:
    """A latent sampled whole and in a region, decoded as "_regional"; changes are of the region's inputs."""
    made = graph()
    made["mask"] = node("SolidMask", value=1.0, width=72, height=72)
    made["drawn"] = node("ImageToMask", image=["outside", 0], channel="red")
    made["shown"] = shown()
    latent = changes.pop("latent", ["latent", 0])
    links = {"mask": ["mask", 0], "model": ["as_model", 0], "positive": ["pos", 0], "negative": ["neg", 0]}
    made["region"] = node("GiveRegion", **links | changes)
    made["regional"] = node("Regional", latent=latent, regions=["region", 0], seed=next(_seeds))
    made["_regional"] = decode(["regional", 0])
    show(made, "show.regional", ["_regional", 0])
    return run_graph(made)


def test_what_a_regional_sampler_makes_has_all_of_its_runs_behind_it(comfy, run_graph, nodes):
    made = regional(run_graph)
    assert said(comfy, made) == {"_regional": "guarded; edited: Regional"}
    run, whole = (comfy.ledger.known(made[name][0][0]).run for name in ("_regional", "decode"))
    assert run.evaluations == 2 * whole.evaluations > 0  # in as many steps, twice
    assert run.firings == run.layers * run.evaluations


def test_a_regional_sampler_launders_neither_a_regions_outlines_nor_a_latent(comfy, run_graph, nodes):
    outside = {"_regional": "guarded throughout, started from an outside picture; edited: Regional"}
    assert said(comfy, regional(run_graph, mask=["drawn", 0])) == outside
    assert said(comfy, regional(run_graph, latent=["outside", 1])) == outside
    assert said(comfy, regional(run_graph, positive=["shown", 0])) == outside  # a conditioning that brings an image
    assert said(comfy, regional(run_graph, model=["ckpt", 0])) == {"_regional": "not guarded"}


def inpainted(run_graph, **changes) -> dict:
    """A part of an image cut out, edited, and put back as "_stitched"; changes are of the links."""
    made = graph()
    made["mask"] = node("SolidMask", value=1.0, width=72, height=72)
    made["drawn"] = node("ImageToMask", image=["outside", 0], channel="red")
    links = {"image": ["decode", 0], "mask": ["mask", 0], "part": ["turned", 0], "stitcher": ["cut", 0]} | changes
    made["cut"] = node("Cut", image=links["image"], mask=links["mask"])
    made["small"] = node("ImageCrop", image=["outside", 0], width=32, height=32, x=0, y=0)
    made["turned"] = node("ImageFlip", image=["cut", 1], flip_method="x-axis: vertically")
    made["_stitched"] = node("Stitch", stitcher=links["stitcher"], part=links["part"])
    show(made, "show.stitched", ["_stitched", 0])
    return run_graph(made)


def test_what_is_cut_out_and_put_back_is_an_edit_by_the_worst_of_it(comfy, run_graph, nodes):
    edited = "guarded; edited: Cut, ImageFlip, Stitch"
    assert said(comfy, inpainted(run_graph)) == {"_stitched": edited}
    for name, link in (("image", ["outside", 0]), ("mask", ["drawn", 0]), ("part", ["small", 0])):
        assert said(comfy, inpainted(run_graph, **{name: link})) == {"_stitched": "not guarded"}, name


def test_another_version_of_the_packs_files_is_not_vouched_for(comfy, run_graph, nodes, monkeypatch):
    monkeypatch.setitem(nodes.FOLDERS, "Detail", ("0" * 64,))
    assert said(comfy, run_graph(graph(_whole=detail(image=["decode2", 0])))) == {"_whole": UNGUARDED}
    assert len(nodes.folder_sha256(pack.Detail)) == 64
    assert nodes.folder_sha256(int) == ""
