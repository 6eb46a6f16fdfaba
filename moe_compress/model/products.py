"""Products of rows with packed matrices, one expert after the other: no copies of weights, one host synchronisation.

All of a factorised projection is a sum of *terms*. Of each row, which belongs to some expert, and of the expert's
span [first, first + length) of a packed table, a term gives

    contract   x_N, table (R, N)      the products of x with the rows of the span            `length` numbers
    expand     t_L, table (R, M)      the rows of the span, added up by the weights t        M numbers
    pick       table None             the span of a row of the row's token                   `length` numbers
    select     x_N, table (R,) int    x at the numbers in the span                           `length` numbers

and zeros beyond `length`. Contract and expand are each other's adjoint, so each is the other's backward pass.

In half precision on a CPU oneDNN compiles a product (milliseconds, and a megabyte of its cache) for every shape, and
a call of it costs 20 microseconds whatever the size. So windows of rows and of spans are rounded up to a few sizes:
they reach into what belongs to the next expert, whose own product overwrites the surplus rows afterwards, and whose
factors meet zeros. A single row takes neither: embedding_bag adds up the rows of a table as fast as memory brings
them.

Shapes: S rows sorted by expert, and some more to reach into; N, M, R as above; T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .slots import Spans

Kind = Literal["contract", "expand", "pick", "select"]
_ADJOINT: dict[Kind, Kind] = {"contract": "expand", "expand": "contract"}

TILE_ROWS = 512
_FEW_ROWS = 32
"""Up to here a product is bound by reading the matrix, and oneDNN is faster with the matrix in first place."""


@dataclass(frozen=True, slots=True)
class Term:
    """What a projection is the sum of.

    Attributes:
        kind: which product.
        source: (S, ...) its rows; of `pick` (T, ...), a row a token.
        table: packed over all experts; None of `pick`.
        spans: the experts' parts of the table; of `pick`, of the source's columns.
    """

    kind: Kind
    source: Tensor
    table: Tensor | None
    spans: Spans


@dataclass(frozen=True, slots=True)
class Run:
    """Rows that follow each other and use the same span."""

    start: int
    count: int
    first: int
    length: int
    is_added: bool
    """Whether an earlier term of the sum has written these rows."""


@dataclass(frozen=True)
class SortedRows:
    """Which rows belong to which expert.

    Attributes:
        order: the experts in the order of their rows.
        counts: rows of each, in that order.
        token_S: token of each row, surplus included.
        is_windowed: products are compiled for their shape.
    """

    order: Sequence[int]
    counts: Sequence[int]
    token_S: Tensor
    is_windowed: bool

    @cached_property
    def num_routed(self) -> int:
        """Rows that belong to an expert."""
        return sum(self.counts)

    def runs(self, spans: Sequence[Spans], term: int) -> list[Run]:
        """The rows of one term of a sum: those of neighbours with one and the same span together."""
        own, earlier = spans[term], spans[:term]
        found: list[Run] = []
        start = 0
        for expert, count in zip(self.order, self.counts, strict=True):
            if count and own.lengths[expert]:
                is_added = any(other.lengths[expert] for other in earlier)
                run = Run(start, count, own.starts[expert], own.lengths[expert], is_added)
                last = found[-1] if found else None
                if last and (last.start + last.count, last.first, last.length, last.is_added) == (
                    *(run.start, run.first, run.length, run.is_added),
                ):
                    found[-1] = Run(last.start, last.count + count, run.first, run.length, is_added)
                else:
                    found.append(run)
            start += count
        return found

    def idle(self, spans: Sequence[Spans]) -> list[slice]:
        """The rows that no term writes."""
        found, start = [], 0
        for expert, count in zip(self.order, self.counts, strict=True):
            if count and not any(each.lengths[expert] for each in spans):
                found.append(slice(start, start + count))
            start += count
        return found


def window(count: int) -> int:
    """Rows that a product of `count` rows, at most TILE_ROWS, is compiled for."""
    return -(-count // 8) * 8 if count <= 16 else -(-count // 32) * 32


def surplus(num_rows: int) -> int:
    """Rows that the window of any of `num_rows` rows may reach beyond the last."""
    return 0 if num_rows == 0 else 7 if num_rows <= 16 else 31


def span_window(length: int) -> int:
    """Columns that a product over a span is compiled for: an eighth too many at most."""
    step = max(32, 1 << length.bit_length() >> 4)
    return -(-length // step) * step


def looped_product(rows: SortedRows, terms: Sequence[Term], width: int, out: Tensor | None = None) -> Tensor:
    """(S, width) the sum of `terms`; into `out`, which takes no part in differentiation, if there is one."""
    kinds, spans = [term.kind for term in terms], [term.spans for term in terms]
    tensors = [tensor for term in terms for tensor in (term.source, term.table)]
    if not torch.is_grad_enabled():
        return _add_up(rows, kinds, spans, width, tensors, out)
    result: Tensor = _Sum.apply(rows, kinds, spans, width, *tensors)
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: SortedRows, kinds: list[Kind], spans: list[Spans], width: int, *tensors: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.rows, ctx.kinds, ctx.spans = rows, kinds, spans
        return _add_up(rows, kinds, spans, width, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SM: Tensor) -> tuple[Tensor | None, ...]:
        rows, grad_SM = ctx.rows, grad_SM.contiguous()
        grads: list[Tensor | None] = []
        tensors = ctx.saved_tensors
        for i, (kind, spans) in enumerate(zip(ctx.kinds, ctx.spans, strict=True)):
            source, table = tensors[2 * i : 2 * i + 2]
            of_source, of_table = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            if not of_source:
                grads.append(None)
            elif kind in _ADJOINT:
                grads.append(_add_up(rows, [_ADJOINT[kind]], [spans], source.shape[1], (grad_SM, table)))
            else:
                grads.append(_scattered(rows, kind, spans, grad_SM, source, table))
            grads.append(_table_gradient(rows, kind, spans, grad_SM, source, table) if of_table else None)
        return None, None, None, None, *grads


def _add_up(
    rows: SortedRows,
    kinds: list[Kind],
    spans: list[Spans],
    width: int,
    tensors: Sequence[Tensor | None],
    out: Tensor | None = None,
) -> Tensor:
    first_source = tensors[0]
    assert first_source is not None
    if out is None:
        out = first_source.new_empty(len(rows.token_S), width)
    out[rows.num_routed :].zero_()
    for term, kind in enumerate(kinds):
        source, table = tensors[2 * term : 2 * term + 2]
        assert source is not None
        put = _Put(rows, source, table, out, may_spill=term == 0)
        for run in rows.runs(spans, term):
            getattr(put, kind)(run)
            if kind != "expand" and not run.is_added and run.length < width:
                out[run.start : run.start + run.count, run.length :].zero_()
    for idle in rows.idle(spans):
        out[idle].zero_()
    return out


@dataclass(slots=True)
class _Put:
    """Writes a term of some rows into `out`, or adds it to what is there.

    Attributes:
        may_spill: all rows further on are still to be written.
    """

    rows: SortedRows
    source: Tensor
    table: Tensor | None
    out: Tensor
    may_spill: bool

    def contract(self, run: Run) -> None:
        assert self.table is not None
        if not self.rows.is_windowed:
            here = slice(run.start, run.start + run.count)
            part = self.table[run.first : run.first + run.length]
            return _multiply(self.source[here], part.T, self.out[here, : run.length], run.is_added)
        shift, part = _span(self.table, run)
        for start, count in _tiles(run):
            x = self.source[start : start + window(count)]
            out = self.out[start : start + count, : run.length]
            spilled = self.out[start : start + len(x), : len(part)]
            if len(x) <= _FEW_ROWS:
                y = torch.mm(part, x.T).T
            elif self.may_spill and not shift and spilled.shape[1] == len(part):
                torch.mm(x, part.T, out=spilled)
                continue
            else:
                y = torch.mm(x, part.T)
            _put(y[:count, shift : shift + run.length], out, run.is_added)

    def expand(self, run: Run) -> None:
        assert self.table is not None
        if not self.rows.is_windowed:
            part = self.table[run.first : run.first + run.length]
            stop = run.start + run.count
            return _multiply(
                self.source[run.start : stop, : run.length], part, self.out[run.start : stop], run.is_added
            )
        if run.count == 1:
            span = torch.arange(run.first, run.first + run.length)
            weights = self.source[run.start, : run.length]
            y = F.embedding_bag(span, self.table, span.new_zeros(1), mode="sum", per_sample_weights=weights)
            return _put(y, self.out[run.start : run.start + 1], run.is_added)
        shift, part = _span(self.table, run)
        for start, count in _tiles(run):
            t = self.source[start : start + window(count), : len(part)]
            if shift or t.shape[1] < len(part):
                t = F.pad(t[:, : run.length], (shift, len(part) - shift - run.length))
            if self.may_spill:
                torch.mm(t, part, out=self.out[start : start + len(t)])
            else:
                _put(torch.mm(t, part)[:count], self.out[start : start + count], run.is_added)

    def pick(self, run: Run) -> None:
        here = slice(run.start, run.start + run.count)
        part = self.source[:, run.first : run.first + run.length].index_select(0, self.rows.token_S[here])
        _put(part, self.out[here, : run.length], run.is_added)

    def select(self, run: Run) -> None:
        assert self.table is not None
        here = slice(run.start, run.start + run.count)
        part = self.source[here].index_select(1, self.table[run.first : run.first + run.length])
        _put(part, self.out[here, : run.length], run.is_added)


def _multiply(a: Tensor, b: Tensor, out: Tensor, is_added: bool) -> None:
    if is_added:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _put(y: Tensor, out: Tensor, is_added: bool) -> None:
    if is_added:
        out.add_(y)
    else:
        out.copy_(y)


def _span(table: Tensor, run: Run) -> tuple[int, Tensor]:
    """The span's place in a window of a table around it, and the window's rows."""
    length = min(span_window(run.length), len(table))
    first = min(run.first, len(table) - length)
    return run.first - first, table[first : first + length]


def _tiles(run: Run) -> list[tuple[int, int]]:
    stop = run.start + run.count
    return [(start, min(TILE_ROWS, stop - start)) for start in range(run.start, stop, TILE_ROWS)]


def _scattered(
    rows: SortedRows, kind: Kind, spans: Spans, grad_SM: Tensor, source: Tensor, table: Tensor | None
) -> Tensor:
    """Gradient of the source of a `pick` or a `select`."""
    grad = torch.zeros_like(source)
    for run in rows.runs([spans], 0):
        here = slice(run.start, run.start + run.count)
        part = grad_SM[here, : run.length]
        if kind == "pick":
            grad[:, run.first : run.first + run.length].index_add_(0, rows.token_S[here], part)
        else:
            assert table is not None
            grad[here].index_add_(1, table[run.first : run.first + run.length], part)
    return grad


def _table_gradient(
    rows: SortedRows, kind: Kind, spans: Spans, grad_SM: Tensor, source: Tensor, table: Tensor
) -> Tensor:
    """Gradient of the table of a `contract` or an `expand`; several experts may have used one span."""
    grad = torch.zeros_like(table)
    t, y = (grad_SM, source) if kind == "contract" else (source, grad_SM)
    for run in rows.runs([spans], 0):
        out = grad[run.first : run.first + run.length]
        if not rows.is_windowed:
            stop = run.start + run.count
            out.addmm_(t[run.start : stop, : run.length].T, y[run.start : stop])
            continue
        for start, count in _tiles(run):
            surplus = (0, span_window(run.length) - run.length, 0, window(count) - count)
            part = F.pad(t[start : start + count, : run.length], surplus)
            out.add_(torch.mm(part.T, y[start : start + len(part)])[: run.length])
    return grad
