"""The robust training and the start from a file: what an attack finds, and what a start begins as."""

from __future__ import annotations

import pytest
import torch
from modular_lora_guard.modular_lora.files.reader import read_lora
from modular_lora_guard.training import output
from modular_lora_guard.training.adapters import Spec, adapted
from modular_lora_guard.training.model import Cond
from modular_lora_guard.training.safety.robust import attacked
from modular_lora_guard.training.safety.start import start_from
from modular_lora_guard.training.safety.train import prepare
from support.erasure_toys import Toy, erasure, noise, options
from support.errors import refuses
from support.toys import TEXT, WIDTH, ToyHostModel


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_an_attack_comes_nearer_to_the_base_within_its_radius(steps):
    toy, x_t, t = Toy().disturb(), noise(4), torch.tensor([3, 20, 50, 90])
    cond = toy.encode(["car"] * 4)
    with toy.off():
        brought = toy.predict(x_t, t, cond)
    for size in (0.1, 0.5):
        found = attacked(toy.predict, x_t, t, cond, brought, steps, size)
        moved = (found.cross - cond.cross).norm(dim=-1)
        assert bool((moved <= size * cond.cross.norm(dim=-1) * 1.0001).all())
        assert not found.cross.requires_grad
        before, after = ((toy.predict(x_t, t, c) - brought).square().sum((1, 2, 3)) for c in (cond, found))
        assert after.sum() < before.sum()
        again = attacked(toy.predict, x_t, t, cond, brought, steps, size)
        assert torch.equal(found.cross, again.cross)


def test_the_attack_is_the_gradient_step_written_out():
    toy, x_t, t, size = Toy().disturb(), noise(2), torch.tensor([3, 60]), 0.2
    cond = toy.encode(["car", "bus"])
    brought = toy.base(x_t, t, "car", "bus")
    cross = cond.cross.clone().requires_grad_()
    (toy.predict(x_t, t, Cond.of(cross)) - brought).square().sum().backward()
    direction = torch.nn.functional.normalize(cross.grad, dim=-1)
    wanted = cond.cross - size * cond.cross.norm(dim=-1, keepdim=True) * direction
    found = attacked(toy.predict, x_t, t, cond, brought, 1, size)
    assert torch.allclose(found.cross, wanted, atol=1e-6)


def test_only_what_is_erased_is_attacked_and_the_target_stays():
    plain, robust = erasure(Toy().disturb()), erasure(Toy().disturb(), robust_steps=3, robust_size=0.4)
    plain.loss(0), robust.loss(0)
    (a, b) = (run.host_model.trained() for run in (plain, robust))
    erased = [i for i, (role, _) in enumerate(robust._rows(0, 0)) if role == "erase"]
    others = [i for i in range(len(a.t)) if i not in erased]
    assert erased
    assert others
    assert torch.equal(a.x_t, b.x_t)
    assert torch.equal(a.cond.cross[others], b.cond.cross[others])
    assert bool(((a.cond.cross - b.cond.cross)[erased].norm(dim=-1) > 0).all())
    assert torch.equal(plain._batch(plain._rows(0, 0))[3], robust._batch(robust._rows(0, 0))[3])


@pytest.mark.slow
def test_robust_training_leaves_an_attack_less():
    """Both erase the concept's own embedding; the same attack brings back less of the robust one."""
    left = {}
    for steps in (0, 5):
        toy = Toy().disturb()
        run = erasure(toy, robust_steps=steps, robust_size=0.5, preserve=(), preserve_weight=0.0, train_batch_size=16)
        optimizer = torch.optim.Adam(toy.parameters, 0.03)
        for step in range(80):
            optimizer.zero_grad()
            run.loss(step % 10).backward()
            optimizer.step()
        x_t, t = noise(32, seed=9), torch.arange(32) * 3
        brought = toy.base(x_t, t, *["car"] * 32)
        found = attacked(toy.predict, x_t, t, toy.encode(["car"] * 32), brought, 10, 0.5)
        with torch.no_grad():
            left[steps] = float((toy.predict(x_t, t, found) - brought).square().mean())
    assert left[5] > 1.1 * left[0]


LAYERS = ("middle_block.1.transformer_blocks.0.attn2.to_k", "middle_block.1.transformer_blocks.0.attn2.to_v")


def written(tmp_path, rank: int, names, width: int = TEXT):
    generator = torch.Generator().manual_seed(3)
    factors = {
        n: (torch.randn(rank, width, generator=generator), torch.randn(WIDTH, rank, generator=generator), 2.0)
        for n in names
    }
    return output.write(tmp_path / "start.safetensors", factors, {}, "float")


@pytest.mark.parametrize(("rank", "whole"), [(2, True), (4, True), (6, False)])
def test_a_start_is_the_files_change_or_the_nearest_of_the_rank(tmp_path, rank, whole):
    toy = ToyHostModel()
    names = {path: toy.unet_names[path] for path in LAYERS}
    lora = read_lora(written(tmp_path, rank, list(names.values())).path)
    with adapted(toy.unet, toy.text_encoder, Spec(names, {}, 4, 8.0, 0.0, 1, "safety")) as adapters:
        line = start_from(adapters, lora)
        for name, layer in lora.plain.items():
            wanted = layer.scale * layer.up @ layer.down
            down, up = adapters.pair(name)
            found = 8.0 / 4 * up.detach() @ down.detach()
            u, s, vh = torch.linalg.svd(wanted)
            assert torch.allclose(found, u[:, :4] * s[:4] @ vh[:4], atol=1e-4)
            assert torch.allclose(found, wanted, atol=1e-4) is whole
    assert ("100.00 %" in line) is whole


def test_a_start_that_does_not_fit_is_refused_by_name(tmp_path):
    toy = ToyHostModel()
    names = {path: toy.unet_names[path] for path in LAYERS[:1]}
    both = written(tmp_path, 2, [toy.unet_names[path] for path in LAYERS])
    with adapted(toy.unet, toy.text_encoder, Spec(names, {}, 4, 4.0, 0.0, 1, "safety")) as adapters:
        with refuses("init.other-layers", both.name, toy.unet_names[LAYERS[1]]):
            start_from(adapters, both)
        with refuses("init.other-shape", toy.unet_names[LAYERS[0]]):
            start_from(adapters, written(tmp_path, 2, list(names.values()), width=TEXT + 1))
    with refuses("option.init", "nowhere.safetensors"):
        prepare(options(init="nowhere.safetensors", output_dir=str(tmp_path)))
