"""A policy that attaches the guard to every model: ordinary graphs, without a node of the guard and as they are."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from conftest import new_executor
from support import drop_in
from support.drop_in import SAFETY, merged
from support.drop_in import guarded as with_guard
from support.errors import refuses
from support.gate_graphs import install_stub
from support.graphs import GraphError, guarded_graph, node
from support.variants import OTHER, TASK, VARIANTS, two_loaders

pytestmark = pytest.mark.usefixtures("packs")
LEVEL = 1 / 255
WORLD = "world.safetensors"


def ordinary(*loaders: tuple[str, float], **options) -> dict:
    """An ordinary graph whose checkpoint is loaded once for all tests."""
    graph = drop_in.ordinary(*loaders, **options)
    graph["ckpt"]["class_type"] = "PackCheckpoint"
    return graph


def attached(sha256, more: str = "", file: str = SAFETY, keys: str = "", guard: str = "") -> str:
    one = f'{{sha256 = "{sha256(file)}", file = "{file}", min_net_strength = 0.9{keys}}}'
    return f'[guard]\nattach = "always"\nrequired = [{one}]\n{guard}\n{more}'


@pytest.fixture(scope="module")
def executors(comfy) -> SimpleNamespace:
    """One for graphs under the policy and one for references: the server empties its cache when a policy comes."""
    return SimpleNamespace(attached=new_executor(comfy), plain=new_executor(comfy), policy="")


@pytest.fixture
def always(operator, sha256):
    operator.write(attached(sha256))
    return operator


@pytest.fixture
def run(operator, run_graph, executors) -> Callable[[dict], dict]:
    """Queues a graph as it is, and runs it; as the server's, the cache is emptied when the policy changes."""

    def go(graph: dict) -> dict:
        fingerprint = operator.policies.fingerprint()
        if executors.policy != fingerprint:
            executors.attached.reset()
            executors.policy = fingerprint
        if refused := operator.queue(graph):
            raise GraphError("validation", " ".join(refused.values()))
        return run_graph(copy.deepcopy(graph), executors.attached)

    return go


@pytest.fixture
def judged(comfy, operator, run, run_graph, executors):
    """The attestations of a graph's images; these are those of the merge, and not those of the graph alone."""

    def judge(graph: dict, shown="decode", same: dict | None = None, near=LEVEL, far=True, **safety) -> list:
        ours = run(graph)[shown][0].clone()
        known = [comfy.ledger.known(image) for image in ours]
        assert all(one.guarded for one in known)
        operator.remove()
        merge = run_graph(merged(same or graph, **safety), executors.plain)["decode"][0].clone()
        if far:
            assert (merge - run_graph(same or graph, executors.plain)["decode"][0]).abs().max() > 4 * near
        assert (ours - merge).abs().max() <= near
        return [one.run for one in known]

    return judge


def stopped(operator, run, graph: dict, code: str | tuple[str, ...], where: str, *named: str) -> dict:
    """The record's line of a graph that passes when it is queued and stops as it runs."""
    with refuses(code, *named) as caught:
        run(graph)
    assert (caught.value.stage, caught.value.node_type) == ("execution", where)
    return operator.record()[-1]


# Ordinary graphs, as they are


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_an_ordinary_graph_and_its_variants_run_as_they_are(always, judged, variant):
    stock = variant is two_loaders  # with ComfyUI's own loader; the others are told from the bare graph in test_drop_in
    graph = variant()
    if not stock:
        graph["ckpt"]["class_type"] = "PackCheckpoint"
    VARIANTS[variant].check(judged(graph, far=stock))


def alone() -> dict:
    """What PackOneNode draws, as a graph of ComfyUI's own nodes."""
    graph = ordinary()
    graph["pos"]["inputs"]["text"] = "gloss, cat"
    return graph


@pytest.mark.parametrize("form", ["dict", "named tuple"])  # the others without ComfyUI, in test_values.py
def test_models_inside_of_what_packs_hand_on_are_guarded(always, run, comfy, form):
    graph = {
        "load": node("PackPipeLoader", ckpt_name=WORLD, form=form),
        "draw": node("PackPipeSampler", pipe=["load", 0], form=form),
        "save": node("SaveImage", images=["draw", 0], filename_prefix="p"),
    }
    images = run(graph)["draw"][0]
    assert [comfy.ledger.known(image).status for image in images] == ["guarded"]


def test_the_image_of_a_pipe_is_that_of_the_merge(always, judged):
    graph = {
        "load": node("PackPipeLoader", ckpt_name=WORLD, form="object"),
        "draw": node("PackPipeSampler", pipe=["load", 0], form="object"),
        "save": node("SaveImage", images=["draw", 0], filename_prefix="p"),
    }
    assert judged(graph, "draw", same=alone())[0].status == "guarded"


