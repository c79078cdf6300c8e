"""Safety first in the real ComfyUI: every image is the merge at its own g, which is found by other means here."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from support.condition_toys import LATENT, control_network, controlled, node, random_cond, sample, toy_unet
from support.errors import refuses
from support.families import GENERIC, evaluate, make, named
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_newer_video import NEWER
from support.families_video import VIDEOS
from support.giving_way import activities, calibrated, expected_share
from support.graphs import save_lora

TASK = 0.6
ALONE = "Hunyuan 3D 2.1"  # takes a prompt and a negative prompt in one call only, so a prompt alone has no activity
FAMILIES = [family for family in (*IMAGE, *DITS, *VIDEOS, *NEWER) if family.name != ALONE]
NEGATIVE = random_cond(2)
WIDE = (1e6, 2e6)  # bounds below which every prompt lies
NARROW = (1e-12, 2e-12)  # and above which


def prompt(seed: int, size: float) -> list:
    ((cross, extra),) = random_cond(seed)
    return [[cross * size, extra]]


PROMPTS = (prompt(5, 0.1), prompt(6, 1.0), prompt(7, 4.0))


@pytest.fixture(scope="module")
def scene(comfy, tmp_path_factory):
    """A toy U-Net, a safety and a task LoRA, and the activities of three prompts, found by hooks on the merged model.

    The safety LoRA is calibrated so that one prompt has g = 0, one g = 1 and one lies between.
    """
    folder, model = tmp_path_factory.mktemp("first"), toy_unet()
    info = comfy.anatomy.model_info(model)
    layers = named(info, "lora_unet_", sliced=False)
    for number, name in enumerate(("safety", "task", "second")):
        save_lora(folder / f"{name}.safetensors", layers, 2 + number, number, size=0.2)
    read = lambda name: comfy.host_files.read_lora(folder / f"{name}.safetensors")  # noqa: E731
    base_sha256 = comfy.anatomy.model_sha256(model)
    own = SimpleNamespace(comfy=comfy, folder=folder, model=model, layers=layers, read=read, base_sha256=base_sha256)
    found = activities(merged(own, 0.0), model, layers, PROMPTS, torch.zeros(LATENT), LATENT[1:])
    own.found = dict(enumerate(found))
    own.order = sorted(own.found, key=own.found.get)
    least, middle, most = (own.found[i] for i in own.order)
    low = least + 0.5 * (middle - least)
    high = (middle - 0.4 * low) / 0.6  # g of the one in the middle: 0.4
    assert least < low < middle < high < most
    own.bounds = low, high
    own.safety = calibrated(read("safety"), folder / "told.safetensors", low, high, base_sha256)
    return own


def merged(scene, share: float, model=None):
    """ComfyUI's own merge of the safety LoRA and of the task LoRA at this share of its strength."""
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    made = scene.model if model is None else model
    for name, strength in (("safety", 1.0), ("task", TASK * share)):
        if strength:
            file = load_torch_file(str(scene.folder / f"{name}.safetensors"))
            made, _ = load_lora_for_models(made, None, file, strength, 0.0)
    return made


def guarded(scene, *safety, tasks=True, combine="safety first", model=None):
    g, host = scene.comfy.host_guard, scene.comfy.host
    own = tuple(g.SafetyLora(lora, 1.0) for lora in (safety or (scene.safety,)))
    others = (g.TaskLora(scene.read("task"), TASK, TASK),) if tasks else ()
    made, _ = host.guard(model or scene.model, None, own, others, False, g.GuardLimits(combine=combine))
    return host.unwrap(made)


def batch(*prompts: list) -> list:
    return [[torch.cat([cross for ((cross, _),) in prompts]), {}]]


def latent(images: int) -> dict:
    return {"samples": torch.zeros(images, *LATENT[1:])}


def runs(scene, latents) -> list:
    return scene.comfy.ledger.latent_runs(latents)


