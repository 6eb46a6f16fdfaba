from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.methods.grouping import (
    Floats,
    adaptive_counts,
    cluster_experts,
    dominant_experts,
    join_dominant,
    join_in_turn,
    ranking,
)

TIED = st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0])
"""Few values, so that most experts are equal to another, and many saw nothing."""


@st.composite
def quotas(draw: st.DrawFn) -> tuple[list[Floats], int, list[int]]:
    """Scores of layers of 1 to 6 experts, experts to keep in all, and the fewest of each layer, some excluded."""
    scores = draw(st.lists(st.lists(TIED, min_size=1, max_size=6), min_size=1, max_size=5))
    at_least = [draw(st.sampled_from([1, min(2, len(score)), len(score)])) for score in scores]
    num_kept = draw(st.integers(sum(at_least), sum(map(len, scores))))
    return [np.array(score) for score in scores], num_kept, at_least


@st.composite
def similarities(draw: st.DrawFn, tied: bool = True, max_experts: int = 8) -> Floats:
    """A symmetric matrix with ones on the diagonal; `tied` of few values, else all values apart."""
    num_experts = draw(st.integers(1, max_experts))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = (
        rng.integers(0, draw(st.integers(1, 3)), (num_experts,) * 2) / 4 if tied else rng.random((num_experts,) * 2)
    )
    upper = np.triu(values, 1)
    return upper + upper.T + np.eye(num_experts)


def subset(rng: np.random.Generator, num_experts: int) -> Floats:
    """Some experts, at least one, ascending."""
    return np.sort(rng.choice(num_experts, rng.integers(1, num_experts + 1), replace=False))


@settings(deadline=None, max_examples=300)
@given(quotas())
def test_adaptive_counts_keep_exactly_the_asked_number(case: tuple[list[Floats], int, list[int]]) -> None:
    scores, num_kept, at_least = case
    counts = adaptive_counts(scores, num_kept, at_least)
    assert sum(counts) == num_kept
    assert all(low <= n <= len(score) for low, n, score in zip(at_least, counts, scores, strict=True))
    kept = [score[dominant_experts(score, n)] for score, n in zip(scores, counts, strict=True)]
    assert all(score.max() in own for score, own in zip(scores, kept, strict=True))
    # what a layer keeps beyond its fewest is worth at least as much as anything that any layer leaves out
    optional = [np.sort(own)[::-1][low:] for own, low in zip(kept, at_least, strict=True)]
    left = [score[ranking(score)[n:]] for score, n in zip(scores, counts, strict=True)]
    assert min(map(np.min, filter(len, optional)), default=2) >= max(map(np.max, filter(len, left)), default=-1)


def test_of_equal_scores_those_of_the_first_layers_stay() -> None:
    assert adaptive_counts([np.full(4, 0.25)] * 3, 7, [1, 1, 1]) == [4, 2, 1]
    assert adaptive_counts([np.zeros(3), np.zeros(3)], 5, [1, 1]) == [3, 2]


