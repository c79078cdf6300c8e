"""Reading every format: what a file holds comes through in its form, what does not fit together is refused."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.errors import LoraFileError
from modular_lora_guard.modular_lora.files.formats import (
    FORMATS,
    RANK_LIMIT,
    BiasedLayer,
    DiffLayer,
    DoraLayer,
    LoraLayer,
)
from modular_lora_guard.modular_lora.files.reader import LoraFile, read_lora
from safetensors.torch import save, save_file
from support.errors import refuses
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
KINDS = {
    "LoRA": "LoRA",
    "LoCon": "LoRA",
    "Tucker": "LoRA",
    "LoHa": "LoHa",
    "LoHa Tucker": "LoHa",
    "LoKr whole": "LoKr",
    "LoKr": "LoKr",
    "LoKr Tucker": "LoKr",
    "OFT": "OFT",
    "diff": "full difference",
    "norm": "full difference",
    "bias": "full difference",
}
OPTIONAL = ("alpha", "dora_scale", "diff_b", "b_norm", "lora_mid.weight", "lokr_t2")
FIELDS = {  # role in a file -> field of its layer, where they differ
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "oft_blocks": "blocks",
    "diff": "weight",
    "diff_b": "bias",
    "w_norm": "weight",
    "b_norm": "bias",
    "dora_scale": "magnitude",
}


def shapes_of(kind: str, o: int, i: int, r: int, k: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts of a layer of o outputs (4·o for LoKr and OFT), i inputs (3·i for LoKr) and rank r."""
    w1, w2 = {"lokr_w1": (4, 3)}, {"lokr_w2": (o, i)}
    return {
        "LoRA": {"lora_down.weight": (r, i), "lora_up.weight": (o, r)},
        "LoCon": {"lora_down.weight": (r, i, k, k), "lora_up.weight": (o, r, 1, 1)},
        "Tucker": {
            "lora_down.weight": (r, i, 1, 1), "lora_up.weight": (o, r, 1, 1), "lora_mid.weight": (r, r, k, k)
        },
        "LoHa": {"hada_w1_a": (o, r), "hada_w1_b": (r, i), "hada_w2_a": (o, r), "hada_w2_b": (r, i)},
        "LoHa Tucker": {
            "hada_w1_a": (r, o), "hada_w1_b": (r, i), "hada_w2_a": (r, o), "hada_w2_b": (r, i),
            "hada_t1": (r, r, k, k), "hada_t2": (r, r, k, k),
        },
        "LoKr whole": w1 | w2,
        "LoKr": {"lokr_w1_a": (4, r), "lokr_w1_b": (r, 3), "lokr_w2_a": (o, r), "lokr_w2_b": (r, i)},
        "LoKr Tucker": w1 | {"lokr_w2_a": (r, o), "lokr_w2_b": (r, i), "lokr_t2": (r, r, k, k)},
        "OFT": {"oft_blocks": (4, o, o)},
        "diff": {"diff": (o, i, k, k)},
        "norm": {"w_norm": (o,), "b_norm": (o,)},
        "bias": {"diff_b": (o,)},
    }[kind]  # fmt: skip


def outputs(kind: str, o: int) -> int:
    return 4 * o if kind.startswith(("LoKr", "OFT")) else o


