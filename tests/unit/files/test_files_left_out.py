"""LoRA files with more in them than layers, and files of other kinds: left out and counted, or refused by kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.files.reader import read_lora
from safetensors.torch import save, save_file
from support.errors import refuses


def pair(layer: str = "lora_unet_a") -> dict:
    return {f"{layer}.lora_down.weight": torch.ones(2, 4), f"{layer}.lora_up.weight": torch.ones(3, 2)}


def check_refusal(folder: Path, code: str, *named: str) -> None:
    with refuses(code, "a.safetensors", *named) as error:
        read_lora(folder / "a.safetensors")
    assert str(error.value).isprintable()


def test_tensors_beside_the_layers_that_comfyui_leaves_out_are_left_out_and_counted(tmp_path):
    more = {f"diffusion_model.blocks.{i}.diff_m": torch.ones(1, 6, 4) for i in range(2)}
    more |= {"text_model.embeddings.token_embedding.lora_embedding_A": torch.ones(2, 4)}  # PEFT's, of a table
    save_file({**pair("diffusion_model.blocks.0.ffn.0"), **more}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert list(lora.layers) == ["diffusion_model.blocks.0.ffn.0"]
    assert set(lora.unread) == set(more)
    first = min(more)
    assert lora.notes == (f"3 tensors are left out, as ComfyUI's own loader leaves them out (first '{first}')",)


def test_a_scale_without_weights_is_left_out_and_counted(tmp_path):
    """As diffusers' training scripts left magnitudes under another name than the weights they belong to."""
    alone = {"a.b.lora_magnitude_vector": torch.ones(3), "c.alpha": torch.tensor(2.0), "d.dora_scale": torch.ones(3, 1)}
    save_file({**pair(), **alone}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert list(lora.layers) == ["lora_unet_a"]
    assert set(lora.unread) == set(alone)


def test_an_alpha_that_nothing_is_scaled_by_may_be_infinite(tmp_path):
    """AI-Toolkit's LoKr of whole factors has an alpha of 9,999,999,999, which float16 cannot hold."""
    factors = {"a.lokr_w1": torch.ones(2, 2), "a.lokr_w2": torch.ones(3, 2)}
    save_file({**factors, "a.alpha": torch.tensor(9999999999.0).half()}, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors").layers["a"].scale == 1.0


def test_comfyuis_short_ending_is_read_as_well(tmp_path):
    save_file(pair(), tmp_path / "a.sft")
    assert list(read_lora(tmp_path / "a.sft").layers) == ["lora_unet_a"]


def test_a_file_of_nothing_else_is_no_lora(tmp_path):
    save_file({"out.0.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    check_refusal(tmp_path, "file.unknown-tensor", "'out.0.weight'")


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"lora_controlnet": torch.ones(0), "input_blocks.0.0.up": torch.ones(2, 2)}, "a Control-LoRA"),
        ({"cond_stage_model.position_ids": torch.ones(2).long(), "first_stage_model.a": torch.ones(2)}, "a checkpoint"),
        ({"model.diffusion_model.out.0.weight": torch.ones(2, 2)}, "a checkpoint"),
        ({"single_blocks.0.qweight": torch.ones(2, 2).char()}, "nunchaku's own form"),
        ({"emb_params": torch.ones(2, 8)}, "an embedding"),
        ({"clip_g": torch.ones(2, 8), "clip_l": torch.ones(2, 8)}, "an embedding"),
        ({"lllite_unet_a.down.0.weight": torch.ones(2, 8)}, "a ControlNet-LLLite"),
        ({"image_proj.norm.weight": torch.ones(8), "ip_adapter.1.to_k_ip.weight": torch.ones(8, 8)}, "an IP-Adapter"),
        ({"control_model.out.weight": torch.ones(8, 8)}, "a ControlNet"),
        ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": torch.ones(8)}, "a motion module"),
    ],
)
def test_another_kind_of_file_is_refused_by_its_kind(tmp_path, tensors, kind):
    save_file(tensors, tmp_path / "a.safetensors")
    check_refusal(tmp_path, "file.another-kind", kind)


