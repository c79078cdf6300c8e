"""Reading LoRA files: every valid file comes through unchanged, everything else is one LoraFileError."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.errors import LoraFileError
from modular_lora_guard.modular_lora.files.reader import (
    HEADER_LIMIT,
    PIECE,
    TENSOR_LIMIT,
    describe_base,
    read_lora,
    sha256_file,
)
from safetensors.torch import save, save_file
from support.errors import refuses
from torch import Tensor

NAMES = {
    "kohya": ("{}.lora_down.weight", "{}.lora_up.weight"),
    "peft": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "adapter": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "diffusers": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "processor": ("{}_lora.down.weight", "{}_lora.up.weight"),
    "linear layer": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
}
TENSOR, HEADER, LAYER = "file.tensor", "file.header", "file.layer"  # codes
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def pair(layer: str = "lora_unet_a", *, style: str = "kohya", rank: int = 2, kernel: int = 0, out: int = 3) -> dict:
    """Tensors of one layer with no zero in them."""
    down, up = (name.format(layer) for name in NAMES[style])
    tail = (kernel, kernel) if kernel else ()
    return {
        down: torch.randn(rank, 4, *tail).abs() + 0.5,
        up: torch.randn(out, rank, *(1 for _ in tail)).abs() + 0.5,
    }


def build(header: dict | bytes, data: bytes) -> bytes:
    """A safetensors file from any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def check_refusal(path: Path, code: str | tuple[str, ...], *named: str, **arguments: str) -> None:
    """Reading must end in an error of this code: one printable line that names the file, and what is ``named``."""
    with refuses(code, path.name, ": ", *named) as error:
        read_lora(path, **arguments)
    assert str(error.value).isprintable()


