"""Files of every format, made by the libraries that train them: guarded equals ComfyUI's merge of each file alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from modular_lora_guard.modular_lora.branches.attachment import Attachment
from modular_lora_guard.modular_lora.branches.layer_spec import layer_spec
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.modular_lora.guard.build import GuardLimits, SafetyLora, TaskLora, build_part
from modular_lora_guard.modular_lora.guard.model_info import ModelInfo
from safetensors.torch import load_file, save_file
from support.errors import refuses
from support.format_files import MAKERS, PATHS, REFUSED, Maker, Model, example, key_map
from support.graphs import save_lora
from torch import Tensor, nn

STRENGTHS = (1.0, 0.7, -0.4, 2.5)
TOLERANCE = 2e-5  # of the largest change: fp32 sums in another order
STORED = ("LoRA and LoCon, LyCORIS", "LoHa, LyCORIS", "LoKr, LyCORIS", "DoRA over LoRA, LyCORIS")
CASES = [pytest.param(maker, kind, id=f"{maker}, {kind}") for maker in MAKERS for kind in maker.kinds]


def info(model: Model, names: dict | None = None) -> ModelInfo:
    found = ((path, m) for path, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor))
    specs = {f"{path}.weight": layer_spec(path, m) for path, m in found}
    values = dict(model.named_parameters())
    return ModelInfo("toy", {**key_map(model), **(names or {})}, specs, ("diffusion_model",), values.get)


def guarded(model: Model, safety: list, tasks: list, names: dict | None = None) -> Tensor:
    """The model's output under the guard; files with their strengths; ``names``: further entries of the key map."""
    loras = [SafetyLora(read_lora(file), strength) for file, strength in safety]
    others = [TaskLora(read_lora(file), strength, 0.0) for file, strength in tasks]
    part = build_part("model", info(model, names), tuple(loras), tuple(others), GuardLimits(), enforce=False)
    attachment = Attachment(model, part.branches)
    attachment.attach()
    try:
        return model.diffusion_model(example())
    finally:
        attachment.detach()


def patches(model: Model, file: Path, names: dict | None = None) -> dict:
    """A file as core reads it: what of the model -> patch."""
    from comfy.lora import load_lora
    from comfy.lora_convert import convert_lora
    from comfy.utils import load_torch_file

    return load_lora(convert_lora(load_torch_file(str(file))), {**key_map(model), **(names or {})})


def lone(model: Model, file: Path, strength: float, names: dict | None = None) -> dict[str, Tensor]:
    """What ComfyUI's own merge of one file makes of W0: weight or bias key -> new value."""
    from comfy.lora import calculate_weight

    values, found = dict(model.named_parameters()), {}
    for entry, patch in patches(model, file, names).items():
        key, offset, function = (entry, None, None) if isinstance(entry, str) else entry  # as ModelPatcher.add_patches
        found[key] = calculate_weight([(strength, patch, 1.0, offset, function)], values[key].clone(), key)
    return found


def merged(model: Model, files: list, names: dict | None = None) -> Tensor:
    """The output with every file's lone change added to W0."""
    other, originals = copy.deepcopy(model), dict(model.named_parameters())
    values = dict(other.named_parameters())
    for file, strength in files:
        for key, weight in lone(model, file, strength, names).items():
            values[key].add_(weight - originals[key])
    return other.diffusion_model(example())


def error(ours: Tensor, reference: Tensor, base: Tensor) -> float:
    effect = float((reference - base).abs().max())
    assert effect > 0.01 * float(base.abs().max())
    return float((ours - reference).abs().max()) / effect


@pytest.fixture
def safety(tmp_path) -> Path:
    """A LoRA on every layer that takes one."""
    model = Model()
    specs = {f"lora_unet_{s.path.rpartition('.')[2]}": s for s in info(model).specs.values() if not s.problem}
    save_lora(tmp_path / "safety.safetensors", specs, 3, 1, size=0.5)
    return tmp_path / "safety.safetensors"


@pytest.mark.parametrize(("maker", "kind"), CASES)
def test_a_format_guarded_equals_its_lone_merge(maker: Maker, kind: str, comfy, safety, tmp_path, matrix):
    if maker.library == "diffusers":
        pytest.importorskip("diffusers", reason="diffusers asks for Python 3.11")
    model, file = Model(), tmp_path / "file.safetensors"
    own = maker.make(model.diffusion_model, PATHS[kind], file)
    base, errors = model.diffusion_model(example()), []
    if own is not None and maker.as_library:
        errors.append(error(guarded(model, [], [(file, 1.0)]), own(example()).detach(), base))
    for strength in STRENGTHS if maker.as_core else ():
        files = [(safety, 1.0), (file, strength)]
        errors.append(error(guarded(model, files[:1], files[1:]), merged(model, files), base))
        if strength > 0:
            errors.append(error(guarded(model, files[1:], []), merged(model, files[1:]), base))
    assert max(errors) < TOLERANCE
    matrix("formats.json", f"{maker.format}, {kind}, {maker.library}", "works", max(errors))


