"""Attaching branches to a model: what runs, what is counted, and what detaching leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from modular_lora_guard.modular_lora.branches.attachment import Attachment, Branches, FusedLayer
from modular_lora_guard.modular_lora.branches.changes import LowRank, Role, Term
from modular_lora_guard.modular_lora.branches.layer_spec import layer_spec
from support.errors import refuses
from torch import Tensor, nn


class Net(nn.Module):
    """A root with layers of every kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(6, 6, 1)
        self.qkv = nn.Linear(6, 18, bias=False)
        self.out = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        h = h + self.skip(h)
        return self.out(self.qkv(h.flatten(2).transpose(1, 2)))


class Model(nn.Module):
    """What holds the root, as ComfyUI's BaseModel holds diffusion_model."""

    def __init__(self):
        super().__init__()
        self.diffusion_model = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.diffusion_model(x)


ROOT = "diffusion_model"
PATHS = tuple(f"{ROOT}.{name}" for name in ("conv", "skip", "qkv", "out"))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def branches(model: Model, roles: tuple[Role, ...] = ("safety", "task"), seed: int = 2, paths=PATHS) -> Branches:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in paths:
        spec = layer_spec(path, model.get_submodule(path))
        out, inside = spec.weight_shape[0], torch.Size(spec.weight_shape[1:]).numel()
        factors = [
            (torch.randn(3, inside, generator=generator), torch.randn(out, 3, generator=generator)) for _ in roles
        ]
        scale, parts = 0.5 / inside**0.5, (LowRank(*pair) for pair in factors)
        terms = [Term(role, part, scale) for role, part in zip(roles, parts, strict=True)]
        layers[path] = FusedLayer(spec, terms)
    return Branches(layers, (ROOT,))


def merged(model: Model, changes: Branches, *roles: str) -> Model:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for path, layer in changes.layers.items():
            weight = other.get_submodule(path).weight
            for term in (t for t in layer.terms if t.role in roles):
                weight += (term.scale * term.part.up @ term.part.down).reshape(weight.shape)
    return other


def entries(model: nn.Module) -> dict[str, dict[str, int]]:
    """Identity of everything in every module's ``__dict__``."""
    return {path: {name: id(value) for name, value in m.__dict__.items()} for path, m in model.named_modules()}


def test_the_whole_model_equals_the_merged_one_in_every_pass(model, x):
    made = branches(model)
    base = model(x)
    references = {roles: merged(model, made, *roles)(x) for roles in (("safety",), ("task",), ("safety", "task"))}
    Attachment(model, made).attach()
    assert torch.allclose(model(x), references["safety", "task"], atol=1e-5)
    for roles in (("safety",), ("task",)):
        with made.only(*roles):
            assert torch.allclose(model(x), references[roles], atol=1e-5)
            assert not torch.allclose(model(x), base, atol=1e-2)
    with made.only():
        assert torch.equal(model(x), base)
    assert torch.allclose(model(x), references["safety", "task"], atol=1e-5)


def test_the_pass_switch_goes_back_after_an_error(model):
    made = branches(model)
    with pytest.raises(KeyboardInterrupt), made.only("safety"):
        raise KeyboardInterrupt
    assert made.roles == {"safety", "task"}


def test_the_counters_count_evaluations_and_firings(model, x):
    made = branches(model, paths=PATHS[:2])
    made.layers |= branches(model, ("task",), paths=PATHS[2:]).layers
    Attachment(model, made).attach()
    for _ in range(3):
        model(x)
    assert made.counts() == ({ROOT: 3}, dict.fromkeys(PATHS, 3))
    with made.only("safety"):
        model(x)
    assert made.counts() == ({ROOT: 4}, dict.fromkeys(PATHS, 4))
    model.diffusion_model.conv(x)
    assert made.counts()[1][PATHS[0]] == 5