def assert_merged(scene, latents, draw) -> list[float]:
    """Every image is that of the merge at the share that is told of it; ``draw`` samples with a model."""
    shares, base = [run.task_share for run in runs(scene, latents)], draw(scene.model)
    for image, share in enumerate(shares):
        reference = draw(merged(scene, share))[image]
        effect = (reference - base[image]).abs().max()
        assert effect > 0.05 * reference.abs().max()
        assert (latents[image] - reference).abs().max() < 1e-3 * effect
    return shares


def test_every_image_of_a_batch_is_the_merge_at_its_own_g(scene):
    patcher = guarded(scene)
    draw = lambda model: sample(model, batch(*PROMPTS), NEGATIVE, latent(3))  # noqa: E731
    made = draw(patcher)
    shares = assert_merged(scene, made, draw)
    assert shares == [expected_share(scene.found[i], *scene.bounds) for i in range(3)]
    assert sorted(shares) == [0.0, 6 / 16, 1.0]
    run = scene.comfy.host.attestation(patcher)
    assert (run.status, run.combine, run.task_share, run.muted_evaluations) == ("guarded", "safety first", 0.0, 1)
    assert run.firings == run.layers * run.evaluations
    assert run.without_activity().task_share is None
    words = importlib.import_module("modular_lora_guard.modular_lora.guard.activity").in_words(runs(scene, made))
    assert f"the task LoRAs do not act on image {shares.index(0.0) + 1}" in words
    assert f"a share of 0.375 on image {shares.index(6 / 16) + 1}" in words


def test_net_strength_as_it_acted_is_that_of_each_image_at_its_g(scene):
    """In the first evaluation all images start alike, so g decides; where the tasks do not act nothing is lost."""
    patcher, whole = guarded(scene), guarded(scene, combine="sum")
    first = sample(patcher, batch(*PROMPTS), NEGATIVE, latent(3), steps=1)
    second = sample(whole, batch(*PROMPTS), NEGATIVE, latent(3), steps=1)
    (each, other) = ([next(iter(run.acted_strength.values())) for run in runs(scene, made)] for made in (first, second))
    shares = [run.task_share for run in runs(scene, first)]
    for share, value, full in zip(shares, each, other, strict=True):
        if share in (0.0, 1.0):
            assert value == pytest.approx(1.0 if share == 0 else full, abs=1e-4)
        assert abs(value - 1) <= abs(full - 1) + 1e-6


def test_where_all_give_way_it_is_safety_alone_and_where_none_does_the_sum_bit_for_bit(scene):
    about, kept = PROMPTS[scene.order[2]], PROMPTS[scene.order[0]]
    first, alone, both = guarded(scene), guarded(scene, tasks=False), guarded(scene, combine="sum")
    draw = lambda model, positive: sample(model, positive, NEGATIVE, latent(2))  # noqa: E731
    assert torch.equal(draw(first, about), draw(alone, about))
    assert torch.equal(draw(first, kept), draw(both, kept))
    assert not torch.equal(draw(alone, about), draw(both, about))
    held = first.branches
    assert held.nbytes() == held.size(torch.float32)
    assert (held.task_share, held.image_shares) == (1.0, None)


def test_evaluations_in_several_calls_have_the_same_g(scene, monkeypatch):
    from comfy import model_management

    draw = lambda: sample(guarded(scene), batch(*PROMPTS), NEGATIVE, latent(3))  # noqa: E731
    together = draw()
    free = model_management.get_free_memory
    said = lambda device=None, torch_free_too=False: free(device, True) if torch_free_too else 0  # noqa: E731
    monkeypatch.setattr(model_management, "get_free_memory", said)
    apart = draw()
    assert [run.task_share for run in runs(scene, apart)] == [run.task_share for run in runs(scene, together)]
    assert (apart - together).abs().max() < 1e-4 * together.abs().max()


def test_a_run_that_starts_late_has_the_g_of_its_prompt(scene):
    start = torch.randn(3, *LATENT[1:], generator=torch.Generator().manual_seed(9))
    draw = lambda model: sample(model, batch(*PROMPTS), NEGATIVE, {"samples": start}, denoise=0.5)  # noqa: E731
    made = draw(guarded(scene))
    assert assert_merged(scene, made, draw) == [expected_share(scene.found[i], *scene.bounds) for i in range(3)]


