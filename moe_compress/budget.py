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

Steps = tuple[NDArray[np.float64], NDArray[np.int64]]
"""What can be bought of a matrix, one after the other: (S,) error removed a parameter, never rising, and (S,)
parameters."""


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


def segments(item: Item) -> Steps:
    """The steps along the convex hull: single directions while they pay, then the rest of the whole matrix at once."""
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


def directions(item: Item) -> Steps:
    """Single directions and never the whole matrix: any number of them is a prefix of any larger number.

    The last direction is left out: factors of full rank are the matrix itself, whose prefixes are no lower ranks.
    """
    width = item.num_rows + item.num_columns
    energy = item.energy[:-1].astype(np.float64)
    return energy / width, np.full(len(energy), width)


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
    hulls = list(map(segments, items))
    owner, step, cost = _queue(hulls)
    num_first = _reach(cost, budget)
    bought = np.bincount(owner[:num_first], minlength=len(items))
    budget -= int(cost[:num_first].sum())
    for position in num_first + np.flatnonzero(cost[num_first:] <= budget):
        index = owner[position]
        if cost[position] <= budget and step[position] == bought[index]:  # a segment builds on those before it
            budget -= int(cost[position])
            bought[index] += 1
    return [DENSE if n == len(cost) else int(n) for n, (_, cost) in zip(bought, hulls, strict=True)]


def allocate_levels(items: list[Item], budgets: list[int]) -> list[list[int]]:
    """Ranks for several budgets, where those of a smaller one are prefixes of those of a larger one.

    A whole matrix has no prefix. So matrices that the smallest budget keeps whole are whole in all, which costs the
    others nothing that it could have bought, and the rest has directions only. All budgets go through one queue, each
    as far as it reaches: what is left over, less than one segment, buys nothing.

    Args:
        items: matrices with energies in one unit.
        budgets: parameters to spend on all of them, the largest first.

    Returns:
        One rank an item, for each budget.
    """
    hulls = list(map(segments, items))
    owner, _, cost = _queue(hulls)
    bought = np.bincount(owner[: _reach(cost, budgets[-1])], minlength=len(items))
    is_whole = [n == len(cost) for n, (_, cost) in zip(bought, hulls, strict=True)]
    steps = [hull if whole else directions(item) for item, hull, whole in zip(items, hulls, is_whole, strict=True)]
    owner, _, cost = _queue(steps)
    levels = (np.bincount(owner[: _reach(cost, budget)], minlength=len(items)) for budget in budgets)
    return [[DENSE if whole else int(n) for n, whole in zip(ranks, is_whole, strict=True)] for ranks in levels]


def _queue(steps: list[Steps]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The steps of all items by falling gain: (S,) whose each is, the how manieth of that item, and its parameters."""
    gains, costs = zip(*steps, strict=True)
    num_steps = np.array([len(cost) for cost in costs])
    gain, cost = np.concatenate(gains), np.concatenate(costs)
    owner = np.repeat(np.arange(len(steps)), num_steps)
    step = np.arange(len(cost)) - np.repeat(num_steps.cumsum() - num_steps, num_steps)
    order = np.argsort(-gain, kind="stable")
    return owner[order], step[order], cost[order]


def _reach(cost: NDArray[np.int64], budget: int) -> int:
    """How many of the first steps a budget pays for."""
    return int(np.searchsorted(cost.cumsum(), budget, side="right"))


def uniform_rank(
    num_rows: int, num_columns: int, num_experts: int, ratio: float, num_bases: float = 0, num_shared: int | None = None
) -> int:
    """The one rank that removes `ratio` of a projection's parameters, its bases paid for; may be negative.

    Args:
        num_rows, num_columns: M and N.
        num_experts: E left factors.
        ratio: fraction of E M N to remove.
        num_bases: whole matrices that are stored besides, or as much as fractions of such.
        num_shared: right factors, if not one an expert.
    """
    kept = ((1 - ratio) * num_experts - num_bases) * num_rows * num_columns
    width = num_experts * num_rows + (num_experts if num_shared is None else num_shared) * num_columns
    return int(np.floor(kept / width + 1e-9))
