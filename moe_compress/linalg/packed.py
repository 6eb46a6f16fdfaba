"""Sums of symmetric matrices at a little over half their size.

Kept are strips of rows, left of the diagonal and up to the strip's own square on it, one after the other:

    (..., P) holds for each strip of rows [start, stop) the columns [0, stop),     P = packed_size(N) ~ N (N + 256) / 2

Strips are what a product is added to in one call, at the speed of the whole matrix. What lies above the diagonal in
their squares is never read: the lower triangle is the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

STRIP = 256
"""Rows of a strip: wide enough for a fast product, few elements above the diagonal."""


def packed_size(size: int) -> int:
    """P, the elements kept of a matrix of `size` rows."""
    return sum(len(rows) * rows.stop for rows in _strips(size))


def strips(packed_P: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Views of the strips: (rows, (..., rows, rows.stop)); to be added to in place, where there is one matrix."""
    start = 0
    for rows in _strips(size):
        stop = start + len(rows) * rows.stop
        yield slice(rows.start, rows.stop), packed_P[..., start:stop].unflatten(-1, (len(rows), rows.stop))
        start = stop


def unpack(packed_P: Tensor, size: int) -> Tensor:
    """The whole matrices, (..., N, N), exactly symmetric."""
    whole_NN = packed_P.new_empty(*packed_P.shape[:-1], size, size)
    for rows, strip in strips(packed_P, size):
        left, square = strip[..., : rows.start], strip[..., rows.start :]
        whole_NN[..., rows, : rows.start] = left
        whole_NN[..., : rows.start, rows] = left.mT
        whole_NN[..., rows, rows] = square.tril() + square.tril(-1).mT
    return whole_NN


def pack(whole_NN: Tensor) -> Tensor:
    """The inverse of `unpack`, (..., P)."""
    strip_list = [
        whole_NN[..., rows.start : rows.stop, : rows.stop].flatten(-2) for rows in _strips(whole_NN.shape[-1])
    ]
    return torch.cat(strip_list, dim=-1)


def _strips(size: int) -> Iterator[range]:
    for start in range(0, size, STRIP):
        yield range(start, min(start + STRIP, size))
