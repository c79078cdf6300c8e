"""Net strength as it acted, and the probe: against fp64 references, and in the real ComfyUI against made files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from modular_lora_guard.modular_lora.branches import acted
from modular_lora_guard.modular_lora.branches.acted import EVERY, Meter
from modular_lora_guard.modular_lora.branches.attachment import Attachment, Branches, FusedLayer
from modular_lora_guard.modular_lora.branches.changes import Bias, Dense, Gain, Kron, LowRank, Rotation, Term
from modular_lora_guard.modular_lora.branches.fusing import Fused
from modular_lora_guard.modular_lora.branches.layer_spec import layer_spec
from modular_lora_guard.modular_lora.errors import GuardError
from modular_lora_guard.tools.benchmarks import cancelling
from PIL import Image
from support.errors import refuses
from support.graphs import GraphError, guarded_graph, save_lora
from support.small_unet import sampled, small_unet
from torch import nn

OWNER, SECOND = ("safety", "a"), ("safety", "b")


class Two(nn.Module):
    """A model of two layers; ``rows`` images in each of two conditionings."""

    def __init__(self, conv: bool = False):
        super().__init__()
        make = (lambda: nn.Conv2d(8, 8, 3, padding=1)) if conv else (lambda: nn.Linear(8, 8))
        self.first, self.second = make(), make()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def low_rank(seed: int, rank: int = 2, inputs: int = 8, size: float = 0.3) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inputs, generator=g) * size, torch.randn(8, rank, generator=g) * size)


def measured(model, terms: dict[str, list[Term]], x, rows, floor=None, strengths=None, images=2, prompt=0):
    """What the meter says of one evaluation, and the inputs and y0 of every layer."""
    specs = {path: layer_spec(path, model.get_submodule(path)) for path in terms}
    strengths = strengths or {OWNER: 1.0}
    meter = Meter(strengths, {owner: owner[1] for owner in strengths}, floor)
    branches = Branches({p: FusedLayer(specs[p], t) for p, t in terms.items()}, ("",), meter=meter)
    attachment, seen = Attachment(model, branches), {}
    attachment.attach()
    try:
        for path in terms:  # around the branch, so that x is what the branch sees
            module = model.get_submodule(path)
            module.register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0].detach().clone()}))
        meter.start(lambda *_: rows, prompt=prompt)
        with torch.no_grad():
            model(x)
        return meter.finish(images), seen
    finally:
        attachment.detach()


def shares(module, terms: list[Term], x) -> dict[tuple, torch.Tensor]:
    """What every owner adds, in fp64 by dense matrices."""
    spec, found = layer_spec("layer", module), {}
    double = nn.Module.double(type(module)(*_shape(module)))
    double.weight.data, double.bias.data = module.weight.detach().double(), module.bias.detach().double()
    y0 = double(x.double()).detach()
    for term in terms:
        owner = (term.role, term.owner)
        if isinstance(term.part, Bias):
            z = term.part.bias.double().reshape(-1, *(1 for _ in spec.weight_shape[2:])).expand_as(y0)
        else:
            double.weight.data = term.part.dense(lambda: module.weight.detach()).double().reshape(module.weight.shape)
            double.bias.data.zero_()
            z = double(x.double()).detach()
        found[owner] = found.get(owner, 0) + term.scale * z
    return {**found, "y0": y0}


def _shape(module) -> tuple:
    return (8, 8) if isinstance(module, nn.Linear) else (8, 8, 3, 1, 1)


def reference(found: list[dict], owner, strength: float, pick) -> float:
    """strength·(1 + Σ<z, others> / Σ<z, z>) over layers, of the rows that ``pick`` takes."""
    other = energy = 0.0
    for each in found:
        z = pick(each[owner])
        rest = sum(pick(value) for key, value in each.items() if key not in (owner, "y0"))
        other, energy = other + float((z * rest).sum()), energy + float((z * z).sum())
    return strength * (1 + other / energy)


FORMS = {
    "pairs": lambda: [Term("task", low_rank(3, 3), 0.7)],
    "dense": lambda: [Term("task", Dense(low_rank(4).up @ low_rank(4).down), -0.4)],
    "Kronecker": lambda: [Term("task", Kron(torch.randn(2, 2) * 0.3, torch.randn(4, 4) * 0.3), 1.0)],
    "gain": lambda: [Term("task", Gain(torch.randn(8) * 0.2, torch.zeros(8)), 1.0), Term("task", low_rank(5), 0.5)],
    "rotation": lambda: [Term("task", Rotation(torch.randn(2, 4, 4) * 0.1, torch.zeros(8)), 1.0)],
    "bias": lambda: [Term("task", Bias(torch.randn(8) * 0.3), 1.0), Term("task", low_rank(6), 0.5)],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("second", [False, True])
def test_the_figure_is_that_of_the_shares_in_fp64_image_by_image(form, second):
    model = Two()
    model.first.bias.data.zero_()  # gains and rotations act on W0·x alone
    model.second.bias.data.zero_()
    safety = [Term("safety", low_rank(1), 0.9, "a")] + [Term("safety", low_rank(2), 0.5, "b")] * second
    terms = {"first": [*safety, *FORMS[form]()], "second": [*safety, *FORMS[form]()]}
    x, rows = torch.randn(4, 5, 8), ((0, 0), (0, 1), (1, 0), (1, 1))
    strengths = {OWNER: 0.9} | ({SECOND: 0.5} if second else {})
    figures, seen = measured(model, terms, x, rows, strengths=strengths)
    found = [shares(model.get_submodule(path), terms[path], seen[path]) for path in terms]
    for owner, strength in strengths.items():
        for image in (0, 1):
            each = [reference(found, owner, strength, lambda z, r=row: z[r]) for row in (image, image + 2)]
            assert figures[owner].images[image] == pytest.approx(min(each), abs=1e-4)


@pytest.mark.parametrize(
    ("own", "conv"), [*((form, False) for form in FORMS), ("pairs", True), ("dense", True), ("bias", True)]
)
def test_activity_is_the_mean_over_layers_of_the_shares_in_fp64_on_the_prompts_rows(own, conv):
    """Whatever form the safety LoRA and the task LoRA have; the other conditioning's rows have no part in it."""
    model = Two(conv)
    for layer in (model.first, model.second):
        layer.bias.data.zero_()
    wide = 72 if conv else 8
    forms = FORMS | (
        {
            "pairs": lambda: [Term("task", low_rank(3, 3, 72), 0.7)],
            "dense": lambda: [Term("task", Dense(low_rank(4, 2, 72).up @ low_rank(4, 2, 72).down), -0.4)],
            "bias": lambda: [Term("task", Bias(torch.randn(8) * 0.3), 1.0)],
        }
        if conv
        else {}
    )
    safety = [Term("safety", one.part, one.scale, "a") for one in forms[own]()]
    terms = {path: [*safety, Term("task", low_rank(9, 2, wide), 0.5)] for path in ("first", "second")}
    x = torch.randn(4, 8, 6, 6) if conv else torch.randn(4, 5, 8)
    rows = ((1, 0), (1, 1), (0, 0), (0, 1))
    figures, seen = measured(model, terms, x, rows)
    found = [shares(model.get_submodule(path), terms[path], seen[path]) for path in terms]
    for image in (0, 1):
        ratios = [float((each[OWNER][2 + image] ** 2).sum() / (each["y0"][2 + image] ** 2).sum()) for each in found]
        assert figures[OWNER].activity[image] == pytest.approx(sum(ratios) / 2, rel=1e-4)
    assert figures[OWNER].activity[0] != figures[OWNER].activity[1]
    assert measured(model, terms, x, rows, prompt=None)[0][OWNER].activity == (None, None)
    assert measured(model, terms, x, ((1, 0),) * 4)[0][OWNER].activity == (None, None)


