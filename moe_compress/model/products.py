"""Sums of products of rows with packed matrices, one expert after the other: no copies of weights.

All of a factorised projection is a sum of *terms*. Of each row, which belongs to some expert, and of the expert's
span [first, first + length) of a packed table, a term gives

    contract   x_N, table (R, N)      the products of x with the rows of the span            `length` numbers
    expand     t_L, table (R, M)      the rows of the span, added up by the weights t        M numbers
    pick       table None             the span of a row of the row's token                   `length` numbers
    select     x_N, table (R,) int    x at the numbers in the span                           `length` numbers

and zeros beyond `length`. Contract and expand are each other's adjoint, so each is the other's backward pass.

Shapes: S rows sorted by expert, and some more for windows to reach into (see tiles.py); N, M, R as above; T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .slots import Spans
from .tiles import Exact, Run, Windowed

Kind = Literal["contract", "expand", "pick", "select"]
_CACHED = 2**18
"""Numbers at a time of what is moved rather than multiplied, so that they stay in the cache."""

_ADJOINT: dict[Kind, Kind] = {"contract": "expand", "expand": "contract"}


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


class SortedRows:
    """Which rows belong to which expert.

    Args:
        order: the experts in the order of their rows.
        counts: rows of each, in that order.
        token_S: token of each row, surplus included.
        is_windowed: products are compiled for their shape.

    Attributes:
        num_routed: rows that belong to an expert.
        busy: expert, first row and number of rows of all that have some.
    """

    def __init__(self, order: Sequence[int], counts: Sequence[int], token_S: Tensor, is_windowed: bool) -> None:
        self.order, self.counts, self.token_S, self.is_windowed = order, counts, token_S, is_windowed
        self.num_routed = 0
        self.busy: list[tuple[int, int, int]] = []
        for expert, count in zip(order, counts, strict=True):
            if count:
                self.busy.append((expert, self.num_routed, count))
            self.num_routed += count

    def runs(self, spans: Spans, is_begun: Sequence[bool] | None = None) -> list[Run]:
        """The rows that a term writes: those of neighbours with one and the same span together.

        Args:
            spans: of the term.
            is_begun: of each expert, whether another term has written its rows.
        """
        found: list[Run] = []
        for expert, start, count in self.busy:
            first, length = spans.starts[expert], spans.lengths[expert]
            if not length:
                continue
            run = Run(start, count, first, length, is_begun is not None and is_begun[expert])
            if found and found[-1].is_continued_by(run):
                run = replace(run, start=found[-1].start, count=found.pop().count + count)
            found.append(run)
        return found


def looped_product(rows: SortedRows, terms: Sequence[Term], width: int, out: Tensor | None = None) -> Tensor:
    """(S, width) the sum of `terms`; without gradients in `out`, if that is given."""
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
                grads.append(_scattered(rows, spans, grad_SM, source, table))
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
        out = first_source.new_empty(rows.token_S.shape[0], width)
    out[rows.num_routed :].zero_()
    is_begun = [False] * len(spans[0].lengths)
    for term, (kind, own) in enumerate(zip(kinds, spans, strict=True)):
        source, table = tensors[2 * term : 2 * term + 2]
        assert source is not None
        runs = rows.runs(own, is_begun)
        if kind in _ADJOINT:
            assert table is not None
            product = Windowed(source, table, out, term == 0) if rows.is_windowed else Exact(source, table, out)
            getattr(product, kind)(runs)
        else:
            _move(rows, runs, source, table, out)
        for run in runs:
            if kind != "expand" and not run.is_added and run.length < width:
                out[run.start : run.start + run.count, run.length :].zero_()
        is_begun = [begun or length > 0 for begun, length in zip(is_begun, own.lengths, strict=True)]
    for expert, start, count in rows.busy:
        if not is_begun[expert]:
            out[start : start + count].zero_()
    return out


def _move(rows: SortedRows, runs: list[Run], source: Tensor, table: Tensor | None, out: Tensor) -> None:
    """`pick` and, with a table, `select`."""
    for run in runs:
        span, stop, step = slice(run.first, run.first + run.length), run.start + run.count, _CACHED // run.length + 1
        for start in range(run.start, stop, step):
            here = slice(start, min(start + step, stop))
            if table is None:
                part = source[:, span].index_select(0, rows.token_S[here])
            else:
                part = source[here].index_select(1, table[span])
            if run.is_added:
                out[here, : run.length] += part
            else:
                out[here, : run.length] = part


def _scattered(rows: SortedRows, spans: Spans, grad_SM: Tensor, source: Tensor, table: Tensor | None) -> Tensor:
    """Gradient of the source of a `pick` or a `select`."""
    grad = torch.zeros_like(source)
    for run in rows.runs(spans):
        here, span = slice(run.start, run.start + run.count), slice(run.first, run.first + run.length)
        part = grad_SM[here, : run.length]
        if table is None:
            grad[:, span].index_add_(0, rows.token_S[here], part)
        else:
            grad[here].index_add_(1, table[span], part)
    return grad


def _table_gradient(
    rows: SortedRows, kind: Kind, spans: Spans, grad_SM: Tensor, source: Tensor, table: Tensor
) -> Tensor:
    """Gradient of the table of a `contract` or an `expand`; several experts may have used one span."""
    grad = torch.zeros_like(table)
    t, y = (grad_SM, source) if kind == "contract" else (source, grad_SM)
    (Windowed if rows.is_windowed else Exact)(t, y, grad).outer(rows.runs(spans))
    return grad
