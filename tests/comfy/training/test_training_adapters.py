"""Adapters of every form: what was trained is what the file says, to the guard's reader and to stock ComfyUI's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modular_lora_guard.modular_lora.branches.layer_spec import layer_spec
from modular_lora_guard.modular_lora.files.reader import LoraFile
from modular_lora_guard.modular_lora.files.target import Place, Target
from modular_lora_guard.training.adapters import Spec, adapted
from modular_lora_guard.training.forms import Dora, Form, Loha, Lokr, Lora, Oft, Size
from modular_lora_guard.training.output import write_layers
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("peft", reason="PEFT is not installed beside this ComfyUI: training tests need it")

NAMES = {path: f"lora_unet_{path}" for path in "abcd"}
X = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """A Linear and a 3×3 convolution with biases, a 1×1 convolution and a Linear without."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(12, 16), nn.Conv2d(16, 8, 3, padding=1, stride=2)
            self.c, self.d = nn.Conv2d(8, 8, 1, bias=False), nn.Linear(8, 24, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).transpose(1, 2).reshape(2, 16, 4, 4)
        return self.d(self.c(self.b(y)).flatten(2).transpose(1, 2))


def trained(form: Form, dtype: torch.dtype) -> tuple[Tensor, dict]:
    """What the net says after some steps, and what is to be written; it begins as the base."""
    net, x = Net().to(dtype), X.to(dtype)
    base = net(x)
    spec = Spec(NAMES, {}, 4, 2.0, 0.0, 1, "task", form, {"lora_unet_b": Size(3, 1.5)})
    with adapted(net, nn.Identity(), spec) as adapters:
        assert torch.equal(net(x), base)
        optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            (net(x).float() - X[:, :4].repeat(1, 1, 2)).square().mean().backward()
            optimizer.step()
        assert all(weight.grad is not None for weight in adapters.parameters())
        with torch.no_grad():
            said = net(x).float()
            with adapters.off():
                assert torch.equal(net(x), base)
        return said, adapters.tensors()


def by_comfyui(path: Path, comfy_lora) -> Tensor:
    """Of stock ComfyUI's loader and sum of every weight."""
    net = Net()
    patches = comfy_lora.load_lora(load_file(path), {name: f"{key}.weight" for key, name in NAMES.items()})
    assert len(patches) == len(NAMES)
    for key, patch in patches.items():
        layer = net.get_submodule(key.removesuffix(".weight"))
        layer.weight.data = comfy_lora.calculate_weight([(1.0, patch, 1.0, None, None)], layer.weight.clone(), key)
    return net(X)


def by_the_guard(lora: LoraFile) -> Tensor:
    """Of the guard's reader, every change multiplied out."""
    net = Net()
    for path, name in NAMES.items():
        layer = net.get_submodule(path)
        values = {"weight": layer.weight, "bias": layer.bias}
        place = Place(Target("x.weight"), layer_spec(path, layer), lambda key, v=values: v[key.rpartition(".")[2]])
        W0 = layer.weight.clone()
        parts = lora.layers[name].resolve(place)
        layer.weight.data += sum(scale * part.dense(lambda W0=W0: W0) for part, scale in parts).reshape(W0.shape)
    return net(X)


@pytest.mark.parametrize(
    ("form", "kinds"),
    [
        (Lora(), {"LoRA"}),
        (Dora(), {"DoRA over LoRA"}),
        (Loha(), {"LoHa"}),
        (Loha(use_tucker=True), {"LoHa"}),
        (Lokr(), {"LoKr"}),
        (Lokr(factor=2, decompose_both=True), {"LoKr"}),
        (Lokr(factor=8), {"LoKr"}),
        (Oft(), {"OFT"}),
    ],
    ids=str,
)
def test_a_file_says_what_was_trained(form, kinds, comfy, tmp_path):
    from comfy import lora as comfy_lora

    said, tensors = trained(form, torch.float32)
    lora = write_layers(tmp_path / "x.safetensors", tensors, {}, "float")
    assert {layer.kind for layer in lora.layers.values()} == kinds
    effect = (said - Net()(X)).abs().max()
    assert effect > 0.01
    assert (by_comfyui(lora.path, comfy_lora) - said).abs().max() < 1e-5 * effect
    assert (by_the_guard(lora) - said).abs().max() < 1e-5 * effect
    spec = Spec(NAMES, {}, 4, 2.0, 0.0, 2, "task", form, {"lora_unet_b": Size(3, 1.5)})
    with adapted(Net(), nn.Identity(), spec) as adapters:
        adapters.load(lora)
        again = adapters.tensors()
    assert all(
        torch.allclose(again[name][end], tensor, rtol=1e-5, atol=1e-7)
        for name, parts in tensors.items()
        for end, tensor in parts.items()
    )


@pytest.mark.parametrize("form", [Dora(), Oft()], ids=str)
def test_a_saved_half_loses_the_rounding_of_the_change_and_no_more(form, comfy, tmp_path):
    """Of W0 itself, which DoRA's lengths multiply and OFT's blocks turn, nothing is rounded."""
    from comfy import lora as comfy_lora

    said, tensors = trained(form, torch.float32)
    lora = write_layers(tmp_path / "x.safetensors", tensors, {}, "bf16")
    effect = (said - Net()(X)).abs().max()
    assert (by_comfyui(lora.path, comfy_lora) - said).abs().max() < 1e-2 * effect


def test_a_network_in_half_precision_is_trained_on_whole_lengths(comfy, tmp_path):
    from comfy import lora as comfy_lora

    said, tensors = trained(Dora(), torch.bfloat16)
    lora = write_layers(tmp_path / "x.safetensors", tensors, {}, "float")
    effect = (said - Net()(X)).abs().max()
    assert (by_comfyui(lora.path, comfy_lora) - said).abs().max() < 0.05 * effect, "bf16 activations"
