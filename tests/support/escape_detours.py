"""Attempts of the catalogue (escapes.py) behind nodes that carry anything, and with images from elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from support.escapes import CKPT, DECODED, GATED, GUARD, NAMED, attempt, graph, show, unguarded
from support.gate_graphs import gated_run, install_stub
from support.graphs import decode, node, sampler

# Hidden behind nodes that carry anything


@graph("an any-type node carries the checkpoint's own MODEL into the Guarded KSampler")
def _(g):
    g["any"] = node("AnyPass", value=CKPT)
    g["sample"]["inputs"]["model"] = ["any", 0]


@graph("forty any-type nodes in a row carry a MODEL into a stock KSampler")
def _(g):
    last = CKPT
    for i in range(40):
        g[f"any{i}"] = node("AnyPass", value=last)
        last = [f"any{i}", 0]
    unguarded(g, last)


@graph("any-type nodes stand in a loop that a MODEL enters")
def _(g):
    g["one"] = node("EscLazy", first=True, a=CKPT, b=["two", 0])
    g["two"] = node("AnyPass", value=["one", 0])
    g["sample"]["inputs"]["model"] = ["two", 0]


@graph("a switch evaluates lazily and turns to the unguarded MODEL")
def _(g):
    g["switch"] = node("EscLazy", first=False, a=GUARD, b=CKPT)
    g["sample"]["inputs"]["model"] = ["switch", 0]


@graph("which side of a lazy switch is taken comes from another node")
def _(g):
    g["side"] = node("PrimitiveBoolean", value=False)
    g["switch"] = node("EscLazy", first=["side", 0], a=DECODED, b=["stock_decode", 0])
    unguarded(g, CKPT)
    g["stock_save"] = node("SaveImage", images=["switch", 0], filename_prefix="x")


@graph("a node of another pack loads the checkpoint itself and gives it out as any type")
def _(g):
    g["hidden"] = node("EscHidden")
    g["sample"]["inputs"]["model"] = ["hidden", 0]


@graph("a KSampler that the policy names takes a MODEL from a node that gives any type", policy=NAMED)
def _(g):
    g["hidden"] = node("EscHidden")
    g["sample"] = sampler(["hidden", 0])


@graph("a MODEL is put into a box of a type of its own and taken out behind Guard Model")
def _(g):
    g["box"] = node("EscBox", value=CKPT)
    g["unbox"] = node("EscUnbox", box=["box", 0])
    g["sample"]["inputs"]["model"] = ["unbox", 0]


@graph("a node samples the MODEL that was put into a box, and takes no MODEL itself")
def _(g):
    g["loaded"] = node("EscHidden")
    g["box"] = node("EscBox", value=["loaded", 0])
    g["sample"] = node("EscSampleBox", box=["box", 0])


@graph("a node loads and samples by itself, with no input at all")
def _(g):
    g["sample"] = node("EscSample")


@graph("a node samples in a thread of its own")
def _(g):
    g["sample"] = node("EscThread")


@graph("a node samples while others run, as its function is a coroutine")
def _(g):
    g["sample"] = node("EscLater")


@graph("a node evaluates the diffusion model without any sampler")
def _(g):
    g["sample"] = node("EscApply")


@graph("a node expands, as it runs, to a whole unguarded graph with a preview")
def _(g):
    g["expand"] = node("EscExpandAll")


@graph("a node gets a hidden MODEL and expands to a stock KSampler")
def _(g):
    g["hidden"] = node("EscHidden")
    g["expand"] = node("EscExpand", model=["hidden", 0])


@graph("a node expands to a stock KSampler on the guarded model")
def _(g):
    g["expand"] = node("EscExpand", model=GUARD)


@graph("a node expands to a checkpoint loader whose MODEL goes into the Guarded KSampler")
def _(g):
    g["expand"] = node("EscExpandLoader")
    g["sample"]["inputs"]["model"] = ["expand", 0]


@graph("an output of another node is asked for by the number -1")
def _(g):
    g["sample"]["inputs"]["model"] = ["ckpt", -3]


@graph("an output is asked for by a number that is no whole number")
def _(g):
    g["sample"]["inputs"]["model"] = ["ckpt", 0.5]


# Images and latents from elsewhere


@graph("an outside picture is shown")
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["show"] = node("PreviewImage", images=["load", 0])


@graph("an outside picture is put into a batch with a guarded one")
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["batch"] = node("ImageBatch", image1=DECODED, image2=["load", 0])
    g["save"]["inputs"] |= {"images": ["batch", 0], "unattested": "save and say so"}


@graph("a guarded picture is edited and then saved")
def _(g):
    g["edit"] = node("ImageInvert", image=DECODED)
    g["stock_save"] = node("SaveImage", images=["edit", 0], filename_prefix="x")


@graph("a picture goes through a mask and comes out as a picture")
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["mask"] = node("ImageToMask", image=["load", 0], channel="red")
    g["picture"] = node("MaskToImage", mask=["mask", 0])
    g["show"] = node("PreviewImage", images=["picture", 0])


@graph("an outside picture is shown as a mask")
def _(g):
    g["load"] = node("LoadImageMask", image="outside.png", channel="red")
    g["show"] = node("MaskPreview", mask=["load", 0])


@graph("a node of another pack that takes anything is an output and gets an outside picture")
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["show"] = node("EscShow", value=["load", 0])


@graph("an outside picture goes into a box before it goes into an output of another pack")
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["box"] = node("EscBox", value=["load", 0])
    g["unbox"] = node("EscUnbox", box=["box", 0])
    g["show"] = node("EscShow", value=["unbox", 0])


@graph("an outside picture stays in its box and goes into an output of another pack")
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["box"] = node("EscBox", value=["load", 0])
    g["show"] = node("EscShow", value=["box", 0])


@graph("an outside latent is decoded by the stock node and saved")
def _(g):
    g["load"] = node("LoadLatent", latent="outside.latent")
    show(g, ["load", 0])


@graph("an outside latent is decoded by Guarded VAE Decode and saved")
def _(g):
    g["load"] = node("LoadLatent", latent="outside.latent")
    g["decode"] = decode(["load", 0])


@graph("an outside latent is mixed into the guarded one")
def _(g):
    g["load"] = node("LoadLatent", latent="outside.latent")
    g["mix"] = node("LatentInterpolate", samples1=["load", 0], samples2=["sample", 0], ratio=0.99)
    g["decode"] = decode(["mix", 0])
    g["stock_save"] = node("SaveImage", images=DECODED, filename_prefix="x")


@graph("an outside latent is sampled with a denoise of 0, so that no step is done")
def _(g):
    g["load"] = node("LoadLatent", latent="outside.latent")
    g["sample"]["inputs"] |= {"latent_image": ["load", 0], "denoise": 0.0}


@graph("the Guarded KSampler (Advanced) ends at the step at which it starts")
def _(g):
    g["load"] = node("LoadLatent", latent="outside.latent")
    steps = {"noise_seed": 1, "add_noise": "disable", "start_at_step": 1, "end_at_step": 1}
    links = {"return_with_leftover_noise": "enable", "latent_image": ["load", 0]}
    g["sample"] = sampler(GUARD, "ModularLoraKSamplerAdvanced", **steps, **links)


@graph(
    "an outside picture is the start of a guarded run",
    "permitted",
    "img2img is sampled with the guard, and the attestation says that it had an outside start",
)
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["encode"] = node("VAEEncode", pixels=["load", 0], vae=["ckpt", 2])
    g["sample"]["inputs"] |= {"latent_image": ["encode", 0], "denoise": 0.5}


@graph(
    "an outside picture stands under a mask that keeps all of it",
    "permitted",
    "as img2img: the attestation says that the run had an outside start",
)
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["other"] = node("ImageInvert", image=["load", 0])  # as attestations are bound to contents
    g["encode"] = node("VAEEncode", pixels=["other", 0], vae=["ckpt", 2])
    g["mask"] = node("SolidMask", value=0.0, width=64, height=64)
    g["kept"] = node("SetLatentNoiseMask", samples=["encode", 0], mask=["mask", 0])
    g["sample"]["inputs"]["latent_image"] = ["kept", 0]


@attempt(
    "an outside picture is what a gate that flags everything puts in a picture's place",
    "permitted",
    "the attestation says that the gate replaced the picture, and does not call it guarded",
)
def _(ground):
    ground.status = "replaced by the gate"
    outside = 1 - np.asarray(Image.open(ground.inputs / "outside.png"), np.float32) / 255
    with pytest.MonkeyPatch.context() as patch:
        install_stub(ground.comfy, patch).score = lambda image: float(not np.allclose(image, outside, atol=1e-6))
        made = gated_run(action="replace", replacement=["other", 0])
        made["latent"]["inputs"]["batch_size"] = 1
        made["load"] = node("LoadImage", image="outside.png")
        made["other"] = node(
            "ImageInvert", image=["load", 0]
        )  # what replaced an image may leave by itself from then on
        ground.send(made)


@graph("the front end's own Reroute stands in the prompt as a node")
def _(g):
    g["reroute"] = node("Reroute", value=CKPT)
    g["sample"]["inputs"]["model"] = ["reroute", 0]


@graph("an unguarded run goes through the websocket and not into a file")
def _(g):
    unguarded(g, CKPT)
    g["stock_save"] = node("SaveImageWebsocket", images=["stock_decode", 0])


@graph("an edited picture goes through the websocket and not into a file")
def _(g):
    g["edit"] = node("ImageInvert", image=DECODED)
    g["stock_save"] = node("SaveImageWebsocket", images=["edit", 0])


@graph("an outside picture is encoded and decoded with nothing between")
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["encode"] = node("VAEEncode", pixels=["load", 0], vae=["ckpt", 2])
    g["decode"] = decode(["encode", 0])


@graph("an unguarded run is saved by SaveAnimatedWEBP")
def _(g):
    unguarded(g, CKPT)
    style = {"filename_prefix": "x", "fps": 6.0, "lossless": True, "quality": 90, "method": "default"}
    g["stock_save"] = node("SaveAnimatedWEBP", images=["stock_decode", 0], **style)


@graph("an unguarded run is saved by SaveWEBM")
def _(g):
    unguarded(g, CKPT)
    style = {"filename_prefix": "x", "codec": "vp9", "fps": 6.0, "crf": 32.0}
    g["stock_save"] = node("SaveWEBM", images=["stock_decode", 0], **style)


@graph("an outside picture is made a video and saved as one")
def _(g):
    g["load"] = node("LoadImage", image="outside.png")
    g["video"] = node("CreateVideo", images=["load", 0], fps=6.0)
    g["stock_save"] = node("SaveVideo", video=["video", 0], filename_prefix="x", format="auto", codec="auto")


@graph(
    "a guarded picture is saved by SaveAnimatedWEBP",
    "permitted",
    "its pixels are exactly those of a guarded run, whichever node writes them",
)
def _(g):
    style = {"filename_prefix": "x", "fps": 6.0, "lossless": True, "quality": 90, "method": "default"}
    g["save"] = node("SaveAnimatedWEBP", images=DECODED, **style)


@graph(
    "the guarded latent is written to a file",
    "permitted",
    "it is the latent of a guarded run; where a gate is required, no latent may leave",
)
def _(g):
    g["latent_file"] = node("SaveLatent", samples=["sample", 0], filename_prefix="x")


@graph(
    "the guarded latent is written to a file where a gate must judge what leaves", policy="[gate]\nrequired = true\n"
)
def _(g):
    del g["save"]
    g["latent_file"] = node("SaveLatent", samples=["sample", 0], filename_prefix="x")


@graph("a guarded picture is saved where a gate must judge what leaves", policy=GATED)
def _(g):
    pass


@graph(
    "another VAE decodes the guarded latent",
    "permitted",
    "the run is guarded whatever decodes it, and the attestation names the VAE by its hash",
)
def _(g):
    g["vae"] = node("VAELoader", vae_name="other.safetensors")
    g["decode"]["inputs"]["vae"] = ["vae", 0]


@graph("another VAE decodes the unguarded latent")
def _(g):
    g["vae"] = node("VAELoader", vae_name="other.safetensors")
    unguarded(g, CKPT)
    g["stock_decode"]["inputs"]["vae"] = ["vae", 0]


@graph(
    "a textual inversion stands in the prompt",
    "permitted",
    "the run is guarded whatever is asked of it, and the attestation names the embeddings by their hash",
)
def _(g):
    g["pos"]["inputs"]["text"] = "a photo of embedding:word, embedding:../checkpoints/world"