@pytest.mark.parametrize(("maker", "named"), REFUSED.items(), ids=map(str, REFUSED))
def test_a_format_that_is_not_read_is_refused_by_name(maker: Maker, named: str, comfy, tmp_path, matrix):
    file = tmp_path / "file.safetensors"
    maker.make(Model().diffusion_model, PATHS[maker.kinds[0]], file)
    with refuses("file.unread-format", named):
        read_lora(file)
    matrix("formats.json", str(maker), "refused")


def swapped(weight: Tensor) -> Tensor:
    """comfy.utils.swap_scale_shift."""
    return torch.cat(weight.chunk(2, dim=0)[::-1], dim=0)


def part_of(layer: nn.Module, offset: tuple[int, int, int] | None) -> nn.Module:
    """The layer that a slice of another's weight would be by itself; no bias: a file of core's cannot change a part."""
    weight = layer.weight.clone() if offset is None else layer.weight.narrow(*offset).clone()
    if isinstance(layer, nn.Conv2d):
        part = nn.Conv2d(weight.shape[1], weight.shape[0], 3, bias=False)
    else:
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    part.weight = nn.Parameter(weight, requires_grad=False)
    return part


OFFSETS = {  # a slice of a fused weight, and rows that the model has in another order
    "rows": ("linear", (0, 12, 12), None),
    "columns": ("linear", (1, 8, 8), None),
    "rows swapped": ("linear", None, swapped),
    "rows of a slice swapped": ("linear", (0, 12, 12), swapped),
    "channels": ("kernel", (0, 4, 8), None),
}
SLICED = [m for m in MAKERS if m.library == "LyCORIS" and len(m.kinds) > 2]


