"""Closed forms against their papers' formulas, written out plainly in float64; and what a projector promises."""

from __future__ import annotations

import pytest
import torch
from modular_lora_guard.training.safety.closed.edit import Edit
from modular_lora_guard.training.safety.closed.null_space import alpha_edit, null_space, quiet_space, speed
from modular_lora_guard.training.safety.closed.rece import adversarial, rece
from modular_lora_guard.training.safety.closed.uce import uce
from support.closed_formulas import formula_alpha_edit, formula_rece, formula_speed, formula_uce

D, OUT, N = 24, 10, 3


def columns(n: int, seed: int) -> torch.Tensor:
    return torch.randn(D, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def W() -> torch.Tensor:
    return torch.randn(OUT, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def change(edit: Edit, W: torch.Tensor) -> torch.Tensor:
    down, up = edit.factors(W)
    assert down.shape == (edit.rank, D)
    assert up.shape == (OUT, edit.rank)
    return up @ down


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).norm() / wanted.norm()) < 1e-10


@pytest.mark.parametrize("kept", [0, 7, 40])
def test_uce_is_the_papers_regression(W, kept):
    C, G, K = columns(N, 1), columns(N, 2), columns(kept, 3)
    for lambda_, alpha, beta in ((0.5, 1.0, 1.0), (0.1, 2.0, 0.3)):
        edit = uce(C, G, K, lambda_, alpha, beta)
        assert edit.rank == N
        assert close(W + change(edit, W), formula_uce(W, C, G, K, lambda_, alpha, beta))
        assert close(change(edit, W), formula_uce(W, C, G, K, lambda_, alpha, beta) - W)


@pytest.mark.parametrize("rounds", [1, 3])
def test_rece_is_uce_and_uce_of_what_brings_the_concept_back(W, rounds):
    others = [torch.randn_like(W) for _ in range(2)]
    C, G, K = columns(N, 1), columns(N, 2), columns(5, 3)
    layers = [W, *others]
    S = sum(w.T @ w for w in layers)
    edit = rece(C, G, K, S, rounds)
    assert edit.rank == N * (rounds + 1)
    for layer, wanted in zip(layers, formula_rece(layers, C, G, K, rounds), strict=True):
        assert close(change(edit, layer), wanted - layer)


def test_reces_embedding_gets_from_the_edited_layers_what_the_concept_got_before(W):
    layers = [W, *(torch.randn_like(W) for _ in range(4))]  # more rows than columns: it can be met
    C, G = columns(N, 1), columns(N, 2)
    S = sum(w.T @ w for w in layers)
    edit = uce(C, G, columns(0, 3))
    found = adversarial(C, S, edit, 1e-9)
    before, edited = (torch.cat(layers) @ x for x in (C, edit(C)))
    assert (before - edited).norm() > 0.5 * before.norm()
    assert (torch.cat(layers) @ edit(found) - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("r", [1.0, 0.01])
@pytest.mark.parametrize("lambda_", [0.0, 0.1])
def test_speed_is_the_authors_formula(W, r, lambda_):
    C, G, K2 = columns(N, 1), columns(N, 2), columns(2, 4)
    P, rank = null_space(columns(6, 3))
    assert rank == 6
    edit = speed(C, G, P, K2, r, lambda_)
    assert edit.rank == N
    assert close(change(edit, W), formula_speed(W, C, G, P, K2, r, lambda_))
    none = columns(0, 4)
    assert close(change(speed(C, G, P, none, r), W), formula_speed(W, C, G, P, none, r, 0.0))


@pytest.mark.parametrize("earlier", [0, 4])
def test_alpha_edit_is_the_authors_formula(W, earlier):
    C, G, Kp = columns(N, 1), columns(N, 2), columns(earlier, 4)
    P, _ = null_space(columns(6, 3))
    assert close(change(alpha_edit(C, G - C, P, Kp, 0.7), W), formula_alpha_edit(W, C, W @ (G - C), P, Kp, 0.7))


@pytest.mark.parametrize("kept", [1, 6, 23, 24, 60])
def test_what_spans_the_kept_inputs_is_taken_from_the_change(W, kept):
    K = columns(kept, 3)
    P, rank = null_space(K)
    assert rank == min(kept, D)
    assert (P @ K).norm() < 1e-12 * K.norm()
    assert torch.allclose(P @ P, P)
    if rank < D:
        C, G = columns(N, 1), columns(N, 2)
        edit = speed(C, G, P, K[:, :1], 1e-5)
        assert (change(edit, W) @ K).norm() < 1e-8 * (W @ K).norm()
        if D - rank >= N:  # what is left of C moves all the way
            assert (W @ edit(P @ C) - W @ (P @ C + G - C)).norm() < 1e-3 * (W @ C).norm()


def test_a_rank_is_counted_as_in_float32():
    K = columns(3, 1)
    assert null_space(torch.cat([K, K.float().double() @ torch.eye(3, dtype=torch.float64)], 1))[1] == 3


def test_speed_holds_its_start_tokens_and_quiet_directions_are_those_used_least(W):
    K = columns(60, 3) * torch.linspace(0.01, 2, D, dtype=torch.float64)[:, None]
    P = quiet_space(K, 0.1)
    values = torch.linalg.eigvalsh(K @ K.T / 60)
    assert round(float(P.trace())) == int((values < 0.1).sum())
    assert (P @ K).square().sum(1).max() / 60 < 0.1 * D
    C, G, K2 = columns(N, 1), columns(N, 2), columns(2, 4)
    held = change(speed(C, G, P, K2), W) @ K2
    free = change(speed(C, G, P, K2[:, :0]), W) @ K2
    assert held.norm() < 1e-9 * free.norm()


def test_edits_follow_each_other_and_are_reduced_to_the_nearest_of_a_rank(W):
    first, second = uce(columns(N, 1), columns(N, 2), columns(4, 3)), uce(columns(2, 5), columns(2, 6), columns(4, 3))
    both = first.then(second)
    one = W + change(first, W)
    assert close(W + change(both, W), one + change(second, one))
    whole = both.U @ both.D
    for rank in (1, 3, 5, 9):
        less, share = both.reduced(rank)
        u, s, vh = torch.linalg.svd(whole)
        assert less.rank == min(rank, 5)
        assert torch.allclose(less.U @ less.D, u[:, :rank] * s[:rank] @ vh[:rank])
        assert share == pytest.approx(float(s[:rank].square().sum() / s.square().sum()))


def test_both_factors_are_of_one_size_for_half_precision(W):
    edit = speed(columns(N, 1) * 1e-4, columns(N, 2), null_space(columns(6, 3))[0], columns(0, 4), 1e-12)
    down, up = edit.factors(W)
    assert torch.allclose(down.norm(dim=1), up.norm(dim=0))
