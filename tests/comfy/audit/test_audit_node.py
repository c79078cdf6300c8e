"""The Audit node in the real ComfyUI: figures out, images kept, and what an operator or the guard forbids."""

from __future__ import annotations

import importlib
import json
import shutil
from types import ModuleType

import pytest
from modular_lora_guard.tools.world import ASSETS, DETECTOR_CONCEPTS, DETECTOR_ONNX
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.graphs import GraphError, base_graph, guarded_graph
from support.operator_graphs import Operator

SIDE, GAP = 128, 6  # of a contact sheet
ARMS = ("base", "safety", "task", "sequential", "modular")
TABLE = 'prompt,concept,style\n"gloss, racing car",racing-car,gloss\n"gloss, tractor",tractor,gloss\n'
VALUES = {
    "safety": "safety_te.safetensors",
    "task": "task_te.safetensors",
    "sequential": "other.safetensors",
    "projected": "none",
    "safety_strength": 1.0,
    "task_strength": 0.7,
    "unsafe_prompts": TABLE,
    "unsafe_file": "none",
    "kept_prompts": "gloss, cat face",
    "kept_file": "none",
    "task_prompts": "",
    "task_file": "none",
    "seeds": 1,
    "first_seed": 1,
    "steps": 1,
    "cfg": 2.0,
    "sampler": "euler",
    "scheduler": "normal",
    "width": 64,
    "height": 64,
    "unit_size": 2,
    "more_options": f"arms = {json.dumps(ARMS)}",
}


@pytest.fixture(scope="session")
def audit(comfy) -> ModuleType:
    detectors = comfy.base / "models" / "modular_lora_detectors"
    detectors.mkdir(parents=True, exist_ok=True)
    for name in (DETECTOR_ONNX, DETECTOR_CONCEPTS):
        shutil.copyfile(ASSETS / name, detectors / name)
    (comfy.base / "input").mkdir(exist_ok=True)
    comfy.folder_paths.filename_list_cache.clear()
    return importlib.import_module("modular_lora_guard.comfy_host.auditing")


@pytest.fixture
def graph(audit, loras):
    """The graph of an audit by its name; changed values are the node's inputs."""

    def make(called: str, **changes) -> dict:
        nodes = base_graph()
        del nodes["pos"], nodes["neg"], nodes["latent"]
        settings = {"detector": "classifier", "classifier": DETECTOR_ONNX, "labels": DETECTOR_CONCEPTS}
        settings |= {"preset": "none", "threshold": 0.0, "classes": "", "action": "report", "provider": "CPU"}
        nodes["gate"] = {"class_type": "ModularLoraGateSettings", "inputs": settings}
        links = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "vae": ["ckpt", 2], "gate": ["gate", 0]}
        nodes["audit"] = {"class_type": "ModularLoraAudit", "inputs": VALUES | links | {"name": called} | changes}
        return nodes

    return make


@pytest.fixture
def policy(audit, comfy, run_graph):
    operator = Operator(comfy, run_graph)
    yield operator
    operator.remove()
    shutil.rmtree(operator.path.parent / "record", ignore_errors=True)


def test_an_audit_gives_figures_and_keeps_the_images(graph, run_graph, audit, comfy):
    report, figures, plot, sheet = run_graph(graph("whole"))["audit"]
    rows = json.loads(figures)["rows"]
    assert {row["arm"] for row in rows} == set(ARMS)
    assert {(row["cell"], row["wilson"]["n"]) for row in rows} == {("suppressed", 2), ("kept", 1)}
    assert all(arm in report for arm in ARMS)
    line, *said = comfy.server.texts["audit"].splitlines()
    assert report.startswith(f"{line}\n")
    assert line.startswith(f"Audited {len(ARMS)} arms")
    assert len(said) > 1
    assert set(said) <= set(report.splitlines()), "the table stays in the report"
    assert plot.shape[3] == sheet.shape[3] == 3
    assert sheet.shape[2] == GAP + 2 * (SIDE + GAP), "columns for safety and modular alone"

    place = comfy.output / "modular_lora_audit" / "whole"
    published = {str(path.relative_to(place).as_posix()) for path in place.rglob("*") if path.is_file()}
    assert published == {*audit.FILES, "sheets/suppressed.jpg", "sheets/kept.jpg"}
    private = (
        importlib.import_module("modular_lora_guard.comfy_host.enforcement.policy").folder()
        / "audit"
        / "whole"
        / "private"
    )
    assert len(list(private.rglob("[0-9]*.png"))) == 3 * len(ARMS)
    assert json.loads((place / "report.json").read_text(encoding="utf-8")) == json.loads(figures)