@pytest.mark.parametrize("kind", ["PackLateLoader", "PackExpandingLoader"])
def test_a_loader_that_ends_later_or_expands_is_guarded(always, run, comfy, kind):
    graph = ordinary((TASK, 0.7))
    graph["ckpt"] = node(kind, ckpt_name=WORLD)
    assert comfy.ledger.known(run(graph)["decode"][0][0]).status == "guarded"


def test_what_a_pack_hides_is_refused_at_the_sampler_and_counted_by_pack(always, run):
    graph = {
        "load": node("PackHidingLoader", ckpt_name=WORLD),
        "draw": node("PackHidingSampler", key=["load", 0]),
        "save": node("SaveImage", images=["draw", 0], filename_prefix="p"),
    }
    line = stopped(always, run, graph, "refused.guard.required", "PackHidingSampler", "not guarded")
    assert line["pack"] == "support.pack_nodes"


def test_a_clone_that_drops_the_guard_is_not_guarded_again(always, run):
    graph = ordinary((TASK, 0.7))
    graph["own"] = node("PackOwnClone", model=["lora0", 0])
    graph["sample"]["inputs"]["model"] = ["own", 0]
    stopped(always, run, graph, "refused.guard.attach", "KSampler", "took the guard off")


# Text encoders


def test_what_is_attached_puts_the_loras_together_as_the_policy_asks(operator, sha256, run):
    """The safety LoRA has no calibration, without which task LoRAs cannot give way: the sum would have gone on."""
    operator.write(attached(sha256, guard='combine = "safety first"'))
    with refuses("safety-first.no-calibration", SAFETY) as caught:
        run(ordinary((TASK, 0.7)))
    assert (caught.value.stage, caught.value.node_type) == ("execution", "KSampler")


def test_a_model_and_a_clip_that_were_loaded_apart(operator, sha256, judged):
    safety = "safety_te.safetensors"
    operator.write(attached(sha256, file=safety))
    graph = ordinary((TASK, 0.7))
    same = copy.deepcopy(graph)
    graph |= {"model": node("PackModel", ckpt_name=WORLD), "clip": node("PackClip", ckpt_name=WORLD)}
    graph["lora0"]["inputs"] |= {"model": ["model", 0], "clip": ["clip", 0]}
    (run,) = judged(graph, same=same, far=False, near=2 * LEVEL, safety=safety)
    assert run.text_encoder.startswith("guarded")


def test_prompts_of_a_hidden_clip_are_refused_at_the_sampler(operator, sha256, run):
    operator.write(attached(sha256, file="safety_te.safetensors"))
    graph = {
        "load": node("PackHidingLoader", ckpt_name=WORLD),
        "model": node("PackModel", ckpt_name=WORLD),
        "draw": node("PackHalfHidingSampler", key=["load", 0], model=["model", 0]),
        "save": node("SaveImage", images=["draw", 0], filename_prefix="p"),
    }
    stopped(operator, run, graph, "conditioning.not-guarded", "PackHalfHidingSampler")


# Nodes of the guard in a graph


def test_guard_adds_its_safety_lora_to_the_policys(always, comfy, run):
    graph = with_guard(ordinary((TASK, 0.7)), behind="lora0", safety=OTHER, strength=0.6)
    known = comfy.ledger.known(run(graph)["decode"][0][0])
    assert known.status == "guarded"
    assert {(one.name, one.strength_model) for one in known.run.safety} == {(SAFETY, 1.0), (OTHER, 0.6)}
    assert [one.name for one in known.run.loras if one.role == "task"] == [TASK]
    weaker = with_guard(ordinary(), strength=0.3)
    known = comfy.ledger.known(run(weaker)["decode"][0][0])
    assert [(one.name, one.strength_model) for one in known.run.safety] == [(SAFETY, 1.0)]


def test_guard_model_guards_by_itself(always, comfy, run):
    graph = guarded_graph(clip=True)
    graph["ckpt"]["class_type"] = "PackCheckpoint"
    assert comfy.ledger.known(run(graph)["decode"][0][0]).status == "guarded"
    graph["before"] = node("LoraLoaderModelOnly", model=["ckpt", 0], lora_name=OTHER, strength_model=0.5)
    graph["guard"]["inputs"]["model"] = ["before", 0]
    stopped(always, run, graph, "model.guarded-already", "ModularLoraGuardModel", "Load Task LoRA")


# What stays refused


