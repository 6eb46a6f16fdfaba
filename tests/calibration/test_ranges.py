"""Ranges of layers: whole, in order, balanced by bytes, and no larger than they must be."""

from __future__ import annotations

from itertools import chain, combinations

from hypothesis import given
from hypothesis import strategies as st

from moe_compress.calibration.ranges import cut, cut_to_fit

layers = st.lists(st.integers(1, 50), min_size=1, max_size=9)


def largest(sizes: list[int], ranges: list[range]) -> int:
    return max(sum(sizes[i] for i in each) for each in ranges)


@given(sizes=layers, num_ranges=st.integers(1, 9))
def test_the_largest_range_is_as_small_as_can_be(sizes: list[int], num_ranges: int) -> None:
    ranges = cut(sizes, num_ranges)
    assert list(chain(*ranges)) == list(range(len(sizes)))
    count = min(num_ranges, len(sizes))
    assert len(ranges) == count
    every = (
        [range(a, b) for a, b in zip((0, *inner), (*inner, len(sizes)), strict=True)]
        for inner in combinations(range(1, len(sizes)), count - 1)
    )
    assert largest(sizes, ranges) == min(largest(sizes, other) for other in every)


@given(sizes=layers, num_workers=st.integers(1, 4), memory=st.integers(1, 200))
def test_ranges_are_resident_when_they_fit_and_else_fit_if_one_layer_does(
    sizes: list[int], num_workers: int, memory: int
) -> None:
    ranges = cut_to_fit(sizes, num_workers, memory)
    assert list(chain(*ranges)) == list(range(len(sizes)))
    if largest(sizes, cut(sizes, num_workers)) <= memory:
        assert len(ranges) == min(num_workers, len(sizes))
    elif max(sizes) <= memory:
        assert largest(sizes, ranges) <= memory
    else:
        assert len(ranges) == len(sizes)


def test_one_large_layer_is_a_range_of_its_own() -> None:
    assert cut([1, 1, 10, 1, 1, 1], 3) == [range(2), range(2, 3), range(3, 6)]
