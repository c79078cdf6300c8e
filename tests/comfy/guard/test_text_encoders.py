"""Text encoders of every family in ComfyUI's own CLIP: guarded = merged on every layer that can be named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.encoder_toys import ENCODERS, save_norms, save_text_lora, tokens, toy_clip
from support.errors import refuses

SAFETY, TASK = 1.0, 0.6
SEEING = (".visual", ".vision_model", ".multi_modal_projector")  # what sees images in a prompt
UNUSED = (".lm_head",)  # writes text, encodes none


@pytest.fixture
def guarded(comfy, loaded, tmp_path):
    """A CLIP under a safety LoRA and task LoRAs with layers by these names: (guarded CLIP, [(file, strength)])."""

    def make(clip, safety: dict, *tasks: dict):
        read, g = comfy.host_files.read_lora, comfy.host_guard
        files = [(tmp_path / f"{seed}.safetensors", TASK if seed else SAFETY) for seed in range(1 + len(tasks))]
        for seed, ((path, _), layers) in enumerate(zip(files, (safety, *tasks), strict=True)):
            save_text_lora(path, layers, rank=3 + seed, seed=seed)
        task_loras = tuple(g.TaskLora(read(path), s, s) for path, s in files[1:])
        safety_loras = (g.SafetyLora(read(files[0][0]), SAFETY),)
        return comfy.host.guard(loaded[0], clip, safety_loras, task_loras, False, g.GuardLimits())[1], files

    return make


def merged(clip, files):
    """The explicit merge, by ComfyUI's own LoRA loader on a clone."""
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    for path, strength in files:
        _, clip = load_lora_for_models(None, clip, load_torch_file(str(path)), 0.0, strength)
    return clip


def encode(clip, prompt: dict) -> dict[str, torch.Tensor]:
    """What the encoders made of a prompt; the weights of T5's words (Anima) are as they were given."""
    made = clip.encode_from_tokens(prompt, return_dict=True)
    tensors = {k: v for k, v in made.items() if isinstance(v, torch.Tensor) and k != "t5xxl_weights"}
    return {k: v for k, v in tensors.items() if v.is_floating_point()}


def largest_error(ours: dict, reference: dict, base: dict) -> float:
    """Largest |guarded - merged| over largest |merged - base| of anything encoded; the LoRAs must change all of it."""
    errors = []
    for key, expected in reference.items():
        if torch.count_nonzero(expected) == 0:  # stands for an encoder that is missing
            assert torch.equal(ours[key], expected)
            continue
        effect = (expected - base[key]).abs().max()
        assert effect > 0.05, key
        errors.append(float((ours[key] - expected).abs().max() / effect))
    return max(errors)


def assert_guarded_is_merged(clip, ours, files, prompt: dict) -> float:
    base, made = encode(clip, prompt), encode(ours, prompt)
    error = largest_error(made, encode(merged(clip, files), prompt), base)
    assert error < 1e-4
    again = encode(clip, prompt)
    assert all(torch.equal(again[key], base[key]) for key in base)
    return error


def aliases(info) -> list[dict]:
    """Layers that take a branch, by each of their names: kohya's, diffusers', the general one, where there are such."""
    names: dict[str, list[str]] = {}
    for name, key in info.key_map.items():
        if len(info.specs[key].weight_shape) == 2 and not info.specs[key].problem:
            names.setdefault(key, []).append(name)
    chosen = [lambda n: n[min(1, len(n) - 1)], lambda n: n[-1], lambda n: n[0]]
    return [{pick(found): info.specs[key] for key, found in names.items()} for pick in chosen]


@pytest.mark.parametrize("name", ENCODERS)
def test_guarded_equals_merged_on_every_layer_of_the_encoders(name, comfy, guarded, matrix):
    clip, prompt = toy_clip(ENCODERS[name]), tokens(ENCODERS[name])
    info = comfy.anatomy.clip_info(clip)
    linear = {k for k, m in clip.cond_stage_model.named_modules() if isinstance(m, torch.nn.Linear)}
    files = aliases(info)
    assert all({spec.path for spec in layers.values()} == linear for layers in files)
    assert all(comfy.host_guard.is_text(layer) for layer in info.key_map)
    ours, files = guarded(clip, *files)
    error = assert_guarded_is_merged(clip, ours, files, prompt)
    assert ours.patcher.guard_state.record.text_encoder == f"guarded, {len(linear)} layers"
    evaluations, firings, _ = ours.patcher.guard_run.counts
    assert evaluations == sum(not root.endswith(SEEING) for root in info.roots)
    assert firings == sum(not any(f"{eye}." in path for eye in SEEING) and not path.endswith(UNUSED) for path in linear)
    matrix("families.json", f"text encoder {name}", "works", error)