def test_a_prompt_counts_whenever_it_acts_and_the_negative_one_never(scene):
    about, kept = PROMPTS[scene.order[2]], PROMPTS[scene.order[0]]
    later = node("ConditioningSetTimestepRange", conditioning=about, start=0.6, end=1.0)[0]
    early = node("ConditioningSetTimestepRange", conditioning=kept, start=0.0, end=0.6)[0]
    both = node("ConditioningCombine", conditioning_1=early, conditioning_2=later)[0]
    patcher = guarded(scene)
    (scheduled,) = runs(scene, sample(patcher, both, NEGATIVE))
    assert (scheduled.task_share, scheduled.muted_evaluations) == (0.0, 2)
    made = sample(patcher, kept, about)
    assert runs(scene, made)[0].task_share == 1.0
    assert torch.equal(made, sample(guarded(scene, combine="sum"), kept, about))


def test_a_batch_under_a_controlnet_is_merged_too(scene):
    """The network takes what the ControlNet gave out of its lists, once for every g."""
    from comfy.controlnet import ControlNet

    control = ControlNet(control_network(), load_device=torch.device("cpu"))

    def draw(model):
        return sample(model, *controlled(control, batch(*PROMPTS), NEGATIVE), latent(3))

    made = draw(guarded(scene))
    assert len(set(assert_merged(scene, made, draw))) > 1


def test_of_two_safety_loras_the_least_g_counts(scene):
    second = scene.read("second")
    for bounds, shares in ((NARROW, [0.0, 0.0, 0.0]), (WIDE, None)):
        lora = calibrated(second, scene.folder / f"second_{bounds[0]}.safetensors", *bounds, scene.base_sha256)
        made = sample(guarded(scene, scene.safety, lora), batch(*PROMPTS), NEGATIVE, latent(3), steps=1)
        found = [run.task_share for run in runs(scene, made)]
        assert found == shares if shares else found[scene.order[2]] < found[scene.order[0]]


@pytest.mark.parametrize("wrong", [None, {"auc": 0.9}, {"strength": 0.5}, {"base_sha256": "0" * 64}])
def test_without_a_calibration_that_fits_there_is_no_guard(scene, wrong):
    lora = scene.read("safety")
    if wrong:
        given = {"base_sha256": scene.base_sha256} | wrong
        lora = calibrated(lora, scene.folder / f"{next(iter(wrong))}.safetensors", *scene.bounds, **given)
    with refuses("safety-first.no-calibration", lora.name):
        guarded(scene, lora)
    drop_in = importlib.import_module("modular_lora_guard.comfy_host.drop_in")
    g = scene.comfy.host_guard
    with refuses("safety-first.no-calibration", lora.name):
        drop_in.attach(scene.model, None, None, (g.SafetyLora(lora, 1.0),), g.GuardLimits(combine="safety first"))


def test_a_sampler_that_lets_nobody_find_g_is_refused(scene):
    patcher = guarded(scene)
    patcher.remove_wrappers_with_key(scene.comfy.host.SAMPLER_SAMPLE, scene.comfy.host.KEY)
    with refuses("safety-first.not-found"):
        sample(patcher)


