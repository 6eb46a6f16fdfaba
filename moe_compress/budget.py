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


def hull(item: Item) -> tuple[int, float, float]:
    """Last rank on the convex hull before the whole matrix.

    Returns:
        (r, parameters from r to dense, error removed by that step).
    """
    step = item.num_rows + item.num_columns
    energy = item.energy.astype(np.float64)
    left = np.concatenate([[energy.sum()], energy.sum() - energy.cumsum()]).clip(min=0)
    ranks = np.arange(len(energy))
    to_dense = item.dense_parameters - ranks * step
    usable = to_dense > step
    # From rank r the next direction is taken as long as it removes more a parameter than going dense at once.
    worth = usable & (energy / step >= left[:-1] / np.where(usable, to_dense, 1))
    stop = int(np.argmin(worth)) if not worth.all() else len(energy)
    return stop, float(item.dense_parameters - stop * step), float(left[stop])


def allocate(items: list[Item], budget: int) -> list[int]:
    """Ranks (DENSE for the whole matrix) that leave the least error within `budget` parameters.

    The order of equal segments is that of the items: the same items give the same ranks.

    Args:
        items: matrices with energies in one unit.
        budget: parameters to spend on all of them.

    Returns:
        One rank an item.
    """
    gains: list[NDArray[np.float64]] = []
    costs: list[NDArray[np.int64]] = []
    owners: list[NDArray[np.int64]] = []
    steps: list[NDArray[np.int64]] = []
    for index, item in enumerate(items):
        stop, dense_cost, dense_gain = hull(item)
        width = item.num_rows + item.num_columns
        gains += [item.energy[:stop].astype(np.float64) / width, np.array([dense_gain / dense_cost])]
        costs += [np.full(stop, width), np.array([dense_cost], dtype=np.int64)]
        owners.append(np.full(stop + 1, index))
        steps.append(np.arange(stop + 1))
    gain, cost = np.concatenate(gains), np.concatenate(costs).astype(np.int64)
    owner, step = np.concatenate(owners), np.concatenate(steps)
    # Along one item gains never rise, so a stable sort keeps its segments in order.
    order = np.lexsort((step, owner, -_monotone(gain, owner)))
    whole = int(np.searchsorted(cost[order].cumsum(), budget, side="right"))
    taken = np.zeros(len(cost), dtype=bool)
    taken[order[:whole]] = True
    budget -= int(cost[order[:whole]].sum())
    cheapest = int(cost.min(initial=budget + 1))
    closed: set[int] = set()
    for position in order[whole:]:  # what is left over buys the best segments that still fit
        if budget < cheapest:
            break
        index = int(owner[position])
        if index in closed:
            continue
        if cost[position] > budget:
            closed.add(index)  # later segments of this item build on this one
            continue
        budget -= int(cost[position])
        taken[position] = True
    counts = np.bincount(owner[taken], minlength=len(items))
    segments = np.bincount(owner, minlength=len(items))
    return [DENSE if n == full else int(n) for n, full in zip(counts, segments, strict=True)]


def _monotone(gain: NDArray[np.float64], owner: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rounding must not let a later segment of an item overtake an earlier one."""
    out = gain.copy()
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(out)], strict=True):
        np.minimum.accumulate(out[start:stop], out=out[start:stop])
    return out


def uniform_rank(num_rows: int, num_columns: int, num_experts: int, ratio: float, has_base: bool) -> int:
    """The one rank that removes `ratio` of a projection's parameters, its base paid for; may be negative."""
    kept = (1 - ratio) * num_experts * num_rows * num_columns
    kept -= num_rows * num_columns if has_base else 0
    return int(np.floor(kept / (num_experts * (num_rows + num_columns)) + 1e-9))
