"""Presets: what they hold is options, what is given beside them wins, and the report says both."""

from __future__ import annotations

import typing

import pytest
import torch
from modular_lora_guard.tools.bootstrap.paths import ROOT
from modular_lora_guard.training import options, presets
from modular_lora_guard.training.in_place import writing_allowed
from modular_lora_guard.training.options import SafetyOptions, TaskOptions, fingerprint
from modular_lora_guard.training.task.train import train_task
from PIL import Image
from support.errors import refuses
from support.toys import Silent, ToyHostModel, Transformer

NAMES = [
    (cls, name)
    for cls in (TaskOptions, SafetyOptions)
    for name in typing.get_args(typing.get_type_hints(cls)["preset"])
    if name
]


def test_every_file_is_a_preset_of_one_training() -> None:
    files = {path.stem for path in (ROOT / "training" / "presets").glob("*.toml")}
    assert files == {name for _, name in NAMES}
    assert len(files) == len(NAMES)


@pytest.mark.parametrize("of", presets.GROUPS)
@pytest.mark.parametrize(("cls", "name"), NAMES)
def test_a_preset_is_options_and_is_explained(cls: type, name: str, of: str) -> None:
    made = presets.load(cls, None, {"preset": name}, of)
    expected = cls(**presets.values(name, of), preset=name)
    assert made == expected
    assert made != cls(preset=name)
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page
    (line,) = presets.said(made, of)
    assert line.startswith(f"preset {name} ({of}): ")
    assert all(f"{option} " in line for option in presets.values(name, of))


def test_given_values_win_over_the_files_and_the_files_over_the_preset(tmp_path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("preset = 'style'\nnetwork_dim = 5\nmax_train_steps = 7\n")
    made = presets.load(TaskOptions, config, {"network_dim": 6}, "sdxl")
    assert (made.network_dim, made.max_train_steps, made.resolution, made.min_snr_gamma) == (6, 7, 1024, 5.0)
    (line,) = presets.said(made, "sdxl")
    assert "; given beside it: network_dim 6 for 16, max_train_steps 7 for 2000" in line
    assert presets.load(TaskOptions, config, {"preset": ""}, "sd") == TaskOptions(network_dim=5, max_train_steps=7)
    assert presets.said(TaskOptions(), "sd") == []


class Writing(Transformer):
    """Writes over what its backward pass needs, in a part of a tensor: it cannot be run again."""

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = super().forward(x, context)
        squared = x.square()
        x[:, :1] = 0.5
        return x + squared


def test_what_a_preset_alone_asks_of_a_network_that_cannot_is_left_out_and_said(tmp_path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")
    folder = tmp_path / "data" / "1_thing"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), (40, 90, 200)).save(folder / "one.png")
    (folder / "one.txt").write_text("thing", encoding="utf-8")
    small = {"train_data_dir": str(folder.parent), "output_dir": str(tmp_path), "resolution": 64, "max_train_steps": 2}
    small |= {"mixed_precision": "no", "lr_warmup_steps": 1}

    def train(options: TaskOptions):
        host_model, watch = ToyHostModel(), Silent()
        host_model.family = "SDXL"
        host_model.unet.middle_block[1].__class__ = Writing
        with writing_allowed():
            return train_task(host_model, options, watch, engine="test"), watch.said

    trained, said = train(presets.load(TaskOptions, None, small | {"preset": "style"}, "sdxl"))
    line = "gradient_checkpointing True of preset style is LEFT OUT: "
    assert all(line in text for text in (said, trained.report, "\n".join(trained.remarks)))
    assert trained.lora.metadata["ss_gradient_checkpointing"] == "False"
    without = presets.values("style", "sdxl") | small
    plain, _ = train(TaskOptions(**without | {"gradient_checkpointing": False}))
    assert all(torch.equal(tensor, plain.lora.tensors[name]) for name, tensor in trained.lora.tensors.items())
    with refuses("train.recompute"):
        train(TaskOptions(**without))


@pytest.mark.parametrize(
    ("name", "given", "left_out"),
    [
        ("style", {"lr_scheduler": "constant"}, ("lr_warmup_steps",)),
        ("style", {"debiased_estimation_loss": True}, ("min_snr_gamma",)),
        (
            "object",
            {"debiased_estimation_loss": True, "lr_scheduler": "constant"},
            ("lr_warmup_steps", "min_snr_gamma"),
        ),
        ("character", {"cache_text_encoder_outputs_to_disk": True}, ("network_train_text_encoder",)),
        ("character", {"text_encoder_lr": 0.0}, ("network_train_text_encoder",)),
        ("style", {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant"}, ("lr_warmup_steps",)),
        ("style", {"lr_scheduler": "constant_with_warmup", "debiased_estimation_loss": True}, ("min_snr_gamma",)),
        ("style", {"lr_scheduler": "constant_with_warmup"}, ()),
        ("style", {"lr_scheduler": "constant", "lr_warmup_steps": 0, "min_snr_gamma": 1.0}, ("lr_warmup_steps",)),
    ],
)
def test_what_is_given_wins_and_what_contradicts_it_is_left_out_and_said(name: str, given: dict, left_out: tuple):
    made = presets.load(TaskOptions, None, {"preset": name} | given, "sd")
    of_preset = presets.values(name, "sd")
    kept = {option: value for option, value in of_preset.items() if option not in left_out}
    assert made == TaskOptions(**kept | given, preset=name)
    (line,) = presets.said(made, "sd")
    before, _, after = line.partition("; LEFT OUT, since it contradicts what was given: ")
    assert [option for option in of_preset if f"{option} {of_preset[option]!r} (" in after] == sorted(left_out)
    assert all(f"{option} " in before for option in kept)


@pytest.mark.parametrize(
    ("given", "code", "named"),
    [
        ({"lr_scheduler": "constant", "lr_warmup_steps": 7}, "option.scheduler", "constant"),
        ({"optimizer_type": "Prodigy"}, "option.prodigy", "learning_rate"),
        ({"colour": 1}, "option.unknown-key", "colour"),
    ],
)
def test_what_is_given_contradicts_itself_whatever_the_preset(given: dict, code: str, named: str) -> None:
    with refuses(code, named):
        presets.load(TaskOptions, None, {"preset": "style"} | given, "sd")


@pytest.mark.parametrize(("cls", "name"), [(TaskOptions, "safety"), (SafetyOptions, "style"), (TaskOptions, "../x")])
def test_a_preset_that_is_none_of_the_training_is_refused(cls: type, name: str) -> None:
    with refuses("option.wrong-value", "preset", name):
        presets.load(cls, None, {"preset": name}, "sd")


def test_a_training_goes_on_with_the_same_values_given_one_by_one() -> None:
    made = presets.load(TaskOptions, None, {"preset": "object"}, "sd")
    assert fingerprint(made) == fingerprint(options.load(TaskOptions, None, presets.values("object", "sd")))


@pytest.mark.parametrize(
    ("family", "flow", "of"),
    [
        ("SD15", False, "sd"),
        ("SD20", False, "sd"),
        ("SDXL", False, "sdxl"),
        ("SD3", True, "flow"),
        ("Flux", True, "flow"),
    ],
)
def test_families_and_their_groups(family: str, flow: bool, of: str) -> None:
    assert presets.group(family, flow) == of