def test_free_drops_the_fused_weights_and_the_next_pass_makes_them_again(model, x):
    made = branches(model)
    Attachment(model, made).attach()
    first = model(x)
    held = sum(layer.nbytes() for layer in made.layers.values())
    made.free()
    assert held > 0
    assert sum(layer.nbytes() for layer in made.layers.values()) == 0
    assert torch.equal(model(x), first)


def test_fused_weights_are_made_ahead_of_the_run(model, x):
    made = branches(model)
    made.to(torch.device("cpu"), torch.float32)
    held = {path: layer.nbytes() for path, layer in made.layers.items()}
    Attachment(model, made).attach()
    model(x)
    assert {path: layer.nbytes() for path, layer in made.layers.items()} == held


def test_attaching_and_detaching_restores_every_module_exactly(model, x):
    before, base = entries(model), model(x)
    attachment = Attachment(model, branches(model))
    for _ in range(2):
        attachment.attach()
        attachment.attach()
        assert attachment.attached
        attachment.detach()
        attachment.detach()
        assert not attachment.attached
        assert entries(model) == before
    assert torch.equal(model(x), base)


def test_a_failure_in_the_middle_of_attaching_restores_every_module_exactly(model):
    model.diffusion_model.out.forward = lambda x: x
    before = entries(model)
    with refuses("layer.replaced-forward", "diffusion_model.out"):
        Attachment(model, branches(model)).attach()
    assert entries(model) == before


def test_a_missing_layer_restores_every_module_exactly(model):
    made = branches(model)
    made.layers[f"{ROOT}.gone"] = made.layers[PATHS[0]]
    before = entries(model)
    with pytest.raises(AttributeError):
        Attachment(model, made).attach()
    assert entries(model) == before


def test_a_bound_method_that_a_loader_left_behind_is_accepted_and_comes_back(model, x):
    layer = model.diffusion_model.qkv
    layer.forward = layer.forward
    before, made = entries(model), branches(model)
    expected = merged(model, made, "safety", "task")(x)
    attachment = Attachment(model, made)
    attachment.attach()
    assert torch.allclose(model(x), expected, atol=1e-5)
    attachment.detach()
    assert entries(model) == before


def test_a_stand_in_that_somebody_kept_is_inert_after_detaching(model, x):
    made = branches(model)
    attachment, base = Attachment(model, made), model(x)
    attachment.attach()
    kept = {path: model.get_submodule(path).forward for path in (*PATHS, ROOT)}
    attachment.detach()
    counts = made.counts()
    for path, stand_in in kept.items():
        model.get_submodule(path).forward = stand_in
    assert torch.equal(model(x), base)
    assert made.counts() == counts


def test_a_wrapper_put_round_a_branch_survives_detaching_without_the_branch(model, x):
    base, attachment = model(x), Attachment(model, branches(model))
    attachment.attach()
    inner, calls = model.diffusion_model.out.forward, []
    model.diffusion_model.out.forward = wrapper = lambda x: (calls.append(1), inner(x))[1]
    attachment.detach()
    assert model.diffusion_model.out.forward is wrapper
    assert torch.equal(model(x), base)
    assert calls


def test_detaching_undoes_the_stand_ins_in_reverse_order(model, x):
    made = Branches(branches(model, paths=(ROOT + ".conv",)).layers, (ROOT + ".conv",))
    before, attachment = entries(model), Attachment(model, made)
    attachment.attach()
    model(x)
    assert made.counts() == ({PATHS[0]: 1}, {PATHS[0]: 1})
    attachment.detach()
    assert entries(model) == before


def test_a_second_attachment_takes_the_seat(model, x):
    before = entries(model)
    one, two = branches(model, seed=3), branches(model, seed=4)
    first, second = Attachment(model, one), Attachment(model, two)
    first.attach()
    second.attach()
    assert second.attached
    assert not first.attached
    assert torch.allclose(model(x), merged_from(model, second, two)(x), atol=1e-5)
    assert one.counts()[0] == {ROOT: 0}
    first.detach()
    assert second.attached
    second.verify()
    second.detach()
    assert entries(model) == before


