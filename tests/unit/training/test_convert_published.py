"""Every published layout of an eraser becomes a safety LoRA, is one, or is refused by its name."""

from __future__ import annotations

import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.training import metadata_keys
from modular_lora_guard.training.convert.convert import convert
from modular_lora_guard.training.convert.difference import ConvertOptions
from support.erased_files import COMPVIS, LAYOUTS, Published, checkpoint, clip, u_net
from support.errors import refuses

BY_NAME = {layout.name: layout for layout in LAYOUTS}
CONVERTED = [layout.name for layout in LAYOUTS if layout.fate == "converted"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """W0 as a checkpoint in CompVis' names: the spelling that most erased files have not."""
    return checkpoint(tmp_path_factory.mktemp("base") / "sd15.safetensors")


def made(layout: Published, folder, base, **options):
    path = layout.write(folder)
    return convert(path, base if layout.base else None, folder / "out.safetensors", ConvertOptions(**options))


def written_name(name: str) -> str:
    """The layer that a weight of W0 has in a LoRA file, without our own table of names."""
    if name.startswith("text_model"):
        return f"lora_te_{name.removesuffix('.weight').replace('.', '_')}"
    return f"lora_unet_{COMPVIS[name].removesuffix('.weight').replace('.', '_')}"


def product(layer) -> torch.Tensor:
    weight = getattr(layer, "weight", None)  # a full difference
    if weight is not None:
        return weight.double()
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    return (up @ down).reshape(layer.shape) * (1.0 if layer.alpha is None else layer.alpha / layer.rank)


def max_rank(lora) -> int:
    return max((layer.rank for layer in lora.layers.values() if layer.rank), default=1)


@pytest.mark.parametrize("name", CONVERTED)
def test_erased_weights_come_back_as_a_safety_lora(name, base, tmp_path):
    layout = BY_NAME[name]
    result = made(layout, tmp_path, base)
    assert layout.says in result.method
    assert layout.says in result.report
    lora = read_lora(tmp_path / "out.safetensors")
    change = layout.change()
    assert {written_name(key) for key in change} == set(lora.layers), "nothing else is changed, and nothing is lost"
    for key, wanted in change.items():
        layer = lora.layers[written_name(key)]
        w0 = {**u_net(), **clip()}[key]
        w0 = (w0.to(layout.dtype) if result.rounded else w0).double()
        exact = w0 + wanted.double()
        rounding = float((exact.to(layout.dtype).double() - exact).norm())
        error, size = float((product(layer) - wanted.double()).norm()), float(wanted.norm())
        if name == "ResAlign":
            assert error <= 0.1 * size
        else:
            assert layer.rank == 2, "the rank that the change has"
            assert error <= 2 * rounding + 1e-6 * size
    assert lora.metadata["modular_lora.role"] == "safety"
    assert layout.says in lora.metadata[metadata_keys.METHOD_KEY]
    assert lora.metadata["modelspec.title"] == "out"
    assert lora.metadata["ss_network_dim"] == lora.metadata["ss_network_alpha"] == str(max_rank(lora))
    assert not {"modular_lora.base_sha256", "modelspec.prediction_type"} & set(lora.metadata), "not known here"
    assert result.residual <= 0.1
    assert f"{result.residual:.3g}" in lora.metadata[metadata_keys.RESIDUAL_KEY]


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS if layout.fate == "loaded"])
def test_what_is_a_lora_already_is_read_as_it_is(name, tmp_path):
    layout = BY_NAME[name]
    path = layout.write(tmp_path)
    assert read_lora(path).layers
    with refuses("convert.is-a-lora", path.name):
        convert(path, None, tmp_path / "out.safetensors", ConvertOptions())


def test_a_pickled_lora_is_saved_again_with_the_same_tensors(tmp_path):
    layout = BY_NAME["Concept sliders"]
    path = layout.write(tmp_path)
    with refuses("file.ending", path.name, "convert-safety"):
        read_lora(path)
    result = convert(path, None, tmp_path / "out.safetensors", ConvertOptions(concept=("age",)))
    held, lora = torch.load(path, weights_only=True), read_lora(tmp_path / "out.safetensors")
    assert held.keys() == lora.tensors.keys()
    assert all(torch.equal(held[key], lora.tensors[key]) for key in held)
    assert layout.says in result.method
    assert lora.metadata[metadata_keys.CONCEPT_KEY] == "age"


@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS if layout.fate.startswith("convert.")])
def test_what_no_lora_can_do_is_refused_by_its_name(name, base, tmp_path):
    layout = BY_NAME[name]
    with refuses(layout.fate, layout.says):
        made(layout, tmp_path, base)
    with refuses("file.another-kind", layout.says):
        read_lora(next(tmp_path.glob("*.safetensors")))


@pytest.mark.parametrize("name", CONVERTED)
def test_the_loader_names_the_file_and_the_command(name, tmp_path):
    path = BY_NAME[name].write(tmp_path)
    files = [path] if path.is_file() else sorted(path.glob("unet/*")) or sorted(path.glob("text_encoder/*"))
    with refuses(("file.ending", "file.another-kind"), files[0].name, "lora convert-safety"):
        read_lora(files[0])
