"""The training nodes in the real ComfyUI: what they make, what they leave as it was, what they refuse."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from modular_lora_guard.tools.bootstrap.paths import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.graphs import GraphError, base_graph, bits, guarded_graph
from support.kohya_toys import STUB, stub_weights

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

IMAGES = ROOT / "tools" / "world" / "assets" / "gloss" / "10_gloss"
STEMS = ("cat-face", "balloon", "crown")
SMALL = {"network_dim": 4, "network_alpha": 4.0, "train_batch_size": 2, "max_train_steps": 2}
TASK = SMALL | {"resolution": 64, "target": "cross-attention", "data_set": "pictures"}
SAFETY = SMALL | {"train_batch_size": 1, "train_size": 64, "concept": "twemoji, car", "preserve": "twemoji, cat face"}
PREVIEWS = {"sample_every_n_steps": 2, "sample_prompts": "gloss, cat\ngloss, car"}
SMALL_PREVIEWS = "sample_size = 64\nsample_steps = 2\n"
FLOAT = "save_precision = 'float'\n"  # tensors are compared bit for bit


def part(comfy, name: str) -> ModuleType:
    """A module of the pack as ComfyUI loaded it."""
    return importlib.import_module(f"modular_lora_guard.{name}")


@pytest.fixture(autouse=True)
def inputs(comfy, loras, tmp_path, monkeypatch):
    """ComfyUI's folders: an input folder with a data set of three images, output and models without earlier files."""
    folder = tmp_path / "input" / "pictures" / "2_gloss"
    folder.mkdir(parents=True)
    for stem in STEMS:
        for ending in (".png", ".txt"):
            shutil.copy(IMAGES / f"{stem}{ending}", folder)
    (tmp_path / "loras").mkdir()
    for lora in comfy.loras.glob("*.safetensors"):
        shutil.copy(lora, tmp_path / "loras")
    folders = comfy.folder_paths.folder_names_and_paths
    for kind in ("loras", "safety_loras"):
        monkeypatch.setitem(folders, kind, ([str(tmp_path / kind)], {".safetensors"}))
    monkeypatch.setattr(comfy.folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(comfy.folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "input"


def defaults(comfy, node: str) -> dict:
    schema = comfy.nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()
    found = {**schema["required"], **schema.get("optional", {})}
    return {name: spec[1]["default"] for name, spec in found.items() if len(spec) > 1 and "default" in spec[1]}


def training(comfy, kind: str, **changes) -> dict:
    """The graph of a small training; ``safety_lora`` is a file's name."""
    graph = base_graph()
    values = defaults(comfy, kind) | {"preset": "none", "model": ["ckpt", 0], "clip": ["ckpt", 1], "vae": ["ckpt", 2]}
    values |= (TASK if kind == "ModularLoraTrainTask" else SAFETY) | changes
    if name := values.pop("safety_lora", ""):
        graph["safety"] = {"class_type": "ModularLoraLoadSafety", "inputs": {"lora_name": name, "strength": 1.0}}
        values["safety_lora"] = ["safety", 0]
    graph["train"] = {"class_type": kind, "inputs": values}
    return graph


def served(graph: dict, **inputs) -> dict:
    """``graph`` with Guard Model, a guarded sampler and an image saved behind it."""
    whole = guarded_graph(task=None, clip=True) | {k: graph[k] for k in ("train", "safety") if k in graph}
    whole["guard"]["inputs"] |= inputs
    return whole


@pytest.fixture
def train(comfy, run_graph):
    """Runs a small task training: (LoRA file, outputs)."""

    def run(**changes):
        out = run_graph(training(comfy, "ModularLoraTrainTask", **changes))["train"]
        return (out[0][0].lora if out else None), out

    return run


def shape_of(module: torch.nn.Module) -> dict:
    """Which objects a model consists of, whether they want gradients, and what hangs on them."""
    found = {}
    for path, m in module.named_modules():
        tensors = {n: (id(t), t.requires_grad) for n, t in (m._parameters | m._buffers).items() if t is not None}
        hooks = len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        found[path] = id(m), type(m), tensors, hooks, "forward" in vars(m), [n for n in vars(m) if "peft" in n]
    return found


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(comfy, kind: str = "loras") -> set[str]:
    folder = Path(comfy.folder_paths.get_folder_paths(kind)[0])
    return {file.name for file in folder.glob("*")} if folder.is_dir() else set()


def refused(run) -> str:
    with pytest.raises(GraphError) as caught:
        run()
    return str(caught.value)


def test_a_trained_task_lora_is_served_at_once_and_the_model_is_what_it_was(comfy, run_graph):
    model, clip, vae = run_graph(guarded_graph("safety_te.safetensors", task=None, clip=True))["ckpt"]
    models = model.model, clip.cond_stage_model, vae.first_stage_model
    before, built, old = [bits(m) for m in models], [shape_of(m) for m in models], names(comfy)
    changes = PREVIEWS | {"target": "linear", "gradient_checkpointing": True, "network_train_text_encoder": True}
    graph = training(comfy, "ModularLoraTrainTask", output_name="made", safety_lora="safety_te.safetensors", **changes)
    graph["train"]["inputs"]["more_options"] = SMALL_PREVIEWS + "training_comment = 'a test'"
    out = run_graph(served(graph, task_lora=["train", 0]))
    assert out["ckpt"][0].model is model.model
    assert [shape_of(m) for m in models] == built
    assert all(same(a, bits(m)) for a, m in zip(before, models, strict=True))
    (task,), report, loss, samples, without = out["train"]
    assert names(comfy) - old == {"made.safetensors"}
    metadata = task.lora.metadata
    assert (metadata["modular_lora.role"], metadata["ss_training_comment"]) == ("task", "a test")
    assert metadata["modular_lora.safety_sha256"] == out["safety"][0][0].lora.sha256
    assert "\nsaved as made.safetensors in loras" in report
    assert loss.shape == (1, 360, 640, 3)
    assert samples.shape == without.shape == (2, 64, 64, 3)
    assert not torch.equal(samples, without), "the safety LoRA is in one of them alone"
    assert "\nguarded: " in out["sample"][1]
    assert comfy.server.texts["save"] == "1 of 1 images attested"


def options_node(comfy, kind: str = "Task", **values) -> dict:
    """A training options node with the values that it has until they are set, and ``values``."""
    name = f"ModularLora{kind}TrainingOptions"
    return {"class_type": name, "inputs": defaults(comfy, name) | values}


def test_values_of_an_options_node_win_over_the_preset_and_are_those_of_the_former_inputs(comfy, run_graph, train):
    few = {"data_set": "pictures", "max_train_steps": 1, "preset": "style", "output_name": "by_node"}
    graph = training(comfy, "ModularLoraTrainTask", **few)
    given = {"network_dim": 4, "network_alpha": 2.0, "target": "attention", "resolution": 64, "flip_aug": "no"}
    given |= {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    given |= {"sample_every_n_steps": 1, "sample_prompts": "gloss, cat\n\ngloss, car", "max_token_length": "150"}
    graph["options"] = options_node(comfy, **given, more_options=SMALL_PREVIEWS + FLOAT)
    listed = comfy.nodes.NODE_CLASS_MAPPINGS["ModularLoraTrainTask"].INPUT_TYPES()
    listed = {**listed["required"], **listed["optional"]}
    own = {name: value for name, value in graph["train"]["inputs"].items() if name in listed}
    graph["train"]["inputs"] = own | {"options": ["options", 0], "colour": "red"}
    (task,), report, _, samples, without = run_graph(graph)["train"]
    lora = task.lora
    assert {(len(layer.down), float(layer.alpha)) for layer in lora.layers.values()} == {(4, 2.0)}
    assert samples.shape == (2, 64, 64, 3)
    assert without.shape == (1, 1, 1, 3), "there is no safety LoRA"
    assert "preset style (sd): " in report
    assert "network_dim 4 for 16" in report
    assert "input colour: " in report
    first, second, *shown = comfy.server.texts["train"].splitlines()
    assert (first, second) == ("Trained in 1 step and saved.", f"saved as {lora.path.name} in loras")
    assert [line.partition(" ")[0] for line in shown] == ["input", "preset"]
    assert all(line in report for line in shown)
    assert lora.sha256 in report
    assert lora.metadata["ss_learning_rate"] == "0.0001"

    former = given | {"flip_aug": False, "max_token_length": 150}
    few |= {"output_name": "by_inputs", "train_batch_size": 1, "more_options": SMALL_PREVIEWS + FLOAT}
    again, _ = train(**few, **former)
    assert same(load_file(lora.path), load_file(again.path))


@pytest.mark.parametrize("empty", ["", " \n"])
@pytest.mark.parametrize(
    ("kind", "more", "found"),
    [
        ("Safety", "preserve = ['a cat', 'a house']", {"preserve": ("a cat", "a house")}),
        ("Safety", "concept = 'a car'\nsynonyms = ['a lorry']", {"concept": ("a car",), "synonyms": ("a lorry",)}),
        ("Safety", "objective = 'leco'\nneutral = 'a tree'", {"objective": "leco", "neutral": "a tree"}),
        ("Task", "sample_prompts = ['a dog']\ntraining_comment = 'x'", {"sample_prompts": ("a dog",)}),
        ("Task", "optimizer_args = ['weight_decay=0.1']", {"optimizer_args": ("weight_decay=0.1",)}),
    ],
)
def test_an_empty_input_of_text_takes_nothing_away(kind, more, found, empty, comfy):
    """On the training node, among the former inputs, and on the options node, beside more_options of the latter."""
    node, module = comfy.nodes.NODE_CLASS_MAPPINGS[f"ModularLoraTrain{kind}"], part(comfy, "nodes.training_options")
    cls = getattr(part(comfy, "training.options"), f"{kind}Options")
    hints = part(comfy, "training.options").hints(cls)
    inputs = options_node(comfy, kind)["inputs"]
    texts = {name: empty for name, value in inputs.items() if value == ""} | {"more_options": more}
    handed = module._handed(cls, inputs | texts)
    own = defaults(comfy, f"ModularLoraTrain{kind}") | {"preset": "none"}
    given = {name: empty if value == "" else value for name, value in own.items() if name in hints}
    former = {name: empty for name in found if name not in given}
    given.pop("resume")
    made = module.asked(node, cls, given | former, handed, lambda: "sd").options
    assert {name: getattr(made, name) for name in found} == found
    written = {"sample_prompts": "a pig"}
    assert module.asked(node, cls, given | written, handed, lambda: "sd").options.sample_prompts == ("a pig",)


def test_the_safety_options_node_is_heard_and_base_previews_are_drawn_once(comfy, run_graph):
    given = {"train_size": 64, "train_batch_size": 1, "denoising_steps": 2, "network_dim": 2, "relative_error": "no"}
    given |= {"sample_every_n_steps": 1, "sample_prompts": "twemoji, car", "sample_size": 64, "sample_steps": 2}
    graph = training(comfy, "ModularLoraTrainSafety", preset="safety", output_name="seen")
    graph["options"] = options_node(comfy, "Safety", **given)
    own = {"options": ["options", 0], "concept": "twemoji, car", "preserve": "", "preset": "safety", "seed": 1}
    own |= {"output_name": "seen", "max_train_steps": 2}
    graph["train"]["inputs"] = {name: graph["train"]["inputs"][name] for name in ("model", "clip", "vae")} | own
    (safety,), report, _, samples, without = run_graph(graph)["train"]
    assert {len(layer.down) for layer in safety.lora.layers.values()} == {2}
    assert samples.shape == without.shape == (1, 64, 64, 3)
    assert "preset safety (sd): " in report
    folder = Path(comfy.folder_paths.get_output_directory()) / "modular_lora" / "seen" / "sample"
    assert sorted(one.name for one in folder.iterdir()) == [
        "seen_000001_00.png", "seen_000002_00.png", "seen_without_00.png",
    ]  # fmt: skip


def test_text_encoder_and_unet_layers_are_trained_and_stock_nodes_load_every_key(comfy, train, loaded, caplog):
    lora, _ = train(network_train_text_encoder=True, target="conv", max_train_steps=1)
    text = [layer for name, layer in lora.layers.items() if name.startswith("lora_te_text_model_encoder_layers_")]
    assert len(text) == 6 * len(loaded[1].cond_stage_model.clip_l.transformer.text_model.encoder.layers) > 0
    assert all(layer.up.float().norm() > 0 for layer in lora.layers.values())
    infos = comfy.anatomy.model_info(loaded[0]), comfy.anatomy.clip_info(loaded[1])
    known = infos[0].key_map.keys() | infos[1].key_map.keys()
    assert {key.rpartition(".lora_")[0] for key in load_file(lora.path) if ".lora_" in key} <= known
    caplog.clear()
    model, clip = comfy.nodes.LoraLoader().load_lora(*loaded[:2], lora.path.name, 1.0, 1.0)
    assert [record.getMessage() for record in caplog.records if "not loaded" in record.getMessage()] == []
    assert len(model.patches) + len(clip.patcher.patches) == len(lora.layers)


def test_the_same_seed_gives_the_same_task_lora_with_and_without_safety_lora_and_previews(comfy, train, monkeypatch):
    loop, optimized = part(comfy, "training.loop"), []
    make = loop.make_optimizer
    monkeypatch.setattr(
        loop, "make_optimizer", lambda groups, options: optimized.append(groups) or make(groups, options)
    )
    attached, attach = [], part(comfy, "comfy_host.trainer_model").ComfyHostModel.attached
    monkeypatch.setattr(
        part(comfy, "comfy_host.trainer_model").ComfyHostModel,
        "attached",
        lambda self, s: attached.append(s) or attach(self, s),
    )
    shown = {"safety_lora": "safety_te.safetensors", "more_options": SMALL_PREVIEWS + FLOAT, **PREVIEWS}
    beside, out = train(output_name="beside", **shown)
    alone, _ = train(output_name="alone", more_options=FLOAT)
    assert same(load_file(beside.path), load_file(alone.path))
    assert out[3].max() > 0
    (((safety,),),) = [attached]
    assert "frozen, in no optimizer group, not in the training" in out[1]
    inside = {p.data_ptr() for groups in optimized for group in groups for p in group["params"]}
    assert len(inside) > 0
    for tensor in (t for layer in safety.lora.layers.values() for t in (layer.down, layer.up)):
        assert not tensor.requires_grad
        assert tensor.data_ptr() not in inside


def interrupting(comfy, monkeypatch, at: int) -> None:
    """ComfyUI's interrupt button, pressed when step ``at`` is done."""
    watch, management = part(comfy, "comfy_host.progress").NodeWatch, sys.modules["comfy.model_management"]
    step = watch.step

    def pressed(self, done, total, losses):
        step(self, done, total, losses)
        if done == at:
            management.interrupt_current_processing()

    monkeypatch.setattr(watch, "step", pressed)


def test_an_interrupt_leaves_a_state_that_goes_on_exactly_and_nothing_else(comfy, run_graph, train, monkeypatch):
    four = {"max_train_steps": 4, "more_options": FLOAT, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
    whole, _ = train(output_name="whole", **four)
    model = run_graph(training(comfy, "ModularLoraTrainTask", output_name="whole", **four))["ckpt"][0].model
    before, old = bits(model), names(comfy)
    with monkeypatch.context() as patched:
        interrupting(comfy, patched, 2)
        assert train(output_name="parts", **four) == (None, None)
    assert "execution_interrupted" in [event for event, _ in comfy.server.messages]
    kept = "stopped; a state is kept: switch resume on to go on from it\nparts-step00000002-state"
    assert comfy.server.texts["train"] == kept, "also where the front end clears what it showed of the progress"
    assert ("modular_lora.report", {"node": "train", "text": kept}) in comfy.server.messages
    assert names(comfy) == old
    assert same(before, bits(model))
    folder = Path(comfy.folder_paths.get_output_directory()) / "modular_lora" / "parts"
    assert [f.name for f in folder.iterdir()] == ["parts-step00000002-state"]
    with refuses("resume.changed", "network_dim", "'4'", "'8'"):
        train(output_name="parts", resume=True, **four | {"network_dim": 8})
    resumed, out = train(output_name="parts", resume=True, **four)
    assert same(load_file(resumed.path), load_file(whole.path))
    assert "4 steps" in out[1]


def test_a_taken_name_gets_a_number(comfy, train):
    first, _ = train(output_name="taken", max_train_steps=1)
    kept = first.path.read_bytes()
    second, _ = train(output_name="taken", max_train_steps=1, seed=43)
    assert (first.path.name, second.path.name) == ("taken.safetensors", "taken_001.safetensors")
    assert first.path.read_bytes() == kept


def test_projection_while_training_is_recorded_in_the_file(train):
    lora, out = train(project=True, safety_lora="safety_te.safetensors")
    assert float(lora.metadata["modular_lora.projected"].removeprefix("residual ")) < 1e-3
    assert "layers kept clear of the safety LoRA's row space" in out[1]


@pytest.mark.parametrize(
    ("objective", "more"),
    [("esd-x", ""), ("esd-x", "on_policy = true"), ("sdd", ""), ("leco", "neutral = 'twemoji, star'")],
)
def test_a_trained_safety_lora_is_one_that_the_guard_takes(objective, more, comfy, run_graph):
    more = f"denoising_steps = 4\n{more}"
    graph = training(comfy, "ModularLoraTrainSafety", objective=objective, output_name="removed", more_options=more)
    guard = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "safety_lora": ["train", 0]}
    graph["guard"] = {"class_type": "ModularLoraGuardModel", "inputs": guard}
    graph["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["guard", 2]}}
    out = run_graph(graph)
    (safety,), report, _, samples, _ = out["train"]
    assert names(comfy, "safety_loras") == {"removed.safetensors"}
    metadata = safety.lora.metadata
    assert (metadata["modular_lora.role"], metadata["modular_lora.concept"]) == ("safety", "twemoji, car")
    assert all("attn2" in name for name in safety.lora.layers) == (objective != "leco")
    assert "1 prompts erased, 1 kept" in report
    assert samples.shape == (1, 1, 1, 3)
    assert f"{len(safety.lora.layers)} layers guarded" in out["guard"][2]


def test_a_model_that_is_not_w0_is_refused_or_recorded(comfy, run_graph):
    graph = training(comfy, "ModularLoraTrainTask", max_train_steps=1)
    guarded = guarded_graph()
    guarded["as"] = {"class_type": "ModularLoraGuardedAsModel", "inputs": {"guarded_model": ["guard", 0]}}
    inputs = graph["train"]["inputs"]
    behind = graph | {k: guarded[k] for k in ("safety", "task", "guard", "as")}
    behind["train"] = {**graph["train"], "inputs": inputs | {"model": ["as", 0]}}
    with refuses("train.guarded-model", "W0"):
        run_graph(behind)

    stock = {"lora_name": "other.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
    stock |= {"model": ["ckpt", 0], "clip": ["ckpt", 1]}
    merged = graph | {"lora": {"class_type": "LoraLoader", "inputs": stock}}
    merged["train"] = {**graph["train"], "inputs": inputs | {"model": ["lora", 0], "clip": ["lora", 1]}}
    with refuses("model.merged"):
        run_graph(merged)
    merged["train"]["inputs"]["more_options"] = "allow_contaminated_base = true"
    merged = served(merged, task_lora=["train", 0]) | {"lora": merged["lora"]}
    out = run_graph(merged)
    assert "merged into" in out["train"][0][0].lora.metadata["modular_lora.contaminated_base"]
    assert "WARNING: trained on a base that" in out["train"][1]
    assert "trained on a base that is not clean" in out["guard"][2]


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"output_name": "../x"}, "name.not-plain", "output_name '../x'"),
        ({"output_name": ""}, "name.not-plain", "output_name ''"),
        ({"more_options": "samplesteps = 3"}, "option.unknown-key", "sample_steps?"),
        ({"more_options": "known_bases = ['/etc/passwd']"}, "train.option-refused", "known_bases"),
        ({"more_options": "output_dir = '/'"}, "train.option-refused", "output_dir"),
        ({"more_options": "network_weights = 'x'"}, "train.option-refused", "network_weights"),
        ({"more_options": "log_with = 'wandb'"}, "train.option-refused", "log_with"),
        ({"output_dir": "/"}, "train.option-refused", "output_dir"),
        ({"train_data_dir": "/"}, "train.option-refused", "train_data_dir"),
        ({"more_options": "sample_size = "}, "option.toml", ""),
        ({"more_options": "sample_size = 'big'"}, "option.wrong-value", "sample_size"),
        ({"resume": True}, "resume.no-state", ""),
        ({"project": True}, "option.project", "safety_lora"),
        ({"data_set": "outside.toml"}, "dataset.outside", "'input'"),
        ({"data_set": "empty"}, "dataset.not-usable", "none of 0"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy_and_nothing_is_written(changes, code, named, comfy, train, inputs):
    outside = inputs.parent / "elsewhere"
    shutil.copytree(inputs / "pictures" / "2_gloss", outside)
    (inputs / "outside.toml").write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = {str(outside)!r}\n")
    (inputs / "empty" / "1_none").mkdir(parents=True)
    old = names(comfy)
    with refuses(code, named):
        train(**changes)
    assert names(comfy) == old
    assert list((inputs.parent / "output").rglob("*.safetensors")) == []


def test_a_data_set_that_is_not_in_the_input_folder_is_refused(comfy, train):
    said = refused(lambda: train(data_set="../pictures"))  # by ComfyUI 0.33.0, by the node in 0.3.75
    assert "Value not in list" in said or "'../pictures' is not a data set in the input folder" in said


def test_a_data_set_toml_cannot_ask_which_folders_the_server_has(comfy, run_graph, inputs):
    def answer(folder: str) -> str:
        (inputs / "ask.toml").write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = {folder!r}\n")
        values = {"data_set": "ask.toml", "resolution": 64, "train_batch_size": 1}
        graph = {"report": {"class_type": "ModularLoraDatasetReport", "inputs": values}}
        return refused(lambda: run_graph(graph)).replace(folder, "X")

    (inputs.parent / "there").mkdir()
    for there, not_there in (("/root", "/no-such-folder"), ("../there", "../nowhere")):
        assert answer(there) == answer(not_there)
        assert "is outside the folder 'input'" in answer(there)


def test_safety_training_needs_a_concept_that_is_not_preserved_too(comfy, run_graph):
    run = lambda **changes: run_graph(training(comfy, "ModularLoraTrainSafety", **changes))  # noqa: E731
    with refuses("option.no-concept", "concept"):
        run(concept=" \n")
    with refuses("option.both-lists", "twemoji, car"):
        run(preserve="twemoji, car")


@pytest.mark.parametrize("data_set", ["pictures", "set.toml"])
def test_the_dataset_report_counts_what_is_there(data_set, comfy, run_graph, inputs):
    folder = inputs / "pictures" / "2_gloss"
    subset = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = {str(folder)!r}\nnum_repeats = 2\n"
    (inputs / "set.toml").write_text(f"[general]\ncaption_extension = '.txt'\n{subset}")
    (folder / "broken.png").write_bytes(b"no picture")
    exif = Image.Exif()
    exif[0x0112] = 6  # upright when turned
    Image.new("RGB", (96, 48), "red").save(folder / "a_turned.jpg", exif=exif)
    shutil.copy(folder / "crown.png", folder / "again.png")  # without a caption

    def run():
        values = {"data_set": data_set, "resolution": 64, "train_batch_size": 2}
        return run_graph({"report": {"class_type": "ModularLoraDatasetReport", "inputs": values}})["report"]

    report, sheet = run()
    assert "5 images, 10 draws in 5 batches an epoch" in report
    assert "again.png" in report
    assert "broken.png" in report
    shown, _, hashed = report.rpartition("\n")
    assert comfy.server.texts["report"] == shown
    assert len(hashed.removeprefix("  sha256 ")) == 64
    assert sheet.shape == (1, 100, 800, 3)
    red = sheet[0, :, :96, 0] - sheet[0, :, :96, 1] > 0.9
    assert (int(red.any(1).sum()), int(red.any(0).sum())) == (96, 48)  # as it is seen and trained
    (folder / "balloon.png").unlink()
    assert "4 images" in run()[0]


def test_a_projected_file_is_clear_of_the_safety_lora_and_served(comfy, run_graph):
    graph = guarded_graph("safety_te.safetensors", "task_te.safetensors", clip=True)
    inputs = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "task_lora": ["task", 0], "safety_lora": ["safety", 0]}
    graph["project"] = {"class_type": "ModularLoraProjectTask", "inputs": inputs | {"save_precision": "fp16"}}
    graph["guard"]["inputs"]["task_lora"] = ["project", 0]
    out = run_graph(graph)
    (task,), report = out["project"]
    (safety,) = out["safety"][0]
    assert task.lora.path.name == "task_te_projected.safetensors"
    assert (task.strength_model, task.strength_clip) == (0.7, 0.7)
    assert task.lora.metadata["modular_lora.safety_sha256"] == safety.lora.sha256
    assert "of its energy removed" in report
    shown = f"{report.splitlines()[0]}\nsaved as {task.lora.path.name} in loras"
    assert comfy.server.texts["project"] == shown
    for name, layer in task.lora.layers.items():
        A, S = layer.down.flatten(1).double(), safety.lora.layers[name].down.flatten(1).double()
        assert (A @ S.T).norm() < 1e-3 * A.norm() * S.norm()
    assert "\nguarded: " in out["sample"][1]


def test_the_kohya_engine_trains_from_the_node_and_needs_a_checkout(comfy, run_graph, monkeypatch):
    checkpoint = comfy.base / "models" / "checkpoints" / "stub.safetensors"
    save_file(stub_weights(), checkpoint)
    graph = training(comfy, "ModularLoraTrainTask", engine="kohya", ckpt_name=checkpoint.name, output_name="by_kohya")
    monkeypatch.delenv("SD_SCRIPTS_PATH", raising=False)
    with refuses("kohya.no-checkout"):
        run_graph(graph)
    monkeypatch.setenv("SD_SCRIPTS_PATH", str(STUB))
    monkeypatch.setenv("SD_SCRIPTS_PYTHON", sys.executable)
    ((task,), report, *_) = run_graph(graph)["train"]
    assert task.lora.path.name == "by_kohya.safetensors"
    assert len(task.lora.layers) > 0
    assert task.lora.metadata["modular_lora.base_sha256"] == comfy.anatomy.model_sha256(run_graph(graph)["ckpt"][0])
    assert "sd-scripts" in report
    assert task.lora.sha256 in report
    assert comfy.server.texts["train"].startswith("Trained in ")
    graph["train"]["inputs"]["ckpt_name"] = ""
    with refuses("kohya.no-checkpoint-name"):
        run_graph(graph)
