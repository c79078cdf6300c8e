"""The branches of one layer, and of whole models built from files, against an explicit merge."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modular_lora_guard.modular_lora.branches.attachment import ALL_ROLES, Attachment, FusedLayer
from modular_lora_guard.modular_lora.branches.changes import (
    Bias,
    Dense,
    Gain,
    Kron,
    LowRank,
    Part,
    Role,
    Rotation,
    Term,
)
from modular_lora_guard.modular_lora.branches.layer_spec import layer_spec
from modular_lora_guard.modular_lora.files.matching import Target
from modular_lora_guard.modular_lora.files.reader import LoraFile, LoraLayer
from modular_lora_guard.modular_lora.guard.build import GuardLimits, ModelInfo, SafetyLora, TaskLora, build_part
from modular_lora_guard.modular_lora.guard.comparing import factor
from torch import Tensor, nn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ROUNDINGS = 16  # of the dtype, each of the size that the same sum over absolute values has
property_test = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Lora:
    """One LoRA on one layer, as a file holds it."""

    role: Role
    layer: LoraLayer
    strength: float
    offset: tuple[int, int, int] | None = None

    def term(self, shape: tuple[int, ...]) -> Term:
        f = factor(self.layer, Target("w", self.offset), shape)
        return Term(self.role, LowRank(f.down, f.up), self.strength * f.scale)

    def change(self, shape: tuple[int, ...], absolute: bool = False) -> Tensor:
        """strength·alpha/rank·up·down in place, as an explicit merge adds it to a weight; fp64."""
        up, down = self.layer.up.double().flatten(1), self.layer.down.double().flatten(1)
        alpha = self.layer.rank if self.layer.alpha is None else self.layer.alpha
        scale = self.strength * alpha / self.layer.rank
        product = abs(scale) * up.abs() @ down.abs() if absolute else scale * up @ down
        whole = torch.zeros(shape, dtype=torch.float64)
        dim, start, length = self.offset or (0, 0, shape[0])
        part = whole.narrow(dim, start, length)
        part.copy_(product.reshape(part.shape))
        return whole


def lora_layer(
    generator: torch.Generator, shape: tuple[int, ...], rank: int, alpha: float | None = None, name: str = "layer"
) -> LoraLayer:
    out, *rest = shape
    down = torch.randn(rank, *rest, generator=generator) / torch.Size(rest).numel() ** 0.5
    up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator) / rank**0.5
    return LoraLayer(name, down, up, alpha)


@st.composite
def modules(draw, grouped: bool = True) -> nn.Module:
    """``grouped``: also in groups or transposed, which changes that act on outputs never reach (see resolve)."""
    wide, narrow, bias = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.booleans())
    if draw(st.booleans()):
        return nn.Linear(narrow, 3 * wide, bias)
    kind = draw(st.sampled_from(CONVOLUTIONS if grouped else CONVOLUTIONS[:3]))
    shape = {name: draw(st.integers(1, 2)) for name in ("stride", "dilation")}
    shape |= {"padding": draw(st.integers(0, 2)), "groups": draw(st.sampled_from((1, 1, 3) if grouped else (1,)))}
    groups, kernel = shape["groups"], draw(st.sampled_from((1, 3)))
    return kind(groups * narrow, groups * wide, kernel, bias=bias, **shape)


@st.composite
def loras(draw, module: nn.Module, generator: torch.Generator) -> list[Lora]:
    shape, found = tuple(module.weight.shape), []
    for _ in range(draw(st.integers(1, 4))):
        role = draw(st.sampled_from(("safety", "task")))
        strength = draw(st.sampled_from((1.0, 0.7, 0.0, -0.4, -1.0, 2.5)))
        alpha = draw(st.sampled_from((None, 0.5, 1.0, 8.0)))
        rank = draw(st.integers(1, 16))
        if isinstance(module, nn.Linear) and draw(st.booleans()):  # one slice of a fused q, k, v weight
            third = shape[0] // 3
            offset = (0, third * draw(st.integers(0, 2)), third)
            found.append(Lora(role, lora_layer(generator, (third, shape[1]), rank, alpha), strength, offset))
        else:
            found.append(Lora(role, lora_layer(generator, shape, rank, alpha), strength))
    return found


def example(module: nn.Module, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.Linear):
        return torch.randn(2, 3, module.in_features, generator=generator)
    return torch.randn(2, module.in_channels, *(7 for _ in module.weight.shape[2:]), generator=generator)


def forward(module: nn.Module, weight: Tensor, x: Tensor, absolute: bool = False) -> Tensor:
    """The module's forward with another weight, in fp64; ``absolute`` sums absolute values."""
    other = copy.deepcopy(module).double()
    with torch.no_grad():
        other.weight.copy_(weight)
        if absolute and other.bias is not None:
            other.bias.abs_()
        return other(x.double().abs() if absolute else x.double())