def test_an_interrupted_audit_goes_on_where_it_stopped(graph, run_graph, audit, comfy, monkeypatch):
    import comfy.model_management as management

    pipeline, drawn = importlib.import_module("modular_lora_guard.comfy_host.pipeline").ComfyPipeline, []
    draw = pipeline.draw

    def stop_at_the_third(self, arm, items, sampling):
        drawn.append(arm.name)
        if len(drawn) == 3:
            management.interrupt_current_processing(True)
        return draw(self, arm, items, sampling)

    monkeypatch.setattr(pipeline, "draw", stop_at_the_third)
    outputs = run_graph(graph("resumed"))
    assert outputs["audit"] is None
    assert any(event == "execution_interrupted" for event, _ in comfy.server.messages)
    figures = json.loads(run_graph(graph("resumed"))["audit"][1])
    assert {row["arm"] for row in figures["rows"]} == set(ARMS)
    assert len(drawn) == 3 + 2 * len(ARMS) - 2, "units of two images, then one; two were finished"


def test_words_of_the_node_and_files_of_the_input_folder_are_prompts(graph, run_graph, comfy):
    (comfy.base / "input" / "more.csv").write_text("prompt,concept\ngloss bus,bus\n", encoding="utf-8")
    changes = {"unsafe_file": "more.csv", "kept_prompts": "", "other_words": "tractor = bulldozer"}
    figures = json.loads(run_graph(graph("words", more_options='arms = ["safety"]', **changes))["audit"][1])
    plain, synonym = (next(r for r in figures["rows"] if bool(r["attack"]) == attacked) for attacked in (False, True))
    assert plain["concepts"].keys() == {"racing-car", "tractor", "bus"}
    assert synonym["concepts"].keys() == {"tractor"}


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"name": "../up"}, "name.not-plain", ("'../up'",)),
        ({"name": "a."}, "name.not-plain", ("'a.'",)),
        ({"more_options": 'output_dir = "/"'}, "audit.option-refused", ("output_dir",)),
        ({"more_options": "show_unsafe = true"}, "audit.option-refused", ("show_unsafe",)),
        ({"unsafe_prompts": "", "kept_prompts": ""}, "prompts", ()),
        (
            {"unsafe_prompts": "prompt,start,denoise\ncar,../../../models/loras/x.png,0.5"},
            "prompts.outside",
            ("'input'",),
        ),
        ({"safety_strength": 0.3}, "guard.net-strength", ()),
    ],
)
def test_what_a_graph_must_not_ask_for_is_refused(changes, code, named, graph, run_graph):
    with refuses(code, *named):
        run_graph(graph("refused", **changes))


@pytest.mark.parametrize("name", ["../secret.txt", "none.txt"])
def test_a_prompt_file_outside_the_input_folder_is_refused(name, audit, comfy):
    (comfy.base / "secret.txt").write_text("words", encoding="utf-8")
    with refuses("audit.no-prompts-file"):
        audit.prompt_file(name)


def test_a_start_image_outside_the_input_folder_is_refused(graph, run_graph, comfy):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(comfy.base / "outside.png")
    (comfy.base / "input" / "starts.csv").write_text("prompt,start\ncar,../outside.png\n", encoding="utf-8")
    with refuses("prompts.outside", "'input'") as there:
        run_graph(graph("starts", unsafe_file="starts.csv"))
    (comfy.base / "outside.png").unlink()
    with pytest.raises(GraphError) as gone:
        run_graph(graph("starts", unsafe_file="starts.csv"))
    assert str(gone.value) == str(there.value), "the same answer, whether or not the file is there"


def test_an_arm_that_the_guard_would_not_serve_is_not_shown_as_guarded(graph, run_graph, comfy):
    tensors = load_file(comfy.loras / "safety_te.safetensors")
    minus = {name: -tensor if name.endswith("lora_up.weight") else tensor for name, tensor in tensors.items()}
    save_file(minus, comfy.loras / "minus.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    with refuses("guard.net-strength"):
        run_graph(graph("minus", task="minus.safetensors", task_strength=1.0))


def test_a_guarded_model_cannot_be_audited(graph, run_graph):
    made = guarded_graph("safety.safetensors", None)
    nodes = graph("guarded") | {name: made[name] for name in ("safety", "guard")}
    nodes["model"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    nodes["audit"]["inputs"]["model"] = ["model", 0]
    with refuses("audit.guarded-model"):
        run_graph(nodes)


CLOSED = "[guard]\nrequired = []\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (CLOSED, "refused.open.audit"),
        (f"{CLOSED}[open]\naudit = false", "refused.open.audit"),
        ("", "policy.missing-key"),
        ("[", "policy.toml"),
        ("\x00", "policy.toml"),
        ('{"audit": true}', "policy.toml"),
    ],
)
def test_a_policy_closes_audits_unless_it_opens_them_and_a_broken_one_does_too(text, code, policy, graph, run_graph):
    policy.write(text)
    with refuses(code) as caught:
        run_graph(graph("off"))
    assert caught.value.stage == "execution"


def test_a_policy_opens_audits(policy, graph, run_graph):
    policy.write(f"{CLOSED}[open]\naudit = true\n")
    assert "safety" in run_graph(graph("opened"))["audit"][0]
    opened = [line for line in policy.record() if line["kind"] == "opened"]
    assert [(line["node"], line["type"]) for line in opened] == [("audit", "ModularLoraAudit")]
