"""Presets: what they hold is options, what is given beside them wins, and the report says both."""

from __future__ import annotations

import typing

import pytest
from modular_lora_guard.tools.bootstrap.paths import ROOT
from modular_lora_guard.training import options, presets
from modular_lora_guard.training.options import SafetyOptions, TaskOptions, fingerprint
from support.errors import refuses

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
