"""Terms that are huge and cancel in exact arithmetic: no LoRA makes the safety LoRA's share vanish by rounding."""

from __future__ import annotations

import pytest
import torch
from modular_lora_guard.modular_lora.branches.changes import Bias, Dense, Gain, Kron, LowRank, Rotation, Term
from modular_lora_guard.modular_lora.branches.fusing import Fused
from modular_lora_guard.modular_lora.branches.layer_spec import layer_spec
from support.errors import refuses
from support.graphs import guarded_graph, save_lora
from torch import nn

INPUTS, OUTPUTS = 64, 48
CPU = torch.device("cpu")


def factors(rank: int, seed: int = 0, out: int = OUTPUTS, inputs: int = INPUTS) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inputs, generator=g) * 0.1, torch.randn(out, rank, generator=g) * 0.1)


def large(power: int, inputs: int = INPUTS) -> tuple[LowRank, LowRank]:
    """+B and −B of rank 1."""
    d, u = torch.randn(1, inputs, generator=torch.Generator().manual_seed(3)), torch.full((OUTPUTS, 1), 2.0**power)
    return LowRank(d, u), LowRank(d, -u)


def joined(a: LowRank, b: LowRank) -> LowRank:
    return LowRank(torch.cat([a.down, b.down]), torch.cat([a.up, b.up], 1))


S = factors(4)
ONES = torch.full((OUTPUTS, INPUTS), 1.0)


def pairs(power: int) -> dict[str, list[Term]]:
    plus, minus = large(power)
    s = Term("safety", S, 1.0, "s")
    task = lambda part: Term("task", part, 1.0)  # noqa: E731
    size = 2.0 ** min(power, 60)
    wide = factors(512, 5)
    wide.up[:, 7], wide.up[:, 300] = size, -size
    wide.down[300] = wide.down[7]
    own = LowRank(wide.down.clone(), -wide.up)
    own.up[:, 7] = own.up[:, 300] = 0
    return {
        "one file": [s, task(joined(plus, minus))],
        "two files": [s, task(plus), task(minus)],
        "tasks around the safety LoRA": [task(plus), s, task(minus)],
        "tasks first": [task(plus), task(minus), s],
        "dense tasks": [s, task(Dense(ONES * size)), task(Dense(-ONES * size))],
        "all dense": [
            Term("safety", Dense(S.up @ S.down), 1.0, "s"),
            task(Dense(ONES * size)),
            task(Dense(-ONES * size)),
        ],
        "pair and dense": [s, task(plus), task(Dense(minus.up @ minus.down))],
        "Kronecker": [s, *(task(Kron(sign * torch.full((8, 8), size), torch.ones(6, 8))) for sign in (1, -1))],
        "gains": [s, *(task(Gain(sign * torch.full((OUTPUTS,), size), None)) for sign in (1, -1))],
        "rotations": [s, *(task(Rotation(sign * size * torch.ones(6, 8, 8), None)) for sign in (1, -1))],
        "biases": [s, *(task(Bias(sign * torch.full((OUTPUTS,), size))) for sign in (1, -1))],
        "rank 512, dense by its size": [s, task(wide), task(own)],
    }  # fmt: skip


