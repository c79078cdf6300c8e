"""A base whose weights are stored in 8 bits or in main memory: gradients beside those of the same weights, whole."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from modular_lora_guard.training.checkpointing import checkpointed
from modular_lora_guard.training.in_place import writing_allowed
from modular_lora_guard.training.options import TaskOptions
from modular_lora_guard.training.stored import Storage, Stored
from support.errors import refuses
from torch import Tensor, nn

CPU = torch.device("cpu")


class Block(nn.Module):
    """A convolution, and what attention does with its rows; ``adapter`` is what is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.qkv = nn.Conv2d(4, width, 3, padding=1), nn.Linear(width, 3 * width, bias=False)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 4)
        self.adapter = nn.Parameter(0.1 * torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(rows + rows @ self.adapter).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(x.shape)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for width in (8, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def made(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(1)
    network = Network().to(dtype)
    for name, weight in network.named_parameters():
        weight.requires_grad_("adapter" in name)
    return network


def stored(network: nn.Module, dtype: torch.dtype = torch.float32, **options: object) -> Storage:
    """``network`` with its weights stored as these options say."""
    storage = Storage(network, TaskOptions(**options), dtype, CPU)
    for part in network.modules():
        for name, weight in part._parameters.items():
            if weight is not None and (held := storage.of(part, name, weight)) is not None:
                part._parameters[name] = held
    return storage


def gradients(network: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2)).to(next(network.parameters()).dtype)
    network.zero_grad()
    network(x).square().sum().backward()
    return [weight.grad.clone() for weight in network.parameters() if weight.requires_grad]


def rounded(network: nn.Module) -> nn.Module:
    """Every weight of a layer as max |W| / 448 times the nearest float8, in a plain tensor."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            W = layer.weight.detach().float()
            scale = W.abs().max().item() / 448
            values = (W / scale).to(torch.float8_e4m3fn).to(layer.weight.dtype) * scale
            layer.weight = nn.Parameter(values, requires_grad=False)
    return network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("mutating", [False, True], ids=["plain", "mutating"])
def test_gradients_in_eight_bits_are_those_of_the_rounded_weights(dtype, again, mutating) -> None:
    network = made(dtype)
    stored(network, dtype, fp8_base_unet=True, blocks_to_swap=2)
    context = writing_allowed() if mutating else nullcontext()
    with context, checkpointed(network, again):
        found = gradients(network)
    assert all(map(torch.equal, found, gradients(rounded(made(dtype)))))
    assert not all(map(torch.equal, found, gradients(made(dtype))))


def test_weights_in_main_memory_change_no_bit() -> None:
    network = made()
    stored(network, blocks_to_swap=3)
    assert all(map(torch.equal, gradients(network), gradients(made())))


def test_what_is_kept_for_the_backward_pass_is_what_is_held() -> None:
    network = made()
    stored(network, fp8_base_unet=True)
    shapes = {frozenset(layer.weight.shape) for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        network(x).sum()
    layers = [part for part in kept if frozenset(part.shape) in shapes and part.shape[0] != 2]
    assert len(layers) == 9, "three layers of three blocks"
    assert all(isinstance(part, Stored) and part.held.dtype == torch.float8_e4m3fn for part in layers)


def test_the_largest_blocks_are_swapped_and_no_more_than_there_are() -> None:
    network = made()
    storage = stored(network, blocks_to_swap=2)
    held = [isinstance(block.qkv.weight, Stored) for block in network.blocks]
    assert held == [False, True, True]
    assert not isinstance(network.blocks[1].norm.weight, Stored)
    count = sum(part.weight.nbytes for block in network.blocks[1:] for part in (block.conv, block.qkv, block.out))
    (line,) = storage.lines()
    assert "2 blocks" in line
    assert "6 weights" in line
    assert f"{count / 2**20:.1f} MiB" in line
    with refuses("train.blocks", "4", "3"):
        stored(made(), blocks_to_swap=4)


def test_the_report_says_how_far_the_rounded_weights_are() -> None:
    storage = stored(made(), fp8_base_unet=True)
    layers = [layer for layer in made().modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    near = [layer for layer in rounded(made()).modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    pairs = [(a.weight.flatten(), b.weight.flatten()) for a, b in zip(layers, near, strict=True)]
    W, W2 = (torch.cat(part) for part in zip(*pairs, strict=True))
    (line,) = storage.lines()
    assert f"|W0' - W0| / |W0| {((W2 - W).norm() / W.norm()).item():.2g}" in line
    assert "9 weights" in line


def test_weights_that_have_eight_bits_are_as_they_were() -> None:
    layer = nn.Linear(4, 4)
    weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    storage = Storage(layer, TaskOptions(fp8_base_unet=True), torch.float32, CPU)
    found = storage.of(layer, "weight", weight)
    assert torch.equal(found.whole(), weight.float())
    assert found.held.data_ptr() == weight.data_ptr(), "no copy"
    assert "1 had 8 bits already" in storage.lines()[0]


def test_a_stored_weight_is_not_written_to() -> None:
    weight = Stored(torch.ones(2, 2), 1.0, torch.float32, CPU)
    with pytest.raises(TypeError, match="read alone"):
        weight.mul_(2)
    assert torch.equal(weight + 0, torch.ones(2, 2))
    assert torch.equal(torch.zeros(2, 2).copy_(weight), torch.ones(2, 2))
