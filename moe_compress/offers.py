"""Chooses among several ways to spend a budget on a part of the model, for all parts at once.

An offer is a set of items (budget.py) with what has to be paid before any of them, such as shared bases. At a price mu
a parameter the best offer of a part is the one whose error + mu * parameters is least, its items bought as far as they
gain more than the price; the price is raised until all parts together fit the budget. This is the Lagrangian of the
choice: exact where the budget falls on a corner of the convex hull over all parts, and off by less than one part's
offer elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .budget import Item, allocate, error, segments

_ROUNDS = 60
"""Halvings of the interval of prices, on a logarithmic scale: to the last bit."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to represent a part of the model.

    Attributes:
        items: its matrices.
        fixed: parameters to be paid whatever the items get.
    """

    items: list[Item]
    fixed: int


class _Curve:
    """Error and parameters of an offer as functions of the price."""

    def __init__(self, offer: Offer) -> None:
        gains, costs = zip(*map(segments, offer.items), strict=True)
        gain, cost = np.concatenate(gains), np.concatenate(costs)
        order = np.argsort(-gain, kind="stable")
        self.gain = gain[order]
        self.parameters = np.append(0, cost[order].cumsum()) + offer.fixed
        whole = sum(error(item, 0) for item in offer.items)
        self.error = whole - np.append(0.0, (gain * cost)[order].cumsum())

    def at(self, price: float) -> tuple[float, int]:
        """(error + price * parameters, parameters)."""
        bought = int(np.searchsorted(-self.gain, -price, side="right"))
        return float(self.error[bought] + price * self.parameters[bought]), int(self.parameters[bought])


def choose(parts: Sequence[Sequence[Offer]], budget: int) -> list[int]:
    """The offer of each part that leaves the least error in all within `budget` parameters.

    Args:
        parts: the offers of each part; the first of a part is what it gets where nothing is to be gained.
        budget: parameters for all parts together.

    Returns:
        The index of one offer a part. Never leaves more error than the first of each part would.
    """
    first = [0] * len(parts)
    if all(len(offers) == 1 for offers in parts):
        return first
    curves = [[_Curve(offer) for offer in offers] for offers in parts]

    def at(price: float) -> tuple[list[int], int]:
        chosen, total = [], 0
        for part in curves:
            values = [curve.at(price) for curve in part]
            best = min(range(len(part)), key=lambda i: values[i][0])
            chosen.append(best)
            total += values[best][1]
        return chosen, total

    prices = np.concatenate([curve.gain[curve.gain > 0] for part in curves for curve in part])
    low, high = np.log(prices.min()) - 1 if len(prices) else 0.0, np.log(prices.max()) + 40 if len(prices) else 0.0
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if at(float(np.exp(middle)))[1] <= budget:
            high = middle
        else:
            low = middle
    return min(first, at(float(np.exp(high)))[0], key=lambda chosen: _error(parts, chosen, budget))


def _error(parts: Sequence[Sequence[Offer]], chosen: list[int], budget: int) -> float:
    """What is left out when the budget is spent on these offers."""
    offers = [part[index] for part, index in zip(parts, chosen, strict=True)]
    items = [item for offer in offers for item in offer.items]
    left = budget - sum(offer.fixed for offer in offers)
    if left < 0:
        return math.inf
    return sum(error(item, rank) for item, rank in zip(items, allocate(items, left), strict=True))