def assert_merged(y: Tensor, module: nn.Module, x: Tensor, active: list[Lora]) -> None:
    shape, dtype = tuple(module.weight.shape), x.dtype
    weight = module.weight.detach().double()
    expected = forward(module, weight + sum(item.change(shape) for item in active), x)
    bound = forward(module, weight.abs() + sum(item.change(shape, True) for item in active), x, True)
    assert y.dtype == dtype
    info = torch.finfo(dtype)
    assert bool(((y.double() - expected).abs() <= ROUNDINGS * info.eps * bound + info.smallest_normal).all())


@property_test
@given(st.data(), st.integers(0, 2**16), st.sampled_from(DTYPES))
def test_a_layer_equals_an_explicit_merge_within_rounding(data, seed, dtype):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    module = data.draw(modules()).to(dtype)
    items = data.draw(loras(module, generator))
    x = example(module, generator).to(dtype)
    spec = layer_spec("w", module)
    layer = FusedLayer(spec, [item.term(spec.weight_shape) for item in items])
    with torch.no_grad():
        base = module(x)
        both = layer.add(base.clone(), x, frozenset(("safety", "task")))
        safety = layer.add(base.clone(), x, frozenset(("safety",)))
        none = layer.add(base.clone(), x, frozenset())
    assert_merged(both, module, x, items)
    assert_merged(safety, module, x, [item for item in items if item.role == "safety"])
    assert torch.equal(none, base)


