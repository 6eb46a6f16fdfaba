"""The ways in which rows go from tokens to factorised experts and back, and the one place that chooses among them.

    loop      rows sorted by expert, one product an expert (products.py). One host synchronisation, no copies.
    every     the same, but each expert takes every token, and a token the outputs that it wants: nothing depends on
              the routing, so there is no synchronisation. For few tokens that want most experts anyway.
    grouped   rows sorted by expert, torch's grouped products over experts of about equal rank, whose factors are
              stacked for the call. One host synchronisation, few launches: for many experts on a GPU.
    gathered  a row a routed pair, with the factors that it needs gathered. No sort, no synchronisation, static shapes:
              for decoding on a GPU, CUDA graphs and torch.compile.

Shapes: T tokens, K choices of each, P = T K routed pairs, E experts, S rows; see products.py for terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from .grouped import Mix, Spread, is_tiled
from .products import SortedRows, Term, looped_product
from .slots import Spans
from .tiles import FEW_ROWS, Run, span_window, surplus

RouteName = Literal["loop", "every", "grouped", "gathered"]

_STATIC_TOKENS = 64
"""Up to here a call that must not depend on the routing reads weights rather than computes."""

_PART_ROWS = 256
"""Rows of a part of a large batch: enough for products near their peak, few enough for the cache."""

_LOOPED_EXPERTS = 16
"""Up to here an expert has so many rows in a large batch that one launch a product is no loss on a GPU."""

_GATHERED_BYTES = 2**25
"""Up to here a GPU copies the factors of all routed pairs in less time than a host synchronisation takes."""


def choose(index_TK: Tensor, num_experts: int, bytes_a_pair: float) -> RouteName:
    """The fastest route that may be taken.

    Args:
        index_TK: expert ids.
        num_experts: E.
        bytes_a_pair: what one routed pair reads of the weights.
    """
    (num_tokens, top_k), is_cuda = index_TK.shape, index_TK.device.type == "cuda"
    num_pairs = num_tokens * top_k
    if is_static(index_TK.device) and num_tokens <= _STATIC_TOKENS:
        return "gathered" if num_pairs <= num_experts else "every"
    if is_cuda and num_pairs * bytes_a_pair <= _GATHERED_BYTES:
        return "gathered"
    return "grouped" if is_cuda and num_experts > _LOOPED_EXPERTS else "loop"


def is_static(device: torch.device) -> bool:
    """Whether what is done now is recorded to be done again, so that it may not wait for a result."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers on a device; kept, because a stream that is being recorded takes nothing from the host."""
    return torch.tensor(values, device=device) if torch.compiler.is_compiling() else _kept(values, device)