def test_merging_saving_and_training_are_refused_when_queued(always):
    graph = ordinary((TASK, 0.7))
    graph["second"] = node("CheckpointLoaderSimple", ckpt_name=WORLD)
    graph["merge"] = node("ModelMergeSimple", model1=["lora0", 0], model2=["second", 0], ratio=0.5)
    graph["sample"]["inputs"]["model"] = ["merge", 0]
    assert "guard.attach" in always.queue(graph)["merge"]
    for kind, inputs in {
        "ModelSave": {"model": ["ckpt", 0], "filename_prefix": "w"},
        "CLIPSave": {"clip": ["ckpt", 1], "filename_prefix": "w"},
        "LoraSave": {"filename_prefix": "w", "rank": 4, "lora_type": "standard", "bias_diff": False},
        "ModularLoraTrainTask": {"model": ["ckpt", 0]},
    }.items():
        graph = ordinary()
        graph["out"] = node(kind, **inputs)
        assert "out" in always.queue(graph), kind


def test_a_merge_that_a_pack_makes_is_refused_where_it_is_made(always, run):
    graph = ordinary((TASK, 0.7))
    graph["light"] = node("PackWholeWeights", model=["lora0", 0], strength=1.0)
    graph["sample"]["inputs"]["model"] = ["light", 0]
    stopped(always, run, graph, "model.not-kept", "PackWholeWeights")


