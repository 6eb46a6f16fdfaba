"""Metrics of tasks: numbers worked out by hand, and what must hold of all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_compress.evaluation.tasks.metrics import (
    Estimate,
    binary_f1,
    by_group,
    exact_match,
    mean,
    normalised,
    proportion,
    token_f1,
)

WORDS = st.lists(st.sampled_from(["Ann", "the", "ran", "3.5", "An", "well-known", "!"]), max_size=5).map(" ".join)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Quick,  brown fox!", "quick brown fox"),
        ("an  Apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre and another", "theatre and another"),
        ("well-known", "wellknown"),
        ("  \tA\n", ""),
    ],
)
def test_what_is_compared(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


@pytest.mark.parametrize(
    ("generated", "answers", "exact", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos", "The Denver Broncos!"], True, 1),
        ("the Denver Broncos.", ["Denver Broncos"], True, 1),
        ("Santa Clara, California", ["Levi's Stadium", "Santa Clara"], False, 0.8),
        ("the team of Denver", ["Denver Broncos"], False, 2 / 5),
        ("gold gold gold", ["gold"], False, 0.5),
        ("gold", ["a blue blue gold gold"], False, 2 / 5),
        ("", ["gold"], False, 0),
        ("the", ["a"], True, 0),
        ("no one", ["no"], False, 2 / 3),
    ],
)
def test_answers_by_the_rules_of_squad(generated: str, answers: list[str], exact: bool, f1: float) -> None:
    assert exact_match(generated, answers) is exact
    assert token_f1(generated, answers) == pytest.approx(f1)


def test_yes_and_no_are_right_as_a_whole_or_not_at_all() -> None:
    assert token_f1("no one", ["no"], yes_no=True) == 0
    assert token_f1("No.", ["no"], yes_no=True) == 1
    assert token_f1("no one", ["one"], yes_no=True) == pytest.approx(2 / 3)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_f1_of_text(generated: str, answers: list[str]) -> None:
    found = token_f1(generated, answers)
    assert 0 <= found <= 1
    assert found == max(token_f1(answer, [generated]) for answer in answers)
    if exact_match(generated, answers) and normalised(generated):
        assert found == 1


@pytest.mark.parametrize(
    ("num_right", "number", "low", "high"),
    [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0)],
)
def test_wilsons_interval(num_right: int, number: int, low: float, high: float) -> None:
    found = proportion([True] * num_right + [False] * (number - num_right))
    assert found.value == num_right / number
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(2, 5))
def test_more_examples_are_surer(right: list[bool], times: int) -> None:
    once, often = proportion(right), proportion(right * times)
    assert 0 <= once.low <= once.value <= once.high <= 1
    assert once.low <= often.low
    assert often.high <= once.high


def test_f1_of_choices() -> None:
    gold, chosen = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]
    assert binary_f1(gold, chosen, range(6)).value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert binary_f1([0, 0], [0, 0], range(2)) == Estimate(0, 0, 0)
    assert binary_f1([1, 1], [1, 1], range(2)) == Estimate(1, 1, 1)
    assert binary_f1(gold, chosen, range(6)) == binary_f1(gold, chosen, range(6))


def test_rows_of_a_question_are_drawn_together() -> None:
    gold, chosen = [1, 1] * 50, [1, 0] * 50
    apart, together = binary_f1(gold, chosen, range(100)), binary_f1(gold, chosen, [i // 2 for i in range(100)])
    assert apart.value == together.value == pytest.approx(2 / 3)
    assert together.low == together.high == together.value  # every question adds the same
    assert apart.low < apart.value < apart.high
    assert by_group([True, False, True, True], ["b", "b", "a", "a"]) == [False, True]


def test_the_bootstrap_is_as_wide_as_the_standard_error_says() -> None:
    values = np.random.default_rng(3).beta(0.5, 0.5, 400)
    found = mean(list(values))
    error = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)
