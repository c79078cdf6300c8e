"""Layers fused together hold what each would by itself; guards of the same layers take turns on them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches import fusing
from modular_lora_guard.modular_lora.branches.attachment import Attachment, Branches
from modular_lora_guard.modular_lora.branches.changes import Bias, Dense, Gain, LowRank, Term
from modular_lora_guard.modular_lora.branches.fused import FusedLayer, make
from modular_lora_guard.modular_lora.branches.fusing import Fused, fuse
from modular_lora_guard.modular_lora.branches.layer_spec import Conv, LayerSpec
from support.errors import refuses
from torch import nn

BOTH = frozenset(("safety", "task"))
CPU = torch.device("cpu")
SHAPES = {(24, 20): None, (20, 24): None, (8, 6, 3, 3): Conv((1, 1), (1, 1), (1, 1))}


@st.composite
def layers(draw: st.DrawFn) -> list[tuple[LayerSpec, list[Term]]]:
    """Layers of few shapes with one to three parts each, in the dtypes that files have."""
    found = []
    for index in range(draw(st.integers(1, 8))):
        shape = draw(st.sampled_from(sorted(SHAPES)))
        spec, terms = LayerSpec(f"l{index}", shape, SHAPES[shape]), []
        for _ in range(draw(st.integers(1, 3))):
            rank, scale = draw(st.sampled_from((1, 2, 12))), draw(st.sampled_from((1.0, 0.7, -2.0)))
            dtype = draw(st.sampled_from((torch.float16, torch.float32, torch.float8_e4m3fn)))
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
            down, up = (torch.randn(s, generator=generator).to(dtype) for s in ((rank, spec.inputs), (shape[0], rank)))
            kind = draw(st.sampled_from((LowRank, LowRank, LowRank, Dense, Gain, Bias)))
            vector = torch.randn(shape[0], generator=generator)
            parts = {
                LowRank: lambda d=down, u=up: LowRank(d, u),
                Dense: lambda d=down, u=up: Dense(u.float() @ d.float()),
                Gain: lambda v=vector: Gain(v, None),
                Bias: lambda v=vector: Bias(v),
            }
            terms.append(Term("task", parts[kind](), scale))
        found.append((spec, terms))
    return found


def held(fused: Fused) -> list[torch.Tensor | None]:
    return [fused.down, fused.up, *(t for owner in sorted(fused.others) for t in fused.others[owner].tensors)]


@settings(max_examples=60, deadline=None)
@given(
    made=layers(), dtype=st.sampled_from((torch.float32, torch.bfloat16)), together=st.sampled_from((1, 1000, 2**20))
)
def test_layers_fused_together_are_bit_for_bit_those_fused_one_by_one(made, dtype, together):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusing, "TOGETHER", together)
        found = fuse(made, dtype, CPU)
    for (spec, terms), fused in zip(made, found, strict=True):
        alone = Fused(spec, terms, dtype, CPU)
        assert (fused.spec, fused.ranks, fused.nbytes) == (spec, alone.ranks, alone.nbytes)
        for mine, other in zip(held(fused), held(alone), strict=True):
            assert (mine is None) == (other is None)
            assert mine is None or (mine.is_contiguous() and torch.equal(mine, other))


def test_a_layer_without_terms_of_a_role_holds_nothing_for_it():
    part = LowRank(torch.ones(1, 3), torch.ones(2, 1))
    made = [FusedLayer(LayerSpec("l", (2, 3)), [Term(role, part, 1.0)]) for role in ("safety", "task")]
    safety = frozenset(("safety",))
    make(made, safety, torch.float32, CPU)
    assert [layer.fused(safety, torch.float32, CPU) is None for layer in made] == [False, True]
    make(made, BOTH, torch.float32, CPU)
    assert [layer.nbytes() for layer in made] == [40, 20]


class Model(nn.Module):
    """Two layers, one of them inside another module."""

    def __init__(self):
        super().__init__()
        self.unet = nn.Module()
        self.unet.first, self.unet.second = nn.Linear(3, 2), nn.Linear(2, 2)
        self.unet.forward = lambda x: self.unet.second(self.unet.first(x))


def branches(scale: float) -> Branches:
    found = {}
    for name, inputs in (("first", 3), ("second", 2)):
        part = LowRank(torch.ones(1, inputs), torch.ones(2, 1))
        found[f"unet.{name}"] = FusedLayer(LayerSpec(f"unet.{name}", (2, inputs)), [Term("task", part, scale)])
    return Branches(found, ("unet",))


def test_guards_of_the_same_layers_take_turns_and_find_a_layer_that_was_replaced_between():
    model, x = Model(), torch.ones(3)
    first, second = (Attachment(model, branches(scale)) for scale in (1.0, 2.0))
    outputs = []
    for attachment in (first, second, first):
        attachment.attach()
        attachment.verify()
        outputs.append(model.unet(x))
        attachment.detach()
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])
    assert first.branches.counts() == ({"unet": 2}, {"unet.first": 2, "unet.second": 2})
    old, model.unet.first = model.unet.first, copy.deepcopy(model.unet.first)
    second.attach()
    assert torch.equal(model.unet(x), outputs[1])
    assert "forward" not in old.__dict__
    assert second.branches.counts() == ({"unet": 2}, {"unet.first": 2, "unet.second": 2})
    second.detach()
    model.unet.second.forward = lambda x: x
    with refuses("layer.replaced-forward", "unet.second"):
        first.attach()
    assert "forward" not in model.unet.first.__dict__
