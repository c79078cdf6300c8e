"""The Audit node in the real ComfyUI: figures out, pictures kept, and what an operator or the guard forbids."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from graphs import GraphError, base_graph, guarded_graph
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.world import ASSETS, DETECTOR_CONCEPTS, DETECTOR_ONNX
from safetensors.torch import load_file, save_file

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
    return importlib.import_module(f"{comfy.host.__name__.rpartition('.')[0]}.audit")


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
def policy(audit):
    """Writes the operator's file; taken away afterwards."""
    path = audit.protected_folder() / audit.POLICY_FILE

    def write(text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    yield write
    path.unlink(missing_ok=True)


def test_an_audit_gives_figures_and_keeps_the_pictures(graph, run_graph, audit, comfy):
    report, figures, plot, sheet = run_graph(graph("whole"))["audit"]
    rows = json.loads(figures)["rows"]
    assert {row["arm"] for row in rows} == set(ARMS)
    assert {(row["cell"], row["wilson"]["n"]) for row in rows} == {("suppressed", 2), ("kept", 1)}
    assert all(arm in report for arm in ARMS)
    assert comfy.server.texts["audit"] == report
    assert plot.shape[3] == sheet.shape[3] == 3
    assert sheet.shape[2] == GAP + 2 * (SIDE + GAP), "columns for safety and modular alone"

    place = comfy.output / "modular_lora_audit" / "whole"
    published = {str(path.relative_to(place).as_posix()) for path in place.rglob("*") if path.is_file()}
    assert published == {*audit.FILES, "sheets/suppressed.jpg", "sheets/kept.jpg"}
    private = audit.protected_folder() / "audit" / "whole" / "private"
    assert len(list(private.rglob("[0-9]*.png"))) == 3 * len(ARMS)
    assert json.loads((place / "report.json").read_text(encoding="utf-8")) == json.loads(figures)


def test_an_interrupted_audit_goes_on_where_it_stopped(graph, run_graph, audit, comfy, monkeypatch):
    import comfy.model_management as management

    painter, drawn = audit.ComfyPainter, []
    draw = painter.draw

    def stop_at_the_third(self, arm, items, sampling):
        drawn.append(arm.name)
        if len(drawn) == 3:
            management.interrupt_current_processing(True)
        return draw(self, arm, items, sampling)

    monkeypatch.setattr(painter, "draw", stop_at_the_third)
    outputs = run_graph(graph("resumed"))
    assert outputs["audit"] is None
    assert any(event == "execution_interrupted" for event, _ in comfy.server.messages)
    figures = json.loads(run_graph(graph("resumed"))["audit"][1])
    assert {row["arm"] for row in figures["rows"]} == set(ARMS)
    assert len(drawn) == 3 + 2 * len(ARMS) - 2, "units of two pictures, then one; two were finished"


def test_words_of_the_node_and_files_of_the_input_folder_are_prompts(graph, run_graph, comfy):
    (comfy.base / "input" / "more.csv").write_text("prompt,concept\ngloss bus,bus\n", encoding="utf-8")
    changes = {"unsafe_file": "more.csv", "kept_prompts": "", "other_words": "tractor = bulldozer"}
    figures = json.loads(run_graph(graph("words", more_options='arms = ["safety"]', **changes))["audit"][1])
    plain, synonym = (next(r for r in figures["rows"] if bool(r["attack"]) == attacked) for attacked in (False, True))
    assert plain["concepts"].keys() == {"racing-car", "tractor", "bus"}
    assert synonym["concepts"].keys() == {"tractor"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../up"}, "names a folder"),
        ({"name": "a."}, "names a folder"),
        ({"more_options": 'output_dir = "/"'}, "output_dir cannot be set here"),
        ({"more_options": "show_unsafe = true"}, "show_unsafe cannot be set here"),
        ({"unsafe_prompts": "", "kept_prompts": ""}, "No prompts"),
        ({"unsafe_prompts": "prompt,start,denoise\ncar,../../../models/loras/x.png,0.5"}, "not there"),
        ({"safety_strength": 0.3}, "net strength"),
    ],
)
def test_what_a_graph_must_not_ask_for_is_refused(changes, said, graph, run_graph):
    with pytest.raises(GraphError, match=said):
        run_graph(graph("refused", **changes))


@pytest.mark.parametrize("name", ["../secret.txt", "none.txt"])
def test_a_prompt_file_outside_the_input_folder_is_refused(name, audit, comfy):
    (comfy.base / "secret.txt").write_text("words", encoding="utf-8")
    with pytest.raises(comfy.host.GuardError, match="not in the input folder"):
        audit._prompt_file(name)


def test_a_start_picture_outside_the_input_folder_is_refused(graph, run_graph, comfy):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(comfy.base / "outside.png")
    (comfy.base / "input" / "starts.csv").write_text("prompt,start\ncar,../outside.png\n", encoding="utf-8")
    with pytest.raises(GraphError, match="outside ComfyUI's input folder"):
        run_graph(graph("starts", unsafe_file="starts.csv"))


def test_an_arm_that_the_guard_would_not_serve_is_not_shown_as_guarded(graph, run_graph, comfy):
    tensors = load_file(comfy.loras / "safety_te.safetensors")
    minus = {name: -tensor if name.endswith("lora_up.weight") else tensor for name, tensor in tensors.items()}
    save_file(minus, comfy.loras / "minus.safetensors")
    comfy.folder_paths.filename_list_cache.clear()
    with pytest.raises(GraphError, match="net strength"):
        run_graph(graph("minus", task="minus.safetensors", task_strength=1.0))


def test_a_guarded_model_cannot_be_audited(graph, run_graph):
    made = guarded_graph("safety.safetensors", None)
    nodes = graph("guarded") | {name: made[name] for name in ("safety", "guard")}
    nodes["model"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    nodes["audit"]["inputs"]["model"] = ["model", 0]
    with pytest.raises(GraphError, match="checkpoint loader's own"):
        run_graph(nodes)


@pytest.mark.parametrize("text", ['{"audit": false}', "", "[]", '{"audit": "no"}', '{"audit": null}', "{", "\x00"])
def test_the_operator_switches_audits_off_and_a_broken_file_does_too(text, policy, graph, run_graph):
    policy(text)
    with pytest.raises(GraphError, match="Audits are off"):
        run_graph(graph("off"))


@pytest.mark.parametrize("text", ["{}", '{"audit": true}', '{"other": 1}'])
def test_a_policy_that_does_not_speak_of_audits_leaves_them_on(text, policy, audit):
    policy(text)
    audit.check_policy(audit.protected_folder())


def test_without_a_policy_audits_are_on_and_a_link_to_nowhere_is_none(audit, tmp_path, comfy):
    audit.check_policy(tmp_path)
    (tmp_path / audit.POLICY_FILE).symlink_to(tmp_path / "gone.json")
    with pytest.raises(comfy.host.GuardError, match="Audits are off"):
        audit.check_policy(tmp_path)


@given(st.binary(max_size=200))
def test_whatever_the_policy_holds_it_is_on_off_or_an_error_of_ours(audit, tmp_path_factory, comfy, data):
    folder: Path = tmp_path_factory.mktemp("policy")
    (folder / audit.POLICY_FILE).write_bytes(data)
    try:
        said = json.loads(data.decode("utf-8"))
    except ValueError:
        said = None
    if isinstance(said, dict) and said.get("audit", True) is True:
        audit.check_policy(folder)
    else:
        with pytest.raises(comfy.host.GuardError, match="Audits are off"):
            audit.check_policy(folder)