def test_of_several_prompts_of_an_image_the_strongest_counts_and_the_first_evaluation_alone():
    terms = {p: [Term("safety", low_rank(1), 1.0, "a")] for p in ("first", "second")}
    x = torch.randn(2, 5, 8)
    model = Two()
    apart = measured(model, terms, x, ((0, 0), (0, 1)))[0][OWNER].activity
    (both,) = measured(model, terms, x, ((0, 0), (0, 0)), images=1)[0][OWNER].activity
    assert both == max(apart)
    tables = [(((0, 0),), [[[0.0, 1.0, 4.0]]]), (((0, 0),), [[[0.0, 3.0, 4.0]]])]
    assert acted._activity(tables, 0, 1) == (0.25,)


def test_convolutions_are_measured_alike():
    model = Two(conv=True)
    terms = {
        p: [Term("safety", low_rank(1, 2, 72), 1.0, "a"), Term("task", low_rank(2, 3, 72), 0.6)]
        for p in ("first", "second")
    }
    x = torch.randn(2, 8, 6, 6)
    figures, seen = measured(model, terms, x, ((0, 0), (0, 1)))
    found = [shares(model.get_submodule(path), terms[path], seen[path]) for path in terms]
    for image in (0, 1):
        wanted = reference(found, OWNER, 1.0, lambda z, r=image: z[r])
        assert figures[OWNER].images[image] == pytest.approx(wanted, abs=1e-4)


