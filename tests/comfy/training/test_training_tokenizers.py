"""Captions are read literally by the tokenizers that ComfyUI has, and families are trained with their own.

The toys of the families (support/training_toys.py) have a stand-in for the tokenizer; here it is ComfyUI's.
"""

from __future__ import annotations

import base64
import functools
import importlib
import inspect
import json
import pkgutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.encoder_toys import ENCODERS, LLAMA, T5, toy_clip
from support.families_dit import DITS
from support.families_image import IMAGE
from support.families_video import VIDEOS
from support.family_training import watch
from support.training_toys import SIDE, toy_parts

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

TEXT = 'a "(red:1.3) cat" (x) [y] \\(z\\) \\\\(w), ((deep) {0} %s'
TEXTS = (TEXT, "", "(", "(cat)", "(cat:0.5)", "a cat")
NOT_MADE = {  # tokenizers that may not be made here -> why
    "Flux2Tokenizer": "ComfyUI 0.3.75 makes it by a class of transformers that newer ones have otherwise",
    "HiDreamTokenizer": "Llama's vocabulary, of 9 MB, is not in every copy of ComfyUI",
    "HunyuanVideoTokenizer": "Llama's vocabulary, of 9 MB, is not in every copy of ComfyUI",
    "Qwen35Tokenizer": "Qwen 3.5's vocabulary, of 6 MB, is not in every copy of ComfyUI",
    "Qwen35ImageTokenizer": "Qwen 3.5's vocabulary, of 6 MB, is not in every copy of ComfyUI",
    "MiniMaxMusic3Tokenizer": "it takes its own vocabulary alone, which comes with the text encoder's file",
}
WRITING = {"SAM3TokenizerWrapper"}  # finds things in images: its commas and colons mean something


@pytest.fixture(scope="module", autouse=True)
def read_once(comfy):
    """Each vocabulary is read once, though many tokenizers have the same."""
    from transformers import PreTrainedTokenizerBase

    original = PreTrainedTokenizerBase.from_pretrained.__func__
    once = functools.cache(original)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PreTrainedTokenizerBase,
            "from_pretrained",
            classmethod(lambda cls, path, **more: original(cls, path, **more) if more else once(cls, path)),
        )
        yield


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.fixture(scope="module")
def vocabularies(comfy) -> dict[str, torch.Tensor]:
    """Vocabularies that come with a text encoder's file; here those of others, and one of single bytes for Mistral."""
    folder = Path(next(iter(importlib.import_module("comfy.text_encoders").__path__)))
    pieces = _bytes((folder / "t5_pile_tokenizer" / "tokenizer.model").read_bytes())
    tekken = {
        "config": {
            "pattern": r"[^\s]+|\s+", "num_vocab_tokens": 256, "default_vocab_size": 1256, "version": "v11",
            "default_num_special_tokens": 1000,
        },
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)],
        "special_tokens": [],
    }  # fmt: skip
    return {
        "tekken_model": _bytes(json.dumps(tekken).encode()),
        "tokenizer_json": _bytes((folder / "t5_tokenizer" / "tokenizer.json").read_bytes()),
    } | dict.fromkeys(("spiece_model", "mt5xl.spiece_model", "gemma_spiece_model", "jina_spiece_model"), pieces)


def classes() -> dict[str, type]:
    """The tokenizers of whole CLIPs that this ComfyUI has: those that are no part of another."""
    from comfy import sd1_clip, sdxl_clip, text_encoders

    names = (f"{text_encoders.__name__}.{m.name}" for m in pkgutil.iter_modules(text_encoders.__path__) if not m.ispkg)
    found = {}
    for module in (sd1_clip, sdxl_clip, *map(importlib.import_module, names)):
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and cls.__module__ == module.__name__ and name.endswith(("Tokenizer", "Wrapper"))
            whole = own and hasattr(cls, "tokenize_with_weights") and not issubclass(cls, sd1_clip.SDTokenizer)
            if whole and not name.endswith("_Tokenizer"):  # those are mixed into others
                found[name] = cls
    return found


def clip_with(tokenizer):
    """ComfyUI's CLIP with a tokenizer and no network."""
    clip = importlib.import_module("comfy.sd").CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = tokenizer, {}
    return clip


def weights(tokens: dict) -> set[float]:
    return {token[1] for chunks in tokens.values() if isinstance(chunks, list) for chunk in chunks for token in chunk}


