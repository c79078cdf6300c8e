"""W0 plus a known change comes back as that change; another base, an embedding and code are refused."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.training.convert.change import Rounding, factored
from modular_lora_guard.training.convert.convert import convert
from modular_lora_guard.training.convert.difference import ConvertOptions
from safetensors.torch import save_file
from support.erased_files import (
    BF16,
    COMPVIS,
    FP16,
    FP32,
    WIDTH,
    K,
    V,
    checkpoint,
    clip,
    compvis,
    erased,
    flux,
    low_rank,
    part,
    pipeline,
    u_net,
)
from support.errors import refuses

NONE = ConvertOptions()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("base") / "sd15.safetensors")


def saved(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def change_of(lora, name: str) -> torch.Tensor:
    layer = lora.layers[f"lora_unet_{COMPVIS[name].removesuffix('.weight').replace('.', '_')}"]
    return layer.up.double().flatten(1) @ layer.down.double().flatten(1) * (layer.alpha / layer.rank)


@pytest.mark.parametrize("rounded", [False, True], ids=["W0 as it is", "W0 rounded first"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_a_known_change_comes_back_within_the_rounding(dtype, rounded, base, tmp_path):
    """The rest is no larger than the rounding of the file, which is known here."""
    change = low_rank(u_net(), K + V)
    safe = part(erased(u_net(), change, dtype, rounded), K + V)
    made = convert(saved(tmp_path / "safe.safetensors", safe), base, tmp_path / "out.safetensors", NONE)
    expected = str(dtype).removeprefix("torch.") if rounded and dtype != FP32 else ""
    assert made.rounded == expected
    lora = read_lora(tmp_path / "out.safetensors")
    for name, weight in safe.items():
        w0 = u_net()[name].to(dtype) if rounded else u_net()[name]
        rounding = float((w0.double() + change[name].double() - weight.double()).norm())
        found, spare = change_of(lora, name), 1e-6 * float(change[name].norm())  # the factors are fp32
        assert float((w0.double() + found - weight.double()).norm()) <= rounding + spare  # by Eckart and Young
        assert float((found - change[name].double()).norm()) <= 2 * rounding + spare


def test_the_proof_is_the_norm_of_what_is_left(base, tmp_path):
    """|W0 + UD - W_safe| / |dW| by the plain formula, with a rank that is too small."""
    change = low_rank(u_net(), V, rank=3)
    safe = part(erased(u_net(), change), V)
    path = saved(tmp_path / "safe.safetensors", safe)
    with refuses("convert.residual", "--rank than 1"):
        convert(path, base, tmp_path / "out.safetensors", ConvertOptions(rank=1))
    made = convert(path, base, tmp_path / "out.safetensors", ConvertOptions(rank=2, limit=0.95))
    rests = [u_net()[name].double() + change_of(made.lora, name) - safe[name].double() for name in safe]
    wholes = [safe[name].double() - u_net()[name].double() for name in safe]
    energies = [torch.cat([one.flatten() for one in found]).norm() for found in (rests, wholes)]
    assert made.residual == pytest.approx(float(energies[0] / energies[1]), rel=1e-3)


def test_biases_norms_and_kernels_are_carried(base, tmp_path):
    """ESD-u changes all but the cross-attention: its kernels, biases and norms, too."""
    names = ("down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.norm1", "mid_block.attentions.0.proj_in")
    change = low_rank(u_net(), (f"{names[0]}.weight", f"{names[2]}.weight"))
    change |= {f"{names[0]}.bias": torch.full((WIDTH,), 0.1), f"{names[1]}.weight": torch.full((WIDTH,), 0.2)}
    change[f"{names[1]}.bias"] = torch.full((WIDTH,), 0.3)
    safe = {name: weight for name, weight in erased(u_net(), change).items() if "attn2" not in name}
    made = convert(saved(tmp_path / "esd-u.safetensors", safe), base, tmp_path / "out.safetensors", NONE)
    assert "ESD-u" in made.method
    tensors, place = made.lora.tensors, COMPVIS[f"{names[0]}.weight"].removesuffix(".weight")
    layer = f"lora_unet_{place}".replace(".", "_")
    assert tensors[f"{layer}.lora_down.weight"].shape == (2, WIDTH, 3, 3)
    assert torch.allclose(tensors[f"{layer}.diff_b"], torch.tensor(0.1), atol=1e-6)
    norm = layer.replace("in_layers_2", "in_layers_0")
    assert torch.allclose(tensors[f"{norm}.w_norm"], torch.tensor(0.2), atol=1e-6)
    assert torch.allclose(tensors[f"{norm}.diff_b"], torch.tensor(0.3), atol=1e-6)
    assert len(made.lora.layers) == 3


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "a part"])
def test_another_base_is_refused(whole, base, tmp_path):
    """Neither a weight in common nor a low rank: what two fine-tuned bases differ by."""
    generator = torch.Generator().manual_seed(9)
    other = {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in u_net().items()}
    safe = saved(tmp_path / "other.safetensors", other if whole else part(other, K + V))
    with refuses("convert.other-base", "other.safetensors", base.name):
        convert(safe, base, tmp_path / "out.safetensors", NONE)
    assert not (tmp_path / "out.safetensors").exists()
    confirmed = ConvertOptions(base_sha256=hashlib.sha256(base.read_bytes()).hexdigest())
    assert convert(safe, base, tmp_path / "out.safetensors", confirmed).residual <= 0.1
    with refuses("convert.other-base", "0" * 64):
        convert(safe, base, tmp_path / "again.safetensors", ConvertOptions(base_sha256="0" * 64))


def test_the_base_itself_and_a_base_of_other_layers_are_refused(base, tmp_path):
    with refuses("convert.no-change", base.name):
        convert(checkpoint(tmp_path / "same.safetensors", FP16), base, tmp_path / "out.safetensors", NONE)
    safe = saved(tmp_path / "safe.safetensors", part(erased(u_net(), low_rank(u_net(), V)), V))
    with refuses("convert.no-base", "--base"):
        convert(safe, None, tmp_path / "out.safetensors", NONE)
    wide = saved(tmp_path / "wide.safetensors", {name: torch.ones(WIDTH, 7) for name in part(u_net(), V)})
    with refuses("convert.other-base", "[16, 24]", "[16, 7]"):
        convert(safe, wide, tmp_path / "out.safetensors", NONE)
    encoder = pipeline(tmp_path / "encoder", None, clip())
    with refuses("convert.other-base", "unet"):
        convert(safe, encoder, tmp_path / "out.safetensors", NONE)


def test_an_embedding_is_refused_or_counted(base, tmp_path):
    change = low_rank(clip(), ("fc1.weight", "token_embedding.weight"))
    folder = pipeline(tmp_path / "adv", None, erased(clip(), change))
    with refuses("convert.embedding", "token_embedding"):
        convert(folder, base, tmp_path / "out.safetensors", NONE)
    leave = ConvertOptions(leave_out_embeddings=True)
    with refuses("convert.residual"):
        convert(folder, base, tmp_path / "out.safetensors", leave)
    made = convert(folder, base, tmp_path / "out.safetensors", ConvertOptions(leave_out_embeddings=True, limit=0.9))
    assert made.residual > 0.3
    assert "left out: text_model.embeddings.token_embedding.weight" in made.report


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_a_pickle_does_not_run(base, tmp_path, capsys):
    path = tmp_path / "bad.pt"
    torch.save({"down_blocks.0.attn2.to_v.weight": Harmful()}, path)
    with refuses("convert.not-only-tensors", "bad.pt"):
        convert(path, base, tmp_path / "out.safetensors", NONE)
    path.write_bytes(pickle.dumps(Harmful()))
    with refuses(("convert.not-only-tensors", "convert.unreadable"), "bad.pt"):
        convert(path, base, tmp_path / "out.safetensors", NONE)
    assert capsys.readouterr().out == ""


def test_a_file_is_not_written_over(base, tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with refuses("convert.output", "out.safetensors"):
        convert(base, base, tmp_path / "out.safetensors", NONE)
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


def test_flux_of_uce_gets_the_names_of_both_spellings(tmp_path):
    """diffusers' base and Black Forest Labs' own, whose names of the text's embedders differ."""
    ends = ("context_embedder.weight", "text_embedder.linear_1.weight")
    safe = saved(tmp_path / "uce.safetensors", part(erased(flux(), low_rank(flux(), ends)), ends))
    native = {"txt_in.weight": flux()[ends[0]], "vector_in.in_layer.weight": flux()[f"time_text_embed.{ends[1]}"]}
    for number, tensors in enumerate((flux(), {f"model.diffusion_model.{name}": w for name, w in native.items()})):
        base = saved(tmp_path / f"base{number}.safetensors", tensors)
        made = convert(safe, base, tmp_path / f"out{number}.safetensors", NONE)
        assert set(made.lora.layers) == {"diffusion_model.txt_in", "diffusion_model.vector_in.in_layer"}
        assert "UCE" in made.method