@pytest.mark.parametrize("name", ENCODERS)
def test_changes_of_norms_are_guarded_and_equal_the_merge(name, comfy, loaded, tmp_path):
    """The last norm works once or twice an evaluation: on the last layer's output, and on that of an earlier one."""
    clip, prompt, g = toy_clip(ENCODERS[name]), tokens(ENCODERS[name]), comfy.host_guard
    specs = comfy.anatomy.clip_info(clip).specs
    norms = {f"text_encoders.{spec.path}": spec for spec in specs.values() if spec.norm is not None}
    path = tmp_path / "norms.safetensors"
    save_norms(path, norms)
    safety = (g.SafetyLora(comfy.host_files.read_lora(path), SAFETY),)
    ours = comfy.host.guard(loaded[0], clip, safety, (), False, g.GuardLimits())[1]
    assert_guarded_is_merged(clip, ours, [(path, SAFETY)], prompt)
    assert ours.patcher.guard_state.part.layers == len(norms)


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_without_a_branch_are_embeddings(name, comfy):
    info = comfy.anatomy.clip_info(toy_clip(ENCODERS[name]))
    kinds = {spec.problem.split(",")[0] for spec in info.specs.values() if spec.problem and spec.norm is None}
    assert all(kind.endswith("Embedding") for kind in kinds)


def test_encoders_that_a_prompt_leaves_out_are_not_missed(comfy, guarded):
    """Hunyuan Image asks ByT5 only where the prompt quotes text."""
    encoder = ENCODERS["Qwen2.5-VL and ByT5 (Hunyuan Image, Hunyuan Video 1.5)"]
    clip, prompt = toy_clip(encoder), tokens(encoder)
    del prompt["byt5"]
    ours, files = guarded(clip, aliases(comfy.anatomy.clip_info(clip))[0])
    assert_guarded_is_merged(clip, ours, files, prompt)
    assert ours.patcher.guard_run.counts[0] == 1


def test_images_in_a_prompt_go_through_guarded_layers(comfy, guarded):
    encoder = ENCODERS["Qwen2.5-VL 7B (Qwen-Image)"]
    clip, prompt = toy_clip(encoder), tokens(encoder)
    (row,) = prompt["qwen25_7b"]
    for place in (5, 9):
        image = torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(place))
        row[place] = ({"type": "image", "data": image, "original_type": "image"}, 1.0)
    layers = aliases(comfy.anatomy.clip_info(clip))[0]
    visual = {name: spec for name, spec in layers.items() if ".visual." in spec.path}
    ours, files = guarded(clip, visual)
    assert_guarded_is_merged(clip, ours, files, prompt)
    assert ours.patcher.guard_run.counts[:2] == (3, 2 * len(visual))  # the text once, each image once


def test_weighted_long_and_skipping_prompts_are_guarded(comfy, guarded):
    """Weights of words, two sections of 77 tokens and CLIP skip, all at once."""
    encoder = ENCODERS["CLIP-L and CLIP-G (SDXL)"]
    clip, prompt = toy_clip(encoder), {s: 2 * rows for s, rows in tokens(encoder, weight=1.4).items()}
    clip.clip_layer(-2)
    ours, files = guarded(clip, *aliases(comfy.anatomy.clip_info(clip))[:2])
    assert_guarded_is_merged(clip, ours, files, prompt)
    assert ours.clone().encode_from_tokens(prompt).shape == (1, 154, 64)


WRITES = {"temperature": 8.0, "top_p": 1.0, "seed": 1, "max_length": 12}


@pytest.fixture
def writer():
    """A CLIP that writes text, where this ComfyUI has CLIP.generate (0.33.0), and a prompt."""
    encoder = ENCODERS["Qwen3 4B (Z-Image)"]
    clip = toy_clip(encoder)
    if not hasattr(clip, "generate"):
        pytest.skip("this ComfyUI's CLIP does not generate text")
    clip.cond_stage_model.qwen3_4b.transformer.model.config.stop_tokens = []
    return clip, tokens(encoder)


