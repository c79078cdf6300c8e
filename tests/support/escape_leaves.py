"""Attempts of the catalogue (escapes.py) to let out what no gate let pass: as sound, text, numbers, behind other nodes.

The gate asks a detector whose answer the attempt decides. Where it flags an image and blurs it, the image that went
into the gate must not come out by any way; where it flags nothing, what was not judged must not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support import escape_nodes
from support.escape_ground import Ground
from support.escapes import DECODED, GATED, Graph, attempt
from support.gate_graphs import gated_run, install_stub
from support.graphs import node

LOOSE = f"{GATED}[open]\nunattested = true\n"
SAMPLED, PASSED = ["sample", 0], ["gate", 0]
_numbers = iter(range(5000, 10**9))


def behind_a_gate(flags: bool, change: Callable[[Graph], None], ground: Ground) -> None:
    """Send a graph with a gate, and then again with what ``change`` makes of it, when all has been judged."""
    with pytest.MonkeyPatch.context() as patch:
        install_stub(ground.comfy, patch).score = lambda image: float(flags)
        number = next(_numbers)
        made = gated_run(action="blur", threshold=0.2 + number / 1e6)  # its own, as the detector's answer is kept
        made["latent"]["inputs"]["batch_size"] = 1
        made["sample"]["inputs"]["seed"] = number
        for do in (lambda made: None, change):
            made["save"]["inputs"]["filename_prefix"] = f"l{next(_numbers)}"
            do(made)
            ground.send(made, client_id="browser")  # whom everything is told


def gate(name: str, outcome: str = "refused", why: str = "", policy: str = GATED, flags: bool = True):
    """Add a function that changes such a graph."""

    def add(change: Callable[[Graph], None]) -> None:
        attempt(name, outcome, why, policy)(lambda ground: behind_a_gate(flags, change, ground))

    return add


def needed(made: Graph, number: list) -> None:
    """Something that is shown needs a number, and says nothing of it but how many images there are."""
    made["n"] = node("EmptyImage", width=64, height=64, batch_size=number, color=0)
    made["size"] = node("GetImageSize", image=["n", 0])
    made["said"] = node("PreviewAny", source=["size", 2])


def let(made: Graph, kind: str, slot: str, form: str, value: list = DECODED) -> None:
    """A node that expands, as it runs, to ``kind`` with the value in this form; no link shows it."""
    made["let"] = node("EscLet", value=value, into=kind, slot=slot, form=form)
    needed(made, ["let", 0])


# As sound


def sound(made: Graph) -> None:
    made["sound"] = node("VAEDecodeAudio", samples=SAMPLED, vae=["ckpt", 2])


@gate("the picture's latent is decoded as sound and saved", flags=False)
def _(g):
    sound(g)
    g["out"] = node("SaveAudio", audio=["sound", 0], filename_prefix="s")


@gate("the picture's latent is decoded as sound and previewed", flags=False)
def _(g):
    sound(g)
    g["out"] = node("PreviewAudio", audio=["sound", 0])


@gate("a picture as sound is trimmed and saved as MP3", flags=False)
def _(g):
    sound(g)
    g["trim"] = node("TrimAudioDuration", audio=["sound", 0], start_index=0.0, duration=9.0)
    g["out"] = node("SaveAudioMP3", audio=["trim", 0], filename_prefix="s", quality="V0")


@gate("a picture as sound is added to the user's own sound", flags=False)
def _(g):
    sound(g)
    g["load"] = node("LoadAudio", audio="outside.flac")
    g["both"] = node("AudioMerge", audio1=["load", 0], audio2=["sound", 0], merge_method="add")
    g["out"] = node("SaveAudioOpus", audio=["both", 0], filename_prefix="s", quality="128k")


@gate("a picture as sound is printed as text", flags=False)
def _(g):
    sound(g)
    g["any"] = node("AnyPass", value=["sound", 0])
    g["out"] = node("PreviewAny", source=["any", 0])


@gate("a picture is the sound track of a video of judged pictures", flags=False)
def _(g):
    sound(g)
    g["video"] = node("CreateVideo", images=PASSED, audio=["sound", 0], fps=6.0)
    g["out"] = node("SaveVideo", video=["video", 0], filename_prefix="s", format="auto", codec="auto")


@gate("a picture is taken out of the sound track of a video of judged pictures", flags=False)
def _(g):
    sound(g)
    g["video"] = node("CreateVideo", images=PASSED, audio=["sound", 0], fps=6.0)
    g["parts"] = node("GetVideoComponents", video=["video", 0])
    g["out"] = node("SaveAudio", audio=["parts", 1], filename_prefix="s")


@gate("a node expands to a sound of the pixels themselves", flags=False)
def _(g):
    let(g, "SaveAudio", "audio", "sound")


@attempt(
    "the user's own sound is trimmed and saved where a gate must judge",
    "permitted",
    "it is read from a file, and ComfyUI's own nodes made nothing else of it",
    GATED,
)
def _(ground):
    def change(g: Graph) -> None:
        g["load"] = node("LoadAudio", audio="outside.flac")
        g["trim"] = node("TrimAudioDuration", audio=["load", 0], start_index=0.0, duration=9.0)
        g["out"] = node("SaveAudio", audio=["trim", 0], filename_prefix="own")

    behind_a_gate(False, change, ground)


# What the gate flagged


@gate("what a gate flagged is saved through a node that expands")
def _(g):
    let(g, "SaveImage", "images", "plain")


@gate("what a gate flagged is previewed through a node that expands", policy=LOOSE)
def _(g):
    let(g, "PreviewImage", "images", "plain")


@gate("what a gate flagged is saved by Save Image (Guarded), told to save what is flagged, through a node that expands")
def _(g):
    let(g, "ModularLoraSaveGated", "images", "plain")


@gate("what a gate flagged is saved by Save Attested Image through a node that expands")
def _(g):
    let(g, "ModularLoraSaveImage", "images", "plain")


@gate("what a gate flagged goes through the websocket through a node that expands")
def _(g):
    let(g, "SaveImageWebsocket", "images", "plain")


@gate("what a gate flagged is saved as an animation of one frame through a node that expands")
def _(g):
    let(g, "SaveAnimatedWEBP", "images", "plain")


@gate("what a gate flagged is the background of a solid")
def _(g):
    let(g, "Preview3D", "bg_image", "plain")


@gate("what a gate flagged stands in one batch with what it made of it")
def _(g):
    g["both"] = node("ImageBatch", image1=PASSED, image2=DECODED)
    let(g, "SaveImage", "images", "plain", ["both", 0])


for _form in escape_nodes.FORMS:
    gate(f"what a gate flagged is printed as text, handed on as: {_form}")(
        lambda g, form=_form: let(g, "PreviewAny", "source", form)
    )

for _form in (
    "video of five dimensions",
    "slice of a batch",
    "one picture",
    "mask",
    "row of a mask",
    "pictures in a list",
):
    gate(f"what no gate judged is saved, handed on as: {_form}", policy=LOOSE, flags=False)(
        lambda g, form=_form: (
            g.update(edit=node("ImageInvert", image=DECODED)),
            let(g, "SaveImage", "images", form, ["edit", 0]),
        )
    )


@gate("a mask of what a gate flagged is previewed")
def _(g):
    g["mask"] = node("ImageToMask", image=DECODED, channel="red")
    g["out"] = node("MaskPreview", mask=["mask", 0])


@gate("a mask of what a gate flagged is printed behind an any-type node")
def _(g):
    g["mask"] = node("ImageToMask", image=DECODED, channel="red")
    g["any"] = node("AnyPass", value=["mask", 0])
    g["out"] = node("PreviewAny", source=["any", 0])


@gate("the latent of what a gate flagged is written through a node that expands")
def _(g):
    let(g, "SaveLatent", "samples", "latent")


@gate("a node expands to a solid whose corners are the picture")
def _(g):
    g["mesh"] = node("EscMesh", value=DECODED)
    let(g, "SaveGLB", "mesh", "plain", ["mesh", 0])


# As text, and by nodes that nobody knows


@gate("another pack makes a text of what a gate flagged, and it is shown")
def _(g):
    g["text"] = node("EscText64", value=DECODED)
    g["out"] = node("PreviewAny", source=["text", 0])


@gate("another pack makes a text of what a gate flagged, and it becomes part of a file's name")
def _(g):
    g["text"] = node("EscText64", value=DECODED)
    g["part"] = node("StringSubstring", string=["text", 0], start=0, end=99)
    g["save"]["inputs"]["filename_prefix"] = ["part", 0]


@gate("a text of what a gate flagged is shown by a node that another expands to")
def _(g):
    g["text"] = node("EscText64", value=DECODED)
    let(g, "PreviewAny", "source", "plain", ["text", 0])


@gate("the same with a text put behind it, and in a table")
def _(g):
    g["text"] = node("EscText64", value=DECODED)
    g["longer"] = node("StringConcatenate", string_a=["text", 0], string_b="x", delimiter="")
    let(g, "PreviewAny", "source", "dict of tuples", ["longer", 0])


@gate("a part of a text of what a gate flagged is shown by a node that another expands to")
def _(g):
    g["text"] = node("EscText64", value=DECODED)
    g["part"] = node("StringSubstring", string=["text", 0], start=0, end=99)
    g["own"] = node("EscLet", value=["part", 0], into="PreviewAny", slot="source", form="list")
    needed(g, ["own", 0])


@gate("a node that is no output shows what a gate flagged as text of its own")
def _(g):
    g["tell"] = node("EscTell", value=DECODED)
    needed(g, ["tell", 0])


@gate("the same by a node whose function is a coroutine")
def _(g):
    g["tell"] = node("EscTellLater", value=DECODED)
    needed(g, ["tell", 0])


@gate("a node fails, so that the error tells the numbers of what a gate flagged", "invalid")
def _(g):
    g["small"] = node("ImageScale", image=DECODED, upscale_method="area", width=8, height=8, crop="disabled")
    g["fail"] = node("EscFail", value=["small", 0])
    needed(g, ["fail", 0])


@gate(
    "a node that is no output shows what a gate flagged beside its progress",
    "permitted",
    "the picture is dropped and the progress goes on; what the gate made of the picture is saved",
)
def _(g):
    g["preview"] = node("EscPreview", value=DECODED)
    needed(g, ["preview", 0])


@gate("one of ComfyUI's API nodes would send what no gate judged to a company", flags=False)
def _(g):
    g["api"] = node("FluxKontextProImageNode", prompt="x", input_image=DECODED)
    g["out"] = node("SaveImage", images=["api", 0], filename_prefix="x")


@gate("one of ComfyUI's API nodes would send what a gate let pass to a company", flags=False)
def _(g):
    g["api"] = node("FluxKontextProImageNode", prompt="x", input_image=PASSED)
    g["out"] = node("SaveImage", images=["api", 0], filename_prefix="x")


@gate("an output of another pack gets what a gate let pass", flags=False)
def _(g):
    g["show"] = node("EscShow", value=PASSED)


@gate("a node expands to an output of another pack")
def _(g):
    let(g, "EscShow", "value", "plain")


@gate(
    "an output of another pack that the policy names gets what a gate let pass",
    "permitted",
    "the operator answers for the node, and the picture was judged",
    f'{GATED}[nodes]\nshowing = ["EscAlias"]\n',
    flags=False,
)
def _(g):
    g["show"] = node("EscAlias", images=PASSED)


@gate(
    "an output of another pack that the policy names gets what a gate flagged",
    policy=f'{GATED}[nodes]\nshowing = ["EscShow"]\n',
)
def _(g):
    let(g, "EscShow", "value", "plain")
