"""Names and shapes of the tensors of factorised experts, and which part of them is whose.

E stored experts, M and N rows and columns of a projection, R the sum of the ranks of all experts, R' of those that have
a right factor of their own, B bases. A *slot* is one factorised projection:

    W_e = base_b(e) + U_e V_e + S_e    rank_e >= 0: U_e = u[rows].T of the packed `u` (R, M), V_e rows of `v` (R', N)
    W_e = dense[k]                     rank_e = DENSE: cheaper than factors beyond the break-even rank M N / (M + N)

`base` (B, M, C) holds C of each base's N columns, the others are zero: `base_columns` (C,) says which, where C < N.
S_e is zero but for some columns: those lie packed in `s` (number of them, M), their numbers in `columns`.

Slots are `gate_up` (rows [gate; up], one factorisation), or `gate` and `up` apart, or `up` where there is no gate,
and `down`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from math import floor
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import CheckpointError

DENSE: Final = -1
"""In a list of ranks: this expert keeps its whole matrix."""

INDEX_SUFFIX: Final = "_columns"
"""Ends the name of a slot's tensor of column numbers, int32; all other tensors are parameters."""


@dataclass(frozen=True)
class Spans:
    """Which rows (or columns) of a packed table belong to each expert.

    Attributes:
        starts: the first one.
        lengths: how many; 0 for none.
        width: the most that any expert has.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", max(self.lengths, default=0))

    @classmethod
    def packed(cls, lengths: list[int]) -> Spans:
        """One behind the other."""
        return cls(tuple(accumulate(lengths[:-1], initial=0)), tuple(lengths))

    def of(self, expert: int) -> slice:
        """Those of one expert."""
        return slice(self.starts[expert], self.starts[expert] + self.lengths[expert])


class FactorisedSlot:
    """One slot; the tensors themselves are parameters of the experts module.

    Args:
        name: slot name.
        num_rows: M, output features.
        num_columns: N, input features.
        ranks: one an expert, DENSE for a whole matrix.
        bases: which base each expert builds on, -1 for none; a whole matrix builds on none. None: no bases.
        share: the expert whose right factor each uses; one that follows uses as many of its first rows as it has
            rank. None: each its own.
        num_sparse: sparse columns of each expert; None for none.
        base_columns: C, columns stored of each base; None for all N.
        skip: share of them left out of every call, those that matter least for its inputs (see base.py).

    Attributes:
        left, right, dense, sparse: rows of `u`, `v`, `dense` (its first two dimensions taken as one) and `s`.
        based: rows of `base`, its first two dimensions taken as one.
        dense_index: expert -> place in `dense`.

    Raises:
        CheckpointError: the lists do not fit each other.
    """

    def __init__(
        self,
        name: str,
        num_rows: int,
        num_columns: int,
        ranks: list[int],
        bases: list[int] | None = None,
        share: list[int] | None = None,
        num_sparse: list[int] | None = None,
        base_columns: int | None = None,
        skip: float = 0.0,
    ) -> None:
        self.name, self.num_rows, self.num_columns, self.ranks = name, num_rows, num_columns, list(ranks)
        experts = range(len(ranks))
        widths = [max(rank, 0) for rank in ranks]
        self._check("bases", bases, lambda e, b: b >= -1, "-1 or the number of a base")
        most = [0 if rank == DENSE else num_columns for rank in ranks]
        self._check(
            "num_sparse", num_sparse, lambda e, n: 0 <= n <= most[e], "within the columns, or 0 of a whole matrix"
        )
        leads = share or list(experts)
        is_leader = f"an expert that leads itself, of rank {DENSE} or at least the follower's"
        self._check("share", share, lambda e, s: s in experts and leads[s] == s and widths[s] >= widths[e], is_leader)
        if not 0 <= skip < 1:
            raise CheckpointError(f"{name}.skip: {skip} is not in [0, 1); mend config.json")
        if base_columns is not None and not 0 <= base_columns <= num_columns:
            raise CheckpointError(f"{name}.base_columns: {base_columns} of {num_columns} columns; mend config.json")
        self.skip, self.leads = skip, leads
        self.left = Spans.packed(widths)
        own = Spans.packed([width * (leads[e] == e) for e, width in enumerate(widths)])
        self.right = Spans(tuple(own.starts[leader] for leader in leads), tuple(widths))
        self.num_right = sum(own.lengths)
        dense = [e for e in experts if ranks[e] == DENSE]
        self.dense_index = {e: k for k, e in enumerate(dense)}
        self.dense = Spans.packed([num_rows * (rank == DENSE) for rank in ranks])
        self.sparse = Spans.packed(num_sparse or [0] * len(ranks))
        self.bases = [-1 if ranks[e] == DENSE else base for e, base in enumerate(bases or [-1] * len(ranks))]
        self.num_bases = max(bases or [-1], default=-1) + 1
        starts = tuple(max(base, 0) * num_rows for base in self.bases)
        self.based = Spans(starts, tuple(num_rows * (base >= 0) for base in self.bases))
        self.num_base_columns = num_columns if base_columns is None else base_columns
        self.has_base_columns = self.num_bases > 0 and base_columns is not None
        self.num_kept_columns = self.num_base_columns - floor(skip * self.num_base_columns + 1e-9)

    def _check(self, field: str, given: list[int] | None, is_valid: Any, rule: str) -> None:
        if given is None:
            return
        if len(given) != len(self.ranks):
            raise CheckpointError(
                f"{self.name}.{field}: {len(given)} entries for {len(self.ranks)} experts; mend config.json"
            )
        wrong = next((e for e, value in enumerate(given) if not is_valid(e, value)), None)
        if wrong is not None:
            raise CheckpointError(
                f"{self.name}.{field}: {given[wrong]} of expert {wrong} is not {rule}; mend config.json"
            )

    def factor_rows(self, expert: int) -> slice:
        """Where an expert's left factor lies in the packed `u`."""
        return self.left.of(expert)

    def right_rows(self, expert: int) -> slice:
        """Where the right factor that an expert uses lies in the packed `v`."""
        return self.right.of(expert)

    def sparse_rows(self, expert: int) -> slice:
        """Where an expert's sparse columns lie in the packed `s` and `columns`."""
        return self.sparse.of(expert)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the slot, by its parameter name."""
        name, rows, columns = self.name, self.num_rows, self.num_columns
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}_u": (sum(self.left.lengths), rows),
            f"{name}_v": (self.num_right, columns),
        }
        if self.dense_index:
            shapes[f"{name}_dense"] = (len(self.dense_index), rows, columns)
        if self.num_bases:
            shapes[f"{name}_base"] = (self.num_bases, rows, self.num_base_columns)
        if self.has_base_columns:
            shapes[f"{name}_base{INDEX_SUFFIX}"] = (self.num_base_columns,)
        if num_sparse := sum(self.sparse.lengths):
            shapes[f"{name}_s"] = (num_sparse, rows)
            shapes[f"{name}{INDEX_SUFFIX}"] = (num_sparse,)
        return shapes

    def dense_weights(self, tensors: Any) -> Tensor:
        """(E, M, N) every expert as a whole matrix; nothing is skipped.

        Args:
            tensors: parameter name -> tensor.
        """
        u, v = tensors[f"{self.name}_u"], tensors[f"{self.name}_v"]
        weights = []
        for expert in range(len(self.ranks)):
            if expert in self.dense_index:
                weights.append(tensors[f"{self.name}_dense"][self.dense_index[expert]])
                continue
            weight = u[self.factor_rows(expert)].T @ v[self.right_rows(expert)]
            if self.bases[expert] >= 0:
                base = tensors[f"{self.name}_base"][self.bases[expert]]
                where = tensors[f"{self.name}_base{INDEX_SUFFIX}"] if self.has_base_columns else None
                weight = weight + base if where is None else weight.index_add(1, where, base)
            if self.sparse.lengths[expert]:
                columns = tensors[f"{self.name}{INDEX_SUFFIX}"][self.sparse_rows(expert)]
                weight = weight.index_add(1, columns, tensors[f"{self.name}_s"][self.sparse_rows(expert)].T)
            weights.append(weight)
        return torch.stack(weights)


def slots_of(spec: dict[str, Any], num_rows_up: int, hidden_size: int, inner: int) -> list[FactorisedSlot]:
    """The slots of a layer's specification `{slot: {"ranks": [...], ...}}`, fields as of `FactorisedSlot`.

    First projections come first; keys of the specification that name no slot are others' business.
    """
    shapes = {
        "gate_up": (num_rows_up, hidden_size),
        "gate": (inner, hidden_size),
        "up": (inner, hidden_size),
        "down": (hidden_size, inner),
    }
    return [FactorisedSlot(name, *shapes[name], **spec[name]) for name in shapes if name in spec]