@st.composite
def layers(draw: st.DrawFn) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """Layers by name: form, parts by role."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = {}
    for index in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(sorted(KINDS)))
        o, i, r, k = draw(st.integers(2, 5)), draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        shapes = shapes_of(kind, o, i, r, k)
        if draw(st.booleans()) and kind not in ("OFT", "diff", "norm", "bias"):
            shapes["dora_scale"] = (outputs(kind, o), 1)
        if draw(st.booleans()) and kind not in ("norm", "bias"):
            shapes["diff_b"] = (outputs(kind, o),)
        dtype = draw(st.sampled_from(DTYPES))
        parts = {role: (torch.rand(shape, generator=generator) + 0.5).to(dtype) for role, shape in shapes.items()}
        if kind != "norm" and draw(st.booleans()):
            parts["alpha"] = draw(st.sampled_from([torch.tensor(2.0), torch.tensor([0.5]), torch.tensor(3)]))
        made[f"lora_unet_block_{index}"] = kind, parts
    return made


def flatten(made: dict[str, tuple[str, dict[str, Tensor]]]) -> dict[str, Tensor]:
    return {f"{name}.{role}": part for name, (_, parts) in made.items() for role, part in parts.items()}


def read(folder: Path, tensors: dict[str, Tensor]) -> LoraFile:
    save_file(tensors, folder / "a.safetensors")
    return read_lora(folder / "a.safetensors")


def check_refusal(folder: Path, tensors: dict[str, Tensor], named: str, code: str = "file.layer") -> None:
    with refuses(code, named) as error:
        read(folder, tensors)
    message = str(error.value)
    assert message.isprintable()
    assert message.startswith("a.safetensors: ")


def attempt(path: Path) -> LoraFile | None:
    """The file, or None where reading ends in a printable LoraFileError; no other error may come."""
    message = ""
    try:
        return read_lora(path)
    except LoraFileError as error:
        message = str(error)
    assert message.isprintable()
    assert message.startswith("a.safetensors: ")
    return None


def fields_of(layer: object) -> dict[str, object]:
    """All fields of a layer and of what it holds inside."""
    inner = getattr(layer, "base", None)
    return vars(layer) | (fields_of(inner) if inner is not None else {})


@settings(max_examples=60, deadline=None)
@given(made=layers())
def test_every_form_comes_through_unchanged(made, tmp_path_factory):
    lora = read(tmp_path_factory.mktemp("lora"), flatten(made))
    assert set(lora.layers) == set(made)
    for name, (kind, parts) in made.items():
        layer = lora.layers[name]
        assert layer.name == name
        assert KINDS[kind] in layer.kind
        assert isinstance(layer, BiasedLayer) == ("diff_b" in parts and kind not in ("diff", "bias"))
        assert ("DoRA" in layer.kind) == ("dora_scale" in parts)
        fields = fields_of(layer)
        if "alpha" in parts and not isinstance(layer, DiffLayer):
            assert fields["alpha"] == parts["alpha"].item()
        for role, part in parts.items():
            if role == "alpha" or (kind == "Tucker" and role in ("lora_down.weight", "lora_mid.weight")):
                continue
            field = fields[FIELDS.get(role, role.removeprefix("hada_").removeprefix("lokr_"))]
            assert field.dtype == part.dtype
            assert torch.equal(field.float(), part.float()), role
        assert not layer.is_zero or kind == "OFT"


@settings(max_examples=60, deadline=None)
@given(made=layers(), data=st.data())
def test_a_layer_that_lost_one_of_its_parts_is_refused(made, data, tmp_path_factory):
    tensors = flatten(made)
    needed = [key for key in tensors if not key.endswith(OPTIONAL) and len(made[key.split(".", 1)[0]][1]) > 1]
    assume(needed)
    lost = data.draw(st.sampled_from(needed))
    name = lost.split(".", 1)[0]
    del tensors[lost]
    left = {key for key in tensors if key.startswith(f"{name}.")}
    assume(not left <= {f"{name}.diff_b", f"{name}.alpha"})  # a difference of the bias stands alone
    check_refusal(tmp_path_factory.mktemp("lora"), tensors, repr(name))


@settings(max_examples=100, deadline=None)
@given(made=layers(), data=st.data())
def test_damage_never_gives_another_error(made, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    raw = save(flatten(made))
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    lora = attempt(path)
    if lora is None:
        return
    assert lora.sha256 == hashlib.sha256(changed).hexdigest()
    for layer in lora.layers.values():
        numbers = [value for value in fields_of(layer).values() if isinstance(value, Tensor)]
        assert all(torch.isfinite(tensor.float()).all() for tensor in numbers)


@settings(max_examples=100, deadline=None)
@given(made=layers(), data=st.data())
def test_a_part_of_another_shape_is_refused_or_fits(made, data, tmp_path_factory):
    tensors = flatten(made)
    name = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.lists(st.integers(1, 5), max_size=5))
    tensors[name] = torch.full(shape, 0.5)
    save_file(tensors, path := tmp_path_factory.mktemp("lora") / "a.safetensors")
    attempt(path)


@pytest.mark.parametrize("position", [0, 1, 7, 8, 15, 16, 31, 63, 64, 100, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(position, dtype, tmp_path):
    down = torch.ones(4, 37)
    down.view(-1)[position] = math.nan
    tensors = {"a.lora_down.weight": torch.ones(4, 37), "a.lora_up.weight": torch.ones(5, 4)}
    tensors |= {"b.lora_down.weight": down, "b.lora_up.weight": torch.ones(5, 4)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    check_refusal(tmp_path, tensors, "'b.lora_down.weight'", "file.not-finite")


@pytest.mark.parametrize(
    ("down", "up", "layer"),
    [
        ("lora_te_text_model_a.lora_down.weight", "lora_te_text_model_a.lora_up.weight", "lora_te_text_model_a"),
        ("lora_prior_unet_a.lora_down.weight", "lora_prior_unet_a.lora_up.weight", "lora_prior_unet_a"),
        ("lora_transformer_a.lora_down.weight", "lora_transformer_a.lora_up.weight", "lora_transformer_a"),
        ("lycoris_a.lora_down.weight", "lycoris_a.lora_up.weight", "lycoris_a"),
        ("lora_unet__blocks_0_k.lora_down.weight", "lora_unet__blocks_0_k.lora_up.weight", "lora_unet_blocks_0_k"),
        ("unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q_lora.up.weight", "unet.a.processor.to_q"),
        ("transformer.a.lora_A.weight", "transformer.a.lora_B.weight", "transformer.a"),
        ("text_encoder_2.a.lora_linear_layer.down.weight", "text_encoder_2.a.lora_linear_layer.up.weight",
         "text_encoder_2.a"),
        ("base_model.model.a.lora_A.default.weight", "base_model.model.a.lora_B.default.weight",
         "base_model.model.a"),
        ("blocks.0.attn.lora_A", "blocks.0.attn.lora_B", "blocks.0.attn"),
        ("diffusion_model.a.lora.down.weight", "diffusion_model.a.lora.up.weight", "diffusion_model.a"),
        ("double_blocks.3.processor.qkv_lora1.down.weight", "double_blocks.3.processor.qkv_lora1.up.weight",
         "diffusion_model.double_blocks.3.img_attn.qkv"),
        ("double_blocks.3.processor.proj_lora2.down.weight", "double_blocks.3.processor.proj_lora2.up.weight",
         "diffusion_model.double_blocks.3.txt_attn.proj"),
        ("single_blocks.9.processor.qkv_lora.down.weight", "single_blocks.9.processor.qkv_lora.up.weight",
         "diffusion_model.single_blocks.9.linear1_qkv"),
        ("single_blocks.9.processor.proj_lora.down.weight", "single_blocks.9.processor.proj_lora.up.weight",
         "diffusion_model.single_blocks.9.linear2"),
    ],
)  # fmt: skip
def test_names_of_every_trainer(down, up, layer, tmp_path):
    lora = read(tmp_path, {down: torch.ones(2, 4), up: torch.full((3, 2), 2.0)})
    assert list(lora.layers) == [layer]
    assert torch.equal(lora.plain[layer].up, torch.full((3, 2), 2.0))


def whole(kind: str, **more: Tensor) -> dict[str, Tensor]:
    """The tensors of one layer named a."""
    parts = {role: torch.ones(shape) for role, shape in shapes_of(kind, 3, 5, 2, 3).items()}
    return {f"a.{role}": part for role, part in (parts | more).items()}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (whole("LoRA") | whole("LoKr"), "LoKr and LoRA"),
        (whole("LoHa") | whole("LoKr whole"), "LoHa and LoKr"),
        (whole("diff") | whole("LoRA"), "LoRA and full difference"),
        (whole("diff") | whole("norm"), "change of a norm and full difference"),
        (whole("norm", diff_b=torch.ones(3)), "diff_b and b_norm"),
        (whole("norm", alpha=torch.ones(1)), "alpha"),
        (whole("OFT", dora_scale=torch.ones(12, 1)), "dora_scale"),
        (whole("LoRA", dora_scale=torch.ones(3, 1), lora_magnitude_vector=torch.ones(3)), "dora_scale and magnitude"),
        (whole("LoHa", lora_magnitude_vector=torch.ones(3)), "magnitude"),
        (whole("LoRA", dora_scale=torch.ones(3)), "dora_scale [3]"),
        (whole("LoRA", dora_scale=torch.ones(())), "dora_scale []"),
        (whole("LoRA", dora_scale=torch.zeros(3, 1)), "dora_scale"),
        (whole("LoRA", lora_magnitude_vector=torch.ones(())), "magnitude []"),
        (whole("LoKr whole") | {"a.lokr_w1": torch.ones(())}, "factors [] and [3, 5]"),
        (whole("LoRA", dora_scale=torch.ones(4, 1)), "dora_scale [4, 1]"),
        (whole("LoRA", lora_magnitude_vector=torch.ones(4)), "magnitude [4]"),
        (whole("LoRA", diff_b=torch.ones(4)), "diff_b has shape [4]"),
        (whole("LoKr whole", lokr_w1_a=torch.ones(4, 2), lokr_w1_b=torch.ones(2, 3)), "lokr_w1 and lokr_w1_a"),
        ({"a.oft_blocks": torch.ones(2, 3, 4)}, "[2, 3, 4]"),
        ({"a.oft_blocks": torch.ones(1, 2, 3, 3)}, "BOFT"),
        ({"a.dora_scale": torch.ones(3, 1)}, "dora_scale"),
        ({"a.b_norm": torch.ones(3)}, "b_norm"),
        (whole("LoHa") | {"a.hada_t1": torch.ones(2, 2, 3, 3)}, "hada_t1"),
        (whole("LoHa") | {"a.hada_w2_b": torch.ones(2, 6)}, "[3, 5] and [3, 6]"),
        (whole("LoHa") | {"a.hada_w1_a": torch.ones(3, RANK_LIMIT + 1), "a.hada_w1_b": torch.ones(RANK_LIMIT + 1, 5)},
         "rank 4097"),
        (whole("Tucker") | {"a.lora_mid.weight": torch.ones(2, 3, 3, 3)}, "mid [2, 3, 3, 3]"),
        (whole("LoCon") | {"a.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "mid [2, 2, 3, 3]"),
        (whole("LoKr whole") | {"a.lokr_w2": torch.ones(2)}, "[2]"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together_are_named(tensors, named, tmp_path):
    check_refusal(tmp_path, tensors, named, "file.unread-format" if named == "BOFT" else "file.layer")


def test_two_adapters_in_one_file_are_refused_even_on_different_layers(tmp_path):
    tensors = {f"{layer}.lora_{part}.{adapter}.weight": torch.ones(2, 2) for part in "AB"
               for layer, adapter in (("a", "first"), ("b", "second"))}  # fmt: skip
    check_refusal(tmp_path, tensors, "'first', 'second'", "file.two-adapters")
    one_layer = {name.replace("b.", "a.", 1): tensor for name, tensor in tensors.items()}
    check_refusal(tmp_path, one_layer, "down", "file.two-adapters")


def test_a_control_lora_of_flux_has_more_inputs_biases_and_replaced_norms(tmp_path):
    tensors = {"img_in.lora_A.weight": torch.ones(2, 4), "img_in.lora_B.weight": torch.ones(3, 2)}
    tensors |= {"img_in.lora_B.bias": torch.ones(3), "single_blocks.0.norm.key_norm.scale": torch.ones(4)}
    layers = read(tmp_path, tensors).layers
    assert list(layers) == ["diffusion_model.img_in", "diffusion_model.single_blocks.0.norm.key_norm.scale"]
    assert [layer.kind for layer in layers.values()] == ["LoRA with more inputs with a bias", "replaced weight"]


def test_tucker_layers_are_what_the_three_convolutions_are(tmp_path):
    torch.manual_seed(0)
    tensors = {name: torch.randn_like(tensor) for name, tensor in whole("Tucker").items()}
    layer = read(tmp_path, tensors).plain["a"]
    x = torch.randn(1, 5, 8, 8)
    one = torch.conv2d(torch.conv2d(x, layer.down), layer.up)
    three = x
    for part in ("down", "mid", "up"):
        three = torch.conv2d(three, tensors[f"a.lora_{part}.weight"])
    assert layer.down.dtype == torch.float32
    assert torch.allclose(one, three, atol=1e-4)


def test_a_tucker_layer_that_would_fill_the_memory_is_refused(tmp_path):
    tensors = {"a.lora_down.weight": torch.ones(1, 4096, 1, 1), "a.lora_up.weight": torch.ones(1, 1, 1, 1)}
    tensors["a.lora_mid.weight"] = torch.ones(1, 1, 513, 513)
    check_refusal(tmp_path, tensors, "1073741824")


def test_magnitudes_of_peft_and_of_lycoris_are_told_apart(tmp_path):
    tensors = whole("LoRA", dora_scale=torch.ones(1, 5))
    tensors |= {name.replace("a.", "b.", 1): t for name, t in whole("LoCon").items()}
    tensors["b.lora_magnitude_vector.default.weight"] = torch.arange(3.0).reshape(1, 3, 1, 1)
    a, b = (read(tmp_path, tensors).layers[name] for name in "ab")
    assert isinstance(a, DoraLayer)
    assert not a.of_sum
    assert b.of_sum
    assert b.magnitude.tolist() == [0, 1, 2]
    assert isinstance(b.base, LoraLayer)


def test_what_nothing_uses_is_counted(tmp_path):
    tensors = whole("LoRA") | {f"bundle_emb.word.clip_{half}": torch.ones(2, 8) for half in "lg"}
    tensors |= {"b.diff": torch.ones(3), "b.alpha": torch.ones(())}
    lora = read(tmp_path, tensors)
    assert set(lora.layers) == {"a", "b"}
    assert any("2 tensors of bundled embeddings" in note for note in lora.notes)
    assert any("alpha of 1 full differences" in note for note in lora.notes)
    embeddings = {name: tensor for name, tensor in tensors.items() if name.startswith("bundle_emb")}
    check_refusal(tmp_path, embeddings, "", "file.no-layer")


@pytest.mark.parametrize(
    "alpha", [torch.tensor(8), torch.tensor([8.0], dtype=torch.float64), torch.tensor(8, dtype=torch.int32)]
)
def test_alphas_of_every_type_that_tools_save(alpha, tmp_path):
    assert read(tmp_path, whole("LoRA", alpha=alpha)).plain["a"].scale == 4.0
    check_refusal(tmp_path, whole("LoRA", diff_b=torch.ones(3, dtype=torch.long)), "dtype 'I64'", "file.tensor")


@pytest.mark.parametrize(
    ("kind", "zero", "is_zero"),
    [
        ("LoHa", "hada_w2_a", True),
        ("LoHa Tucker", "hada_t2", True),
        ("LoKr whole", "lokr_w1", True),
        ("LoKr", "lokr_w1_b", True),
        ("LoKr Tucker", "lokr_t2", True),
        ("Tucker", "lora_mid.weight", True),
        ("OFT", "oft_blocks", True),
        ("diff", "diff", True),
        ("norm", "w_norm", False),
    ],
)
def test_a_layer_whose_product_is_zero_is_known_as_zero(kind, zero, is_zero, tmp_path):
    tensors = {f"keep.{role}": torch.ones(2, 2) for role in ("lora_down.weight", "lora_up.weight")} | whole(kind)
    tensors[f"a.{zero}"] = torch.zeros_like(tensors[f"a.{zero}"])
    assert read(tmp_path, tensors).layers["a"].is_zero == is_zero


def test_a_file_of_another_format_says_so_where_only_lora_is_taken(tmp_path):
    lora = read(tmp_path, whole("LoHa"))
    with refuses("file.not-plain", "a.safetensors", "'a'", "LoHa"):
        _ = lora.plain


def test_every_name_and_role_belongs_to_one_format():
    """A new format that took another's names would be read as it, or the other way round."""
    ends = [end for kind in FORMATS for end in kind.endings]
    roles = [role for kind in FORMATS for role in set().union(*kind.whole)]
    assert len(ends) == len(set(ends))
    assert len(roles) == len(set(roles))
    assert len({kind.form for kind in FORMATS if kind.whole}) == sum(bool(kind.whole) for kind in FORMATS)
    for kind in FORMATS:
        made = {*kind.endings.values(), *(role for _, role in kind.patterns)}
        assert set().union(*kind.whole) <= made
