"""Which layers the text alone feeds, asked of every family's toy; and closed forms on them, held against the papers."""

from __future__ import annotations

import importlib

import pytest
import torch
from modular_lora_guard.modular_lora.errors import GuardError
from support.closed_formulas import formula_alpha_edit, formula_rece, formula_speed, formula_uce
from support.errors import refuses
from support.families import Family, drawn, make
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_newer_video import NEWER
from support.families_video import VIDEOS

FAMILIES = (*IMAGE, *DITS, *VIDEOS, *NEWER)
EXPECTED = {  # parts of the names of the layers that are to be found
    "SD1.x": ("attn2.to_k", "attn2.to_v"),
    "SDXL": ("attn2.to_k", "attn2.to_v"),
    "SD3": ("context_embedder", "y_embedder.mlp.0"),
    "Flux dev": ("txt_in", "vector_in.in_layer"),
    "Chroma": ("txt_in",),
    "AuraFlow": ("cond_seq_linear",),
    "PixArt Sigma": ("cross_attn.kv_linear",),
    "Lumina 2": ("cap_embedder.1",),
    "Z-Image": ("cap_embedder.1",),
    "Qwen-Image": ("txt_in",),
    "OmniGen2": ("caption_embedder.1",),
    "Stable Cascade C": ("kv_mapper.1",),
    "LTX Video": ("attn2.to_k", "attn2.to_v"),
    "Wan 2.1 T2V": ("cross_attn.k", "cross_attn.v"),
    "Cosmos Predict2": ("cross_attn.k_proj", "cross_attn.v_proj"),
}
MIXED = {  # halves of joint attention, which are refused by name
    "SD3": "joint_blocks.0.context_block.attn.qkv",
    "Flux dev": "double_blocks.0.txt_attn.qkv",
    "Qwen-Image": "txt_mlp",
}
NONE = {"Hunyuan 3D 2.1"}  # its text reaches no linear layer of the kind alone, and small latents do not fit it


def text_of(family: Family, seed: int) -> list:
    """A conditioning as CLIPTextEncode makes it."""
    generator = torch.Generator().manual_seed(seed)
    further = {k: drawn(v, generator) for k, v in family.cond.items() if k != "sampler"}
    return [[torch.randn(1, *family.context, generator=generator), further]]


@pytest.fixture
def host(comfy):
    return importlib.import_module("modular_lora_guard.comfy_host.text_inputs")


@pytest.fixture
def toy(comfy):
    def build(family: Family):
        from comfy import supported_models

        if not hasattr(supported_models, family.config):
            pytest.skip(f"this ComfyUI has no {family.config}")
        return make(family)

    return build


def found_in(host, comfy, model, family: Family):
    names = host._names(comfy.anatomy.model_info(model), family.config)
    try:
        return host.find(model, text_of(family, 1), names), names
    except GuardError:  # a toy that wants its own latents
        own = [1, *family.latent] if not isinstance(family.latent[0], tuple) else None
        if own is None:
            raise
        return host.find(model, text_of(family, 1), names, [(own, own)]), names


@pytest.mark.sampled(12)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_closed_forms_on_the_layers_that_the_text_alone_feeds(family, host, comfy, toy, tmp_path):
    model = toy(family)
    if family.name in NONE:
        with refuses(("make.no-text-layers", "make.no-prediction")):
            found_in(host, comfy, model, family)
        return
    (found, shapes), names = found_in(host, comfy, model, family)
    assert found.share > 0.15, "of the text's effect goes through them"
    for part in EXPECTED.get(family.name, ()):
        assert any(part in path for path in found.paths)
    if family.name in EXPECTED:
        assert all(any(part in path for part in EXPECTED[family.name]) for path in found.paths)
    layers = importlib.import_module("modular_lora_guard.training.safety.closed.layers")
    if name := MIXED.get(family.name):
        with refuses("make.mixed-input", name):
            layers.named(found, [name])
    texts = [text_of(family, seed) for seed in (1, 2, 3)]
    with host.evaluating(model, texts[0], shapes) as run:
        rows = [layers.read(model.model, found.inputs, lambda cond=cond: run("text", cond)) for cond in texts]
    _check_formulas(comfy, model, found, names, rows, tmp_path)


def _check_formulas(comfy, model, found, names: dict, rows: list, folder) -> None:
    """Every closed form against its paper on these inputs; then the guard takes the LoRA whole."""
    closed = "modular_lora_guard.training.safety.closed"
    null, uce, rece = (importlib.import_module(f"{closed}.{name}") for name in ("null_space", "uce", "rece"))
    factors = {}
    for number, one in enumerate(found.inputs):
        C, G, K = (each[number][each[number].any(1)][:2].T for each in rows)  # Flux 2 fills up with zeros in front
        weights = [comfy.anatomy.original_weight(model, f"{path}.weight").double() for path in one.layers]
        P, rank = null.null_space(K)
        assert rank <= K.shape[1]
        none, scale = K[:, :0], float(C.square().sum(0).mean())
        edits = {
            "speed": null.speed(C, G, P, none, 0.01 * scale),
            "alpha": null.alpha_edit(C, G - C, P, none, 0.01 * scale),
            "uce": uce.uce(C, G, K),
            "rece": rece.rece(C, G, K, sum(W.T @ W for W in weights), rounds=1),
        }
        returned = formula_rece(weights, C, G, K, 1)
        for W, brought in zip(weights, returned, strict=True):
            wanted = {
                "speed": formula_speed(W, C, G, P, none, 0.01 * scale, 0.0),
                "alpha": formula_alpha_edit(W, C, W @ (G - C), P, none, 0.01 * scale),
                "uce": formula_uce(W, C, G, K, 0.5, 1.0, 1.0) - W,
                "rece": brought - W,
            }
            for name, edit in edits.items():
                down, up = edit.factors(W)
                assert (up @ down - wanted[name]).norm() <= 1e-10 * wanted[name].norm(), name
            assert (wanted["speed"] @ K).norm() < 1e-6 * (W @ K).norm() + 1e-12
        for path, W in zip(one.layers, weights, strict=True):
            down, up = edits["speed"].factors(W)
            factors[names[path]] = (down.float(), up.float(), float(edits["speed"].rank))
    output = importlib.import_module("modular_lora_guard.training.output")
    lora = output.write(folder / "made.safetensors", factors, {"modular_lora.role": "safety"}, "float")
    g = comfy.host_guard
    part = g.build_part(
        "model", comfy.anatomy.model_info(model), (g.SafetyLora(comfy.host_files.read_lora(lora.path), 1.0),), (),
        g.GuardLimits(),
    )  # fmt: skip
    assert part.lines[0].matched == len(lora.layers) == len(found.paths)
    assert part.lines[0].unmatched == ()


def test_a_model_whose_every_layer_sees_mixed_text_is_refused_with_their_names(host):
    layers = importlib.import_module("modular_lora_guard.training.safety.closed.layers")

    class Joint(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.image = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x, text):
            return self.first(text + x.mean()) + self.image(x)

    model, seeds = Joint(), {"text": (0, 0), "other noise": (1, 0), "other text": (0, 1)}

    def run(ask):
        noise, text = seeds[ask]
        x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(noise))
        return model(x, torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(10 + text)))

    with torch.no_grad(), refuses("make.no-text-layers", "1 of 2", "first: first"):
        layers.find(model, ["first", "image"], run)