@pytest.mark.parametrize("kind", pairs(0))
@pytest.mark.parametrize(
    ("dtype", "power"),
    [(torch.float32, 20), (torch.float32, 40), (torch.float32, 60), (torch.bfloat16, 20), (torch.float16, 8)],
)
def test_terms_that_cancel_leave_the_safety_share_whole(kind, dtype, power):
    terms = pairs(power)[kind]
    module = nn.Linear(INPUTS, OUTPUTS, bias=False)
    x = torch.randn(32, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)
    y0 = (x @ module.weight.detach().to(dtype).T).contiguous()
    exact = sum(t.scale * t.part.dense(lambda: module.weight.detach()).double() for t in terms if t.role == "safety")
    share = x.double() @ exact.T
    fused = Fused(layer_spec("layer", module), terms, dtype, CPU)
    with_safety = fused(y0.clone(), x).double()
    without = fused.only("task")(y0.clone(), x).double()
    kept = float(((with_safety - without) * share).sum() / share.square().sum())
    assert kept == pytest.approx(1.0, abs=0.02 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("make", [nn.Linear, nn.Conv2d])
def test_the_result_is_the_base_and_the_safety_share_and_then_the_task_share(make):
    """(y0 + s) + t, in every layout."""
    module = make(INPUTS, OUTPUTS, **({} if make is nn.Linear else {"kernel_size": 1}))
    x = torch.randn(2, 9, INPUTS) if make is nn.Linear else torch.randn(2, INPUTS, 3, 3)
    y0 = module(x).detach()
    spec = layer_spec("layer", module)
    tasks = [Term("task", factors(8, 2), 0.7), Term("task", Bias(torch.ones(OUTPUTS)), 1.0)]
    fused = Fused(spec, [Term("safety", S, 1.0, "s"), *tasks], torch.float32, CPU)
    h = fused.reduced(x)
    s, t = (fused.share(owner, y0, x, h) for owner in (("safety", "s"), ("task", "")))
    assert torch.allclose(fused(y0.clone(), x), (y0 + s) + t, rtol=0, atol=2e-6)


def spoiled(layers: dict, path, change) -> None:
    """A LoRA file in which ``change`` has replaced the factors (up out r, down r in) of a middle layer."""
    from safetensors.torch import load_file, save_file

    save_lora(path, layers, 4, 9)
    tensors = load_file(path)
    name = [n.removesuffix(".lora_up.weight") for n in tensors if n.endswith("to_v.lora_up.weight")][3]
    change(tensors, name)
    save_file(tensors, path)


def huge(power: int):
    def change(tensors: dict, name: str) -> None:
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        up[:, 0], up[:, 1], down[1] = 2.0**power, -(2.0**power), down[0].clone()

    return change


def dense_difference(size: float):
    def change(tensors: dict, name: str) -> None:
        out, inputs = len(tensors[f"{name}.lora_up.weight"]), tensors[f"{name}.lora_down.weight"].shape[1]
        for ending in ("lora_up.weight", "lora_down.weight", "alpha"):
            del tensors[f"{name}.{ending}"]
        tensors[f"{name}.diff"] = torch.full((out, inputs), size)

    return change


@pytest.mark.parametrize("power", [20, 40, 60, 100])
def test_a_file_of_huge_terms_is_refused_by_name(run_graph, loras, power):
    spoiled(loras.unet, loras.folder / "huge.safetensors", huge(power))
    with refuses("lora.too-large", "huge.safetensors") as error:
        run_graph(guarded_graph(task="huge.safetensors"))
    assert error.value.stage == "execution"


def test_two_files_that_cancel_each_other_are_refused(run_graph, loras):
    for sign, name in ((1, "plus"), (-1, "minus")):
        spoiled(loras.unet, loras.folder / f"{name}.safetensors", dense_difference(sign * 2.0**30))
    graph = guarded_graph(task="plus.safetensors")
    graph["more"] = {
        "class_type": "ModularLoraLoadTask",
        "inputs": {
            "lora_name": "minus.safetensors",
            "strength_model": 1.0,
            "strength_clip": 1.0,
            "task_lora": ["task", 0],
        },
    }
    graph["guard"]["inputs"]["task_lora"] = ["more", 0]
    with refuses("lora.too-large", "us.safetensors"):
        run_graph(graph)


def test_a_second_safety_lora_is_held_to_the_same(run_graph, loras):
    spoiled(loras.unet, loras.folder / "second.safetensors", huge(40))
    graph = guarded_graph(task=None)
    graph["second"] = {
        "class_type": "ModularLoraLoadSafety",
        "inputs": {"lora_name": "second.safetensors", "strength": 1.0, "safety_lora": ["safety", 0]},
    }
    graph["guard"]["inputs"]["safety_lora"] = ["second", 0]
    with refuses("lora.too-large", "second.safetensors"):
        run_graph(graph)
