"""The allocation against every choice there is, on problems small enough to list them all."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.budget import DENSE, Item, allocate, error, parameters, segments, uniform_rank

Points = list[tuple[int, float]]
"""(parameters, error)."""


def item(num_rows: int, num_columns: int, *energy: float) -> Item:
    return Item(num_rows, num_columns, np.array(energy, dtype=np.float32))


@st.composite
def some_items(draw: st.DrawFn, most: int = 3) -> list[Item]:
    """Shapes of all proportions; energies with zeros, ties, and anything from flat to steep."""
    items = []
    for _ in range(draw(st.integers(1, most))):
        rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        rank = min(rows, columns)
        energy = draw(st.lists(st.sampled_from([0, 0.25, 1, 1.5, 2, 8, 100]), min_size=rank, max_size=rank))
        items.append(item(rows, columns, *sorted(energy, reverse=True)))
    return items


def distinct_items(seed: int) -> list[Item]:
    """Items of which no two segments are equal."""
    generator = np.random.default_rng(seed)
    items = []
    for rows, columns in generator.integers(1, 9, (6, 2)).tolist():
        energy = generator.exponential(size=min(rows, columns)) ** 3 * generator.exponential()
        items.append(item(rows, columns, *sorted(energy, reverse=True)))
    return items


def total(items: list[Item]) -> int:
    return sum(i.dense_parameters for i in items)


def spent(items: list[Item], ranks: list[int]) -> int:
    return sum(parameters(i, r) for i, r in zip(items, ranks, strict=True))


def left(items: list[Item], ranks: list[int]) -> float:
    return sum(error(i, r) for i, r in zip(items, ranks, strict=True))


def every_choice(items: list[Item]) -> Points:
    choices = product(*([*range(len(i.energy) + 1), DENSE] for i in items))
    return [(spent(items, list(ranks)), left(items, list(ranks))) for ranks in choices]


def lower_hull(points: Points) -> Points:
    """Corners of the lower convex hull, as far as more parameters leave less error."""
    hull: Points = []
    for x, y in sorted(points):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


@settings(deadline=None)
@given(some_items(most=1))
def test_segments_walk_along_the_hull_from_nothing_to_the_whole_matrix(items: list[Item]) -> None:
    gain, cost = segments(items[0])
    assert (np.diff(gain) <= 0).all()
    assert (cost > 0).all()
    at = [0, *cost.cumsum()]
    error_at = error(items[0], 0) - np.array([0, *(gain * cost).cumsum()])
    corners = lower_hull(every_choice(items))
    expected = np.interp(at, *zip(*corners, strict=True))
    np.testing.assert_allclose(error_at, expected, rtol=0, atol=1e-9)
    assert at[-1] == items[0].dense_parameters


@settings(deadline=None)
@given(some_items())
def test_corners_of_the_hull_of_all_choices_are_found(items: list[Item]) -> None:
    for budget, expected in lower_hull(every_choice(items)):
        ranks = allocate(items, budget)
        assert spent(items, ranks) <= budget
        assert left(items, ranks) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(some_items(), st.floats(0, 1))
def test_between_two_corners_the_error_is_between_theirs(items: list[Item], share: float) -> None:
    budget = int(share * total(items))
    corners = lower_hull(every_choice(items))
    found = left(items, allocate(items, budget))
    assert found >= np.interp(budget, *zip(*corners, strict=True)) - 1e-9
    assert found <= min(y for x, y in corners if x <= budget) + 1e-9


@settings(deadline=None)
@given(some_items(most=5), st.floats(0, 1))
def test_the_budget_is_spent_to_within_one_step(items: list[Item], share: float) -> None:
    budget = int(share * total(items))
    ranks = allocate(items, budget)
    unspent = budget - spent(items, ranks)
    assert unspent >= 0
    for one, rank in zip(items, ranks, strict=True):
        assert rank == DENSE or segments(one)[1][rank] > unspent


@settings(deadline=None)
@given(some_items(most=4))
def test_more_parameters_never_leave_more_error(items: list[Item]) -> None:
    errors = [left(items, allocate(items, budget)) for budget in range(total(items) + 1)]
    assert all(more <= less + 1e-9 for less, more in pairwise(errors))


@settings(deadline=None)
@given(some_items(most=5))
def test_the_whole_budget_keeps_everything_and_none_keeps_nothing(items: list[Item]) -> None:
    assert allocate(items, total(items)) == [DENSE] * len(items)
    assert left(items, [DENSE] * len(items)) == 0
    assert allocate(items, 0) == [0] * len(items)


@settings(deadline=None)
@given(some_items(most=5), st.floats(0, 1))
def test_factors_are_smaller_than_the_matrix_they_stand_for(items: list[Item], share: float) -> None:
    for one, rank in zip(items, allocate(items, int(share * total(items))), strict=True):
        assert rank == DENSE or parameters(one, rank) < one.dense_parameters


def test_a_flat_spectrum_is_kept_whole_or_not_at_all() -> None:
    flat = item(4, 4, 1, 1, 1, 1)  # a direction costs 8 and removes 1; all four cost 16
    assert [allocate([flat], budget) for budget in (8, 15, 16)] == [[0], [0], [DENSE]]


def test_a_steep_spectrum_gives_way_to_the_whole_matrix_where_that_pays() -> None:
    steep = item(6, 6, 16, 4, 1, 1, 1, 1)  # 16/12 > 24/36, 4/12 = 8/24; then 12 for the rest
    assert [allocate([steep], budget) for budget in (11, 12, 24, 35, 36)] == [[0], [1], [2], [2], [DENSE]]


def test_of_equal_segments_the_first_item_gets_its_own_first() -> None:
    alike = [item(4, 4, 9, 3, 0, 0)] * 3
    expected = {8: [1, 0, 0], 16: [1, 1, 0], 24: [1, 1, 1], 32: [DENSE, 1, 1], 40: [DENSE, DENSE, 1]}
    assert {budget: allocate(alike, budget) for budget in expected} == expected
    assert allocate(alike * 20, 8 * 20) == [1] * 20 + [0] * 40


def test_rounding_does_not_let_a_step_overtake_those_it_builds_on() -> None:
    gain, _ = segments(item(5, 8, 6.5, 6.5, 6.5, 0.5, 2.0**-49))  # 6.5 / 13 = 20 / 40, but for the last bit
    assert len(gain) > 1
    assert (np.diff(gain) <= 0).all()


def test_what_is_left_over_buys_what_still_fits() -> None:
    items = [item(8, 8, *[4] * 8), item(2, 3, 0.1, 0)]  # 64 parameters for 32; 6 for 0.1
    assert allocate(items, 63) == [0, DENSE]


def test_a_step_is_not_taken_before_those_it_builds_on() -> None:
    # Of the second item a direction costs 5 and, after it, the rest of the matrix only 1.
    items = [item(1, 4, 100), item(2, 3, 3, 0.01)]
    assert [cost.tolist() for _, cost in map(segments, items)] == [[4], [5, 1]]
    assert [allocate(items, budget) for budget in (4, 8, 9, 10)] == [[DENSE, 0], [DENSE, 0], [DENSE, 1], [DENSE, DENSE]]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False), st.floats(0, 1))
def test_the_order_of_items_does_not_matter_where_none_are_equal(seed: int, shuffler: object, share: float) -> None:
    items = distinct_items(seed)
    order = list(range(len(items)))
    shuffler.shuffle(order)  # type: ignore[attr-defined]
    ranks = allocate(items, int(share * total(items)))
    assert allocate([items[i] for i in order], int(share * total(items))) == [ranks[i] for i in order]


@pytest.mark.parametrize(
    ("ratio", "has_base", "rank"),
    [
        # Mixtral-8x7B, 14336 x 4096: M N / (M + N) = 3185.78 a matrix; eight of them less one for the base
        (0.2, True, 2150),  # (6.4 - 1) / 8 * 3185.78 = 2150.40
        (0.4, True, 1513),  # (4.8 - 1) / 8 * 3185.78 = 1513.24
        (0.6, True, 876),  # (3.2 - 1) / 8 * 3185.78 = 876.09
        (0.4, False, 1911),  # 0.6 * 3185.78 = 1911.47
        (0.9, True, -80),  # (0.8 - 1) / 8 * 3185.78 = -79.64
    ],
)
def test_uniform_rank_of_mixtral(ratio: float, has_base: bool, rank: int) -> None:
    assert uniform_rank(14336, 4096, 8, ratio, has_base) == rank


def test_uniform_rank_that_comes_out_even_is_not_rounded_down() -> None:
    assert (1 - 0.9) * 20 * 20 / 40 < 1
    assert uniform_rank(20, 20, 1, 0.9, num_bases=0) == 1


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 9), st.integers(1, 99), st.booleans())
def test_uniform_rank_is_the_highest_that_fits(
    num_rows: int, num_columns: int, num_experts: int, percent: int, has_base: bool
) -> None:
    rank = uniform_rank(num_rows, num_columns, num_experts, percent / 100, has_base)
    step, area = num_experts * (num_rows + num_columns), num_rows * num_columns
    kept = (100 - percent) * num_experts * area - 100 * area * has_base  # in hundredths, exact
    assert 100 * step * rank <= kept < 100 * step * (rank + 1)
