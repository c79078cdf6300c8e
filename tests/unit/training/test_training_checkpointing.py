"""Blocks that are run again going back: the gradients of a network that writes in place, and what is refused."""

from __future__ import annotations

import pytest
import torch
from modular_lora_guard.training.checkpointing import checkpointed
from modular_lora_guard.training.in_place import writing_allowed
from support.errors import refuses
from torch import Tensor, nn


class Block(nn.Module):
    """Adds to its two streams in place, as Flux's does, and needs what it writes over."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line, self.text = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, img: Tensor, txt: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.text(txt)
        img += self.line(self.norm(img)) * keys.mean(1, keepdim=True) * gate
        img += self.line(self.norm(img)).tanh() * gate
        txt += keys.sin() * gate
        return img, txt


class Streams(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 8), nn.ModuleList(block() for _ in range(3)), nn.Linear(8, 8)

    def forward(self, img: Tensor, txt: Tensor, gate: Tensor) -> Tensor:
        img, txt = self.first(img), self.first(txt)
        for block in self.blocks:
            img, txt = block(img=img, txt=txt, gate=gate)
        return self.last(torch.cat([txt, img], 1))


def gradients(network: nn.Module, again: bool) -> list[Tensor]:
    given = [torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(rows)) for rows in (5, 3, 1)]
    network.zero_grad()
    with writing_allowed(), checkpointed(network, again):
        network(*given).square().sum().backward()
    return [weight.grad.clone() for weight in network.parameters()]


class Statement(Block):
    """Writes by calls whose answer nobody takes, as LTX Video's does, into what it is given and into its own."""

    def forward(self, img: Tensor, txt: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        held = img
        img.addcmul_(self.line(self.norm(img)), gate)
        img.mul_(2).sub_(gate)
        torch.add(img, gate, out=img)
        own = self.text(txt)
        own.add_(gate)
        img.add_(held.tanh())
        return img, own


@pytest.mark.parametrize("block", [Block, Statement])
def test_gradients_are_the_same_where_blocks_write_in_place(block) -> None:
    torch.manual_seed(0)
    network = Streams(block)
    assert all(map(torch.equal, gradients(network, False), gradients(network, True)))


class Together(Streams):
    """Gives a block its streams in a tuple."""

    def forward(self, img: Tensor, txt: Tensor, gate: Tensor) -> Tensor:
        streams = self.first(img), self.first(txt)
        for block in self.blocks:
            streams = block(streams, gate)
        return self.last(torch.cat(streams[::-1], 1))


class OfTuple(Block):
    def forward(self, streams: tuple[Tensor, Tensor], gate: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(*streams, gate)


def test_trying_a_block_leaves_what_is_in_a_tuple_as_it_was() -> None:
    torch.manual_seed(0)
    network = Together(OfTuple)
    assert all(map(torch.equal, gradients(network, False), gradients(network, True)))


class Silent(Block):
    """Gives back other tensors than it wrote into."""

    def forward(self, img: Tensor, txt: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        img += gate
        return img * 2, txt


class View(Block):
    """Writes into a tensor by another view of it."""

    def forward(self, img: Tensor, txt: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        img = self.line(img)
        img.flatten(1).add_(gate.flatten(1).mean())
        return img, txt


class Slices(Block):
    """Writes over what its backward pass needs, in a part of a tensor."""

    def forward(self, img: Tensor, txt: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        img = self.line(img)
        squared = img.square()
        img[:, :1] = gate
        return img + squared, txt


@pytest.mark.parametrize("block", [Silent, View, Slices])
def test_what_running_again_would_make_wrong_is_refused(block) -> None:
    with refuses("train.recompute"):
        gradients(Streams(block), True)


class Dropping(Slices):
    def forward(self, img: Tensor, txt: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(nn.functional.dropout(img), txt, gate)


def test_a_training_goes_on_without_where_it_need_not_be_refused() -> None:
    torch.manual_seed(0)
    network, said = Streams(Dropping), []
    given = [torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(rows)) for rows in (5, 3, 1)]

    def losses(again: bool) -> list[Tensor]:
        torch.manual_seed(1)
        with writing_allowed(), checkpointed(network, again, lambda: said.append("left out")) as passed:
            loss = passed(lambda: network(*given).square().sum())
            return [loss().detach(), loss().detach()]

    plain = losses(False)
    assert not torch.equal(*plain), "the second draws other numbers"
    assert all(map(torch.equal, plain, losses(True)))
    assert said == ["left out"]
    assert not any("forward" in vars(module) for module in network.modules())
