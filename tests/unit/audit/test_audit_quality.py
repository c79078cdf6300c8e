"""KID, FID and CLIP score of an audit's images, and what is said where they cannot be had."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from modular_lora_guard.audit import quality
from modular_lora_guard.audit.options import AuditOptions
from modular_lora_guard.audit.plan import Arm, Item
from modular_lora_guard.audit.results import Drawn, Verdict
from PIL import Image
from support.audit_toys import Colours, judge
from support.errors import refuses

SIZE = AuditOptions(width=8, height=8)


def drawn(folder: Path, arm: str, cell: str, shade: int, count: int = 20) -> list[Drawn]:
    made = []
    for seed in range(count):
        path = folder / f"{arm}-{cell}-{seed}.png"
        noise = np.random.default_rng(seed).integers(0, 50, 3)
        Image.new("RGB", (8, 8), tuple(int(shade + n) for n in noise)).save(path)
        made.append(Drawn(Arm(arm), Item("a cat", seed, cell), path, Verdict(False, 0.0, (), "")))
    return made


def measure(options: AuditOptions, some: list[Drawn], judge=judge):
    return quality.measure(options, judge(), some, lambda: None)


def test_kid_grows_with_the_distance_from_the_base_arm(tmp_path):
    some = [*drawn(tmp_path, "base", "kept", 0), *drawn(tmp_path, "safety", "kept", 10)]
    some += drawn(tmp_path, "task", "kept", 200)
    first, again = measure(SIZE, some), measure(SIZE, some)
    near, far = first.quality
    assert (near.arm, far.arm, near.n) == ("safety", "task", 20)
    assert near.kid < far.kid
    assert near.fid < far.fid
    assert first == again
    assert first.settings["embedding"] == "concepts's own"
    assert any("no CLIP score" in note for note in first.notes)


def test_the_task_cell_is_compared_with_the_tasks_images(tmp_path):
    (tmp_path / "style").mkdir()
    drawn(tmp_path / "style", "any", "any", 200)
    some = [*drawn(tmp_path, "base", "task", 0), *drawn(tmp_path, "task", "task", 200)]
    base, task = measure(replace(SIZE, task_pictures=str(tmp_path / "style")), some).quality
    assert (base.arm, task.arm) == ("base", "task")
    assert task.kid < base.kid
    assert task.fid == pytest.approx(0, abs=1e-3)


def test_fid_and_kid_of_few_images_are_left_out_and_said_so(tmp_path):
    wide = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    notes: list[str] = []
    assert set(quality.distances(wide, wide, "kept", notes)) == {"kid"}
    assert notes == [
        "quality, kept: KID's deviation left out, 12 images are not twice a subset of 100",
        "quality, kept: FID left out, it is biased with 12 images in 30 dimensions",
    ]
    some = [*drawn(tmp_path, "base", "kept", 0, 9), *drawn(tmp_path, "safety", "kept", 10, 9)]
    found = measure(SIZE, some)
    assert not found.quality
    assert "quality, kept: 9 images are too few for KID (10 at least)" in found.notes


def test_kids_deviation_is_that_over_subsets_which_differ():
    """Against the mean over hand-made subsets: none where each subset is all images, else as the subsets say."""
    one, other = (torch.randn(260, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for count, given in ((20, False), (100, False), (199, False), (200, True), (260, True)):
        assert ("kid_std" in quality.distances(one[:count], other[:count], "kept", [])) is given
    random = np.random.default_rng(0)
    over = [
        _mmd(one[random.choice(260, 100, False)].double(), other[random.choice(260, 100, False)].double())
        for _ in range(200)
    ]
    found = quality.distances(one, other, "kept", [])
    assert found["kid_std"] == pytest.approx(np.std(over), rel=0.3)
    assert found["kid"] == pytest.approx(np.mean(over), abs=4 * np.std(over) / 10)


def _mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased squared MMD with KID's cubic kernel (Bińkowski et al., 2018, eq. 4)."""
    n, d = x.shape
    kernel = lambda a, b: (a @ b.T / d + 1) ** 3  # noqa: E731
    own = sum(float(k.sum() - k.diagonal().sum()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    return own - 2 * float(kernel(x, y).mean())


def test_what_is_not_at_hand_is_not_measured_and_said_so(tmp_path, monkeypatch):
    some = [*drawn(tmp_path, "base", "kept", 0), *drawn(tmp_path, "safety", "kept", 10)]
    assert any("no base arm" in note for note in measure(SIZE, some[20:]).notes)
    assert measure(SIZE, drawn(tmp_path, "base", "suppressed", 0)).notes == (
        "quality: no kept or task prompts, so it was not measured",
    )
    monkeypatch.setattr(Colours, "embeds", False)
    assert any("no embedding is at hand" in note for note in measure(SIZE, some).notes)
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    assert any("torchmetrics is not installed" in note for note in measure(SIZE, some).notes)


def test_weights_that_are_none_are_an_error_with_the_remedy(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    some = drawn(tmp_path, "base", "kept", 0)
    with refuses("audit.not-inception", "x.safetensors"):
        measure(replace(SIZE, inception=str(tmp_path / "x.safetensors")), some)
    with refuses("audit.clip-folder"):
        measure(replace(SIZE, clip=str(tmp_path)), some)
    (tmp_path / "config.json").write_text("{}")
    with refuses("audit.clip-unreadable"):
        measure(replace(SIZE, clip=str(tmp_path)), some)


@pytest.fixture
def tiny_clip(tmp_path) -> Path:
    """A CLIP model of random weights with CLIP's own tokenizer, which ComfyUI brings."""
    comfyui = os.environ.get("MODULAR_LORA_COMFYUI")
    if not comfyui:
        pytest.skip("MODULAR_LORA_COMFYUI is not set: run the tests with `python3 run.py test`")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=layers, vision_config=layers | {"image_size": 32, "patch_size": 16})
    tokenizer = CLIPTokenizer.from_pretrained(Path(comfyui) / "comfy" / "sd1_tokenizer")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = CLIPModel(config)
    model.visual_projection.weight.data.neg_()  # else every cosine of this seed is below 0
    model.save_pretrained(tmp_path / "clip")
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_the_clip_score_is_of_each_image_with_its_own_prompt(tmp_path, tiny_clip):
    some = drawn(tmp_path, "base", "kept", 100)
    cut: set[str] = set()
    score = quality.clip_scorer(tiny_clip, cut)
    long = replace(some[0], item=replace(some[0].item, prompt="a dog " * 200))
    singles = [score([one]) for one in (*some, long)]
    assert all(0 <= one <= 100 for one in singles)
    assert score([*some, long]) == pytest.approx(np.mean(singles), abs=1e-3)
    assert len(set(singles)) > 1
    assert cut == {long.item.prompt}
    assert "CLIP score: 1 of" in " ".join(measure(replace(SIZE, clip=str(tiny_clip)), [*some, long]).notes)
    assert measure(replace(SIZE, clip=str(tiny_clip)), some).quality[0].clip == pytest.approx(np.mean(singles[:-1]))


@pytest.mark.slow
def test_inception_gives_its_last_pooled_layer(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = models.inception_v3(weights=None, init_weights=False, aux_logits=True)
    save_file(model.state_dict(), tmp_path / "i.safetensors")
    embedding = quality.inception(tmp_path / "i.safetensors")
    assert embedding.of(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 2048)
    assert "i.safetensors" in embedding.name
