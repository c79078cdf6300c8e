"""Projection of task LoRAs: per layer, inside the safety LoRA's row space, only the safety LoRA answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches.layer_spec import LayerSpec
from modular_lora_guard.modular_lora.files.reader import LoraFile, LoraLayer, read_lora
from modular_lora_guard.modular_lora.guard.build import ModelInfo
from modular_lora_guard.training.output import projected_metadata, write_tensors
from modular_lora_guard.training.projection import (
    bases,
    format_projection,
    output_bases,
    project,
    project_file,
    project_outputs,
    residual,
    row_basis,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from support.errors import refuses
from torch import Tensor

ASSETS = Path(__file__).resolve().parents[3] / "tools" / "world" / "assets"
HALF = 2.0**-11  # largest relative rounding error of fp16
EPS = 2.0**-23


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A_s (r_s n), A_t (r_t n) and B_t (out r_t) of a layer with room beside the safety LoRA; fp16 values."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = draw(st.integers(2, 48))
    r_s, r_t, out = draw(st.integers(1, n - 1)), draw(st.integers(1, 12)), draw(st.integers(1, 24))
    size = draw(st.sampled_from([1e-2, 1.0, 30.0]))
    shapes = (r_s, n), (r_t, n), (out, r_t)
    return tuple((torch.randn(s, generator=g) * size).half().float() for s in shapes)


@settings(max_examples=150, deadline=None)
@given(layer=layers(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 99))
def test_inside_the_row_space_the_layer_answers_as_safety_alone(layer, dtype, seed):
    A_s, A_t, B_t = layer
    g = torch.Generator().manual_seed(seed)
    out, n = B_t.shape[0], A_t.shape[1]
    W0, B_s = torch.randn(out, n, generator=g), torch.randn(out, len(A_s), generator=g)
    Q = row_basis(A_s)
    fresh = project(A_t, Q)
    A = fresh.to(dtype)
    rounding = float((A.double() - fresh.double()).norm()) + 8 * EPS * float(A_t.norm())
    x = (torch.randn(5, len(A_s), generator=g) @ A_s).double()  # in the row space
    safety = x @ (W0 + B_s @ A_s).double().T
    both = safety + x @ A.double().T @ B_t.double().T
    assert float((both - safety).norm()) <= rounding * float(B_t.norm() * x.norm())
    plain = x @ A_t.double().T @ B_t.double().T
    assume(float(plain.norm()) > 1e-3 * float(A_t.norm() * B_t.norm() * x.norm()))
    if dtype == torch.float32:  # without the projection the claim fails by orders of magnitude
        assert float(plain.norm()) > 50 * float((both - safety).norm())


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_outside_the_row_space_the_task_lora_answers_as_before(layer):
    A_s, A_t, _ = layer
    Q = row_basis(A_s)
    x = torch.randn(4, A_t.shape[1], generator=torch.Generator().manual_seed(0)).double()
    x -= x @ Q.double() @ Q.double().T
    difference = x @ (project(A_t, Q).double() - A_t.double()).T
    assert float(difference.norm()) <= 16 * EPS * float(A_t.norm() * (x.norm() + 1))


@settings(max_examples=80, deadline=None)
@given(layer=layers(), seed=st.integers(0, 99))
def test_in_what_the_safety_lora_writes_the_layer_answers_as_safety_alone_to_every_input(layer, seed):
    A_s, A_t, B_t = layer
    g = torch.Generator().manual_seed(seed)
    out, n = B_t.shape[0], A_t.shape[1]
    assume(out > 1)
    W0, B_s = torch.randn(out, n, generator=g), torch.randn(out, min(len(A_s), out - 1), generator=g)
    A_s = A_s[: B_s.shape[1]]
    B = project_outputs(B_t, row_basis(B_s.T))
    x = torch.randn(n, 5, generator=g).double()
    safety = (W0 + B_s @ A_s).double() @ x
    both = safety + B.double() @ (A_t.double() @ x)
    assert float((B_s.double().T @ (both - safety)).norm()) <= 64 * EPS * float(
        B_s.norm() * B_t.norm() * (A_t.double() @ x).norm()
    )
    z = torch.randn(out, generator=g).double()  # and elsewhere it writes what it wrote
    z -= B_s.double() @ torch.linalg.lstsq(B_s.double(), z).solution
    assert float((z @ (B.double() - B_t.double())).norm()) <= 64 * EPS * float(z.norm() * B_t.norm())


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_the_basis_is_orthonormal_and_spans_every_row(layer):
    A_s, _, _ = layer
    Q = row_basis(A_s).double()
    assert torch.allclose(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64), atol=1e-5)
    left = A_s.double() - A_s.double() @ Q @ Q.T
    assert float((left.norm(dim=1) / A_s.double().norm(dim=1)).max()) < 1e-5
    assert row_basis(A_s).dtype == torch.float32


def test_directions_that_repeat_or_vanish_are_dropped_and_small_rows_are_not():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 16, generator=g)
    assert row_basis(torch.cat([a, 2 * a, 0 * a, b])).shape == (16, 2)
    assert row_basis(torch.cat([a, 1e-9 * b])).shape == (16, 2)  # its B may be as large as it likes
    assert row_basis(torch.zeros(3, 16)).shape == (16, 0)
    assert torch.equal(project(b, row_basis(torch.zeros(3, 16))), b)


def test_the_residual_in_fp16_is_rounding_and_in_float32_next_to_nothing():
    g = torch.Generator().manual_seed(0)
    A_s, A_t = (torch.randn(r, 768, generator=g) / 28 for r in (8, 16))
    Q = row_basis(A_s)
    assert residual(A_t, Q) == pytest.approx(math.sqrt(8 / 768), rel=0.3)
    assert residual(project(A_t, Q), Q) < 1e-7
    assert 1e-6 < residual(project(A_t, Q).half(), Q) < 6e-5
    assert residual(torch.zeros(2, 768), Q) == 0


@pytest.mark.parametrize("rank", [8, 12])
def test_a_safety_lora_that_fills_the_input_space_is_an_error_that_names_the_layer(rank):
    down = torch.randn(rank, 8, generator=torch.Generator().manual_seed(0))
    with refuses("project.nothing-left", "mid_attn", f"rank {rank}", "8"):
        row_basis(down, "mid_attn")


def test_two_safety_loras_that_fill_it_together_are_an_error_too():
    task, first, second = lora("t", ["x"], 2, 0), lora("a", ["x"], 4, 1), lora("b", ["x"], 4, 2)
    assert bases(task.layers, [first])["x"].shape == (8, 4)
    with refuses("project.nothing-left", "x", "rank 8"):
        bases(task.layers, [first, second])


def test_a_conv_layer_answers_as_safety_alone_on_patches_in_the_row_space():
    g = torch.Generator().manual_seed(3)
    A_s, A_t = torch.randn(4, 6, 3, 3, generator=g), torch.randn(5, 6, 3, 3, generator=g)
    Q = row_basis(A_s)
    A = project(A_t, Q)
    assert (A.shape, Q.shape) == (A_t.shape, (54, 4))
    x = (Q @ torch.randn(4, 7, generator=g)).T.reshape(7, 6, 3, 3)  # seven patches
    assert float(F.conv2d(x, A_t).norm()) > 1
    assert float(F.conv2d(x, A).norm()) < 1e-5


def test_projection_ignores_autocast_and_leaves_no_graph():
    g = torch.Generator().manual_seed(0)
    A_s, A_t = torch.randn(4, 64, generator=g), torch.nn.Parameter(torch.randn(4, 64, generator=g))
    Q = row_basis(A_s)
    with torch.autocast("cpu", torch.bfloat16):
        A = project(A_t, Q)
    assert torch.equal(A, project(A_t, Q))
    assert (A.dtype, A.requires_grad) == (torch.float32, False)


def lora(name: str, names: list[str], rank: int, seed: int, size: int = 8, out: int = 8) -> LoraFile:
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    made = {n: LoraLayer(n, make(rank, size), make(out, rank), float(rank)) for n in names}
    return LoraFile(Path(name), name, name * 8, {}, made)


FUSED = ModelInfo(
    family="Toy",
    key_map={
        "lora_unet_to_q": ("qkv.weight", (0, 0, 8)),
        "unet.to_k": ("qkv.weight", (0, 8, 8)),
        "lora_unet_qkv": "qkv.weight",
        "unet.left": ("wide.weight", (1, 0, 6)),
        "unet.right": ("wide.weight", (1, 6, 6)),
        "lora_unet_wide": "wide.weight",
        "lora_unet_other": "other.weight",
    },
    specs={
        "qkv.weight": LayerSpec("qkv", (24, 8)),
        "wide.weight": LayerSpec("wide", (8, 12)),
        "other.weight": LayerSpec("other", (8, 8)),
    },
    roots=(),
)


def test_slices_of_a_fused_weight_share_its_input_space_whatever_the_files_call_them():
    task, safety = lora("t", ["lora_unet_to_q", "lora_unet_other"], 3, 0), lora("s", ["unet.to_k"], 2, 1)
    found = bases(task.layers, [safety], [FUSED])
    assert set(found) == {"lora_unet_to_q"}
    assert residual(safety.layers["unet.to_k"].down, found["lora_unet_to_q"]) == pytest.approx(1)


def test_slices_of_the_inputs_are_projected_only_where_they_meet():
    whole, left = lora("t", ["lora_unet_wide"], 3, 0, 12), lora("s", ["unet.left"], 2, 1, 6)
    Q = bases(whole.layers, [left], [FUSED])["lora_unet_wide"]
    assert float(Q[6:].abs().max()) == 0
    assert residual(left.layers["unet.left"].down, Q[:6]) == pytest.approx(1)
    right = lora("r", ["unet.right"], 2, 2, 6)
    assert bases(right.layers, [whole], [FUSED])["unet.right"].shape == (6, 3)
    assert bases(right.layers, [left], [FUSED])["unet.right"].shape == (6, 0)


def test_slices_of_a_fused_weight_share_no_outputs_and_rearranged_rows_are_found():
    task, other, whole = (lora(n, [layer], 2, i, 8, out) for i, (n, layer, out) in enumerate(
        (("t", "lora_unet_to_q", 8), ("o", "unet.to_k", 8), ("w", "lora_unet_qkv", 24))
    ))  # fmt: skip
    assert output_bases(task.layers, [other], [FUSED])["lora_unet_to_q"].shape == (8, 0), "they write apart"
    P = output_bases(task.layers, [whole], [FUSED])["lora_unet_to_q"]
    assert residual(whole.layers["lora_unet_qkv"].up[:8].T, P) == pytest.approx(1)
    turned = ModelInfo(
        family="Toy",
        key_map={"lora_unet_x": ("x.weight", None, lambda rows: rows.roll(3, 0)), "unet.y": "x.weight"},
        specs={"x.weight": LayerSpec("x", (8, 8))},
        roots=(),
    )
    task, safety = lora("t", ["lora_unet_x"], 2, 0), lora("s", ["unet.y"], 2, 1)
    P = output_bases(task.layers, [safety], [turned])["lora_unet_x"]
    assert residual(safety.layers["unet.y"].up.roll(-3, 0).T, P) == pytest.approx(1)


@pytest.mark.parametrize(("sides", "said"), [("input", "residual"), ("output", "outputs"), ("both", "residual")])
def test_the_sides_that_are_asked_for_are_clear_and_the_file_says_how_well(sides, said, tmp_path):
    task, safety = lora("t", ["x", "y"], 4, 0, 16, 12), lora("s", ["x"], 3, 1, 16, 12)
    tensors = {f"{n}.lora_{r}.weight": getattr(task.layers[n], r) for n in ("x", "y") for r in ("down", "up")}
    save_file(tensors, tmp_path / "t.safetensors")
    task = read_lora(tmp_path / "t.safetensors")
    made, report = project_file(task, [safety], sides=sides)
    after = write_tensors(tmp_path / "p.safetensors", made, projected_metadata(task, [safety], report))
    layer, other = after.layers["x"], safety.layers["x"]
    rows, columns = row_basis(other.down), row_basis(other.up.T)
    assert (residual(layer.down, rows) < 1e-5) == (sides != "output")
    assert (residual(layer.up.T, columns) < 1e-5) == (sides != "input")
    assert torch.equal(after.layers["y"].down, task.layers["y"].down)
    assert torch.equal(after.layers["y"].up, task.layers["y"].up)
    text = after.metadata["modular_lora.projected"]
    assert text.startswith(said)
    assert (", outputs " in text) == (sides == "both")
    dense = lambda x: float((x.scale * x.up.double() @ x.down.double()).square().sum())  # noqa: E731
    whole = sum(dense(x) for x in task.layers.values())
    assert report.removed == pytest.approx((dense(task.layers["x"]) - dense(layer)) / whole, rel=1e-5)


def test_a_safety_lora_that_writes_everywhere_is_an_error_of_the_output_side_alone():
    task, safety = lora("t", ["x"], 2, 0, 16, 4), lora("s", ["x"], 4, 1, 16, 4)
    assert bases(task.layers, [safety])["x"].shape == (16, 4)
    with refuses("project.nothing-left", "x", "output space of 4"):
        output_bases(task.layers, [safety])
    with refuses("project.other-shape", "5 outputs", "4"):
        bases(task.layers, [lora("s", ["x"], 2, 1, 16, 5)])


def test_files_without_a_common_layer_are_an_error_with_the_remedy():
    task, safety = lora("t", ["a"], 2, 0), lora("s", ["b"], 2, 1)
    with refuses("project.other-layers", "none of 1", "checkpoint"):
        bases(task.layers, [safety])
    with refuses("project.other-layers", "none of 1", "one base"):
        bases(task.layers, [safety], [FUSED])
    with refuses("project.other-shape", "layer a", "9 inputs", "8"):
        bases(task.layers, [lora("s", ["a"], 2, 1, 9)])


@pytest.mark.parametrize(
    "names",
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.lora_up.weight"),
        ("unet.down_blocks.0.lora_A.weight", "unet.down_blocks.0.lora_B.weight"),
        ("base_model.model.x.lora_A.default.weight", "base_model.model.x.lora_B.default.weight"),
        ("unet.down_blocks.0_lora.down.weight", "unet.down_blocks.0_lora.up.weight"),
        ("unet.down.lora.down.weight", "unet.down.lora.up.weight"),
        ("unet.down.lora_linear_layer.down.weight", "unet.down.lora_linear_layer.up.weight"),
    ],
)
def test_a_file_keeps_its_names_types_and_all_but_the_paired_downs(names, tmp_path):
    g = torch.Generator().manual_seed(0)
    shapes = {names[0]: (3, 8), names[1]: (8, 3), "other.lora_down.weight": (3, 8), "other.lora_up.weight": (8, 3)}
    save_file({n: torch.randn(s, generator=g).half() for n, s in shapes.items()}, tmp_path / "t.safetensors")
    task = read_lora(tmp_path / "t.safetensors")
    [layer] = set(task.layers) - {"other"}
    safety = lora("s", [layer], 2, 1)
    tensors, report = project_file(task, [safety])
    before = load_file(tmp_path / "t.safetensors")
    assert {n: t.dtype for n, t in tensors.items()} == {n: t.dtype for n, t in before.items()}
    assert [n for n in tensors if not torch.equal(tensors[n], before[n])] == [names[0]]
    Q = row_basis(safety.layers[layer].down)
    assert residual(tensors[names[0]], Q) < HALF < 0.1 < residual(before[names[0]], Q)
    assert report.unpaired == ("other",)
    energies = [float((x.scale * x.up.double() @ x.down.double()).norm() ** 2) for x in task.layers.values()]
    lost = report.layers[0].before - report.layers[0].after
    assert report.removed == pytest.approx(lost / sum(energies), rel=1e-6)  # of the whole LoRA, unpaired layers too
    again = write_tensors(tmp_path / "p.safetensors", tensors, {})
    assert set(again.layers) == set(task.layers)


def test_a_tucker_file_is_projected_with_its_kernel_and_saved_without_the_middle(tmp_path):
    torch.manual_seed(0)
    tensors = {"x.lora_down.weight": torch.randn(2, 8, 1, 1), "x.lora_up.weight": torch.randn(8, 2, 1, 1)}
    save_file(tensors | {"x.lora_mid.weight": torch.randn(2, 2, 3, 3)}, tmp_path / "t.safetensors")
    safety = LoraFile(Path(), "s", "", {}, {"x": LoraLayer("x", torch.randn(1, 8, 3, 3), torch.ones(8, 1), None)})
    made, report = project_file(read_lora(tmp_path / "t.safetensors"), [safety])
    assert set(made) == set(tensors)
    assert made["x.lora_down.weight"].shape == (2, 8, 3, 3)
    assert report.residual < 1e-5


def test_files_of_other_formats_are_refused(tmp_path):
    tensors = {"x.lokr_w1": torch.ones(2, 2), "x.lokr_w2": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "t.safetensors")
    other = read_lora(tmp_path / "t.safetensors")
    for task, safety in ((other, lora("s", ["x"], 2, 1)), (lora("t", ["x"], 2, 1), other)):
        with refuses("file.not-plain", "t.safetensors", "'x'", "LoKr"):
            project_file(task, [safety])


def test_the_report_counts_the_energy_of_the_dense_matrices(tmp_path):
    task, safety = (
        read_lora(ASSETS / "demo_task_gloss.safetensors"),
        read_lora(ASSETS / "demo_safety_vehicles.safetensors"),
    )
    tensors, report = project_file(task, [safety])
    says = projected_metadata(task, [safety], report)
    after = write_tensors(tmp_path / "p.safetensors", tensors, says)
    assert after.metadata["modular_lora.safety_sha256"] == safety.sha256
    assert after.metadata["modular_lora.projected"] == f"residual {report.residual:.1e}"
    assert after.metadata["ss_network_dim"] == task.metadata["ss_network_dim"]
    assert projected_metadata(after, [safety, task], report)["modular_lora.safety_sha256"] == (
        f"{safety.sha256},{task.sha256}"
    )
    dense = lambda x: float((x.scale * x.up.double().flatten(1) @ x.down.double().flatten(1)).norm() ** 2)  # noqa: E731
    assert len(report.layers) == 84
    for p in report.layers[::12]:
        assert p.before == pytest.approx(dense(task.layers[p.layer]), rel=1e-6)
        assert p.after == pytest.approx(dense(after.layers[p.layer]), rel=1e-6)
    assert report.removed == pytest.approx(
        1 - sum(p.after for p in report.layers) / sum(p.before for p in report.layers)
    )
    assert 0 < report.removed < 0.5
    assert report.residual < HALF
    text = format_projection(report)
    assert "84 of 84 layers paired by equal names" in text
    assert text.count("lora_unet_") == 84


@pytest.mark.parametrize(
    ("own", "wanted", "saved"),
    [
        (torch.float8_e4m3fn, None, torch.float16),  # 8 bits would put the residual back
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_a_file_is_saved_in_its_own_type_or_the_one_asked_for(own, wanted, saved, tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {f"x.lora_{k}.weight": torch.randn(8, 8, generator=g).to(own) for k in ("down", "up")}
    save_file(tensors, tmp_path / "t.safetensors")
    made, _ = project_file(read_lora(tmp_path / "t.safetensors"), [lora("s", ["x"], 2, 1)], dtype=wanted)
    assert {t.dtype for t in made.values()} == {saved}
    assert torch.equal(made["x.lora_up.weight"].float(), tensors["x.lora_up.weight"].float())


def test_a_lora_of_the_same_initialisation_loses_most_and_the_report_says_why(tmp_path):
    safety = read_lora(ASSETS / "demo_safety_vehicles.safetensors")
    _, report = project_file(safety, [safety])
    assert report.removed > 0.999
    assert "WARNING: 84 layers lost more than 50% of their energy" in format_projection(report, rows=False)


def test_layers_that_the_model_lacks_are_counted_and_named(tmp_path):
    save_file(
        {f"{n}.lora_{k}.weight": torch.randn(8, 8) for n in ("lora_unet_to_q", "lora_te_x") for k in ("down", "up")},
        tmp_path / "t.safetensors",
    )
    _, report = project_file(read_lora(tmp_path / "t.safetensors"), [lora("s", ["unet.to_k"], 2, 1)], [FUSED])
    assert report.strangers == {"t.safetensors": ("lora_te_x",)}
    assert "WARNING: 1 layers of t.safetensors are not in the model (first lora_te_x)" in format_projection(report)


def test_a_file_that_changed_since_it_was_read_is_projected_as_it_was_read(tmp_path):
    path = tmp_path / "t.safetensors"
    write = lambda seed: save_file(  # noqa: E731
        {
            f"x.lora_{k}.weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
            for k in ("down", "up")
        },
        path,
    )
    write(0)
    task, safety = read_lora(path), [lora("s", ["x"], 2, 1)]
    wanted, _ = project_file(task, safety)
    write(1)
    found, _ = project_file(task, safety)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other, _ = project_file(read_lora(path), safety)
    assert not torch.equal(other["x.lora_up.weight"], wanted["x.lora_up.weight"])