def test_uneven_layers_keep_fewer() -> None:
    assert adaptive_counts([np.array([0.9, 0.05, 0.05]), np.array([0.3, 0.3, 0.4])], 4, [1, 1]) == [1, 3]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_dominant_experts_are_even_over_router_groups(num_groups: int, group_size: int, data: st.DataObject) -> None:
    per_group = data.draw(st.integers(1, group_size))
    score = np.array(data.draw(st.lists(TIED, min_size=num_groups * group_size, max_size=num_groups * group_size)))
    kept = dominant_experts(score, num_groups * per_group, num_groups)
    assert list(kept) == sorted(set(kept))
    assert Counter(kept // group_size) == dict.fromkeys(range(num_groups), per_group)
    for group in range(num_groups):
        members = np.arange(group * group_size, (group + 1) * group_size)
        left = np.setdiff1d(members, kept)
        assert min(score[np.intersect1d(members, kept)]) >= max(score[left], default=-1)


def test_of_equal_experts_the_lowest_ids_dominate() -> None:
    assert dominant_experts(np.array([0.0, 1.0, 1.0, 1.0]), 2).tolist() == [1, 2]
    assert dominant_experts(np.zeros(6), 2, num_router_groups=2).tolist() == [0, 3]


@settings(deadline=None, max_examples=100)
@given(similarities(), st.integers(0, 10**6))
def test_each_joins_the_dominant_expert_it_is_most_alike(similarity: Floats, seed: int) -> None:
    dominant = subset(np.random.default_rng(seed), len(similarity))
    joined = join_dominant(similarity, dominant)
    assert joined[dominant].tolist() == dominant.tolist()
    for expert in np.setdiff1d(np.arange(len(similarity)), dominant):
        assert joined[expert] == min(d for d in dominant if similarity[expert, d] == similarity[expert, dominant].max())
    unlimited = join_dominant(similarity, dominant, max_size=len(similarity))
    assert joined.tolist() == unlimited.tolist()


@settings(deadline=None, max_examples=200)
@given(similarities(), st.integers(0, 10**6), st.integers(0, 2))
def test_no_group_is_over_its_greatest_size_and_everyone_joins(similarity: Floats, seed: int, spare: int) -> None:
    rng, num_experts = np.random.default_rng(seed), len(similarity)
    dominant = subset(rng, num_experts)
    max_size = -(-num_experts // len(dominant)) + spare
    in_turn = join_in_turn(similarity, dominant, rng.random(num_experts), max_size)
    for joined in (join_dominant(similarity, dominant, max_size), in_turn):
        sizes = Counter(joined.tolist())
        assert sizes.keys() == set(dominant.tolist())
        assert max(sizes.values()) <= max_size
        assert joined[dominant].tolist() == dominant.tolist()


def test_the_most_alike_pairs_fill_a_group_first() -> None:
    similarity = np.array([[1, 0.1, 0.8, 0.9], [0.1, 1, 0.2, 0.3], [0.8, 0.2, 1, 0.5], [0.9, 0.3, 0.5, 1]])
    assert join_dominant(similarity, np.array([0, 1])).tolist() == [0, 1, 0, 0]
    assert join_dominant(similarity, np.array([0, 1]), max_size=2).tolist() == [0, 1, 1, 0]


def test_too_little_room_is_a_mistake() -> None:
    for join in (
        lambda: join_dominant(np.eye(5), np.array([0, 1]), max_size=2),
        lambda: join_in_turn(np.eye(5), np.array([0, 1]), np.ones(5), max_size=2),
    ):
        with pytest.raises(AssertionError):
            join()


def test_salient_experts_choose_in_turn() -> None:
    similarity = np.array(
        [[1, 0, 0.9, 0.8, 0.7], [0, 1, 0.9, 0.8, 0.1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    )
    score = np.array([1.0, 2.0, 0.0, 0.0, 0.0])
    assert join_in_turn(similarity, np.array([0, 1]), score, max_size=3).tolist() == [0, 1, 1, 1, 0]
    assert join_in_turn(similarity, np.array([0, 1]), score, max_size=4).tolist() == [0, 1, 1, 1, 1]


@settings(deadline=None, max_examples=300)
@given(similarities(max_experts=10), st.data())
def test_hierarchical_makes_exactly_the_asked_number_of_clusters(similarity: Floats, data: st.DataObject) -> None:
    num_experts = len(similarity)
    count = data.draw(st.integers(1, num_experts))
    score = np.array(data.draw(st.lists(TIED, min_size=num_experts, max_size=num_experts)))
    leaders = cluster_experts(similarity, count, score)
    assert len(set(leaders.tolist())) == count
    for leader in set(leaders.tolist()):
        members = np.flatnonzero(leaders == leader)
        assert leader == members[ranking(score[members])[0]]
    assert cluster_experts(similarity.copy(), count, score.copy()).tolist() == leaders.tolist()


def test_hierarchical_finds_the_blocks_that_are_there() -> None:
    block = np.array([0, 1, 0, 2, 1, 0])
    similarity = np.where(block[:, None] == block, 0.9, 0.1)
    np.fill_diagonal(similarity, 1)
    leaders = cluster_experts(similarity, 3, np.array([1.0, 5.0, 3.0, 0.0, 9.0, 2.0]))
    assert leaders.tolist() == [2, 4, 2, 3, 4, 2]


@settings(deadline=None, max_examples=100)
@given(similarities(tied=False), st.integers(0, 10**6))
def test_the_numbering_of_experts_does_not_matter_where_nothing_is_equal(similarity: Floats, seed: int) -> None:
    rng, num_experts = np.random.default_rng(seed), len(similarity)
    score = rng.permutation(num_experts).astype(np.float64)
    count = int(rng.integers(1, num_experts + 1))
    order = rng.permutation(num_experts)
    place = np.argsort(order)  # where an expert is after renumbering
    moved, moved_score = similarity[np.ix_(order, order)], score[order]
    max_size = -(-num_experts // count)
    dominant, moved_dominant = dominant_experts(score, count), dominant_experts(moved_score, count)
    assert moved_dominant.tolist() == sorted(place[dominant].tolist())
    for before, after in (
        (join_dominant(similarity, dominant), join_dominant(moved, moved_dominant)),
        (join_dominant(similarity, dominant, max_size), join_dominant(moved, moved_dominant, max_size)),
        (
            join_in_turn(similarity, dominant, score, max_size),
            join_in_turn(moved, moved_dominant, moved_score, max_size),
        ),
        (cluster_experts(similarity, count, score), cluster_experts(moved, count, moved_score)),
    ):
        assert after[place].tolist() == place[before].tolist()
