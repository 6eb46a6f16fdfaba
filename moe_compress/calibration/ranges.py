"""Cuts the layers into chunks: of a given number, or as memory allows, balanced by bytes.

A worker holds one chunk at a time. Where every worker's share fits, each has one chunk and keeps it from the forward
half to the backward half (*resident*); else the chunks are as many rounds of all workers as it takes for each to fit,
and come and go (*streamed*).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


def cut(sizes: Sequence[int], num_ranges: int) -> list[range]:
    """Consecutive ranges of layers, the largest as small as can be; fewer where layers are few.

    Args:
        sizes: bytes of each layer, positive.
        num_ranges: how many.
    """
    num_ranges = min(num_ranges, len(sizes))
    ends = [0, *accumulate(sizes)]
    low, high = max(sizes), ends[-1]
    while low < high:
        middle = (low + high) // 2
        if len(_filled(ends, middle, num_ranges)) <= num_ranges:
            high = middle
        else:
            low = middle + 1
    return _filled(ends, low, num_ranges)


def cut_to_fit(sizes: Sequence[int], num_workers: int, memory_bytes: float) -> list[range]:
    """The ranges that `num_workers` workers with so much room for a range share, resident if they fit."""
    rounds = range(1, -(-len(sizes) // num_workers) + 1)
    cuts = (cut(sizes, count * num_workers) for count in rounds)
    fitting = (ranges for ranges in cuts if max(sum(sizes[i] for i in each) for each in ranges) <= memory_bytes)
    return next(fitting, [range(i, i + 1) for i in range(len(sizes))])


def _filled(ends: list[int], limit: int, num_ranges: int) -> list[range]:
    """Ranges of at most `limit` bytes, filled one after the other; enough layers are left for `num_ranges`."""
    ranges: list[range] = []
    start, num_layers = 0, len(ends) - 1
    while start < num_layers:
        stop = bisect_right(ends, ends[start] + limit) - 1
        stop = max(start + 1, min(stop, num_layers - (num_ranges - len(ranges) - 1)))
        ranges.append(range(start, stop))
        start = stop
    return ranges