def test_a_model_in_fp64_is_measured_and_probed():
    terms = {p: [Term("safety", low_rank(1), 1.0, "a"), Term("task", low_rank(2), 0.5)] for p in ("first", "second")}
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    figures, seen = measured(model := Two().double(), terms, x, ((0, 0), (0, 1)))
    found = [shares(model.get_submodule(path), terms[path], seen[path]) for path in terms]
    for image in (0, 1):
        wanted = reference(found, OWNER, 1.0, lambda z, r=image: z[r])
        assert figures[OWNER].images[image] == pytest.approx(wanted, abs=1e-4)


def test_rows_that_belong_to_no_image_count_for_every_image():
    model = Two()
    terms = {"first": [Term("safety", low_rank(1), 1.0, "a"), Term("task", low_rank(2), 0.5)], "second": []}
    terms["second"] = terms["first"]
    figures, _ = measured(model, terms, torch.randn(3, 5, 8), ((0, EVERY),) * 3)
    assert figures[OWNER].images[0] is not None
    assert figures[OWNER].images[0] == figures[OWNER].images[1]


def test_where_the_safety_lora_does_next_to_nothing_it_is_not_judged():
    model = Two()
    small = LowRank(low_rank(1).down * 1e-3, low_rank(1).up * 1e-2)
    terms = {p: [Term("safety", small, 1.0, "a"), Term("task", low_rank(2), 1.0)] for p in ("first", "second")}
    figures, _ = measured(model, terms, torch.randn(2, 5, 8), ((0, 0), (0, 1)), floor=0.5)
    assert figures[OWNER].images == (None, None)
    assert 0 < figures[OWNER].share < acted.SHARE


def test_below_the_floor_and_beyond_all_numbers_the_run_stops():
    undone = low_rank(1)
    terms = lambda scale: {  # noqa: E731
        p: [Term("safety", low_rank(1), 1.0, "a"), Term("task", undone, scale)] for p in ("first", "second")
    }
    x, rows = torch.randn(2, 5, 8), ((0, 0), (0, 1))
    assert measured(Two(), terms(-0.4), x, rows, floor=0.5)[0][OWNER].least == pytest.approx(0.6, abs=1e-4)
    with pytest.raises(GuardError):
        measured(Two(), terms(-0.6), x, rows, floor=0.5)
    with pytest.raises(GuardError):
        measured(Two(), terms(1.0), x * float("inf"), rows)


class Absorbing(Fused):
    """As sums were before they were apart: every term into one tensor."""

    def apply(self, y, x, h, g=None):
        return y.view(-1, 8).addmm_(h.reshape(-1, h.shape[-1]), self.up.t()).view(y.shape)