def test_an_open_clip_encoder_is_taken_apart(tmp_path):
    """SDXL's second encoder in a checkpoint holds q, k and v as one matrix."""
    theirs = {}
    for name, weight in clip().items():
        layer = name.removeprefix("text_model.encoder.layers.")
        for ours, open_clip in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                                ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj")):  # fmt: skip
            layer = layer.replace(ours, open_clip)
        if name.startswith("text_model.encoder") and "self_attn" not in layer:
            theirs[f"transformer.resblocks.{layer}"] = weight
    for n in range(2):
        for end in ("weight", "bias"):
            parts = [clip()[f"text_model.encoder.layers.{n}.self_attn.{q}_proj.{end}"] for q in "qkv"]
            theirs[f"transformer.resblocks.{n}.attn.in_proj_{end}"] = torch.cat(parts)
    base = saved(tmp_path / "xl.safetensors", {f"conditioner.embedders.1.model.{n}": w for n, w in theirs.items()})
    inner = {name: weight for name, weight in clip().items() if ".layers." in name}
    folder = tmp_path / "xl" / "text_encoder_2"
    folder.mkdir(parents=True)
    saved(folder / "model.safetensors", erased(inner, low_rank(inner, ("k_proj.weight",))))
    made = convert(tmp_path / "xl", base, tmp_path / "out.safetensors", NONE)
    assert set(made.lora.layers) == {f"lora_te2_text_model_encoder_layers_{n}_self_attn_k_proj" for n in range(2)}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["wide", "tall"])
def test_factors_are_the_best_of_their_rank(shape):
    """Against the singular value decomposition (Eckart and Young)."""
    change = torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = factored(change, [Rounding(0.0)], 0.5, 8)
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    assert (found.rank, found.exact) == (8, False)
    assert torch.allclose(found.up @ found.down, u[:, :8] * s[:8] @ v[:8], atol=1e-8)


def test_the_rounding_is_as_large_as_it_is():
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(7))
    for dtype in (FP16, BF16):
        found = (weight.to(dtype).double() - weight.double()).square().mean().sqrt()
        assert Rounding.of(weight, dtype).error == pytest.approx(float(found), rel=0.02)


def test_a_compvis_part_of_a_u_net_is_known(base, tmp_path):
    safe = compvis(part(erased(u_net(), low_rank(u_net(), V)), V), "")
    made = convert(saved(tmp_path / "safe.safetensors", safe), base, tmp_path / "out.safetensors", NONE)
    assert len(made.lora.layers) == 16
