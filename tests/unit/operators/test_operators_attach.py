"""What a policy that attaches the guard says of graphs before they run, of families, and of a line at home."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.provenance.attestation import Attestation, GateRecord, LoraRecord
from modular_lora_guard.operators import home, rules
from modular_lora_guard.operators.graph import check
from modular_lora_guard.operators.policy import FILE, PolicyError, parse
from support.errors import refuses
from support.graphs import node
from support.policy_graphs import FACTS, SAFETY, TASK, Files, guarded, known

ONE = f'sha256 = "{SAFETY}", min_net_strength = 0.9'
ATTACH = f'[guard]\nattach = "always"\nrequired = [{{{ONE}}}]\n'
PACKS = {
    "PipeLoader": known("ckpt_name COMBO", "PIPE"),
    "PipeSampler": known("pipe PIPE; image IMAGE", "IMAGE"),
    "PackLoader": known("ckpt_name COMBO; lora_name COMBO", "MODEL CLIP"),
    "PackShow": known("model MODEL; images IMAGE", "IMAGE", True),
    "ModelMergeSimple": known("model1 MODEL; model2 MODEL", "MODEL"),
    "EasyCache": known("model MODEL", "MODEL"),
}
CORE = ("ModelMergeSimple", "EasyCache")


def refused(graph: dict, policy: str = ATTACH) -> dict[str, set[str]]:
    """Node -> rules that refuse it."""
    facts = FACTS | {name: replace(one, core=name in CORE) for name, one in PACKS.items()}
    found: dict[str, set[str]] = {}
    for one in check(graph, facts.get, parse(policy.encode(), Path(FILE)), Files()):
        found.setdefault(one.node, set()).add(one.rule)
    return found


def ordinary(**more: dict) -> dict:
    return {
        "ckpt": node("CheckpointLoaderSimple", ckpt_name="x"),
        "lora": node("LoraLoader", model=["ckpt", 0], clip=["ckpt", 1], lora_name="task.safetensors"),
        "pos": node("CLIPTextEncode", clip=["lora", 1], text="a cat"),
        "latent": node("EmptyLatentImage", width=64),
        "patched": node("FreeU", model=["lora", 0]),
        "sample": node("KSampler", model=["patched", 0], positive=["pos", 0], latent_image=["latent", 0]),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["ckpt", 2]),
        "save": node("SaveImage", images=["decode", 0]),
    } | more


def test_an_ordinary_graph_and_pipes_of_packs_pass_as_they_are() -> None:
    assert refused(ordinary()) == {}
    assert refused(ordinary(), f"{ATTACH}[gate]\nrequired = true\n") == {}
    pipe = {"load": node("PipeLoader", ckpt_name="x"), "draw": node("PipeSampler", pipe=["load", 0])}
    assert refused(pipe | {"save": node("SaveImage", images=["draw", 0])}) == {}
    graph = ordinary()
    graph["ckpt"] = node("PackLoader", ckpt_name="x", lora_name="task.safetensors")
    graph["decode"]["inputs"]["vae"] = ["vae", 0]
    assert "ckpt" not in refused(graph)
    assert refused(guarded()) == {}  # Guard Model, by itself


@pytest.mark.parametrize("kind", CORE)
def test_what_a_guarded_model_refuses_is_refused_when_queued(kind: str) -> None:
    links = {"model1": ["ckpt", 0], "model2": ["lora", 0]} if kind == "ModelMergeSimple" else {"model": ["ckpt", 0]}
    graph = ordinary(patched=node(kind, **links))
    assert refused(graph) == {"patched": {"guard.attach"}}


def test_weights_and_images_from_elsewhere_and_denied_files_do_not_pass() -> None:
    assert refused(ordinary(out=node("ModelSave", model=["lora", 0])))["out"] == {"nodes.allow"}
    assert refused({"load": node("LoadImage", image="x"), "save": node("SaveImage", images=["load", 0])}) == {
        "save": {"open.unattested"}
    }
    assert refused(ordinary(), f'{ATTACH}[tasks]\ndeny = ["{TASK}"]') == {"lora": {"tasks.deny"}}
    assert refused(ordinary(out=node("ModularLoraTrainTask", model=["lora", 0])))["out"] == {"open.training"}


def test_an_output_of_a_pack_may_take_guarded_models_where_it_is_named() -> None:
    graph = ordinary(out=node("PackShow", model=["lora", 0], images=["decode", 0]))
    assert "open.unattested" in refused(graph)["out"]
    assert refused(graph, f'{ATTACH}[nodes]\nshowing = ["PackShow"]') == {}


# The policy's keys


@pytest.mark.parametrize(
    "text",
    [
        '[guard]\nattach = "always"\nrequired = []',
        '[guard]\nattach = "sometimes"\nrequired = []',
        f'[guard]\nrequired = [{{{ONE}, file = "x.safetensors"}}]',
        f"[guard]\nrequired = [{{{ONE}, strength = 0.5}}]",
        f'[guard]\nrequired = [{{{ONE}}}]\nother_families = "gate"',
        f'{ATTACH}other_families = "gate"\n[open]\nunattested = true',
        f'[guard]\nattach = "always"\nrequired = [{{{ONE}, strength = 0}}]',
        f'[guard]\nrequired = [{{{ONE}, family = ""}}]',
    ],
)
def test_keys_that_do_nothing_or_make_no_sense_are_refused(text: str) -> None:
    with refuses("policy.wrong-value"):
        parse(text.encode(), Path(FILE))


# Families


def run(family: str, sha256: str = SAFETY) -> Attestation:
    """One in which nothing was evaluated yet."""
    lora = LoraRecord("safety", "safety", sha256, 1.0, 1.0)
    return Attestation("guarded", "", family, "", False, (lora,), {sha256: 1.0})


def families(other: str = "") -> object:
    both = f'{{{ONE}, family = "SD15"}}, {{sha256 = "{TASK}", family = "Flux"}}'
    return parse(f'[guard]\nattach = "always"\nrequired = [{both}]\n{other}'.encode(), Path(FILE))


def unsigned(lora, key: str) -> str:
    return ""


def test_a_run_must_carry_what_its_family_asks_for_and_no_more() -> None:
    rules.check_run(families(), run("SD15"), unsigned)
    rules.check_run(families(), run("Flux", sha256=TASK), unsigned)
    with refuses("refused.guard.required", "missing"):
        rules.check_run(families(), run("Flux"), unsigned)
    with refuses("refused.guard.required", "SDXL"):
        rules.check_run(families(), run("SDXL"), unsigned)
    rules.check_run(families('other_families = "gate"'), run("SDXL"), unsigned)


def test_an_image_that_no_guarded_run_made_leaves_by_a_gate_alone() -> None:
    policy = families('other_families = "gate"')
    gate = GateRecord("d", "1" * 64, "2" * 64, "blur", False, False, "3" * 64)
    rules.check_image(policy, None, gate, unsigned, True, True)
    rules.check_image(policy, run("SD15"), None, unsigned, False, True)
    for judged, accepted in ((None, False), (gate, False)):
        with refuses("refused.guard.other_families"):
            rules.check_image(policy, None, judged, unsigned, accepted, True)
    flagged = GateRecord("d", "1" * 64, "2" * 64, "report", True, False, "3" * 64)
    with refuses("refused.guard.other_families", "flagged"):
        rules.check_image(policy, None, flagged, unsigned, True, True)
    with refuses("refused.open.unattested"):
        rules.check_image(families(), None, gate, unsigned, True, True)


# At home


def test_a_line_names_mode_files_and_families() -> None:
    line = home.parse("# ours\n\nfamily: a b.safetensors for SD15, sub/c.SAFETENSORS for Flux\n", "guard.txt")
    assert (line.mode, line.loras) == ("family", (("a b.safetensors", "SD15"), ("sub/c.SAFETENSORS", "Flux")))
    policy = home.policy(line, (SAFETY, TASK), Path())
    assert policy.attaches
    assert policy.gate.required
    assert not any(vars(policy.open).values())
    assert [(one.sha256, one.family) for one in policy.guard.for_family("Flux")] == [(TASK, "Flux")]
    always = home.policy(home.parse("always: waiting for it.safetensors", "x"), (SAFETY,), Path())
    assert all(vars(always.open).values())
    assert not always.gate.required


@pytest.mark.parametrize(
    "text", ["", "always", "always:", "often: a.safetensors", "always: a.pt", "always: a.safetensors,"]
)
def test_another_line_is_none(text: str) -> None:
    with refuses("policy.home", "guard.txt"):
        home.parse(text, "guard.txt")


@given(st.text())
def test_whatever_stands_there_is_a_line_or_an_error_that_names_the_place(text: str) -> None:
    line, said = None, ""
    try:
        line = home.parse(text, "guard.txt")
    except PolicyError as error:
        said = str(error)
    assert said.startswith("guard.txt: ") if line is None else line.mode in home.MODES and all(dict(line.loras))


@pytest.mark.parametrize("what", ["a link to nowhere", "a folder", "a link to itself"])
def test_what_lies_there_and_cannot_be_read_is_an_error_and_not_no_line(what: str, tmp_path: Path) -> None:
    file = tmp_path / home.FILE
    if what == "a folder":
        file.mkdir()
    else:
        file.symlink_to(file if "itself" in what else tmp_path / "gone")
    with refuses("policy.unreadable", file):
        home.read(file, "")


def test_the_variable_comes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / home.FILE
    assert home.read(file, " ") is None
    file.write_text("always: a.safetensors", encoding="utf-8")
    assert home.read(file, "").loras == (("a.safetensors", ""),)
    assert home.read(file, "family: b.safetensors").where.endswith(home.VARIABLE)
    file.write_bytes(b"\xff\xfe\xff")
    with refuses("policy.home"):
        home.read(file, "")
