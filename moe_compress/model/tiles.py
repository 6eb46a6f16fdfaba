"""Products of runs of rows with spans of a packed table: as they are, or in windows of few sizes.

A *run* is rows that follow each other and belong to one span [first, first + length) of the table. Written into the
rows of `out`, or added to them:

    contract   the products of a row with the rows of the span     x_N, table (R, N)  ->  `length` numbers
    expand     the rows of the span added up by weights            t_L, table (R, M)  ->  M numbers

In half precision on a CPU oneDNN compiles a product (milliseconds, and a megabyte of its cache) for every shape, and
each call costs 20 microseconds whatever its size. So there windows of rows and of spans are rounded up to a few sizes.
They reach into what belongs to others: surplus columns are cut off or meet zeros, surplus rows are overwritten by
their own product afterwards. A few rows are added up without oneDNN, all runs in one call of embedding_bag.

Shapes: S rows, and some more to reach into; M, N, R as above; L at least `length`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouped import TILE_ROWS, is_tiled

FEW_ROWS = 32
"""Up to here a product is bound by reading the matrix, and oneDNN is faster with the matrix in first place."""

_BAG_PRODUCTS = 2**20
"""Multiplications that embedding_bag does in about the time that a call of oneDNN takes whatever its size."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows that follow each other and use the same span.

    Attributes:
        start, count: the rows.
        first, length: the span.
        is_added: to what is in these rows already.
    """

    start: int
    count: int
    first: int
    length: int
    is_added: bool

    def is_continued_by(self, other: Run) -> bool:
        """Whether both are one."""
        mine = (self.start + self.count, self.first, self.length, self.is_added)
        return mine == (other.start, other.first, other.length, other.is_added)


def window(count: int) -> int:
    """Rows that a product of `count` rows, at most TILE_ROWS, is compiled for."""
    return (count + 7) // 8 * 8 if count <= 16 else (count + 31) // 32 * 32


def surplus(num_rows: int) -> int:
    """Rows that the window of any of `num_rows` rows may reach beyond the last."""
    return 0 if num_rows == 0 else 7 if num_rows <= 16 else 31


def span_window(length: int) -> int:
    """Columns that a product over a span is compiled for: an eighth too many at most, or up to 32."""
    step = max(32, 1 << length.bit_length() >> 4)
    return (length + step - 1) // step * step


def product_of_all(x_TN: Tensor, table_RN: Tensor) -> Tensor:
    """(T, R) the products of all rows with all of a table."""
    num_rows = x_TN.shape[0]
    if not is_tiled(x_TN) or num_rows > FEW_ROWS:
        return F.linear(x_TN, table_RN)
    return torch.mm(table_RN, F.pad(x_TN, (0, 0, 0, window(num_rows) - num_rows)).T).T[:num_rows]


class Exact:
    """Products of just the rows and spans there are."""

    def __init__(self, source: Tensor, table: Tensor, out: Tensor) -> None:
        self.source, self.table, self.out = source, table, out

    def contract(self, runs: list[Run]) -> None:
        for run in runs:
            here = slice(run.start, run.start + run.count)
            part = self.table[run.first : run.first + run.length]
            _multiply(self.source[here], part.T, self.out[here, : run.length], run.is_added)

    def expand(self, runs: list[Run]) -> None:
        for run in runs:
            here = slice(run.start, run.start + run.count)
            part = self.table[run.first : run.first + run.length]
            _multiply(self.source[here, : run.length], part, self.out[here], run.is_added)

    def outer(self, runs: list[Run]) -> None:
        """Adds t^T y, `source` t (S, L), `table` y (S, M), to the spans of `out` (R, M)."""
        for run in runs:
            here = slice(run.start, run.start + run.count)
            part = self.out[run.first : run.first + run.length]
            part.addmm_(self.source[here, : run.length].T, self.table[here])


def _multiply(a: Tensor, b: Tensor, out: Tensor, is_added: bool) -> None:
    if is_added:
        out.addmm_(a, b)
    elif torch.compiler.is_compiling():  # which takes no part of a tensor as `out`
        out.copy_(torch.mm(a, b))
    else:
        torch.mm(a, b, out=out)


class Windowed:
    """The same in windows.

    Args:
        source, table, out: as above; columns of `source` beyond a row's span are zero where it is expanded.
        may_spill: the runs come in the order of their rows, and nothing is written yet that follows one of them.
    """

    def __init__(self, source: Tensor, table: Tensor, out: Tensor, may_spill: bool = False) -> None:
        self.source, self.table, self.out, self.may_spill = source, table, out, may_spill

    def contract(self, runs: list[Run]) -> None:
        num_rows, width = self.table.shape[0], self.out.shape[1]
        for run in runs:
            shift, length, part = self._span(run, num_rows)
            fits = self.may_spill and not shift and length <= width
            if fits and run.count == 1:  # half as many steps in Python, which are a third of the time
                torch.mv(part, self.source[run.start], out=self.out[run.start, :length])
                continue
            for start, count in _tiles(run):
                x = self.source[start : start + window(count)]
                if fits and count > FEW_ROWS:
                    torch.mm(x, part.T, out=self.out[start : start + window(count), :length])
                    continue
                y = torch.mm(part, x.T).T if count <= FEW_ROWS else torch.mm(x, part.T)
                y = y[:count, shift : shift + run.length]
                _put(y, self.out[start : start + count, : run.length], run.is_added)

    def expand(self, runs: list[Run]) -> None:
        num_rows, width = self.table.shape
        few: list[Run] = []
        for run in runs:
            if (run.count - 1) * run.length * width <= _BAG_PRODUCTS:
                few.append(run)
                continue
            shift, length, part = self._span(run, num_rows)
            for start, count in _tiles(run):
                t = self.source[start : start + window(count), :length]
                if shift or t.shape[1] < length:
                    t = F.pad(t[:, : run.length], (shift, length - shift - run.length))
                if self.may_spill:
                    torch.mm(t, part, out=self.out[start : start + window(count)])
                else:
                    _put(torch.mm(t, part)[:count], self.out[start : start + count], run.is_added)
        for is_added in (False, True):
            self._expand_few([run for run in few if run.is_added == is_added])

    def _expand_few(self, runs: list[Run]) -> None:
        """`expand` of runs of few rows, all at once."""
        if not runs:
            return
        rows: list[int] = []
        spans: list[Tensor] = []
        weights: list[Tensor] = []
        for run in runs:
            here = range(run.start, run.start + run.count)
            rows += here
            spans += [torch.arange(run.first, run.first + run.length)] * run.count
            weights += self.source[here.start : here.stop, : run.length].unbind()
        ends = list(accumulate(map(len, spans), initial=0))
        y_RM = F.embedding_bag(
            torch.cat(spans), self.table, torch.tensor(ends[:-1]), mode="sum", per_sample_weights=torch.cat(weights)
        )
        row_R = torch.tensor(rows)
        if runs[0].is_added:
            self.out.index_add_(0, row_R, y_RM)
        else:
            self.out.index_copy_(0, row_R, y_RM)

    def outer(self, runs: list[Run]) -> None:
        for run in runs:
            out = self.out[run.first : run.first + run.length]
            for start, count in _tiles(run):
                zeros = (0, span_window(run.length) - run.length, 0, window(count) - count)
                t = F.pad(self.source[start : start + count, : run.length], zeros)
                out.add_(torch.mm(t.T, self.table[start : start + window(count)])[: run.length])

    def _span(self, run: Run, num_rows: int) -> tuple[int, int, Tensor]:
        """The place of a span in a window of the table around it; the window's length, and its rows."""
        length = min(span_window(run.length), num_rows)
        first = min(run.first, num_rows - length)
        return run.first - first, length, self.table[first : first + length]


def _put(y: Tensor, out: Tensor, is_added: bool) -> None:
    if is_added:
        out.add_(y)
    else:
        out.copy_(y)


def _tiles(run: Run) -> list[tuple[int, int]]:
    if run.count <= TILE_ROWS:
        return [(run.start, run.count)]
    stop = run.start + run.count
    return [(start, min(TILE_ROWS, stop - start)) for start in range(run.start, stop, TILE_ROWS)]