def test_every_tokenizer_reads_a_caption_literally(comfy, vocabularies):
    """The reference is the tokenizer itself, with ComfyUI's search for weights taken away."""
    from comfy import sd1_clip

    tokens = importlib.import_module("modular_lora_guard.comfy_host.tokens")
    made, left, weighted = [], {}, []
    for name, cls in classes().items():
        if name in WRITING:
            continue
        try:
            tokenizer = cls(embedding_directory=None, tokenizer_data=dict(vocabularies))
        except Exception as error:
            left[name] = error
            continue
        clip = clip_with(tokenizer)
        found = [tokens.literal(clip, text) for text in TEXTS]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sd1_clip, "token_weights", lambda text, weight: [(text, weight)])
            assert found == [clip.tokenize(text) for text in TEXTS], name
        assert all(weights(one) <= {1.0} for one in found), name
        assert all(len(chunks) == 1 for chunks in tokens.streams(clip.tokenize("a cat")).values()), name
        if weights(clip.tokenize(TEXT)) != {1.0}:
            weighted.append(name)
        made.append(name)
    assert left.keys() <= NOT_MADE.keys(), left
    assert {"SD1Tokenizer", "QwenImageTokenizer", "ZImageTokenizer", "HunyuanVideo15Tokenizer"} <= set(made)
    assert {"SD1Tokenizer", "SD3Tokenizer", "HunyuanImageTokenizer"} <= set(weighted), (
        "without escapes there are weights"
    )


@settings(max_examples=30)
@given(text=st.text(alphabet='()\\:1.2 a"', max_size=30))
def test_any_text_has_the_tokens_that_clip_has_without_weights(text, loaded):
    clip, tokens = loaded[1], importlib.import_module("modular_lora_guard.comfy_host.tokens")
    assert tokens.literal(clip, text) == clip.tokenize(text, disable_weights=True)


OWN = {  # family -> its encoder, and the tokenizer that ComfyUI gives it
    "Qwen-Image": ("Qwen2.5-VL 7B (Qwen-Image)", "qwen_image.QwenImageTokenizer"),
    "Z-Image": ("Qwen3 4B (Z-Image)", "z_image.ZImageTokenizer"),
    "Hunyuan Image 2.1": (
        "Qwen2.5-VL and ByT5 (Hunyuan Image, Hunyuan Video 1.5)",
        "hunyuan_image.HunyuanImageTokenizer",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_family_is_trained_with_its_own_tokenizer_and_encoder(name, comfy, data, tmp_path):
    """A caption is encoded as ComfyUI encodes a prompt whose brackets are escaped, and its tokens reach the network."""
    family = next(family for family in (*IMAGE, *DITS, *VIDEOS) if family.name == name)
    encoder, tokenizer = OWN[name]
    module, cls = tokenizer.split(".")
    model, _, vae = toy_parts(family)
    encoder = ENCODERS[encoder]
    wide = {**LLAMA, "hidden_size": family.context[-1], "vocab_size": 152064}
    glyphs = {"": {**T5, "d_model": 1472}}  # ByT5's width is the network's
    clip = toy_clip(replace(encoder, sizes=encoder.sizes | {encoder.streams[0]: wide} | glyphs))
    clip.tokenizer = getattr(importlib.import_module(f"comfy.text_encoders.{module}"), cls)()
    for caption in data.glob("*/*.txt"):
        caption.write_text(f'the sign "({caption.stem}:1.4)" (red:0.7)', encoding="utf-8")
    trainer, task, options = (
        importlib.import_module(f"modular_lora_guard.{name}")
        for name in ("comfy_host.trainer_model", "training.task.train", "training.options")
    )
    o = options.TaskOptions(
        output_dir=str(tmp_path), train_data_dir=str(data), network_dim=2, max_train_steps=2, resolution=SIDE,
        save_precision="float", learning_rate=5e-3,
    )  # fmt: skip
    with trainer.opened(model, clip, vae, o) as opened:
        said = opened.encode(['a "(cat:1.3)" (red:0.7)', "a cat"])
        stock = clip.encode_from_tokens_scheduled(clip.tokenize('a "\\(cat:1.3\\)" \\(red:0.7\\)'))[0]
        assert torch.equal(said.rows[0].cross, stock[0])
        for key, part in said.rows[0].further.items():
            assert part is None or torch.equal(part, stock[1][key]), key
        assert not opened.too_long("a cat " * 200), "the encoder reads the whole text"
        trained = task.train_task(opened, o, watch(), engine="test")
    assert any(layer.up.any() for layer in trained.lora.layers.values()), "nothing was learnt"
