"""Several safety LoRAs as one file: MACE's fusion against its formula in float64, refusals, and what the file says."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard import activity, concept
from modular_lora_guard.modular_lora.guard.build import SafetyLora
from modular_lora_guard.training import cli, output
from modular_lora_guard.training.safety.closed.combine import combine_safety
from modular_lora_guard.training.safety.closed.fusion import confined, reaches
from modular_lora_guard.training.safety.closed.make import make_safety
from modular_lora_guard.training.safety.closed.options import CombineOptions, MakeOptions
from support.closed_formulas import formula_fusion
from support.closed_words import LAYERS, MIXED, OUT, WIDTH, Words, file_name
from support.errors import refuses

PROMPTS = (("car", "bus"), ("pizza",), ("owl", "crow"))


def columns(n: int, seed: int) -> torch.Tensor:
    return torch.randn(WIDTH, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_the_fusion_is_the_papers_regression(kept):
    W, K, C = columns(OUT, 1).T, columns(kept, 2), [columns(n, 3 + n) for n in (2, 5, 1)]
    factors = [(columns(3, 10 + i).T, columns(OUT, 20 + i).T[:, :3]) for i in range(3)]
    for lambda_ in (1e-3, 0.5, 20.0):
        reach = reaches(C, K, lambda_)
        parts = [confined(*factors[i], C[i], reach[i]) for i in range(3)]
        assert [len(down) for down, _ in parts] == [2, 3, 1], "no rank grows, and none is above the columns' number"
        found = W + sum(up @ down for down, up in parts)
        wanted = formula_fusion(W, [up @ down for down, up in factors], C, K, lambda_)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-10


def random_lora(tmp_path, number: int, prompts=(), paths=LAYERS, rank: int = 2) -> SafetyLora:
    """A file that changes what it likes, as a trained one does."""
    generator = torch.Generator().manual_seed(number)
    layers = {
        file_name(path): (
            torch.randn(rank, WIDTH, generator=generator), torch.randn(OUT, rank, generator=generator), 4.0
        )
        for path in paths
    }  # fmt: skip
    metadata = {concept.PROMPTS_KEY: concept.trained(prompts)} if prompts else {}
    return SafetyLora(output.write(tmp_path / f"{number}.safetensors", layers, metadata, "float"), 0.5 + number / 4)


def dense(lora, path: str) -> torch.Tensor:
    layer = lora.plain[file_name(path)]
    return layer.scale * layer.up.double() @ layer.down.double()


def combine(tmp_path, safety, concepts=(), **changes):
    return combine_safety(
        Words(), safety, concepts, CombineOptions(output_dir=str(tmp_path / "made"), **changes), engine="test"
    )


def test_the_file_is_the_formula_and_its_report_is_measured_on_it(tmp_path):
    safety = [random_lora(tmp_path, i, texts) for i, texts in enumerate(PROMPTS)]
    made = combine(tmp_path, safety, preserve=("kept",), tokens="subject", ridge=0.3)
    model, lora = Words(), read_lora(made.lora.path)
    C = [torch.cat([model.rows(text)[1:3].T for text in texts], 1) for texts in PROMPTS]
    K = model.rows("kept")[1:3].T  # of the empty prompt no row is a word
    for path in LAYERS:
        W = model.weight(path).double()
        alone = [one.strength * dense(one.lora, path) for one in safety]
        wanted = formula_fusion(W, alone, C, K, 0.3) - W
        assert float((dense(lora, path) - wanted).norm() / wanted.norm()) < 1e-6
    for i in range(3):
        asked = [safety[i].strength * dense(safety[i].lora, path) @ C[i] for path in LAYERS]
        rest = [dense(lora, path) @ C[i] - y for path, y in zip(LAYERS, asked, strict=True)]
        share = 1 - (sum(r.square().sum() for r in rest) / sum(y.square().sum() for y in asked)) ** 0.5
        assert made.measured.held[i] == pytest.approx(float(share), abs=1e-5)
        for j in range(3):
            answers = sum((model.weight(path).double() @ C[j]).square().sum() for path in LAYERS)
            moved = sum((safety[i].strength * dense(safety[i].lora, path) @ C[j]).square().sum() for path in LAYERS)
            assert made.measured.alone[i][j] == pytest.approx(float((moved / answers) ** 0.5), rel=1e-5)
    moved = max(
        float((dense(lora, path) @ x).norm() / (model.weight(path).double() @ x).norm())
        for path in LAYERS
        for x in model.rows("kept")
    )
    assert made.measured.kept["kept"] == pytest.approx(moved, rel=1e-4)


def test_with_room_each_acts_on_its_own_concept_alone(tmp_path):
    safety = [random_lora(tmp_path, i, texts) for i, texts in enumerate(PROMPTS)]
    made = combine(tmp_path, safety, ridge=1e-9, tokens="subject", preserve=("kept",))
    assert min(made.measured.held) > 0.999
    for i in range(3):
        assert max(made.measured.combined[i][j] for j in range(3) if j != i) < 1e-4 < made.measured.alone[i][0]
    assert "which is none of theirs" in made.report
    assert "a signature of its own" in made.report
    assert re.search(r"to the concept of 1\.safetensors: moved its answers by \S+ alone, by \S+ now", made.report)


def test_files_that_change_other_layers_each_and_half_precision(tmp_path):
    safety = [random_lora(tmp_path, 0, ("car",), LAYERS[:1]), random_lora(tmp_path, 1, ("owl",), LAYERS[1:], rank=9)]
    made = combine(tmp_path, safety, ridge=1e-9, tokens="subject", save_precision="fp16")
    assert sorted(made.lora.layers) == sorted(map(file_name, LAYERS))
    assert made.lora.plain[file_name(LAYERS[2])].down.shape[0] == 2, "of nine ranks two see the concept's two tokens"
    assert min(made.measured.held) > 0.99


def test_the_metadata_names_what_it_is_made_of_and_what_for(tmp_path):
    files = []
    for name, word in (("cars", "car"), ("owls", "owl")):
        o = MakeOptions(output_name=name, output_dir=str(tmp_path), concept=(word,), guide=("heart",))
        files.append(make_safety(Words(), o, engine="test").lora)
    made = combine(tmp_path, [SafetyLora(files[0], 1.0), SafetyLora(files[1], 0.5)], preserve=("kept",))
    metadata = made.lora.metadata
    assert concept.read(made.lora) == ("car", "owl")
    assert metadata["modular_lora.role"] == "safety"
    assert metadata["modular_lora.method"] == "combined"
    assert metadata["modular_lora.base_sha256"] == Words.base_sha256
    assert json.loads(metadata["modular_lora.preserved_prompts"]) == ["kept"]
    sources = json.loads(metadata["modular_lora.combined_from"])
    assert [(s["name"], s["sha256"], s["strength"]) for s in sources] == [
        ("cars.safetensors", files[0].sha256, 1.0), ("owls.safetensors", files[1].sha256, 0.5),
    ]  # fmt: skip
    assert activity.KEY not in metadata, "the toy's words say nothing of its sentences"
    assert "calibration of safety activity: none" in made.report


def test_what_does_not_go_together_is_refused_and_nothing_is_written(tmp_path):
    car, owl = random_lora(tmp_path, 0, ("car",)), random_lora(tmp_path, 1, ("owl",))
    for code, safety, concepts, changes, named in (
        ("combine.too-few", [car], (), {}, ()),
        ("combine.prompts", [car, owl], [["a"]], {}, ("1 lists", "2 LoRAs")),
        ("combine.no-prompts", [car, random_lora(tmp_path, 2)], (), {}, ("2.safetensors",)),
        ("combine.same-prompt", [car, owl], [["owl"], []], {}, ("'owl'", "0.safetensors", "1.safetensors")),
        ("combine.same-prompt", [car, car], (), {}, ("'car'",)),
        ("combine.both-lists", [car, owl], (), {"preserve": ("owl",)}, ("'owl'",)),
        ("combine.prompt-too-long", [car, owl], [["x" * 51], []], {}, ("x" * 51,)),
        ("combine.mixed-input", [car, random_lora(tmp_path, 3, ("b",), (*LAYERS, MIXED))], (), {}, (MIXED,)),
        ("combine.other-base", [car, random_lora(tmp_path, 4, ("b",), ("block.9.to_k",))], (), {}, ("4.safetensors",)),
        ("option.wrong-value", [car, owl], (), {"ridge": -1.0}, ("ridge",)),
    ):
        with refuses(code, *named):
            combine(tmp_path, safety, concepts, **changes)
    assert not (tmp_path / "made").exists()


def test_the_command_line_takes_concepts_and_strengths_in_the_files_order(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(cli, "_text_model", lambda chosen: (SimpleNamespace(ENGINE="test"), Words()))
    for number, prompts in ((0, ("car",)), (1, ("owl",))):
        random_lora(tmp_path, number, prompts)
    (tmp_path / "any.safetensors").touch()
    given = ["combine-safety", str(tmp_path / "0.safetensors"), str(tmp_path / "1.safetensors"), "--checkpoint"]
    given += [str(tmp_path / "any.safetensors"), "--output_dir", str(tmp_path / "made"), "--tokens", "last"]
    given += ["--concept", "--concept", "cat", "crow", "--strength", "1", "--strength", "0.5", "--no-calibrate"]
    assert cli.main(given) == 0
    assert "2 safety LoRAs as one, 3 layers" in capsys.readouterr().out
    made = read_lora(tmp_path / "made" / "combined.safetensors")
    assert concept.read(made) == ("car", "cat", "crow")
    assert [s["strength"] for s in json.loads(made.metadata["modular_lora.combined_from"])] == [1.0, 0.5]
    assert made.metadata["ss_sd_model_name"] == "any.safetensors"
    for wrong in (["--strength", "2"], ["--concept", "x"]):
        assert cli.main([*given, *wrong]) == 1
    assert "3 numbers for 2 files" in caplog.text
    assert "3 lists of concept prompts for 2 LoRAs" in caplog.text