@lru_cache(maxsize=2**14)
def _kept(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def make_route(name: RouteName, index_TK: Tensor, order: Sequence[int], hidden_TD: Tensor) -> Route:
    """Lays out the rows.

    Args:
        name: which route.
        index_TK: expert ids.
        order: the experts in the order that sorted rows are to have.
        hidden_TD: what will go that way.
    """
    if name == "gathered":
        return Gathered(index_TK)
    if name == "every":
        return every_token(index_TK, len(order), is_tiled(hidden_TD) and not torch.compiler.is_compiling())
    if name == "grouped":
        return Grouped(*_sorted(index_TK, order, False))
    return Looped(*_sorted(index_TK, order, is_tiled(hidden_TD)))


class Route(ABC):
    """Rows between tokens and experts; the products of its subclasses.

    Attributes:
        index_TK: expert ids.
        token_S: token of each row.
        row_TK: the row of each routed pair.
        top_k: K.
    """

    def __init__(self, index_TK: Tensor, token_S: Tensor, row_TK: Tensor) -> None:
        self.index_TK, self.token_S, self.row_TK = index_TK, token_S, row_TK
        self.top_k = index_TK.shape[1]

    def spread(self, hidden_TD: Tensor) -> Tensor:
        """(S, D) the hidden state of each row's token."""
        return hidden_TD.index_select(0, self.token_S)

    def parts(self) -> Iterator[Route]:
        """Routes that take the rows in turn; all at once where that is not slower."""
        yield self

    def among(self, out_SX: Tensor) -> Tensor:
        """This part's rows of the whole route's."""
        return out_SX

    def mix(self, out_SD: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, D) sum over a token's rows by their weights."""
        chosen_TKD = out_SD.index_select(0, self.row_TK.flatten()).unflatten(0, self.row_TK.shape)
        return (chosen_TKD * weights_TK[:, :, None]).sum(1).to(out_SD.dtype)

    def expert_of_rows(self) -> Tensor:
        """(S,) expert of each row; anything where no pair is routed to it."""
        ids_S = torch.zeros_like(self.token_S)
        return ids_S.index_put((self.row_TK.flatten(),), self.index_TK.flatten())

    def width(self, spans: Spans) -> int:
        """Columns to give a product over `spans` that is expanded afterwards."""
        return spans.width

    def is_once(self, spans: Spans, num_rows: int) -> bool:
        """Whether to multiply every token with all `num_rows` of a table at once rather than rows with their spans."""
        return num_rows * len(spans.lengths) <= self.top_k * sum(spans.lengths)

    @abstractmethod
    def product(self, terms: Sequence[Term], width: int, out: Tensor | None = None) -> Tensor:
        """(S, width) the sum of `terms`, of which there is at least one; in `out`, if that is given and can be."""


class TermByTerm(Route):
    """A route whose product makes each term anew and adds it."""

    def product(self, terms: Sequence[Term], width: int, out: Tensor | None = None) -> Tensor:
        total = self._term(terms[0], width)
        for term in terms[1:]:
            total = total + self._term(term, width)
        return total

    @abstractmethod
    def _term(self, term: Term, width: int) -> Tensor:
        """(S, width) one term."""


def _sorted(index_TK: Tensor, order: Sequence[int], is_windowed: bool) -> tuple[Tensor, SortedRows, Tensor, Tensor]:
    """Rows of routed pairs alone, sorted by expert: the synchronisation is here."""
    (num_tokens, top_k), device = index_TK.shape, index_TK.device
    num_experts = len(order)
    place_E = constant(tuple(order), device).argsort()
    place_P, pair_P = torch.sort(place_E[index_TK.reshape(-1)], stable=True)
    ends = torch.searchsorted(place_P, torch.arange(num_experts, device=device), right=True).tolist()
    counts = [stop - start for start, stop in pairwise([0, *ends])]
    row_P = torch.empty_like(pair_P).index_put_((pair_P,), torch.arange(len(pair_P), device=device))
    token_S = F.pad(pair_P // top_k, (0, surplus(len(pair_P)) if is_windowed else 0))
    return index_TK, SortedRows(order, counts, token_S, is_windowed), row_P.view(num_tokens, top_k), pair_P


def every_token(index_TK: Tensor, num_experts: int, is_windowed: bool) -> Looped:
    """Rows of every token for every expert."""
    num_tokens = len(index_TK)
    token_T = torch.arange(num_tokens, device=index_TK.device)
    token_S = F.pad(token_T.repeat(num_experts), (0, surplus(num_tokens * num_experts) if is_windowed else 0))
    rows = SortedRows(range(num_experts), [num_tokens] * num_experts, token_S, is_windowed)
    return Looped(index_TK, rows, index_TK * num_tokens + token_T[:, None], None)


class Looped(Route):
    """`loop` and `every`."""

    def __init__(self, index_TK: Tensor, rows: SortedRows, row_TK: Tensor, pair_P: Tensor | None) -> None:
        super().__init__(index_TK, rows.token_S, row_TK)
        self.rows, self.pair_P = rows, pair_P

    def _has_own_rows(self) -> bool:
        """Whether every pair has a row of its own, so that rows move by gathering alone, forward and backward."""
        return self.pair_P is not None and self.index_TK.device.type == "cpu"

    def spread(self, hidden_TD: Tensor) -> Tensor:
        if not self._has_own_rows():
            return super().spread(hidden_TD)
        spread: Tensor = Spread.apply(hidden_TD, self.token_S, self.row_TK)
        return spread

    def parts(self) -> Iterator[Route]:
        """On a CPU some experts at a time, so that all between spreading and mixing stays in the cache."""
        if not self._has_own_rows() or torch.is_grad_enabled() or self.rows.num_routed < 2 * _PART_ROWS:
            yield self
            return
        start = first = 0
        for last, stop in enumerate(accumulate(self.rows.counts), 1):
            if stop - start >= _PART_ROWS or stop == self.rows.num_routed > start:
                yield Part(self, slice(first, last), slice(start, stop))
                start, first = stop, last

    def mix(self, out_SD: Tensor, weights_TK: Tensor) -> Tensor:
        if not self._has_own_rows():
            return super().mix(out_SD, weights_TK)
        if not torch.is_grad_enabled() and weights_TK.dtype == out_SD.dtype:
            return F.embedding_bag(self.row_TK, out_SD, mode="sum", per_sample_weights=weights_TK)  # fp32 inside
        mixed: Tensor = Mix.apply(out_SD, weights_TK, self.token_S, self.row_TK)
        return mixed

    def is_once(self, spans: Spans, num_rows: int) -> bool:
        """Few tokens: by how much is read, where one large product reads twice as fast as many small ones."""
        if not self.rows.is_windowed or len(self.index_TK) > FEW_ROWS:
            return super().is_once(spans, num_rows)
        used = sum(spans.lengths[e] for e, _, _ in self.rows.busy)
        return num_rows <= 2 * used

    def width(self, spans: Spans) -> int:
        """A whole window, so that none need be padded."""
        return span_window(spans.width) if self.rows.is_windowed else spans.width

    def product(self, terms: Sequence[Term], width: int, out: Tensor | None = None) -> Tensor:
        return looped_product(self.rows, terms, width, out)


class Part(Looped):
    """Some experts' rows of a sorted `loop`, without gradients; the mixing is the whole's."""

    def __init__(self, whole: Looped, experts: slice, rows: slice) -> None:
        counts, order, is_windowed = whole.rows.counts[experts], whole.rows.order[experts], whole.rows.is_windowed
        reach = rows.stop + (surplus(rows.stop - rows.start) if is_windowed else 0)
        self.place = slice(rows.start, reach)
        part = SortedRows(order, counts, whole.token_S[self.place], is_windowed)
        super().__init__(whole.index_TK, part, whole.row_TK, whole.pair_P[rows] if whole.pair_P is not None else None)

    def spread(self, hidden_TD: Tensor) -> Tensor:
        return hidden_TD.index_select(0, self.token_S)

    def among(self, out_SX: Tensor) -> Tensor:
        return out_SX[self.place]

    def expert_of_rows(self) -> Tensor:
        assert self.pair_P is not None
        return F.pad(self.index_TK.flatten()[self.pair_P], (0, len(self.token_S) - len(self.pair_P)))


class Grouped(TermByTerm, Looped):
    """`grouped`."""

    def width(self, spans: Spans) -> int:
        return _bucket(spans.width)

    def _term(self, term: Term, width: int) -> Tensor:
        runs = self.rows.runs(term.spans)
        parts: dict[int, Tensor] = {}
        if term.kind in ("contract", "expand"):
            buckets: dict[int, list[Run]] = defaultdict(list)
            for run in runs:
                buckets[_bucket(run.length)].append(run)
            for length, bucket in buckets.items():
                parts |= _bucket_product(term, bucket, length)
        for run in runs if not parts else []:
            here, span = slice(run.start, run.start + run.count), slice(run.first, run.first + run.length)
            if term.table is None:
                parts[run.start] = term.source[:, span].index_select(0, self.token_S[here])
            else:
                parts[run.start] = term.source[here].index_select(1, term.table[span])
        whole, at = [], 0
        for start, part in sorted(parts.items()):
            if start > at:
                whole.append(part.new_zeros(start - at, width))
            whole.append(F.pad(part, (0, width - part.shape[1])))
            at = start + len(part)
        whole.append(term.source.new_zeros(len(self.token_S) - at, width))
        return torch.cat(whole)


def _bucket(length: int) -> int:
    """A quarter too many at most, and a multiple of 16: what grouped products want of strides."""
    step = max(16, 1 << length.bit_length() >> 3)
    return -(-length // step) * step


def _bucket_product(term: Term, runs: list[Run], length: int) -> dict[int, Tensor]:
    """The rows of some runs by their start, as a grouped product of spans filled up to `length` with zeros."""
    source, table = term.source, term.table
    assert table is not None
    firsts = [run.first for run in runs]
    if firsts == [firsts[0] + i * length for i in range(len(runs))] and all(run.length == length for run in runs):
        stack_GLX = table[firsts[0] : firsts[0] + len(runs) * length].unflatten(0, (len(runs), length))
    else:
        spans = torch.tensor([(run.first, run.length) for run in runs], device=table.device)
        index_GL, is_beyond_GL = _places(spans[:, 0], spans[:, 1], length)
        stack_GLX = table[index_GL].masked_fill(is_beyond_GL[:, :, None], 0)
    rows = torch.cat([source[run.start : run.start + run.count] for run in runs])
    if term.kind == "expand":
        rows = F.pad(rows, (0, max(0, length - rows.shape[1])))[:, :length]
    counts = [run.count for run in runs]
    ends_G = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=table.device)
    is_expanded = term.kind == "expand"
    if table.shape[1] * table.element_size() % 16:  # a stride that grouped products refuse
        weight = stack_GLX if is_expanded else stack_GLX.mT
        out = torch.ops.transformers.grouped_mm_fallback(rows, weight, offs=ends_G)
    else:
        out = _grouped_linear(rows, stack_GLX, ends_G, is_transposed=is_expanded)
    return dict(zip((run.start for run in runs), out.split(counts), strict=True))


class Gathered(TermByTerm):
    """`gathered`."""

    def __init__(self, index_TK: Tensor) -> None:
        num_tokens, top_k = index_TK.shape
        row_TK = torch.arange(num_tokens * top_k, device=index_TK.device).view(num_tokens, top_k)
        super().__init__(index_TK, row_TK.flatten() // top_k, row_TK)

    def mix(self, out_SD: Tensor, weights_TK: Tensor) -> Tensor:
        return (out_SD.unflatten(0, self.row_TK.shape) * weights_TK[:, :, None]).sum(1).to(out_SD.dtype)

    def expert_of_rows(self) -> Tensor:
        return self.index_TK.flatten()

    def _term(self, term: Term, width: int) -> Tensor:
        source, table = term.source, term.table
        ids_P, device = self.index_TK.flatten(), self.index_TK.device
        first_P, length_P = constant(term.spans.starts, device)[ids_P], constant(term.spans.lengths, device)[ids_P]
        index_PW, is_beyond_PW = _places(first_P, length_P, term.spans.width)
        if term.kind == "expand":
            assert table is not None
            return torch.bmm(source[:, None, : term.spans.width], table[index_PW])[:, 0]
        if table is None:
            found_PW = source[self.token_S].gather(1, index_PW)
        elif term.kind == "select":
            found_PW = source.gather(1, table[index_PW].long())
        else:
            found_PW = torch.bmm(table[index_PW], source[:, :, None])[:, :, 0]
        return F.pad(found_PW.masked_fill(is_beyond_PW, 0), (0, width - term.spans.width))


def _places(first_G: Tensor, length_G: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(G, width) where the numbers of some spans lie, 0 beyond their end; (G, width) whether it is beyond."""
    step_W = torch.arange(width, device=first_G.device)
    is_beyond_GW = step_W >= length_G[:, None]
    return (first_G[:, None] + step_W).masked_fill(is_beyond_GW, 0), is_beyond_GW