def test_images_from_elsewhere_do_not_leave(always, run):
    graph = {"picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0x884422)}
    graph["save"] = node("SaveImage", images=["picture", 0], filename_prefix="p")
    assert "open.unattested" in always.queue(graph)["save"]


def test_the_safety_lora_that_is_not_there_is_named(operator, sha256, run, comfy):
    operator.write(attached(sha256).replace('file = "safety.safetensors", ', ""))
    stopped(operator, run, ordinary(), "refused.guard.attach", "PackCheckpoint", "required.file")
    shutil.copy(comfy.loras / SAFETY, comfy.loras.parent / "safety_loras" / "one.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    assert comfy.ledger.known(run(ordinary())["decode"][0][0]).status == "guarded"
    (comfy.loras.parent / "safety_loras" / "one.safetensors").unlink()


# Families


def other_family() -> dict:
    """A graph of a model for which the policy names nothing."""
    graph = ordinary()
    graph["toy"] = node("PackToy", family="SD2.x")
    graph["sample"]["inputs"] |= {"model": ["toy", 0], "positive": ["toy", 1], "negative": ["toy", 1]}
    return graph


def test_a_family_without_an_entry_is_refused_by_name(operator, sha256, run):
    operator.write(attached(sha256, keys=', family = "SD15"'))
    stopped(operator, run, other_family(), "refused.guard.required", "PackToy", "SD20", "SD15")


def test_a_family_with_an_entry_of_its_own_gets_that_one(operator, sha256, run, comfy, loras):
    from support.families import make, named
    from support.families_image import U_NETS
    from support.graphs import save_lora

    toy = make(next(one for one in U_NETS if one.name == "SD2.x"))
    info = comfy.anatomy.model_info(toy)
    save_lora(loras.folder / "sd2.safetensors", named(info, "lora_unet_", sliced=False), 2, 9)
    comfy.folder_paths.filename_list_cache.clear()
    both = ", ".join(
        f'{{sha256 = "{sha256(file)}", file = "{file}", family = "{family}"}}'
        for file, family in ((SAFETY, "SD15"), ("sd2.safetensors", "SD20"))
    )
    operator.write(f'[guard]\nattach = "always"\nrequired = [{both}]\n')
    for graph, file, family in ((ordinary(), SAFETY, "SD15"), (other_family(), "sd2.safetensors", "SD20")):
        known = comfy.ledger.known(run(graph)["decode"][0][0])
        assert known.status == "guarded"
        assert known.run.base_family == family
        assert [one.name for one in known.run.safety] == [file]


@pytest.fixture
def detector(comfy, monkeypatch):
    """Decides what the gate flags."""
    import modular_lora_guard.comfy_host.enforcement.gated as gated

    gated._gate.clear()
    yield install_stub(comfy, monkeypatch)
    gated._gate.clear()


@pytest.mark.parametrize("flagged", [False, True])
def test_a_family_without_an_entry_may_be_gated_instead(operator, sha256, run, comfy, detector, flagged):
    detector.score = lambda image: float(flagged)
    operator.write(attached(sha256, keys=', family = "SD15"', guard='other_families = "gate"'))
    graph = other_family()
    graph["sample"]["inputs"]["seed"] = 90 + flagged
    images = run(graph)["decode"][0]
    assert comfy.ledger.known(images[0]).status == "not guarded"
    assert detector.seen
    assert [line["kind"] for line in operator.record()[-2:]] == ["run", "gate"]
    if flagged:
        return
    seen = len(detector.seen)
    assert comfy.ledger.known(run(ordinary())["decode"][0][0]).status == "guarded"
    assert len(detector.seen) == seen  # what a guarded run made needs no gate


# A gate without a node


def saved(comfy, prefix: str) -> list:
    from PIL import Image

    return [Image.open(file) for file in sorted(comfy.output.glob(f"{prefix}_*.png"))]


def test_a_required_gate_stands_in_front_of_every_image_output(operator, sha256, run, comfy, detector):
    operator.write(attached(sha256, "[gate]\nrequired = true\n"))
    detector.score = lambda image: 1.0
    graph = ordinary((TASK, 0.7))
    graph["save"]["inputs"]["filename_prefix"] = "gate_flagged"
    graph["sample"]["inputs"]["seed"] = 77
    graph["show"] = node("PreviewImage", images=["decode", 0])
    image = run(graph)["decode"][0][0]
    (file,) = saved(comfy, "gate_flagged")
    import numpy as np

    written = np.asarray(file.convert("RGB")).astype(float) / 255
    assert abs(written - image.numpy()).max() > 4 * LEVEL  # blurred
    detector.score = lambda image: 0.0
    graph["save"]["inputs"]["filename_prefix"], graph["sample"]["inputs"]["seed"] = "gate_passed", 78
    image = run(graph)["decode"][0][0]
    (file,) = saved(comfy, "gate_passed")
    assert abs(np.asarray(file.convert("RGB")) / 255 - image.numpy()).max() <= LEVEL


def test_what_the_gate_withholds_is_not_written_and_the_job_ends_well(operator, sha256, run, comfy, detector):
    operator.write(attached(sha256, '[gate]\nrequired = true\nactions = ["withhold"]\n'))
    detector.score = lambda image: 1.0
    graph = ordinary()
    graph["save"]["inputs"]["filename_prefix"] = "gate_withheld"
    run(graph)
    assert not saved(comfy, "gate_withheld")


def test_what_no_gate_can_judge_stays_refused(operator, sha256, run, detector):
    operator.write(attached(sha256, "[gate]\nrequired = true\n"))
    graph = ordinary()
    graph["out"] = node("SaveLatent", samples=["sample", 0], filename_prefix="l")
    assert "gate.required" in operator.queue(graph)["out"]


# At home


@pytest.fixture
def home(operator):
    """Writes the line; nothing of it is left."""
    file = operator.path.parent / "guard.txt"

    def write(line: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(line, encoding="utf-8")
        operator.enforce.watch()

    yield write
    file.unlink(missing_ok=True)
    operator.enforce.watch()


def test_one_line_at_home_guards_every_model_and_closes_nothing_else(home, operator, run, comfy):
    home(f"# for the whole house\nalways: {SAFETY}\n")
    graph = ordinary((TASK, 0.7))
    graph["picture"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x884422)
    graph["other"] = node("SaveImage", images=["picture", 0], filename_prefix="p")
    assert comfy.ledger.known(run(graph)["decode"][0][0]).status == "guarded"
    graph["merge"] = node("ModelMergeSimple", model1=["ckpt", 0], model2=["ckpt", 0], ratio=0.5)
    graph["sample"]["inputs"]["model"] = ["merge", 0]
    assert "merge" in operator.queue(graph)


def test_what_is_in_force_stands_in_the_list_of_nodes_with_where_it_comes_from(home, operator, comfy, caplog):
    home(f"always: {SAFETY}")
    said = comfy.nodes.NODE_CLASS_MAPPINGS["ModularLoraInForce"].GET_NODE_INFO_V1()
    assert "guard.txt" in said["display_name"]
    assert '"always"' in said["display_name"]
    assert any("guard.txt" in record.getMessage() for record in caplog.records)
    (operator.path.parent / "guard.txt").unlink()
    operator.enforce.watch()
    assert "ModularLoraInForce" not in comfy.nodes.NODE_CLASS_MAPPINGS


def test_the_environment_names_the_family_preset(operator, monkeypatch):
    monkeypatch.setenv("MODULAR_LORA_GUARD", f"family: {SAFETY}")
    operator.enforce.watch()
    policy = operator.policies.current()
    assert policy.attaches
    assert policy.gate.required
    assert not operator.queue(ordinary((TASK, 0.7)))
    graph = {"picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0x884422)}
    graph["save"] = node("SaveImage", images=["picture", 0], filename_prefix="p")
    assert "save" in operator.queue(graph)
    monkeypatch.delenv("MODULAR_LORA_GUARD")
    operator.enforce.watch()


@pytest.mark.parametrize("line", ["always", "ever: safety.safetensors", "always: none.safetensors", "always:\nfamily:"])
def test_a_line_that_cannot_be_followed_lets_nothing_be_sampled(home, run, line):
    home(line)
    with pytest.raises(GraphError, match=r"guard\.txt") as caught:
        run(ordinary())
    assert caught.value.stage == "validation"


def test_an_operators_policy_comes_first(home, operator, sha256):
    operator.write(attached(sha256, file=OTHER))
    home(f"always: {SAFETY}")
    assert [one.file for one in operator.policies.current().guard.required] == [OTHER]
    operator.remove()
    assert [one.file for one in operator.policies.current().guard.required] == [SAFETY]