def test_loras_of_loaders_and_hooks_behind_the_drop_in_guard_give_way(scene):
    from comfy.hooks import create_hook_lora, set_hooks_for_conditioning
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    drop_in = importlib.import_module("modular_lora_guard.comfy_host.drop_in")
    g, file = scene.comfy.host_guard, load_torch_file(str(scene.folder / "task.safetensors"))
    limits = g.GuardLimits(combine="safety first")
    plain = drop_in.attach(scene.model, None, None, (g.SafetyLora(scene.safety, 1.0),), limits).model
    loaded, _ = load_lora_for_models(plain, None, file, TASK, 0.0)
    ours, other = (sample(one, batch(*PROMPTS), NEGATIVE, latent(3)) for one in (loaded, guarded(scene)))
    assert (ours - other).abs().max() < 1e-4 * other.abs().max()
    assert [run.task_share for run in runs(scene, ours)] == [run.task_share for run in runs(scene, other)]
    alone = guarded(scene, tasks=False)
    hooks = create_hook_lora(lora=file, strength_model=TASK, strength_clip=0.0)
    about, kept = (
        set_hooks_for_conditioning(PROMPTS[scene.order[place]], hooks=hooks, append_hooks=True) for place in (2, 0)
    )
    for positive, place, acts in ((about, 2, False), (kept, 0, True)):  # hooks split an evaluation into two calls
        made, other = sample(plain, positive, NEGATIVE), sample(alone, PROMPTS[scene.order[place]], NEGATIVE)
        (run,) = runs(scene, made)
        assert run.task_share == float(acts)
        assert any(lora.role == "task" for lora in run.loras)
        apart = float((made - other).abs().max() / other.abs().max())
        assert apart > 1e-3 if acts else apart < 1e-5


def test_task_loras_do_not_act_in_the_text_encoder(comfy, loaded, loras):
    """It runs before g is known: what it makes is what it makes without them, and the record says so."""
    model, clip, _ = loaded
    g, sha256 = comfy.host_guard, comfy.anatomy.model_sha256(model)
    plain = comfy.host_files.read_lora(loras.folder / "safety.safetensors")
    safety = (g.SafetyLora(calibrated(plain, loras.folder / "first_told.safetensors", *WIDE, sha256), 1.0),)
    tasks = (g.TaskLora(comfy.host_files.read_lora(loras.folder / "task_te.safetensors"), 1.0, 1.0),)
    made, encoder = comfy.host.guard(model, clip, safety, tasks, False, g.GuardLimits(combine="safety first"))
    tokens = clip.tokenize("a picture")
    assert torch.equal(encoder.encode_from_tokens(tokens), clip.encode_from_tokens(tokens))
    assert "do not act in the text encoder" in made.report
    record = comfy.host.unwrap(made).guard_state.record
    assert [lora.strength_clip for lora in record.loras] == [1.0, 0.0]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_gives_way(family, comfy, tmp_path, monkeypatch):
    """Safety alone and the sum bit for bit, a share between within rounding of the merge."""
    from comfy import supported_models

    if not hasattr(supported_models, family.config):
        pytest.skip(f"this ComfyUI has no {family.config}")
    model = make(family)
    layers = named(comfy.anatomy.model_info(model), GENERIC, sliced=False)
    for number, name in enumerate(("safety", "task")):
        save_lora(tmp_path / f"{name}.safetensors", layers, 1 + number, number, size=0.2)
    read = lambda name: comfy.host_files.read_lora(tmp_path / f"{name}.safetensors")  # noqa: E731
    scene = SimpleNamespace(comfy=comfy, folder=tmp_path, model=model, read=read)
    sha256, draw = comfy.anatomy.model_sha256(model), lambda patcher: evaluate(patcher, family, family.cond)
    told = [
        calibrated(read("safety"), tmp_path / f"{n}.safetensors", *bounds, sha256)
        for n, bounds in enumerate((NARROW, WIDE))
    ]
    least, most = (guarded(scene, lora) for lora in told)
    assert torch.equal(draw(least), draw(guarded(scene, told[0], tasks=False)))
    assert torch.equal(draw(most), draw(guarded(scene, told[1], combine="sum")))
    assert comfy.host.attestation(most).task_share == 1.0
    first = importlib.import_module("modular_lora_guard.modular_lora.guard.safety_first")
    monkeypatch.setattr(first, "shares", lambda known, measured, images: (0.5,) * images)
    ours, reference, base = draw(most), draw(merged(scene, 0.5)), draw(model)
    assert (ours - reference).abs().max() < 1e-4 * (reference - base).abs().max()
