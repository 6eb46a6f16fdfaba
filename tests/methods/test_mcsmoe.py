from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from moe_compress.methods.mcsmoe import choose_columns, column_scores, residual
from moe_compress.model.slots import DENSE, FactorisedSlot

Matrices = tuple[list[NDArray[np.floating]], list[int], int]


@st.composite
def matrices(draw: st.DrawFn) -> Matrices:
    """Scores of the columns of some matrices (many equal, some that may not be taken), costs and a budget."""
    value = st.sampled_from([-np.inf, 0.0, 0.5, 0.5, 1.0, 2.0, 3.0])
    scores = draw(st.lists(st.lists(value, min_size=1, max_size=5), min_size=1, max_size=4))
    costs = [draw(st.integers(1, 9)) for _ in scores]
    return [np.array(score) for score in scores], costs, draw(st.integers(0, 60))


def one_by_one(scores: list[NDArray[np.floating]], costs: list[int], budget: int) -> list[list[int]]:
    """The highest score first, until one does not fit."""
    chosen: list[list[int]] = [[] for _ in scores]
    pairs = [(-s, i, j) for i, score in enumerate(scores) for j, s in enumerate(score) if s > 0]
    for _, matrix, column in sorted(pairs):
        budget -= costs[matrix]
        if budget < 0:
            break
        chosen[matrix].append(column)
    return [sorted(own) for own in chosen]


@settings(deadline=None, max_examples=300)
@given(matrices())
def test_columns_are_those_of_highest_score_within_the_budget(case: Matrices) -> None:
    scores, costs, budget = case
    chosen = choose_columns(scores, costs, budget)
    assert [own.tolist() for own in chosen] == one_by_one(scores, costs, budget)
    assert sum(len(own) * cost for own, cost in zip(chosen, costs, strict=True)) <= budget
    assert all((score[own] > 0).all() for score, own in zip(scores, chosen, strict=True))


def factors_of(slot: FactorisedSlot, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: slot.shapes()[name] for name in (f"{slot.name}_u", f"{slot.name}_v")}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def test_the_residual_is_what_an_experts_own_factors_leave() -> None:
    slot = FactorisedSlot("up", 6, 4, [2, DENSE, 0, 3])
    factors = factors_of(slot)
    weight_MN = torch.randn(6, 4)
    for expert, start, stop in ((0, 0, 2), (2, 2, 2), (3, 2, 5)):
        expected = weight_MN - factors["up_u"][start:stop].T @ factors["up_v"][start:stop]
        torch.testing.assert_close(residual(weight_MN, factors, slot, expert), expected)
    assert torch.equal(residual(weight_MN, factors, slot, 2), weight_MN)


def test_the_residual_of_half_precision_weights_is_fp32() -> None:
    slot = FactorisedSlot("up", 6, 4, [2])
    factors = {name: tensor.bfloat16() for name, tensor in factors_of(slot).items()}
    weight_MN = torch.randn(6, 4).bfloat16()
    found = residual(weight_MN, factors, slot, 0)
    exact = weight_MN.double() - factors["up_u"].double().T @ factors["up_v"].double()
    torch.testing.assert_close(found, exact.float(), atol=1e-5, rtol=0)


def test_all_columns_of_the_residual_give_the_matrix_back() -> None:
    slot = FactorisedSlot("down", 5, 7, [1, 2])
    factors = factors_of(slot)
    for expert in range(2):
        weight_MN = torch.randn(5, 7)
        left_MN = residual(weight_MN, factors, slot, expert)
        chosen = choose_columns([column_scores(left_MN, None).numpy()], [6], budget=7 * 6)[0]
        assert chosen.tolist() == list(range(7))
        rows = slot.factor_rows(expert)
        rebuilt = factors["down_u"][rows].T @ factors["down_v"][rows]
        rebuilt[:, chosen] += left_MN[:, chosen]
        torch.testing.assert_close(rebuilt, weight_MN, atol=1e-5, rtol=0)


def test_a_columns_score_is_its_importance_squared_a_parameter() -> None:
    left_MN, gradient_MN = torch.randn(6, 4), torch.randn(6, 4)
    energy = left_MN.double().square().sum(0)
    torch.testing.assert_close(column_scores(left_MN, None), energy / 7)
    by_gradient = column_scores(left_MN, gradient_MN.square().sum(0))
    torch.testing.assert_close(by_gradient, energy * gradient_MN.double().square().sum(0) / 7, rtol=1e-6, atol=0)
    # the bound of the paper's sum of |s dL/ds| over the column
    assert bool(((by_gradient * 7).sqrt() >= (left_MN * gradient_MN).abs().sum(0) * (1 - 1e-6)).all())


def test_energy_removes_the_most_that_this_many_equal_columns_can() -> None:
    left = [torch.randn(5, 6), torch.randn(5, 6) * 2]
    chosen = choose_columns([column_scores(matrix, None).numpy() for matrix in left], [6, 6], budget=4 * 6)
    energies = torch.cat([matrix.square().sum(0) for matrix in left])
    taken = sum(float(m[:, own].square().sum()) for m, own in zip(left, chosen, strict=True))
    assert sum(map(len, chosen)) == 4
    assert abs(taken - float(energies.topk(4).values.sum())) < 1e-4