STRANGERS = {
    "a step counter": {"global_step": torch.tensor(100)},
    "token positions": {"lora_te1_text_model_embeddings_position_ids": torch.arange(77)[None]},
    "a flag": {"something.flag": torch.tensor(True)},
    "bytes": {"config": torch.zeros(9, dtype=torch.uint8)},
    "nothing": {"extra.foo": torch.zeros(0)},
    "a matrix of no rows": {"extra.foo": torch.zeros(0, 7)},
    "a float64 statistic": {"loss.mean": torch.tensor(0.1, dtype=torch.float64)},
    "a complex number": {"spectrum": torch.ones(3, dtype=torch.complex64)},
    "many dimensions": {"cube": torch.ones(1, 1, 1, 1, 1, 1, 2)},
    "what is not finite": {"loss.worst": torch.tensor([float("nan"), float("inf")])},
    "a name of no layer": {"alpha": torch.tensor(2.0), ".lora_up.weight": torch.ones(2, 2)},
    "a name of control characters": {"a\nb.lora_up.weight": torch.ones(2, 2)},
    "a name of any length": {"a" * 600 + ".alpha": torch.ones(1)},
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_tensor_that_is_no_loras_is_left_out_whatever_it_holds(tmp_path, kind):
    sound = pair()
    save_file(sound | STRANGERS[kind], tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert set(lora.unread) == set(STRANGERS[kind])
    assert lora.notes[0].startswith(f"{len(STRANGERS[kind])} tensors are left out")
    assert lora.notes[0].isprintable()
    (layer,) = lora.layers.values()
    assert torch.equal(layer.down, sound["lora_unet_a.lora_down.weight"])
    assert torch.equal(layer.up, sound["lora_unet_a.lora_up.weight"])


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "made up"])
def test_a_stranger_of_a_dtype_that_is_not_known_is_left_out(tmp_path, dtype):
    raw = save(pair() | {"z.flag": torch.zeros(5, dtype=torch.uint8)})
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"U8"', f'"{dtype}"'.encode())
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert read_lora(tmp_path / "a.safetensors").unread == ("z.flag",)


INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_an_alpha_may_be_of_any_whole_number_type(tmp_path, dtype):
    save_file(pair() | {"lora_unet_a.alpha": torch.tensor(6).to(dtype)}, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors").layers["lora_unet_a"].scale == 3.0


@given(st.integers(0, 2**31), st.floats(0.1, 64))
@settings(max_examples=20, deadline=None)
def test_a_float64_lora_is_read_as_float32(tmp_path_factory, seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    tensors = {name: torch.rand(t.shape, generator=generator).double() + 0.5 for name, t in pair().items()}
    save_file(tensors | {"lora_unet_a.alpha": torch.tensor(alpha, dtype=torch.float64)}, path)
    layer = read_lora(path).layers["lora_unet_a"]
    assert layer.alpha == alpha
    assert torch.equal(layer.down, tensors["lora_unet_a.lora_down.weight"].float())
    assert torch.equal(layer.up, tensors["lora_unet_a.lora_up.weight"].float())


OTHERS = {  # by what people keep beside their LoRAs: tensor names, a word of the refusal, the node to use
    "CLIP": (("text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.position_ids"), "a text encoder"),
    "CLIP with a projection": (("transformer.text_model.final_layer_norm.weight", "text_projection"), "a text encoder"),
    "T5": (("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "a text encoder"),
    "Qwen": (("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"), "a text encoder"),
    "CLIP vision": (("vision_model.encoder.layers.0.mlp.fc1.weight",), "a vision encoder"),
    "VAE": (("encoder.conv_in.weight", "decoder.conv_in.weight"), "a VAE"),
    "VAE of diffusers": (("decoder.up_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"), "a VAE"),
    "VAE of Wan": (("encoder.conv1.weight", "decoder.middle.0.residual.0.gamma"), "a VAE"),
    "Flux": (("double_blocks.0.img_attn.qkv.weight", "img_in.weight"), "a diffusion model"),
    "SD3": (("joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight"), "a diffusion model"),
    "U-Net of diffusers": (("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",), "a diffusion model"),
    "U-Net": (("input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"), "a diffusion model"),
    "Wan": (("blocks.0.self_attn.q.weight", "patch_embedding.weight"), "a diffusion model"),
    "ESRGAN": (("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"), "an upscaler"),
    "RealESRGAN": (("body.0.rdb1.conv1.weight", "conv_first.weight"), "an upscaler"),
    "SwinIR": (("layers.0.residual_group.blocks.0.attn.qkv.weight", "conv_first.weight"), "an upscaler"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("integers", [False, True])
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, kind, integers):
    names, word = OTHERS[kind]
    tensors = {name: torch.ones(4) for name in names} | ({"steps": torch.arange(3)} if integers else {})
    save_file(tensors, tmp_path / "a.safetensors")
    check_refusal(tmp_path, "file.another-kind", word)


def test_a_checkpoint_of_more_tensors_than_a_lora_may_have_is_named(tmp_path):
    save_file({f"model.diffusion_model.a.{i}.weight": torch.ones(1) for i in range(20_001)}, tmp_path / "a.safetensors")
    check_refusal(tmp_path, "file.another-kind", "checkpoint")


PICKLE = "pickle"
CONTENTS = {
    "login": (b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>" * 9, "a web page"),
    "page": (b"\n  <html lang='en'>" + b" " * 50, "a web page"),
    "marked page": (b"\xef\xbb\xbf<!doctype html>" + b" " * 50, "a web page"),
    "denied": (b'{"error":"Unauthorized","message":"you must be logged in"}' * 2, "JSON text"),
    "list": (b'[{"error": 404}, {"error": 404}]', "JSON text"),
    "plain": ("Übermäßig viele Anfragen: try again later".encode(), "text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64, "a Git LFS pointer"),
    "zip": (b"PK\x03\x04" + b"\0" * 400, PICKLE),
    "pickle": (b"\x80\x02}q\x00" + b"\0" * 400, PICKLE),
    "gguf": (b"GGUF\3\0\0\0" + b"\0" * 400, "a GGUF file"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 400, "a PNG image"),
    "zeros": (bytes(4096), "zeros"),
    "empty": (b"", "empty"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_lies_under_the_name_of_a_lora_is_said(tmp_path, kind):
    data, words = CONTENTS[kind]
    (tmp_path / "a.safetensors").write_bytes(data)
    check_refusal(tmp_path, "file.empty" if kind == "empty" else "file.another-kind", words)


@pytest.mark.parametrize(
    ("name", "words", "not_words"),
    [
        ("a.gguf", "GGUF", "pickle"),
        ("a.GGUF", "GGUF", "pickle"),
        ("a.safetensors.part", "unfinished download", "pickle"),
        ("a.safetensors.crdownload", "unfinished download", "pickle"),
        ("a.zip", "archive", "pickle"),
        ("a.ckpt", PICKLE, "GGUF"),
        ("a.json", "only", "pickle"),
    ],
)
def test_a_file_of_another_ending_is_named_by_it(tmp_path, name, words, not_words):
    (tmp_path / name).write_bytes(b"x")
    with refuses("file.ending", words) as error:
        read_lora(tmp_path / name)
    assert not_words not in str(error.value)


def test_all_tensors_of_a_file_are_given_under_their_own_names_as_they_are_stored(tmp_path):
    """Those that are left out too, of any dtype, wherever they lie in the file, and also once the file is gone."""
    stored = {
        **pair(),
        "lora_unet_a.alpha": torch.tensor(2.0, dtype=torch.float64),
        "b.diff_m": torch.ones(3, dtype=torch.bool),  # what comes after it does not lie on a whole number
        "c.diff_m": torch.arange(5, dtype=torch.int64),
        "d.diff_m": torch.ones(3, dtype=torch.uint8),
    }
    path = tmp_path / "a.safetensors"
    save_file(stored, path)
    lora = read_lora(path)
    path.unlink()
    assert lora.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert lora.tensors[name].dtype == tensor.dtype
        assert torch.equal(lora.tensors[name], tensor)
    assert lora.roles["lora_unet_a"]["down"] == "lora_unet_a.lora_down.weight"


def test_a_tensor_of_a_dtype_that_nobody_knows_is_named(tmp_path):
    data = save({**pair(), "b.diff_m": torch.ones(2, dtype=torch.uint8)}).replace(b'"U8"', b'"Q8"')
    (tmp_path / "a.safetensors").write_bytes(data)
    with refuses("file.dtype", "a.safetensors", "b.diff_m"):
        _ = read_lora(tmp_path / "a.safetensors").tensors