def test_text_is_generated_by_the_guarded_encoder_as_by_a_merged_one(writer, comfy, guarded):
    clip, prompt = writer
    ours, files = guarded(clip, *aliases(comfy.anatomy.clip_info(clip)))
    plain = clip.generate(prompt, **WRITES)
    text = ours.generate(prompt, **WRITES)
    assert text == merged(clip, files).generate(prompt, **WRITES) != plain
    assert clip.generate(prompt, **WRITES) == plain
    assert_guarded_is_merged(clip, ours, files, prompt)


def test_a_branch_that_is_lost_while_text_is_generated_is_an_error(writer, comfy, guarded):
    clip, prompt = writer
    ours, _ = guarded(clip, aliases(comfy.anatomy.clip_info(clip))[0])
    module = ours.cond_stage_model.qwen3_4b.transformer.model
    forward, projection = module.forward, module.layers[1].mlp.up_proj

    def without(*args, **kwargs):
        branch = projection.__dict__.pop("forward")
        try:
            return forward(*args, **kwargs)
        finally:
            projection.__dict__["forward"] = branch

    module.forward = without
    try:
        with refuses("run.short", "1 of", "up_proj"):
            ours.generate(prompt, **WRITES)
    finally:
        del module.forward


def test_a_lora_for_an_encoder_that_is_not_loaded_is_refused(comfy, guarded):
    whole = toy_clip(ENCODERS["CLIP-L, CLIP-G and T5-XXL (SD3)"])
    half = toy_clip(ENCODERS["CLIP-L and CLIP-G (SD3 without T5)"])
    layers = aliases(comfy.anatomy.clip_info(whole))[0]
    with refuses("lora.not-whole", "38 ", "59 ", "SD3ClipModel_"):
        guarded(half, layers)


class Plain(torch.nn.Module):
    """An encoder of another pack: no ``transformer``; ``whole``: it is called as a module."""

    def __init__(self, whole: bool):
        super().__init__()
        self.whole, self.inner = whole, torch.nn.Linear(4, 8)

    def forward(self, rows):
        return self.inner(rows)

    def encode(self, rows):
        return self(rows) if self.whole else self.inner(rows)


class PlainClip(torch.nn.Module):
    def __init__(self, device=None, dtype=None, model_options=None, whole=True):
        super().__init__()
        self.dtypes, self.plain = {torch.float32}, Plain(whole).requires_grad_(False)

    def reset_clip_options(self):
        pass

    def set_clip_options(self, options):
        pass

    def encode_token_weights(self, rows):
        return self.plain.encode(rows), None


@pytest.mark.parametrize("whole", [True, False])
def test_an_encoder_of_another_kind_works_or_stops(whole, comfy, guarded):
    from comfy import sd

    target = SimpleNamespace(params={"whole": whole}, clip=PlainClip, tokenizer=lambda **_: None)
    clip = sd.CLIP(target, model_options={"dtype": torch.float32})
    ours, files = guarded(clip, aliases(comfy.anatomy.clip_info(clip))[0])
    rows = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    if not whole:
        with refuses("run.short", "1 of 1"):
            ours.encode_from_tokens(rows)
        return
    assert_guarded_is_merged(clip, ours, files, rows)


@pytest.mark.parametrize("key", ["conditioning_llama3", "conditioning_mt5xl", "conditioning_byt5small", "gligen"])
def test_what_further_encoders_made_must_come_from_the_guarded_clip(key, comfy, loaded, loras):
    g, (model, clip, _) = comfy.host_guard, loaded
    safety = g.SafetyLora(comfy.host_files.read_lora(loras.folder / "safety_te.safetensors"), 1.0)
    handle, ours = comfy.host.guard(model, clip, (safety,), (), False, g.GuardLimits())
    prompt = clip.tokenize("a cat")
    cond = ours.encode_from_tokens(prompt)

    def check(encoded):
        value = ("position", None, [(encoded, 4, 4, 0, 0)]) if key == "gligen" else encoded
        state = comfy.host.unwrap(handle).guard_state
        return comfy.host._check_conditioning({"positive": [{"cross_attn": cond, key: value}]}, state)

    assert len(check(ours.encode_from_tokens(prompt, return_pooled=True)[1])) == 1
    with refuses("conditioning.not-guarded"):
        check(clip.encode_from_tokens(prompt, return_pooled=True)[1])
