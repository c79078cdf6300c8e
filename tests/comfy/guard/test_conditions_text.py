"""Conditionings beside a guard whose safety LoRA has a text-encoder half: honest ones pass, unguarded text does not."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.condition_toys import SIZE, node, noise_image, random_cond, sample
from support.encoder_toys import randomise
from support.errors import refuses


@pytest.fixture(scope="module", autouse=True)
def photomaker(comfy) -> None:
    """PhotoMakerEncode, which the other tests do not load."""
    file = Path(comfy.nodes.__file__).parent / "comfy_extras" / "nodes_photomaker.py"
    asyncio.run(comfy.nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    importlib.import_module("modular_lora_guard.comfy_host.conditioning").register()


@pytest.fixture(scope="module")
def world(comfy, loaded, loras):
    """The demo world under a safety LoRA with a text-encoder half, its guarded CLIP, and the CLIP as it came."""
    g, (model, clip, _) = comfy.host_guard, loaded
    safety = (g.SafetyLora(comfy.host_files.read_lora(loras.folder / "safety_te.safetensors"), 1.0),)
    handle, ours = comfy.host.guard(model, clip, safety, (), False, g.GuardLimits())
    return SimpleNamespace(model=comfy.host.unwrap(handle), clip=ours, plain=clip)


def text(clip, words: str) -> list:
    return node("CLIPTextEncode", clip=clip, text=words)[0]


def mask() -> torch.Tensor:
    return torch.linspace(0, 1, SIZE).expand(1, SIZE, SIZE)


def average(one, other, clip, kind):
    return node("ConditioningAverage", conditioning_to=one, conditioning_from=other, conditioning_to_strength=0.6)[0]


def redux(one, other, clip, kind):
    """A style model of Flux's class, of the demo world's width."""
    from comfy.ldm.flux.redux import ReduxImageEncoder
    from comfy.sd import StyleModel

    encoder = ReduxImageEncoder(redux_dim=8, txt_in_features=768, dtype=torch.float32)
    randomise(encoder)
    seen = SimpleNamespace(last_hidden_state=torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)))
    settings = {"style_model": StyleModel(encoder), "clip_vision_output": seen}
    return node("StyleModelApply", conditioning=one, **settings, strength=0.7, strength_type=kind)[0]


def faces(one, other, clip, kind):
    """PhotoMakerEncode with a stand-in for its network, which changes the tokens of one word."""

    class Maker:
        load_device = torch.device("cpu")

        def __call__(self, id_pixel_values, prompt_embeds, class_tokens_mask):
            return torch.where(class_tokens_mask[..., None], prompt_embeds * 1.5 + 0.1, prompt_embeds)

    import nodes  # the class that the server runs, not the module's own once more

    maker = nodes.NODE_CLASS_MAPPINGS["PhotoMakerEncode"]
    return maker.execute(photomaker=Maker(), image=noise_image(64), clip=clip, text="a photomaker cat").result[0]


def seen(one, other, clip, kind):
    vision = SimpleNamespace(image_embeds=torch.randn(1, 768, generator=torch.Generator().manual_seed(4)))
    settings = {"clip_vision_output": vision, "strength": 1.0, "noise_augmentation": 0.1}
    return node("unCLIPConditioning", conditioning=one, **settings)[0]


def together(one, other, clip, kind):
    return node("ConditioningConcat", conditioning_to=one, conditioning_from=other)[0]


def combined(one, other, clip, kind):
    """Areas, masks and ranges of steps."""
    place = {"width": 0.5, "height": 0.5, "x": 0.0, "y": 0.0, "strength": 0.7}
    (area,) = node("ConditioningSetAreaPercentage", conditioning=one, **place)
    (masked,) = node("ConditioningSetMask", conditioning=other, mask=mask(), set_cond_area="default", strength=1.0)
    (late,) = node("ConditioningSetTimestepRange", conditioning=one, start=0.2, end=1.0)
    (both,) = node("ConditioningCombine", conditioning_1=area, conditioning_2=masked)
    return node("ConditioningCombine", conditioning_1=both, conditioning_2=late)[0]


def boxes(one, other, clip, kind):
    """GLIGEN's phrase in a box, by the same CLIP; its network is of ComfyUI's class and the world's widths."""
    from comfy import gligen, model_patcher

    fusers = [gligen.GatedSelfAttentionDense(width, 768, 4, width // 4) for width in kind]
    network = gligen.Gligen(fusers, gligen.PositionNet(768, 768), 768).eval()
    randomise(network)
    cpu = torch.device("cpu")
    patcher = model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)
    place = {"text": "a horse", "width": 64, "height": 64, "x": 32, "y": 0}
    return node("GLIGENTextBoxApply", conditioning_to=one, clip=clip, gligen_textbox_model=patcher, **place)[0]


def nothing(one, other, clip, kind):
    return node("ConditioningZeroOut", conditioning=one)[0]


MADE = {
    "an average": (average, None),
    "a style model": (redux, "multiply"),
    "a style model by attention": (redux, "attn_bias"),
    "PhotoMaker": (faces, None),
    "unCLIP": (seen, None),
    "two prompts in one": (together, None),
    "regions": (combined, None),
    "a zeroed prompt": (nothing, None),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_guarded_prompts_keeps_the_guard(name, comfy, world):
    make, kind = MADE[name]
    one, other = text(world.clip, "a cat"), text(world.clip, "on a table")
    made = make(one, other, world.clip, kind)
    sample(world.model, made, text(world.clip, ""))
    assert comfy.host.attestation(world.model).status == "guarded"


@pytest.mark.parametrize("name", [name for name in MADE if name != "a zeroed prompt"])
def test_what_is_made_of_an_unguarded_prompt_is_refused(name, comfy, world):
    make, kind = MADE[name]
    one, other = text(world.plain, "a dog"), text(world.clip, "on a table")
    made = make(one, other, world.plain, kind)
    with refuses("conditioning.not-guarded", "positive"):
        sample(world.model, made, text(world.clip, ""))


@pytest.mark.parametrize("name", ["an average", "two prompts in one", "regions"])
def test_a_guarded_prompt_does_not_carry_an_unguarded_one_with_it(name, comfy, world):
    make, kind = MADE[name]
    one, other = text(world.clip, "a cat"), text(world.plain, "a horse")
    with refuses("conditioning.not-guarded", "positive"):
        sample(world.model, make(one, other, world.clip, kind), text(world.clip, ""))


def test_an_average_with_anything_else_is_refused(comfy, world):
    made = average(text(world.clip, "a cat"), random_cond(3), None, None)
    with refuses("conditioning.not-guarded", "positive"):
        sample(world.model, made, text(world.clip, ""))


def test_what_a_node_encodes_inside_the_run_is_checked_as_well(comfy, world):
    """PerpNeg evaluates its empty prompt from inside the CFG function; by cfg 0 its image is that prompt's."""
    for clip, refused in ((world.clip, False), (world.plain, True)):
        settings = {"empty_conditioning": text(clip, "a horse"), "neg_scale": 1.0}
        (model,) = node("PerpNeg", "nodes_perpneg", model=world.model, **settings)
        run = lambda model=model: sample(model, text(world.clip, "a cat"), text(world.clip, ""), cfg=0.0)  # noqa: E731
        if refused:
            with refuses("conditioning.not-guarded", "extra"):
                run()
        else:
            run()
            assert comfy.host.attestation(model).status == "guarded"
        assert "extra_conds" not in vars(model.model)


def test_another_nodes_patch_of_what_the_check_stands_before_is_there_again_afterwards(comfy, world):
    model, calls = world.model.clone(), []
    stock = model.get_model_object("extra_conds")
    model.add_object_patch("extra_conds", patch := lambda **entry: calls.append(1) or stock(**entry))
    for runs in (1, 2):
        sample(model, text(world.clip, "a cat"), text(world.clip, ""))
        assert vars(model.model)["extra_conds"] is patch
        assert len(calls) >= 2 * runs
    model.unpatch_model()


@pytest.mark.parametrize("phrase", ["guarded", "plain"])
def test_gligens_phrases_are_text_as_well(phrase, comfy, world):
    from comfy.ldm.modules.attention import BasicTransformerBlock

    blocks = [m for m in world.model.model.diffusion_model.modules() if isinstance(m, BasicTransformerBlock)]
    widths = [block.attn1.to_q.in_features for block in blocks]
    clip = world.clip if phrase == "guarded" else world.plain
    made = boxes(text(world.clip, "a cat"), None, clip, widths)
    if phrase == "guarded":
        sample(world.model, made, text(world.clip, ""))
        assert comfy.host.attestation(world.model).status == "guarded"
    else:
        with refuses("conditioning.not-guarded", "positive"):
            sample(world.model, made, text(world.clip, ""))
