"""Choosing among several ways to spend on a part of the model."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.budget import Item, allocate, error
from moe_compress.offers import Offer, choose


def random_offer(generator: np.random.Generator, fixed: int) -> Offer:
    items = []
    for _ in range(int(generator.integers(1, 4))):
        rows, columns = (int(n) for n in generator.integers(2, 9, 2))
        energy = np.sort(generator.exponential(size=min(rows, columns)) ** 3)[::-1]
        items.append(Item(rows, columns, energy))
    return Offer(items, fixed)


def left_out(parts: list[list[Offer]], chosen: tuple[int, ...] | list[int], budget: int) -> float:
    offers = [part[index] for part, index in zip(parts, chosen, strict=True)]
    budget -= sum(offer.fixed for offer in offers)
    items = [item for offer in offers for item in offer.items]
    if budget < 0:
        return float("inf")
    return sum(error(item, rank) for item, rank in zip(items, allocate(items, budget), strict=True))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0.05, 1))
def test_never_worse_than_the_first_and_near_the_best(seed: int, num_parts: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    parts = [
        [random_offer(generator, 0), random_offer(generator, int(generator.integers(0, 30)))] for _ in range(num_parts)
    ]
    total = sum(item.dense_parameters for part in parts for item in part[0].items)
    budget = int(share * total)
    chosen = choose(parts, budget)
    found = left_out(parts, chosen, budget)
    assert found <= left_out(parts, [0] * num_parts, budget)
    best = min(left_out(parts, each, budget) for each in product(range(2), repeat=num_parts))
    everything = left_out(parts, [0] * num_parts, 0)
    assert found <= best + 0.5 * everything


def test_a_base_that_explains_everything_is_bought() -> None:
    energy = np.linspace(2.0, 1.0, 8)
    alone = Offer([Item(8, 8, energy)] * 4, 0)
    based = Offer([Item(8, 8, energy * 1e-3)] * 4, 64)
    assert choose([[alone, based]], 128) == [1]
    assert choose([[alone, based], [alone, alone]], 200) == [1, 0]
    assert choose([[alone, based]], 63) == [0]  # it could not be paid


def test_of_equal_offers_the_first_is_taken() -> None:
    offer = Offer([Item(4, 4, np.ones(4))], 0)
    assert choose([[offer, offer], [offer, offer]], 16) == [0, 0]