@st.composite
def parts(draw, module: nn.Module, generator: torch.Generator) -> list[tuple[Part, float]]:
    """One to four parts of every form that fits the layer, with their scales."""
    out, *rest = module.weight.shape
    fan_in, kernel = torch.Size(rest).numel(), tuple(rest[1:])
    random = lambda *shape: torch.randn(shape, generator=generator) / torch.Size(shape).numel() ** 0.5  # noqa: E731
    splits = lambda size: [n for n in range(1, size + 1) if size % n == 0]  # noqa: E731
    found = []
    for kind in draw(st.lists(st.sampled_from((LowRank, Dense, Kron, Gain, Rotation, Bias)), min_size=1, max_size=4)):
        rank, block = draw(st.integers(1, 16)), draw(st.sampled_from(splits(out)))
        outer, inner = draw(st.sampled_from(splits(out))), draw(st.sampled_from(splits(rest[0])))
        part = {
            LowRank: lambda r=rank: LowRank(random(r, fan_in), random(out, r)),
            Dense: lambda: Dense(random(out, fan_in)),
            Kron: lambda o=outer, i=inner: Kron(random(o, i), random(out // o, rest[0] // i, *kernel)),
            Gain: lambda: Gain(random(out), module.bias),
            Rotation: lambda n=block: Rotation(random(out // n, n, n), module.bias),
            Bias: lambda: Bias(random(out)),
        }[kind]()
        found.append((part, draw(st.sampled_from((1.0, 0.7, -0.4, 2.5)))))
    return found


def total(found: list[tuple[Part, float]], module: nn.Module, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """Σ scale·part as changes of the weight and of the bias; fp64; ``absolute`` sums absolute values."""
    size = (lambda t: t.detach().abs()) if absolute else (lambda t: t.detach())
    weight, bias = torch.zeros(module.weight.shape, dtype=torch.float64), torch.zeros(len(module.weight)).double()
    for part, scale in found:
        scale = abs(scale) if absolute else scale
        mine = {f.name: size(v) for f in fields(part) if isinstance(v := getattr(part, f.name), Tensor)}
        part = replace(part, **mine)
        if isinstance(part, Bias):
            bias += scale * part.bias
        else:
            weight += (scale * part.dense(lambda: size(module.weight))).reshape(weight.shape)
        if absolute and isinstance(part, Gain | Rotation) and part.bias is not None:  # what is taken back of W0·x + b
            bias += 2 * scale * part.dense(lambda p=part: p.bias[:, None]).flatten()
    return weight, bias


@property_test
@given(st.data(), st.integers(0, 2**16), st.sampled_from(DTYPES))
def test_every_form_of_change_equals_an_explicit_merge_within_rounding(data, seed, dtype):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    module = data.draw(modules(grouped=False)).to(dtype)
    found = data.draw(parts(module, generator))
    x, spec = example(module, generator).to(dtype), layer_spec("w", module)
    layer = FusedLayer(spec, [Term("task", part, scale) for part, scale in found])
    with torch.no_grad():
        y = layer.add(module(x), x, frozenset(("task",))).double()
    expected, bound = (evaluate(module, *total(found, module, size), x, size) for size in (False, True))
    info = torch.finfo(dtype)
    assert bool(((y - expected).abs() <= ROUNDINGS * info.eps * bound + info.smallest_normal).all())


@property_test
@given(st.data(), st.integers(0, 2**16), st.sampled_from(DTYPES), st.floats(0.01, 0.99))
def test_every_form_of_a_task_lora_acts_at_its_share_and_the_safety_lora_whole(data, seed, dtype, share):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    module = data.draw(modules(grouped=False)).to(dtype)
    safety, tasks = data.draw(parts(module, generator)), data.draw(parts(module, generator))
    x, spec = example(module, generator).to(dtype), layer_spec("w", module)
    layer = FusedLayer(spec, [Term("safety", *one, "a") for one in safety] + [Term("task", *one) for one in tasks])
    with torch.no_grad():
        y = layer.add(module(x), x, ALL_ROLES, torch.tensor(share)).double()
        muted, alone = (
            made.add(module(x), x, frozenset(("safety",)))
            for made in (layer, FusedLayer(spec, [Term("safety", *one, "a") for one in safety]))
        )
    assert torch.equal(muted, alone)
    changes = [*safety, *((part, share * scale) for part, scale in tasks)]
    expected, bound = (evaluate(module, *total(changes, module, size), x, size) for size in (False, True))
    info = torch.finfo(dtype)
    assert bool(((y - expected).abs() <= ROUNDINGS * info.eps * bound + info.smallest_normal).all())


def evaluate(module: nn.Module, weight: Tensor, bias: Tensor, x: Tensor, absolute: bool) -> Tensor:
    """The module with changes of its weight and bias, in fp64; ``absolute`` sums absolute values."""
    W0 = module.weight.detach().double()
    y = forward(module, (W0.abs() if absolute else W0) + weight, x, absolute)
    return y + bias.reshape(-1, *(1 for _ in weight.shape[2:]))


@pytest.mark.parametrize("kind", ["layer", "group", "rms", "gemma", "t5"])
def test_a_norm_takes_changes_of_its_weight_and_bias(kind):
    class RMSNorm(nn.Module):
        """As ComfyUI's own for Gemma, which stores its weight less one."""

        def __init__(self):
            super().__init__()
            self.eps, self.weight = 1e-3, nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (6,), self.weight + 1, self.eps)

    class T5LayerNorm(nn.Module):
        """As ComfyUI's own for T5."""

        def __init__(self):
            super().__init__()
            self.variance_epsilon, self.weight = 1e-3, nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    norms = {"layer": lambda: nn.LayerNorm(6), "group": lambda: nn.GroupNorm(3, 6), "rms": lambda: nn.RMSNorm(6, 1e-5)}
    module = {**norms, "gemma": RMSNorm, "t5": T5LayerNorm}[kind]()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 4, generator=generator) if kind == "group" else torch.randn(2, 5, 6, generator=generator)
    delta, shift = torch.randn(6, 1, generator=generator), torch.randn(6, generator=generator)
    terms = [Term("task", Dense(delta), 0.7)]
    if getattr(module, "bias", None) is not None:
        terms.append(Term("task", Bias(shift), -0.4))
    with torch.no_grad():
        base, layer = module(x), FusedLayer(layer_spec("w", module), terms)
        y = layer.add(module(x), x, frozenset(("task",)))
        part = layer.add(module(x), x, frozenset(("task",)), torch.tensor(0.25))
        assert torch.allclose(part - base, 0.25 * (y - base), atol=1e-5)
        module.weight += 0.7 * delta.flatten()
        if len(terms) > 1:
            module.bias -= 0.4 * shift
        assert torch.allclose(y, module(x), atol=1e-5)


@property_test
@given(st.data(), st.integers(0, 2**16))
def test_the_order_of_loras_does_not_matter(data, seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    module = data.draw(modules())
    items = data.draw(loras(module, generator))
    x = example(module, generator)
    spec, roles = layer_spec("w", module), frozenset(("safety", "task"))
    for order in (items, items[::-1], data.draw(st.permutations(items))):
        layer = FusedLayer(spec, [item.term(spec.weight_shape) for item in order])
        with torch.no_grad():
            assert_merged(layer.add(module(x), x, roles), module, x, items)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (5, 6), (2, 3, 4, 6)])
def test_a_linear_layer_takes_inputs_of_any_rank(shape):
    module, generator = nn.Linear(6, 9), torch.Generator().manual_seed(0)
    item = Lora("safety", lora_layer(generator, (9, 6), 2), 1.0)
    x = torch.randn(shape, generator=generator)
    with torch.no_grad():
        assert_merged(
            FusedLayer(layer_spec("w", module), [item.term((9, 6))]).add(module(x), x, frozenset({"safety"})),
            module,
            x,
            [item],
        )


def test_an_output_that_is_not_contiguous_gets_its_branch():
    class Turned(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)

    module, generator = Turned(6, 9), torch.Generator().manual_seed(0)
    item = Lora("safety", lora_layer(generator, (9, 6), 2), 1.0)
    x = torch.randn(4, 5, 6, generator=generator)
    with torch.no_grad():
        y = FusedLayer(layer_spec("w", module), [item.term((9, 6))]).add(module(x), x, frozenset({"safety"}))
        assert_merged(y, module, x, [item])


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(4, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")],
    ids=["embedding", "norm", "padded by its own values"],
)
def test_a_layer_that_takes_no_branch_says_why(module):
    assert layer_spec("w", module).problem


class Block(nn.Module):
    """A fused q, k, v weight, a layer that takes two halves, and two convolutions."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.qkv = nn.Linear(6, 18, bias=False)
        self.out = nn.Linear(18, 6)
        self.conv_out = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x).permute(0, 2, 3, 1)  # b h w c
        return self.conv_out(self.out(self.qkv(h)).permute(0, 3, 1, 2))


class Model(nn.Module):
    """What holds the root, as ComfyUI's BaseModel holds diffusion_model."""

    def __init__(self):
        super().__init__()
        self.diffusion_model = Block()


NAMES = {  # layer of a file -> (layer of the model, slice of its weight)
    "conv_in": ("conv_in", None),
    "to_q": ("qkv", (0, 0, 6)),
    "to_k": ("qkv", (0, 6, 6)),
    "to_v": ("qkv", (0, 12, 6)),
    "left": ("out", (1, 0, 9)),
    "right": ("out", (1, 9, 9)),
    "conv_out": ("conv_out", None),
}


def model_info(model: Model) -> ModelInfo:
    specs = {f"{path}.weight": layer_spec(path, m) for path, m in model.named_modules() if hasattr(m, "weight")}
    keys = {name: (f"diffusion_model.{path}.weight", offset) for name, (path, offset) in NAMES.items()}
    return ModelInfo("Block", {k: v if v[1] else v[0] for k, v in keys.items()}, specs, ("diffusion_model",))


@st.composite
def files(draw, model: Model) -> LoraFile:
    generator, layers = torch.Generator().manual_seed(draw(st.integers(0, 2**16))), {}
    for name in sorted(draw(st.sets(st.sampled_from(sorted(NAMES)), min_size=1))):
        path, offset = NAMES[name]
        shape = list(model.get_submodule(f"diffusion_model.{path}").weight.shape)
        if offset:
            shape[offset[0]] = offset[2]
        alpha, rank = draw(st.sampled_from((None, 0.5, 4.0))), draw(st.integers(1, 16))
        layers[name] = lora_layer(generator, tuple(shape), rank, alpha, name)
    return LoraFile(Path("x.safetensors"), "x.safetensors", "0" * 64, {}, layers)


def merge(model: Model, items: list[tuple[LoraFile, float]]) -> Model:
    other = copy.deepcopy(model)
    for lora, strength in items:
        for name, layer in lora.layers.items():
            path, offset = NAMES[name]
            weight = other.get_submodule(f"diffusion_model.{path}").weight
            with torch.no_grad():
                weight += Lora("task", layer, strength, offset).change(tuple(weight.shape)).to(weight)
    return other


@property_test
@given(st.data())
def test_a_model_guarded_with_files_equals_the_explicit_merge(data):
    torch.manual_seed(0)
    model = Model()
    safety = [
        SafetyLora(data.draw(files(model)), strength) for strength in data.draw(st.sampled_from(((1.0,), (0.3, 2.0))))
    ]
    tasks = [TaskLora(data.draw(files(model)), s, 1.0) for s in data.draw(st.sampled_from(((), (0.7,), (0.0, -0.7))))]
    part = build_part("model", model_info(model), tuple(safety), tuple(tasks), GuardLimits(), enforce=False)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    items = [(s.lora, s.strength) for s in safety] + [(t.lora, t.strength_model) for t in tasks]
    with torch.no_grad():
        references = [merge(model, part_of).diffusion_model(x) for part_of in (items, items[: len(safety)])]
        Attachment(model, part.branches).attach()
        for roles, expected in zip((("safety", "task"), ("safety",)), references, strict=True):
            with part.branches.only(*roles):
                y = model.diffusion_model(x)
            assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["to_k", "right"])
def test_a_slice_leaves_the_rest_of_its_weight_bitwise_alone(name):
    model, generator = Model(), torch.Generator().manual_seed(0)
    path, (dim, start, length) = NAMES[name]
    shape = list(model.get_submodule(f"diffusion_model.{path}").weight.shape)
    shape[dim] = length
    lora = LoraFile(Path("x"), "x", "0", {}, {name: lora_layer(generator, tuple(shape), 4, None, name)})
    part = build_part("model", model_info(model), (SafetyLora(lora, 1.0),), (), GuardLimits())
    (term,) = part.branches.layers[f"diffusion_model.{path}"].terms
    down, up = term.part.down, term.part.up
    assert not (up[:start] if dim == 0 else down[:, :start]).any()
    assert (up[start:] if dim == 0 else down[:, start:]).any()


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_task_lora_of_strength_zero_takes_no_rank(strength):
    model, generator = Model(), torch.Generator().manual_seed(0)
    file = lambda rank: LoraFile(  # noqa: E731
        Path("x"), "x", str(rank), {}, {"to_q": lora_layer(generator, (6, 6), rank, None, "to_q")}
    )
    tasks = (TaskLora(file(5), strength, 0.0),)
    part = build_part("model", model_info(model), (SafetyLora(file(3), 1.0),), tasks, GuardLimits(), enforce=False)
    terms = part.branches.layers["diffusion_model.qkv"].terms
    assert sum(term.part.down.shape[0] for term in terms) == 3 + 5 * bool(strength)