def merged_from(model: Model, attachment: Attachment, made: Branches) -> Model:
    attachment.detach()
    other = merged(model, made, "safety", "task")
    attachment.attach()
    return other


def test_verify_tells_a_lost_branch_and_a_lost_seat(model):
    attachment = Attachment(model, branches(model))
    with refuses("run.branches-lost", "all of 0"):
        attachment.verify()
    attachment.attach()
    attachment.verify()
    del model.diffusion_model.skip.__dict__["forward"]
    with refuses("run.branches-lost", "1 of 5"):
        attachment.verify()


def test_no_branch_tensor_is_ever_in_a_state_dict_or_among_the_parameters(model, x):
    names = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    parameters, buffers = [id(p) for p in model.parameters()], list(model.buffers())
    submodules = [path for path, _ in model.named_modules()]
    Attachment(model, branches(model)).attach()
    model(x)
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == names
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.buffers()) == buffers
    assert [path for path, _ in model.named_modules()] == submodules


def test_w0_is_bitwise_the_same_after_passes_in_any_mode(model, x):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Attachment(model, branches(model)).attach()
    with torch.inference_mode():
        model(x)
    model(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_passes_may_change_between_inference_mode_no_grad_and_grad(model, x, first, second):
    with MODES[first]():
        made = branches(model)
        attachment = Attachment(model, made)
        attachment.attach()
        one = model(x)
    with MODES[second]():
        two = model(x)
        made.to(torch.device("cpu"), torch.float32)
        made.free()
        three = model(x)
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert made.counts() == ({ROOT: 3}, dict.fromkeys(PATHS, 3))


def test_gradients_flow_through_the_branches_to_the_input(model, x):
    made = branches(model)
    other = merged(model, made, "safety", "task")
    Attachment(model, made).attach()
    gradients = []
    for net in (model, other):
        leaf = x.clone().requires_grad_()
        net(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


def test_a_deep_copy_has_branches_and_counters_of_its_own(model, x):
    made = branches(model)
    attachment, base = Attachment(model, made), model(x)
    attachment.attach()
    guarded = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), guarded)
    assert made.counts()[0] == {ROOT: 1}
    attachment.detach()
    assert torch.equal(model(x), base)
    assert torch.equal(twin(x), guarded)
    assert not any(p is q for p in model.parameters() for q in twin.parameters())


def test_a_deep_copy_of_a_model_that_was_detached_is_plain(model, x):
    attachment, base = Attachment(model, branches(model)), model(x)
    attachment.attach()
    attachment.detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), base)
    assert not any("forward" in m.__dict__ for m in twin.modules())


@pytest.mark.slow
def test_torch_compile_keeps_one_graph_and_counts_right(model, x):
    pytest.importorskip("torch._dynamo", reason="this torch has no dynamo")
    made = branches(model)
    made.to(torch.device("cpu"), torch.float32)
    attachment = Attachment(model, made)
    attachment.attach()
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        assert torch.allclose(compiled(x), expected, atol=1e-6)
    assert made.counts() == ({ROOT: 4}, dict.fromkeys(PATHS, 4))


@pytest.mark.slow
def test_a_model_compiled_before_or_while_guarded_gives_the_stock_output_afterwards(model, x):
    pytest.importorskip("torch._dynamo", reason="this torch has no dynamo")
    made, base = branches(model), model(x)
    made.to(torch.device("cpu"), torch.float32)
    attachment = Attachment(model, made)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(x), base)
        attachment.attach()
        assert torch.equal(compiled(x), model(x))
        attachment.detach()
    assert torch.equal(compiled(x), base)
    assert made.counts() == ({ROOT: 4}, dict.fromkeys(PATHS, 4))