@st.composite
def lora_tensors(draw: st.DrawFn) -> dict[str, tuple[str, Tensor, Tensor, float | None]]:
    """Layers by name: naming style, down, up, alpha."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layers = {}
    for index in range(draw(st.integers(1, 4))):
        rank, inside, out, kernel = (draw(st.integers(1, 5)) for _ in range(4))
        tail = (kernel, kernel) if draw(st.booleans()) else ()
        dtype = draw(st.sampled_from(DTYPES))
        down = (torch.rand(rank, inside, *tail, generator=generator) + 0.5).to(dtype)
        up = (torch.rand(out, rank, *(1 for _ in tail), generator=generator) - 2).to(dtype)
        alpha = draw(st.none() | st.sampled_from([0.5, 1.0, 4.0]))
        layers[f"unet.block.{index}"] = (draw(st.sampled_from(sorted(NAMES))), down, up, alpha)
    return layers


def flatten(layers: dict[str, tuple[str, Tensor, Tensor, float | None]]) -> dict[str, Tensor]:
    tensors = {}
    for name, (style, down, up, alpha) in layers.items():
        tensors |= dict(zip((text.format(name) for text in NAMES[style]), (down, up), strict=True))
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@settings(max_examples=40, deadline=None)
@given(layers=lora_tensors(), metadata=st.dictionaries(st.text("abc_.", min_size=1), st.text(max_size=20), max_size=3))
def test_a_valid_file_comes_through_unchanged(layers, metadata, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    path.write_bytes(save(flatten(layers), metadata))
    lora = read_lora(path)
    assert lora.metadata == metadata
    assert lora.name == "a.safetensors"
    assert lora.sha256 == sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(lora.layers) == set(layers)
    assert lora.zero_layers == ()
    for name, (_, down, up, alpha) in layers.items():
        layer = lora.layers[name]
        assert layer.name == name
        assert layer.rank == down.shape[0]
        assert layer.scale == (1.0 if alpha is None else alpha / down.shape[0])
        for ours, theirs in ((layer.down, down), (layer.up, up)):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.float(), theirs.float())


def attempt(path: Path, raw: bytes, changed: bytes) -> None:
    """A changed file must be refused or be a sound LoRA; against the released hash it is always refused."""
    path.write_bytes(changed)
    try:
        lora, message = read_lora(path), ""
    except LoraFileError as error:
        lora, message = None, str(error)
    assert message.isprintable()
    if lora is not None:
        assert lora.sha256 == hashlib.sha256(changed).hexdigest()
        for layer in lora.layers.values():
            assert math.isfinite(layer.scale)
            assert torch.isfinite(layer.down.float()).all()
            assert torch.isfinite(layer.up.float()).all()
    if changed != raw:
        with pytest.raises(LoraFileError):
            read_lora(path, expected_sha256=hashlib.sha256(raw).hexdigest())


@settings(max_examples=100, deadline=None)
@given(data=st.data(), layers=lora_tensors())
def test_flipped_bits_and_cuts_never_give_another_error(data, layers, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    raw = save(flatten(layers))
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(raw)))
    tail = data.draw(st.binary(max_size=8))
    attempt(path, raw, bytes(changed))
    attempt(path, raw, raw[:cut] + tail)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([2**63, 10**400]),
    lambda item: st.lists(item, max_size=4) | st.dictionaries(st.text(max_size=9), item, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), layers=lora_tensors(), value=JSON)
def test_header_edits_never_give_another_error(data, layers, value, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    raw = save(flatten(layers))
    header, body = parts(raw)
    tensor = data.draw(st.sampled_from(sorted(header)))
    edit = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "entry", "add", "rename", "metadata", "all"]))
    if edit == "entry":
        header[tensor] = value
    elif edit == "add":
        header[data.draw(st.text(max_size=30))] = value
    elif edit == "rename":
        header[data.draw(st.text(max_size=30))] = header.pop(tensor)
    elif edit == "metadata":
        header["__metadata__"] = value
    else:
        header[tensor] = {**header[tensor], edit: value}
    attempt(path, raw, build(json.dumps(value).encode() if edit == "all" else header, body))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("a.boft_R", "BOFT"),
        ("a.oft_r", "OFT"),
        ("a.oft_R.default.weight", "OFT"),
        ("a.rescale", "rescale"),
        ("a.lokr_t1", "LoKr"),
        ("a.reshape_weight", "LoRA"),
        ("a.scalar", "use_scalar"),
        ("a.a1.weight", "GLoRA"),
        ("a.on_input", "IA3"),
        ("a.ia3_l", "IA3"),
        ("a.vera_lambda_b", "VeRA"),
        ("a.lora_E.default", "AdaLoRA"),
        ("a.lambda_layer", "T-LoRA"),
        ("a.lora_up.bias", "bias"),
        ("lora_unet_a.lora_upp.weight", ""),
        ("lora_unet_a.diff_m", ""),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, tensor, kind):
    save_file({**pair(), tensor: torch.ones(1)}, tmp_path / "a.safetensors")
    code = "file.unread-format" if kind else "file.unknown-tensor"
    check_refusal(tmp_path / "a.safetensors", code, repr(tensor), kind, "LoRA, LoCon, LoHa")


DOWN, UP = (name.format("lora_unet_a") for name in NAMES["kohya"])


def entry(header: dict, tensor: str, **fields: Any) -> dict:
    return {**header, tensor: {**header[tensor], **fields}}


@pytest.mark.parametrize(
    ("edit", "code", "named"),
    [
        (lambda h: entry(h, DOWN, dtype="I32"), TENSOR, "dtype 'I32'"),
        (lambda h: entry(h, DOWN, dtype="F64"), TENSOR, "bytes 0 to 32"),
        (lambda h: entry(h, DOWN, dtype=["F32"]), TENSOR, "dtype"),
        (lambda h: entry(h, DOWN, shape=[2, -4]), TENSOR, "shape"),
        (lambda h: entry(h, DOWN, shape=[True, 8]), TENSOR, "shape"),
        (lambda h: entry(h, DOWN, shape=[10**400, 10**400]), TENSOR, "shape"),
        (lambda h: entry(h, DOWN, shape=[0, 4], data_offsets=[0, 0]), TENSOR, "bytes 32 to 56"),
        (lambda h: entry(h, DOWN, data_offsets=[-32, 0]), TENSOR, "offsets"),
        (lambda h: entry(h, DOWN, data_offsets=[0.0, 32.0]), TENSOR, "offsets"),
        (lambda h: entry(h, DOWN, data_offsets=[0, 31]), TENSOR, "bytes 0 to 31"),
        (lambda h: entry(h, UP, data_offsets=[0, 24]), TENSOR, "bytes"),
        (lambda h: entry(h, UP, data_offsets=[40, 64]), TENSOR, "bytes 40 to 64"),
        (lambda h: {**h, "x.alpha": {"dtype": "F32", "shape": [], "data_offsets": [56, 60]}}, TENSOR, "bytes 56 to 60"),
        (lambda h: {key: value for key, value in h.items() if key != UP}, TENSOR, "24 bytes"),
        (lambda h: {**h, "__metadata__": {"a": 1}}, HEADER, "metadata"),
        (lambda h: {**h, "__metadata__": "a"}, HEADER, "metadata"),
        (lambda h: {**h, DOWN: {**h[DOWN], "more": 1}}, TENSOR, "data_offsets"),
        (lambda h: {}, HEADER, "0 tensors"),
        (lambda h: {f"l{i}.alpha": h[UP] for i in range(TENSOR_LIMIT + 1)}, HEADER, "20001 tensors"),
        (lambda h: json.dumps(h).replace("{", '{"a": 1, "a": 2, ', 1).encode(), HEADER, "'a'"),
        (lambda h: b"[" * 50_000, HEADER, "JSON"),
        (lambda h: b"\xff\xfe{}", HEADER, "JSON"),
        (lambda h: b"[1]", HEADER, "list"),
        (lambda h: b"{}" + b" " * HEADER_LIMIT, HEADER, f"{HEADER_LIMIT}"),
    ],
)
def test_a_header_that_is_wrong_is_named(tmp_path, edit, code, named):
    path = tmp_path / "a.safetensors"
    header, body = parts(save(pair()))
    assert header[DOWN]["data_offsets"] == [0, 32]
    path.write_bytes(build(edit(header), body))
    check_refusal(path, code, named)


@pytest.mark.parametrize(
    ("tensors", "code", "named"),
    [
        ({DOWN: torch.ones(2, 4)}, LAYER, "down"),
        ({UP: torch.ones(3, 2)}, LAYER, "up"),
        ({"b.alpha": torch.tensor(1.0)}, LAYER, "alpha"),
        ({DOWN: torch.ones(2, 4), UP: torch.ones(3, 5)}, LAYER, "2 in down and 5 in up"),
        ({DOWN: torch.ones(2, 4, 3), UP: torch.ones(3, 2)}, "file.unread-format", "[2, 4, 3]"),
        ({DOWN: torch.ones(2, 4, 3, 3), UP: torch.ones(3, 2, 3, 3)}, "file.unread-format", "[3, 2, 3, 3]"),
        ({DOWN: torch.ones(4097, 4), UP: torch.ones(3, 4097)}, LAYER, "rank 4097"),
        ({**pair(), "lora_unet_a.alpha": torch.ones(2)}, LAYER, "[2]"),
        ({**pair(), "lora_unet_a.alpha": torch.tensor(math.inf)}, LAYER, "inf"),
        ({**pair(), "lora_unet_a.alpha": torch.tensor(-1.0)}, LAYER, "-1.0"),
        ({DOWN: torch.full((2, 4), math.nan), UP: torch.ones(3, 2)}, "file.not-finite", "nan"),
        ({DOWN: torch.ones(2, 4), UP: torch.tensor([[1.0, -math.inf]])}, "file.not-finite", "inf"),
        ({DOWN: torch.ones(2, 4, dtype=torch.int8), UP: torch.ones(3, 2)}, TENSOR, "dtype 'I8'"),
        ({DOWN: torch.ones(0, 4), UP: torch.ones(3, 0)}, TENSOR, "shape [0, 4]"),
        ({DOWN: torch.full((2, 4), 1e300, dtype=torch.float64), UP: torch.ones(3, 2)}, "file.not-finite", "inf"),
        ({**pair("a", style="kohya"), **pair("a", style="peft")}, "file.two-adapters", "down"),
        ({DOWN: torch.ones(2, 4), UP: torch.zeros(3, 2)}, "file.all-zero", "1 "),
        ({**pair(), "lora_unet_a.alpha": torch.tensor(0.0)}, "file.all-zero", "1 "),
    ],
)
def test_tensors_that_make_no_lora_are_named(tmp_path, tensors, code, named):
    save_file(tensors, tmp_path / "a.safetensors")
    check_refusal(tmp_path / "a.safetensors", code, named)


def test_layers_that_change_nothing_are_listed(tmp_path):
    tensors = pair("kept") | pair("up") | pair("down") | pair("alpha") | pair("apart")
    tensors |= {"up.lora_up.weight": torch.zeros(3, 2), "down.lora_down.weight": torch.zeros(2, 4)}
    tensors |= {"alpha.alpha": torch.tensor(0.0), "apart.lora_up.weight": torch.tensor([[1.0, 0.0]])}
    tensors |= {"apart.lora_down.weight": torch.tensor([[0.0, 0.0], [1.0, 1.0]])}
    save_file(tensors, tmp_path / "a.safetensors")
    assert set(read_lora(tmp_path / "a.safetensors").zero_layers) == {"up", "down", "alpha", "apart"}


@pytest.mark.parametrize("field", ["entry", "shape", "__metadata__"])
def test_nesting_of_any_depth_is_refused(tmp_path, field):
    path = tmp_path / "a.safetensors"
    header, body = parts(save(pair()))
    for depth in (1, 10, 100, 300, 600, *range(800, 1000, 3), 2000, 9000, 90_000):
        deep = b"[" * depth + b"]" * depth
        mark = {"entry": {DOWN: "?"}, "shape": entry(header, DOWN, shape="?"), "__metadata__": {"__metadata__": "?"}}
        path.write_bytes(build(json.dumps({**header, **mark[field]}).encode().replace(b'"?"', deep), body))
        check_refusal(path, (HEADER, TENSOR))  # how deep Python itself reads is its own affair


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "a"])
def test_pickle_files_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(save(pair()))
    check_refusal(tmp_path / name, "file.ending")


def test_paths_that_are_no_file(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    check_refusal(tmp_path / "folder.safetensors", "file.directory")
    check_refusal(tmp_path / "missing.safetensors", "file.no-such-file")
    with refuses("file.unreadable", "missing.safetensors"):
        sha256_file(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("size", [0, 7, 8, 9])
def test_files_too_short_for_a_header(tmp_path, size):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(pair())[:size])
    check_refusal(path, HEADER if size else "file.empty")


def test_the_expected_hash_is_kept_to(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(pair(), path)
    sha256 = read_lora(path, expected_sha256="").sha256
    assert read_lora(path, expected_sha256=f" {sha256.upper()} ").sha256 == sha256
    check_refusal(path, "file.other-sha256", "0" * 64, expected_sha256="0" * 64)
    check_refusal(path, "file.no-sha256", "'abc'", expected_sha256="abc")


def test_a_file_written_again_is_read_and_hashed_again(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(pair(), path)
    first, before = read_lora(path), sha256_file(path)
    kept = first.layers["lora_unet_a"].down.clone()
    save_file(pair(out=5), path)
    assert torch.equal(first.layers["lora_unet_a"].down, kept)
    assert sha256_file(path) == read_lora(path).sha256 != before


def test_the_base_that_a_file_names():
    assert describe_base({}) is None
    assert describe_base({"ss_base_model_version": "sdxl_base_v1-0"}) == "sdxl_base_v1-0 (ss_base_model_version)"
    spec = {"modelspec.architecture": "stable-diffusion-v1/lora\n"}
    assert describe_base(spec) == "stable-diffusion-v1/lora? (modelspec.architecture)"


def test_a_file_of_many_pieces_and_of_odd_places_is_read_whole(tmp_path):
    """Larger than what is read and hashed at a time; one byte comes first, so that all numbers lie at odd places."""
    tensors = pair("a") | {"b.lora_down.weight": torch.rand(256, 2**13) + 0.5, "b.lora_up.weight": torch.ones(3, 256)}
    header, body = parts(save(tensors))
    shifted = {key: entry | {"data_offsets": [n + 1 for n in entry["data_offsets"]]} for key, entry in header.items()}
    one = {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}
    path = tmp_path / "a.safetensors"
    path.write_bytes(build({"a.alpha": one, **shifted}, b"\x3c" + body))
    assert path.stat().st_size > PIECE
    lora = read_lora(path)
    assert lora.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert lora.plain["a"].alpha == 1.0
    for name in ("a", "b"):
        assert torch.equal(lora.plain[name].down, tensors[f"{name}.lora_down.weight"])
