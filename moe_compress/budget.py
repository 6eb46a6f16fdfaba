"""Spends one parameter budget over the layers, experts and projections of a model.

Every item is one expert's matrix (M, N) with the energies lambda_1 >= lambda_2 >= ... of its weighted factorisation
(squared singular values, in loss units, comparable over the whole model). Keeping r directions costs r (M + N)
parameters and leaves the error sum_{i > r} lambda_i; keeping the whole matrix costs M N and leaves none. The cheapest
sets of choices are those of the Lagrangian: minimise error + mu * parameters. For one item its solutions, as mu falls,
are the corners of the lower convex hull of (parameters, error); over all items they are had by taking hull segments
in the order of error removed a parameter, until the budget is spent.

Source: METHODS step 3 (allocated ranks). Differs from `k_e ~ freq^alpha sensitivity^beta`: nothing to tune. Costs one
sort of all segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DENSE = -1


@dataclass(frozen=True, slots=True)
class Item:
    """One matrix to spend on.

    Attributes:
        num_rows, num_columns: M and N.
        energy: (K,) descending energies, float.
    """

    num_rows: int
    num_columns: int
    energy: NDArray[np.floating]

    @property
    def dense_parameters(self) -> int:
        """M N, the cost of the whole matrix."""
        return self.num_rows * self.num_columns


def parameters(item: Item, rank: int) -> int:
    """Parameters of a rank, or of the whole matrix where rank is DENSE."""
    return item.dense_parameters if rank == DENSE else rank * (item.num_rows + item.num_columns)


def error(item: Item, rank: int) -> float:
    """Energy that a rank leaves out."""
    return 0.0 if rank == DENSE else float(item.energy[rank:].sum(dtype=np.float64))


def segments(item: Item) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The steps along the convex hull: single directions while they pay, then the rest of the whole matrix at once.

    Returns:
        (S,) error removed a parameter, never rising, and (S,) parameters.
    """
    width = item.num_rows + item.num_columns
    energy = item.energy.astype(np.float64)
    left = np.append(energy[::-1].cumsum()[::-1], 0.0)
    to_dense = item.dense_parameters - width * np.arange(len(left))
    # From rank r the next direction is taken as long as it removes more a parameter than going dense at once.
    pays = (to_dense[1:] > 0) & (energy / width >= left[:-1] / np.maximum(to_dense[:-1], 1))
    rank = int(np.argmin(np.append(pays, False)))
    gain = np.append(energy[:rank] / width, left[rank] / to_dense[rank])
    cost = np.append(np.full(rank, width), to_dense[rank])
    return np.minimum.accumulate(gain), cost  # rounding must not let the last step overtake those it builds on


def allocate(items: list[Item], budget: int) -> list[int]:
    """Ranks (DENSE for the whole matrix) that leave the least error within `budget` parameters.

    Segments are bought in the order of what they gain a parameter; once one is too dear, those behind it that still
    fit are bought. So what is left over buys no further segment, and a larger budget never leaves more error. Equal
    segments are bought in the order of the items: the same items give the same ranks.

    Args:
        items: matrices with energies in one unit.
        budget: parameters to spend on all of them.

    Returns:
        One rank an item.
    """
    gains, costs = zip(*map(segments, items), strict=True)
    num_segments = np.array([len(cost) for cost in costs])
    gain, cost = np.concatenate(gains), np.concatenate(costs)
    owner = np.repeat(np.arange(len(items)), num_segments)
    step = np.arange(len(cost)) - np.repeat(num_segments.cumsum() - num_segments, num_segments)
    order = np.argsort(-gain, kind="stable")
    spent = cost[order].cumsum()
    num_whole = int(np.searchsorted(spent, budget, side="right"))
    bought = np.bincount(owner[order[:num_whole]], minlength=len(items))
    budget -= int(spent[num_whole - 1]) if num_whole else 0
    rest = order[num_whole:]
    for position in rest[cost[rest] <= budget]:
        index = owner[position]
        if cost[position] <= budget and step[position] == bought[index]:  # a segment builds on those before it
            budget -= int(cost[position])
            bought[index] += 1
    return [DENSE if n == full else int(n) for n, full in zip(bought, num_segments, strict=True)]


def uniform_rank(
    num_rows: int, num_columns: int, num_experts: int, ratio: float, num_bases: int = 0, num_shared: int | None = None
) -> int:
    """The one rank that removes `ratio` of a projection's parameters, its bases paid for; may be negative.

    Args:
        num_rows, num_columns: M and N.
        num_experts: E left factors.
        ratio: fraction of E M N to remove.
        num_bases: whole matrices that are stored besides.
        num_shared: right factors, if not one an expert.
    """
    kept = ((1 - ratio) * num_experts - num_bases) * num_rows * num_columns
    width = num_experts * num_rows + (num_experts if num_shared is None else num_shared) * num_columns
    return int(np.floor(kept / width + 1e-9))
