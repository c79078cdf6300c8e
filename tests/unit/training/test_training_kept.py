"""Latents and captions' encodings on disk: the same training, nothing encoded twice, nothing stale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from modular_lora_guard.training.model import Text
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.task import kept
from modular_lora_guard.training.task.train import train_task
from PIL import Image
from safetensors.torch import load_file
from support.errors import refuses
from support.toys import Silent, ToyHostModel

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")


class Counting(ToyHostModel):
    """Counts what it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded = [0, 0]  # images, captions

    def encode_images(self, images):
        self.encoded[0] += len(images)
        return super().encode_images(images)

    def encode(self, prompts):
        self.encoded[1] += len(prompts)
        return super().encode(prompts)

    def release(self, text: bool) -> None:
        """Keeps what is counted."""


def sided(shade: int) -> Image.Image:
    """An image that its mirror image differs from."""
    across = Image.linear_gradient("L").rotate(90).resize((64, 64))
    return Image.merge("RGB", (across, Image.new("L", (64, 64), shade), across))


@pytest.fixture
def options(tmp_path) -> TaskOptions:
    folder = tmp_path / "data" / "1_thing"
    folder.mkdir(parents=True)
    for i in range(2):
        sided(90 * i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing {i}", encoding="utf-8")
    return TaskOptions(
        output_dir=str(tmp_path / "out"), train_data_dir=str(tmp_path / "data"), resolution=64, max_train_steps=3,
        network_dim=2, network_alpha=2.0, save_precision="float", flip_aug=True,
    )  # fmt: skip


def run(options: TaskOptions) -> tuple[dict[str, torch.Tensor], list[int], str]:
    host_model = Counting()
    trained = train_task(host_model, options, Silent(), engine="test")
    return load_file(trained.lora.path), host_model.encoded, trained.report


def test_the_same_lora_and_nothing_is_encoded_twice_or_stale(options) -> None:
    plain, _, _ = run(options)
    on_disk = replace(options, cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True)
    first, made, report = run(on_disk)
    again, found, later = run(on_disk)
    for other in (first, again):
        assert all(torch.equal(tensor, other[name]) for name, tensor in plain.items())
    assert (made, found) == ([4, 2], [0, 0])  # two images, each mirrored as well; two captions
    assert "cache_latents: 0 found on disk, 4 made" in report
    assert "cache_text_encoder_outputs: 2 found on disk, 0 made" in later

    folder = Path(options.train_data_dir) / "1_thing"
    sided(30).save(folder / "0.png")
    (folder / "1.txt").write_text("another thing", encoding="utf-8")
    damaged = next((Path(options.output_dir) / "cache_text_encoder_outputs").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:20])
    changed, encoded, _ = run(on_disk)
    plain, _, _ = run(options)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in plain.items())
    assert encoded[0] == 2, "the changed picture and its mirror image"
    assert encoded[1] in (1, 2), "the changed caption, and the other where its file was cut off"


def test_a_conditioning_is_read_as_it_was() -> None:
    text = Text(torch.randn(1, 3, 4), {"pooled_output": torch.randn(1, 5), "attention_mask": None})
    (back,) = kept.as_cond(kept.as_tensors(text)).rows
    assert torch.equal(back.cross, text.cross)
    assert back.further.keys() == text.further.keys()
    assert torch.equal(back.further["pooled_output"], text.further["pooled_output"])
    assert back.further["attention_mask"] is None


def test_captions_are_not_kept_where_the_text_encoder_is_trained(options) -> None:
    with refuses("option.cache", "cache_text_encoder_outputs_to_disk"):
        replace(options, network_train_text_encoder=True, cache_text_encoder_outputs_to_disk=True)
