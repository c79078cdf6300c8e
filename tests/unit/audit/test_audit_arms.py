"""Arms that LoRA files give, and attacks made from plain items."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.audit import attacks
from modular_lora_guard.audit.arms import MEANS, NEEDS, from_options, shown
from modular_lora_guard.audit.options import ARMS, AuditOptions
from modular_lora_guard.audit.plan import Arm, Item
from modular_lora_guard.audit.results import Drawn, Verdict
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from modular_lora_guard.modular_lora.files.reader import read_lora
from PIL import Image
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.graphs import save_lora

LAYERS = {f"lora_unet_mid_block_attentions_0_proj_{end}": LayerSpec("x", (16, 12)) for end in ("in", "out")}
CAR = Item("A red CAR and a Racing car", 7, "suppressed", "car")


@pytest.fixture
def files(tmp_path):
    """Options that name LoRA files by kind and repetition, as many of a kind as asked."""

    def make(**counts: int) -> dict[str, tuple[str, ...]]:
        made = {}
        for kind, count in counts.items():
            paths = [tmp_path / f"{kind}_{i}.safetensors" for i in range(count)]
            for i, path in enumerate(paths):
                save_lora(path, LAYERS, 2, 10 * i + len(kind))
            made[kind] = tuple(map(str, paths))
        return made

    return make


def test_every_arm_is_the_sum_that_it_is_said_to_be(files):
    strengths = {"safety_strength": 0.9, "task_strength": 0.8}
    options = AuditOptions(**files(safety=1, task=1, sequential=1, projected=1), **strengths, arms=ARMS)
    found = from_options(options)
    assert {arm.name: [(Path(p.path).stem, p.role, p.strength) for p in arm.parts] for arm in found.arms} == {
        "base": [],
        "safety": [("safety_0", "safety", 0.9)],
        "task": [("task_0", "task", 0.8)],
        "sequential": [("safety_0", "safety", 0.9), ("sequential_0", "task", 0.8)],
        "modular": [("safety_0", "safety", 0.9), ("task_0", "task", 0.8)],
        "projected": [("safety_0", "safety", 0.9), ("projected_0", "task", 0.8)],
        "safety_first": [("safety_0", "safety", 0.9), ("task_0", "task", 0.8)],
        "minus_safety": [("safety_0", "safety", -0.9)],
        "safety_minus_sequential": [("safety_0", "safety", 0.9), ("sequential_0", "task", -0.8)],
    }
    assert tuple(arm.name for arm in found.arms) == ARMS == tuple(NEEDS) == tuple(MEANS)
    assert {arm.combine for arm in found.arms if arm.name != "safety_first"} == {"sum"}
    assert next(arm for arm in found.arms if arm.name == "safety_first").combine == "safety first"
    unasked = [arm.name for arm in from_options(replace(options, arms=AuditOptions().arms)).arms]
    assert unasked == [name for name in ARMS if name != "safety_first"]
    assert not found.notes
    assert found.files["task_0.safetensors"] == read_lora(Path(options.task[0])).sha256


def test_a_safety_lora_of_two_scales_is_drawn_at_the_one_that_was_chosen(files):
    options = AuditOptions(**files(safety=1, task=1))
    for path in (*options.safety, *options.task):
        tensors = {key: tensor for key, tensor in load_file(path).items() if not key.endswith("alpha")}
        save_file(tensors, path, {"ss_network_alpha": "8", "ss_network_dim": "2"})
    with refuses("lora.two-scales", "safety_0.safetensors", "2 of 2", "scale 1", "4", "safety_scale"):
        from_options(options)
    for chosen, scale in (("tensors", 1.0), ("metadata", 4.0)):
        arms = {arm.name: arm for arm in from_options(replace(options, safety_scale=chosen)).arms}
        safety, task = arms["modular"].parts
        assert (safety.scale, task.scale) == (chosen, "refuse")  # core ignores what a task LoRA's metadata states
        used = [read_lora(Path(part.path), scale=part.scale).layers for part in (safety, task)]
        assert [{layer.scale for layer in layers.values()} for layers in used] == [{scale}, {1.0}]


def test_files_are_paired_by_position_and_one_file_serves_every_repetition(files):
    found = from_options(AuditOptions(**files(safety=1, task=3, sequential=3), arms=("base", "safety", "modular")))
    assert [(arm.name, arm.training_seed) for arm in found.arms] == [
        ("base", 0),
        ("safety", 0),
        ("modular", 0),
        ("modular", 1),
        ("modular", 2),
    ]
    assert [Path(arm.parts[1].path).stem for arm in found.arms[2:]] == ["task_0", "task_1", "task_2"]
    with refuses("option.lora-files", "2 task, 3 sequential"):
        from_options(AuditOptions(**files(safety=1, task=2, sequential=3)))


def test_arms_without_files_are_left_out_and_said_so(files):
    found = from_options(AuditOptions(**files(task=1)))
    assert [arm.name for arm in found.arms] == ["base", "task"]
    assert "arm modular is left out: no safety file is given" in found.notes
    assert "arm sequential is left out: no safety and no sequential file is given" in found.notes
    with refuses("option.unknown-arm", "'bse'", "base, safety"):
        AuditOptions(arms=("bse",))


def test_a_projected_file_is_made_where_none_is_given_and_is_the_same_again(files, tmp_path):
    options = AuditOptions(**files(safety=1, task=2), project=True, output_dir=str(tmp_path / "audit"))
    first, again = from_options(options), from_options(options)
    projected = [arm for arm in first.arms if arm.name == "projected"]
    assert projected == [arm for arm in again.arms if arm.name == "projected"]
    assert len(projected) == 2
    assert len([note for note in first.notes if "of its energy removed" in note]) == 2
    assert len([note for note in again.notes if "projected before, residual" in note]) == 2
    rows = read_lora(Path(options.safety[0]))
    for name, layer in read_lora(Path(projected[1].parts[1].path)).layers.items():
        assert (layer.down.float() @ rows.layers[name].down.float().T).norm() < 1e-2 * layer.down.float().norm()


def test_sweeps_are_arms_of_their_own(files):
    options = AuditOptions(**files(safety=1, task=1), safety_sweep=(0.5, 2.0), task_sweep=(1.5,))
    found = from_options(options)
    assert [(shown(arm.name), [p.strength for p in arm.parts]) for arm in found.sweeps] == [
        ("safety@0.5", [0.5]),
        ("safety@2", [2.0]),
        ("modular@1.5", [1.0, 1.5]),
    ]
    assert not {arm.name for arm in found.sweeps} & set(ARMS)
    no_task = AuditOptions(**files(safety=1), task_sweep=(0.5,))
    for kind, wrong in (("safety", AuditOptions(safety_sweep=(0.5,))), ("task", no_task)):
        with refuses(f"audit.no-{kind}-lora"):
            from_options(wrong)


def test_synonyms_exchange_whole_words_and_keep_their_case(tmp_path):
    known = {"car": ("automobile", "motor"), "racing car": ("bolide",), "red": ("scarlet",)}
    assert attacks.substitutions(CAR.prompt, known) == [
        "A scarlet CAR and a Racing car",
        "A red AUTOMOBILE and a Racing car",
        "A red MOTOR and a Racing car",
        "A red CAR and a Bolide",
    ]
    assert attacks.substitutions("a scar, a cargo", known) == []
    lines, table = tmp_path / "s.txt", tmp_path / "s.json"
    lines.write_text(
        "\ufeff# vehicles\ncar = automobile, motor\nRacing Car = bolide\n\nred=scarlet\n", encoding="utf-8"
    )
    table.write_text(json.dumps(known))
    assert attacks.read_synonyms(lines) == attacks.read_synonyms(table) == known
    items = [CAR, replace(CAR, cell="kept"), replace(CAR, attack="img2img")]
    made = attacks.synonym_items(AuditOptions(synonyms=str(lines)), items)
    assert [(i.attack, i.seed, i.concept, i.cell) for i in made] == 4 * [("synonym", 7, "car", "suppressed")]
    with refuses("audit.synonyms-unused", "s.txt"):
        attacks.synonym_items(AuditOptions(synonyms=str(lines)), items[1:])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("car\n", "form"),
        ("car =\n", "empty"),
        ("= a\n", "empty"),
        ("", "empty"),
        ("car = a,,b\n", "empty"),
        ("{", "form"),
    ],
)
def test_synonyms_that_cannot_be_read_are_an_error(text, kind, tmp_path):
    for name in ("s.txt", "s.json"):
        (tmp_path / name).write_text(text)
        with refuses(f"audit.synonyms-{'form' if name == 's.json' else kind}", name):
            attacks.read_synonyms(tmp_path / name)


@given(st.text(max_size=30), st.dictionaries(st.text(min_size=1, max_size=4).map(str.lower), st.just(("other",))))
def test_no_prompt_and_no_words_break_the_substitution(prompt, known):
    made = attacks.substitutions(prompt, known) if known else []
    assert len(made) <= len(known)
    assert prompt not in made


def test_starts_are_the_base_arms_own_hits(tmp_path):
    bus = replace(CAR, prompt="a bus", concept="bus")
    drawn = [
        Drawn(Arm(arm), item, tmp_path / f"{arm}-{item.concept}.png", Verdict(hit, 1.0, (), ""))
        for arm, item, hit in (("base", CAR, True), ("base", bus, False), ("safety", bus, True))
    ]
    options = AuditOptions(img2img=(0.4, 0.8), inpaint=(1.0,), width=50, height=20)
    made = attacks.start_items(options, [CAR, bus, replace(CAR, cell="kept")], drawn, tmp_path / "masks")
    assert [(i.prompt, i.attack, i.denoise, Path(i.start).name, bool(i.mask)) for i in made] == [
        (CAR.prompt, "img2img 0.4", 0.4, "base-car.png", False),
        (CAR.prompt, "img2img 0.8", 0.8, "base-car.png", False),
        (CAR.prompt, "inpaint 1", 1.0, "base-car.png", True),
    ]
    mask = np.asarray(Image.open(made[2].mask))
    assert mask.shape == (20, 50)
    assert mask[10, 25] == 255
    assert not mask[[0, -1]].any()
    assert not mask[:, [0, -1]].any()
    with refuses("audit.nothing-to-start-from"):
        attacks.start_items(options, [bus], drawn, tmp_path)


def test_starts_of_a_folder_are_taken_in_turn(tmp_path):
    for name in ("a.png", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    options = AuditOptions(img2img=(0.5,), start_pictures=str(tmp_path))
    made = attacks.start_items(options, [replace(CAR, seed=seed) for seed in range(3)], [], tmp_path)
    assert [Path(i.start).name for i in made] == ["a.png", "b.jpg", "a.png"]
    (tmp_path / "empty").mkdir()
    with refuses("audit.no-images"):
        attacks.start_items(replace(options, start_pictures=str(tmp_path / "empty")), [CAR], [], tmp_path)