def test_the_probe_sees_a_share_that_rounding_took(monkeypatch):
    """Without the separate sums: up [2^40, −2^40] over equal rows of down."""
    from modular_lora_guard.modular_lora.branches import fusing

    monkeypatch.setattr(fusing, "Fused", Absorbing)
    d, u = torch.ones(1, 8), torch.full((8, 1), 2.0**40)
    huge = LowRank(torch.cat([d, d]), torch.cat([u, -u], 1))
    terms = {
        "first": [Term("task", LowRank(d, u), 1.0), Term("safety", low_rank(1), 1.0, "a"), Term("task", huge, 1.0)]
    }
    terms["second"] = terms["first"]
    with pytest.raises(GuardError):
        measured(Two(), terms, torch.randn(2, 5, 8), ((0, 0), (0, 1)))


LAYERS = {
    "linear": (lambda: nn.Linear(8, 8), (4, 50, 8)),
    "linear, one token": (lambda: nn.Linear(8, 8), (4, 8)),
    "1x1": (lambda: nn.Conv2d(8, 8, 1), (4, 8, 7, 9)),
    "1x1, 1d": (lambda: nn.Conv1d(8, 8, 1), (4, 8, 70)),
    "1x1, no batch": (lambda: nn.Conv2d(8, 8, 1), (8, 7, 9)),
    "1x1, strided": (lambda: nn.Conv2d(8, 8, 1, stride=2), (4, 8, 8, 8)),
    "3x3": (lambda: nn.Conv2d(8, 8, 3, padding=1), (4, 8, 7, 9)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["pairs", "dense"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_probe_finds_the_share_of_fp64_in_every_layer(layer, form, dtype):
    make, shape = LAYERS[layer]
    module = make().to(dtype)
    spec, x = layer_spec("layer", module), torch.randn(shape).to(dtype)
    safety = [
        Term("safety", low_rank(1, 2, spec.inputs), 1.0, "a"),
        Term("safety", low_rank(2, 1, spec.inputs), 0.5, "b"),
    ]
    pair = low_rank(3, 3, spec.inputs)
    task = Term("task", pair if form == "pairs" else Dense(pair.up @ pair.down), 0.7)
    fused = Fused(spec, [*safety, task], dtype, x.device)
    with torch.no_grad():
        y0, pick = module(x), acted._positions(fused, x)
        before, h = y0.clone(), fused.reduced(x)
        result = fused.apply(y0, x, h)
        found = acted._probe(fused, pick(before).clone(), pick(x), pick(h), pick(result)).tolist()
        double = module.double()
        double.bias.data.zero_()
        double.weight.data = sum(t.scale * t.part.dense(None).to(dtype).double() for t in safety).reshape(
            spec.weight_shape
        )
        s = pick(double(x.double()))
    rounding = 0.02 if dtype is torch.bfloat16 else 1e-5
    assert found[1] == pytest.approx(float(s.square().sum()), rel=rounding)
    assert found[0] == pytest.approx(found[1], rel=rounding)
    assert found[2] == pytest.approx(float(pick(before).double().square().sum()), rel=1e-5)
    assert found[3] == pytest.approx(float(pick(result).double().sum()), rel=1e-3, abs=1e-2)
    if layer in ("linear", "1x1", "1x1, 1d"):
        assert acted.POSITIONS <= pick(before).numel() / 8 < 2 * acted.POSITIONS


@pytest.mark.parametrize("layer", ["linear", "1x1"])
@pytest.mark.parametrize("image", [0, 3])
@pytest.mark.parametrize("lost", ["share", "finite"])
def test_the_probe_looks_at_every_image(layer, image, lost, monkeypatch):
    """Of layers that treat each position by itself."""
    make, shape = LAYERS[layer]
    terms, apply = [Term("safety", low_rank(1), 1.0, "a"), Term("task", low_rank(2), 0.5)], Fused.apply
    module = Two()
    module.first, module.second = make(), make()

    def faulty(self, y, x, h, g=None):
        before, made = y.clone(), apply(self, y, x, h)
        made[image] = torch.nan if lost == "finite" else made[image] - 40 * self.share(OWNER, before, x, h)[image]
        return made

    monkeypatch.setattr(Fused, "apply", faulty)
    rows = tuple((0, number) for number in range(4))
    with refuses("run.not-finite" if lost == "finite" else "run.share-lost"):
        measured(module, {"first": terms, "second": terms}, torch.randn(shape), rows, images=4)


def test_every_kind_of_evaluation_is_measured_first_and_once_more_at_a_place_that_is_not_told():
    meter = Meter({OWNER: 1.0}, {OWNER: "a"}, None)
    places = set()
    for run in range(40):
        meter.start(lambda args, _: args[0], 20, str(run).encode())
        found = {kind: [] for kind in (0, 1)}
        for number in range(20):
            for kind in (0, 1):
                with meter.evaluation("root", (((kind, 0),),), {}):
                    found[kind] += [number] * meter.measuring
        for numbers in found.values():
            assert numbers[0] == 0
            assert len(numbers) == 2
            places.add(numbers[1])
    assert len(places) > 10


@pytest.fixture
def guard(comfy, tmp_path):
    """Guards the small U-Net with these files: safety first, then tasks at 1."""

    def make(*paths, model=None):
        g, files = comfy.host_guard, [comfy.host_files.read_lora(path) for path in paths]
        tasks = tuple(g.TaskLora(lora, 1.0, 1.0) for lora in files[1:])
        own = (g.SafetyLora(files[0], 1.0),)
        return comfy.host.unwrap(comfy.host.guard(model or small_unet(), None, own, tasks, False, g.GuardLimits())[0])

    return make


@pytest.fixture
def layers(comfy):
    info = comfy.anatomy.model_info(small_unet())
    named = {}
    for name, key in info.key_map.items():
        if name.startswith("lora_unet_") and key in info.specs and not info.specs[key].problem:
            named.setdefault(key, name)
    return {name: info.specs[key] for key, name in named.items()}


@contextmanager
def attack(safety, layers: dict, path, model) -> Iterator[None]:
    """Writes a file that cancels the safety LoRA on what these layers of the model read meanwhile."""
    modules = {name: model.model.get_submodule(spec.path) for name, spec in layers.items()}
    with cancelling.moments(modules) as moments:
        yield
    cancelling.save(path, cancelling.against_inputs(cancelling.factors(safety), moments, ridge=1e-2))


def test_a_file_made_against_the_files_net_strength_is_refused_as_it_acts(comfy, guard, layers, tmp_path):
    linear = {name: spec for name, spec in layers.items() if spec.conv is None and "emb" not in spec.path}
    safety, made = tmp_path / "safety.safetensors", tmp_path / "attack.safetensors"
    save_lora(safety, linear, 2, 0, size=0.2)
    base = small_unet()
    with attack(safety, linear, made, base):
        sampled(base, steps=3)
    patcher = guard(safety, made)
    ((_, result),) = patcher.guard_state.part.interference
    assert result.net_strength == pytest.approx(1.0, abs=1e-3)
    before = len(comfy.ledger.latents)
    with pytest.raises(comfy.host_guard.GuardError):
        sampled(patcher, steps=3)
    assert len(comfy.ledger.latents) == before
    assert comfy.host.attestation(patcher).status == "not sampled"


def test_a_run_says_what_it_measured_and_the_measurement_changes_nothing(comfy, guard, layers, tmp_path, monkeypatch):
    for name, seed in (("s", 0), ("t", 1)):
        save_lora(tmp_path / f"{name}.safetensors", layers, 3, seed, size=0.2)
    patcher = guard(tmp_path / "s.safetensors", tmp_path / "t.safetensors")
    latents = sampled(patcher, steps=4, batch=2, cfg=2.0)
    run = comfy.host.attestation(patcher)
    ((sha256, value),) = run.acted_strength.items()
    assert sha256 == patcher.guard_state.record.loras[0].sha256
    assert run.measured_evaluations == 2
    assert 0.5 < value < 1.5
    assert run.acted_share[sha256] > acted.SHARE
    each = [comfy.ledger.latents.get(comfy.host.tensor_sha256(latent)).acted_strength[sha256] for latent in latents]
    assert min(each) == value
    assert each[0] != each[1]
    monkeypatch.setattr(type(patcher.branches.meter), "start", lambda *_: None)
    assert torch.equal(sampled(patcher, steps=4, batch=2, cfg=2.0), latents)


def test_two_safety_loras_of_one_file_name_both_stay_in_the_record(comfy, run_graph, loras):
    """By their SHA-256; people read the path below the folder."""
    for folder, seed in (("one", 21), ("two", 22)):
        (loras.folder / folder).mkdir(exist_ok=True)
        save_lora(loras.folder / folder / "same.safetensors", loras.unet, 2, seed)
    graph = guarded_graph(task=None)
    graph["safety"]["inputs"]["lora_name"] = "one/same.safetensors"
    graph["second"] = {
        "class_type": "ModularLoraLoadSafety",
        "inputs": {"lora_name": "two/same.safetensors", "strength": 1.0, "safety_lora": ["safety", 0]},
    }
    graph["guard"]["inputs"]["safety_lora"] = ["second", 0]
    graph["save"]["inputs"]["filename_prefix"] = "same"
    run_graph(graph)
    (file,) = comfy.output.glob("same*.png")
    record = json.loads(Image.open(file).text["modular_lora_attestation"])
    assert [lora["name"] for lora in record["loras"]] == ["one/same.safetensors", "two/same.safetensors"]
    shas = {lora["sha256"] for lora in record["loras"]}
    assert len(shas) == 2
    assert record["net_strength"].keys() == record["acted_strength"].keys() == shas
    assert all(value > 0.5 for value in record["acted_strength"].values())


def test_a_prompt_that_stands_in_the_other_conditioning_is_measured_too(run_graph, loras, comfy):
    """With cfg 0 the negative prompt draws the image: every conditioning of the guider is judged."""
    graph = guarded_graph()
    graph["sample"]["inputs"]["cfg"] = 0.0
    graph["save"]["inputs"]["filename_prefix"] = "swapped"
    run_graph(graph)
    (file,) = comfy.output.glob("swapped*.png")
    record = json.loads(Image.open(file).text["modular_lora_attestation"])
    assert record["measured_evaluations"] >= 1
    assert all(value is not None for value in record["acted_strength"].values())


def test_a_graph_with_a_file_that_cancels_on_real_inputs_is_stopped(comfy, run_graph, loras):
    """The whole way, from the loader to the sampler: the base's image is not called guarded, nor shown."""
    values = {name: spec for name, spec in loras.unet.items() if spec.path.endswith("attn2.to_v")}
    save_lora(loras.folder / "on_values.safetensors", values, 2, 31, size=0.3)
    sampler = guarded_graph()["sample"] | {"class_type": "KSampler"}
    graph = {name: one for name, one in guarded_graph().items() if name in ("ckpt", "pos", "neg", "latent")}
    graph |= {"sample": sampler, "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}}
    graph["sample"]["inputs"]["model"] = ["ckpt", 0]
    graph["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["ckpt", 2]}}
    made, base = loras.folder / "attack.safetensors", run_graph(graph)["ckpt"][0]
    graph["sample"]["inputs"]["seed"] = 2  # another run of the same loaded model
    with attack(loras.folder / "on_values.safetensors", values, made, base):
        run_graph(graph)
    for name in ("attack", "task"):
        guarded = guarded_graph("on_values.safetensors", f"{name}.safetensors")
        guarded["save"]["inputs"]["filename_prefix"] = f"after_{name}"
        if name == "task":
            run_graph(guarded)
            continue
        with pytest.raises(GraphError) as error:
            run_graph(guarded)
        assert error.value.stage == "execution"
        assert error.value.node_type.startswith("ModularLora")
        assert not list(comfy.output.glob("after_attack*"))