@pytest.mark.parametrize("place", OFFSETS)
@pytest.mark.parametrize("maker", SLICED, ids=str)
def test_a_slice_of_a_weight_takes_every_format(maker: Maker, place: str, comfy, safety, tmp_path, matrix):
    model, file = Model(), tmp_path / "file.safetensors"
    path, offset, rearrange = OFFSETS[place]
    layer = model.get_submodule(f"diffusion_model.{path}")
    net = torch.nn.Module()
    net.part = part_of(layer, offset)
    maker.make(net, "part", file)
    entry = (f"diffusion_model.{path}.weight", offset, rearrange)
    base = model.diffusion_model(example())
    errors = []
    for strength in STRENGTHS:
        files = [(safety, 1.0), (file, strength)]
        names = {"lora_unet_part": entry}
        errors.append(error(guarded(model, files[:1], files[1:], names), merged(model, files, names), base))
    assert max(errors) < TOLERANCE
    name = f"{maker.format}, slices and swapped rows of a weight, {maker.library}"
    matrix("formats.json", name, "works", max(errors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("maker", [m for m in MAKERS if str(m) in STORED], ids=str)
def test_files_in_every_storage_precision(maker: Maker, dtype: torch.dtype, comfy, safety, tmp_path, matrix):
    model, file, errors = Model(), tmp_path / "file.safetensors", []
    base = model.diffusion_model(example())
    for path in ("linear", "kernel"):
        maker.make(model.diffusion_model, path, file)
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
        files = [(safety, 1.0), (file, 0.7)]
        errors.append(error(guarded(model, files[:1], files[1:]), merged(model, files), base))
    assert max(errors) < TOLERANCE
    matrix("formats.json", f"files stored as {str(dtype).removeprefix('torch.')}", "works", max(errors))


@pytest.mark.parametrize("rank", [1, 64, 512])
def test_loras_of_every_rank(rank: int, comfy, safety, tmp_path, matrix):
    model, file = Model(), tmp_path / "file.safetensors"
    layers = {f"lora_unet_{s.path.rpartition('.')[2]}": s for s in info(model).specs.values() if not s.problem}
    save_lora(file, layers, rank, 2, size=0.5, alpha=rank / 2)
    files = [(safety, 1.0), (file, 0.7)]
    base = model.diffusion_model(example())
    worst = error(guarded(model, files[:1], files[1:]), merged(model, files), base)
    assert worst < TOLERANCE
    matrix("formats.json", f"LoRA and LoCon of rank {rank}", "works", worst)


def test_biases_by_their_own_names(comfy, safety, tmp_path, matrix):
    model, file = Model(), tmp_path / "file.safetensors"
    paths = ("linear", "kernel", "line", "layer", "group")
    values = {path: model.get_submodule(f"diffusion_model.{path}").bias for path in paths}
    save_file({f"diffusion_model.{path}.bias.diff": torch.cos(b + 1) for path, b in values.items()}, file)
    files, base = [(safety, 1.0), (file, -0.4)], model.diffusion_model(example())
    worst = error(guarded(model, files[:1], files[1:]), merged(model, files), base)
    assert worst < TOLERANCE
    matrix("formats.json", "differences of biases alone", "works", worst)


@pytest.mark.parametrize(
    ("path", "tensors", "named", "row"),
    [
        ("rms", {"w_norm": (36,), "b_norm": (36,)}, "rms", "a difference of a bias that a norm lacks"),
        ("embedding", {"diff": (7, 5)}, "Embedding", "a difference of an embedding"),
        ("linear", {"diff": (36, 23)}, "[36, 23]", "a layer of another shape"),
    ],
)
def test_what_a_layer_cannot_take_is_counted_in_a_task_lora_and_stops_a_safety_lora(
    path, tensors, named, row, safety, tmp_path, matrix
):
    model, file = Model(), tmp_path / "file.safetensors"
    model.diffusion_model.embedding = nn.Embedding(7, 5)
    whole = {"lora_unet_out.diff": torch.ones(8, 36)}
    save_file({f"lora_unet_{path}.{name}": torch.ones(shape) for name, shape in tensors.items()} | whole, file)
    with refuses("lora.not-whole", named):
        guarded(model, [(file, 1.0)], [])
    loras = (SafetyLora(read_lora(safety), 1.0),), (TaskLora(read_lora(file), 1.0, 0.0),)
    part = build_part("model", info(model), *loras, GuardLimits(), enforce=False)
    ((name, why),) = part.lines[1].left
    assert (part.lines[1].matched, name) == (2 if path == "rms" else 1, f"lora_unet_{path}")
    assert named in why
    matrix("formats.json", row, "refused")


@pytest.mark.parametrize("role", ["diff", "LoRA"])
def test_the_bias_beside_a_weight_of_another_shape_acts_as_core_merges_it(role, comfy, safety, tmp_path):
    """As the LoRAs of text to video on an image to video model: ComfyUI logs the weight and adds the bias."""
    model, file = Model(), tmp_path / "file.safetensors"
    change = {"diff": torch.ones(36, 20)}
    if role == "LoRA":
        change = {"lora_down.weight": torch.ones(2, 20), "lora_up.weight": torch.ones(36, 2)}
    save_file({f"lora_unet_linear.{k}": v for k, v in (change | {"diff_b": torch.ones(36)}).items()}, file)
    files, base = [(safety, 1.0), (file, 0.7)], model.diffusion_model(example())
    assert error(guarded(model, files[:1], files[1:]), merged(model, files), base) < TOLERANCE
    alone = [guarded(model, files[:1], tasks) for tasks in ([], files[1:])]
    assert (alone[0] - alone[1]).abs().max() > 0.1


def test_a_lora_beside_a_change_of_a_bias_that_the_layer_lacks_acts_without_it(comfy, safety, tmp_path):
    model, file = Model(), tmp_path / "file.safetensors"
    model.diffusion_model.out = nn.Linear(36, 8, bias=False)
    factors = {"lora_down.weight": torch.ones(2, 36), "lora_up.weight": torch.ones(8, 2)}
    save_file({f"lora_unet_out.{k}": v for k, v in (factors | {"diff_b": torch.ones(8)}).items()}, file)
    both = guarded(model, [(safety, 1.0)], [(file, 1.0)])
    save_file({f"lora_unet_out.{k}": v for k, v in factors.items()}, file)
    assert torch.equal(both, guarded(model, [(safety, 1.0)], [(file, 1.0)]))


def test_rows_in_no_order_are_refused(safety, tmp_path):
    model, file = Model(), tmp_path / "file.safetensors"
    save_lora(file, {"lora_unet_part": info(model).specs["diffusion_model.linear.weight"]}, 2, 2)
    for wrong in (torch.flip, torch.cumsum, lambda w: w[:5], lambda w: w * 0):
        names = {"lora_unet_part": ("diffusion_model.linear.weight", None, wrong)}
        with refuses("layer.rearranged"):
            guarded(model, [(safety, 1.0)], [(file, 1.0)], names)


@pytest.mark.parametrize("maker", [m for m in MAKERS if "DoRA" in m.format or m.format == "OFT"], ids=str)
def test_a_task_lora_leaves_the_safety_change_alone_where_core_does_not(maker: Maker, comfy, safety, tmp_path):
    """Core's merge of a DoRA or OFT after the safety LoRA rescales or rotates the safety LoRA's share too.

    Ours is the sum of lone changes: the safety LoRA's terms are bit for bit those of the guard without the task LoRA.
    """
    from comfy.lora import calculate_weight

    model, file, key = Model(), tmp_path / "file.safetensors", "diffusion_model.linear.weight"
    maker.make(model.diffusion_model, "linear", file)
    W0 = model.get_parameter(key)
    both = [patches(model, path)[key] for path in (safety, file)]
    after = calculate_weight([(1.0, patch, 1.0, None, None) for patch in both], W0.clone(), key)
    alone = [calculate_weight([(1.0, patch, 1.0, None, None)], W0.clone(), key) - W0 for patch in both]
    if maker.as_core:
        assert float((after - W0 - sum(alone)).norm() / alone[0].norm()) > 0.01
    lora, task = SafetyLora(read_lora(safety), 1.0), TaskLora(read_lora(file), 1.0, 0.0)
    parts = [build_part("model", info(model), (lora,), tasks, GuardLimits(), enforce=False) for tasks in ((), (task,))]
    without, with_task = (part.branches.layers["diffusion_model.linear"].terms for part in parts)
    (mine,), (kept, *others) = without, with_task
    assert others
    assert all(term.role == "task" for term in others)
    assert (kept.role, kept.scale) == (mine.role, mine.scale)
    assert torch.equal(kept.part.down, mine.part.down)
    assert torch.equal(kept.part.up, mine.part.up)


def test_a_file_of_every_format_on_a_whole_unet_equals_core_s_own_merge(comfy, tmp_path, matrix):
    """SD1.5 at toy width, every layer in another format, norms and biases too; it is the only file."""
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file
    from support.families import evaluate, make
    from support.families_image import U_NETS

    family, file, tensors = U_NETS[0], tmp_path / "file.safetensors", {}
    model = make(family)
    info = comfy.anatomy.model_info(model)
    keys = [k for k, spec in info.specs.items() if (spec.norm or not spec.problem) and k.startswith("diffusion_model.")]
    plain = [maker for maker in MAKERS if maker.library == "LyCORIS" and maker.as_core and len(maker.kinds) > 2]
    norm = next(maker for maker in MAKERS if maker.format == "norm")
    for index, key in enumerate(keys):
        spec, net = info.specs[key], nn.Module()
        name = f"lora_unet_{spec.path.removeprefix('diffusion_model.').replace('.', '_')}"
        net.layer = copy.deepcopy(model.model.get_submodule(spec.path))
        (norm if spec.norm else plain[index % len(plain)]).make(net, "layer", file, 0.05)
        made = {n.replace("lora_unet_layer", name): value for n, value in load_file(file).items()}
        tensors |= made
    save_file(tensors, file)
    g, safety = comfy.host_guard, comfy.host_files.read_lora(file)
    handle, _ = comfy.host.guard(model, None, (g.SafetyLora(safety, 1.0),), (), False, g.GuardLimits())
    reference, _ = load_lora_for_models(model, None, load_torch_file(str(file)), 1.0, 0.0)
    models = (comfy.host.unwrap(handle), reference, model)
    ours, theirs, base = (evaluate(m, family, family.cond) for m in models)
    worst = error(ours, theirs, base)
    assert len(models[0].guard_state.part.branches.layers) == len(keys)
    assert comfy.host.attestation(models[0]).status == "guarded"
    assert worst < 1e-3
    matrix("formats.json", "every format in one file, whole U-Net of SD1.5", "works", worst)


def test_w0_is_what_it_was_before_a_lora_was_merged(comfy, tmp_path):
    from comfy.model_management import load_models_gpu, unload_all_models
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file
    from support.families import make
    from support.families_image import U_NETS

    model = make(U_NETS[0])
    info = comfy.anatomy.model_info(model)
    key = next(k for k, spec in info.specs.items() if not spec.problem and k.startswith("diffusion_model."))
    W0 = info.weight(key).clone()
    save_lora(tmp_path / "a.safetensors", {key.removesuffix(".weight"): info.specs[key]}, 2, 1)
    merged, _ = load_lora_for_models(model, None, load_torch_file(str(tmp_path / "a.safetensors")), 1.0, 0.0)
    load_models_gpu([merged])
    try:
        assert not torch.equal(model.model.get_parameter(key), W0)
        assert torch.equal(comfy.anatomy.original_weight(merged, key), W0)
    finally:
        unload_all_models()
    assert torch.equal(model.model.get_parameter(key), W0)
