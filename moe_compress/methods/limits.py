"""What a ratio leaves of the experts: budgets, fixed ranks, and the ratios that cannot be."""

from __future__ import annotations

import math

import numpy as np

from ..budget import uniform_rank
from ..errors import RecipeError
from ..method_options import D2MoE
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS
from .grouping import Floats
from .slots import Slot, slots


def num_bases(layer: MoELayer, slot: Slot, options: D2MoE) -> float:
    """Bases that a projection is sure to get; one that has some of its columns counts for as much."""
    if not options.has_fixed_bases:
        return 0
    share = options.num_base_columns(slot.num_columns) / slot.num_columns
    return min(int(options.num_bases), layer.num_experts) * share


def num_shared(layer: MoELayer, options: D2MoE) -> int:
    """Right factors that the layer's experts have."""
    return layer.num_experts if isinstance(options.share, str) else min(options.share, layer.num_experts)


def highest_ratio(layers: list[MoELayer], options: D2MoE) -> float:
    """The bound that the ratio must stay under (where one rank is given to all: may reach).

    Allocated: 1, less B/E for B bases. Uniform: rank one everywhere, 1 - (E M + C N) / (E M N) for C right factors,
    less B/E.
    """
    bounds = []
    for layer in layers:
        experts = layer.num_experts
        for slot in (slot for group in GROUPS for slot in slots(layer, group, options)):
            base = num_bases(layer, slot, options) / experts
            rank_one = experts * slot.num_rows + num_shared(layer, options) * slot.num_columns
            rank_one_share = rank_one / (experts * slot.num_rows * slot.num_columns)
            bounds.append(1 - base - (0 if options.ranks == "allocated" else rank_one_share))
    return min(bounds)


def check_ratio(layers: list[MoELayer], options: D2MoE) -> None:
    """Refuses a ratio that leaves nothing for deltas.

    Raises:
        RecipeError: names the highest ratio that is possible.
    """
    if options.ratio is None:
        return
    highest = highest_ratio(layers, options)
    if highest <= 0 and options.num_bases != 1:
        raise RecipeError(f"method.num_bases: {options.num_bases} bases are all the experts there are; lower it")
    named = f"{max(math.floor(highest * 10_000), 0) / 10_000:g}"  # rounded up it would be refused itself
    if options.ranks != "allocated":
        if options.ratio > highest + 1e-12:
            raise RecipeError(
                f"method.ratio: {options.ratio} leaves some projection no rank; the highest possible is {named};"
                " lower it or set ranks: allocated"
            )
    elif options.ratio >= highest:
        raise RecipeError(
            f"method.ratio: {options.ratio} is more than the shared bases of the experts leave; the highest possible"
            f" is below {named}; lower it or set base: none"
        )


def mean_rank(layer: MoELayer, slot: Slot, options: D2MoE) -> int:
    """The one rank at which a projection meets the ratio; every direction where nothing is to be removed."""
    if options.ratio is None:
        return min(slot.num_rows, slot.num_columns)
    sizes = slot.num_rows, slot.num_columns, layer.num_experts
    return uniform_rank(*sizes, options.ratio, num_bases(layer, slot, options), num_shared(layer, options))


def fixed_ranks(layer: MoELayer, slot: Slot, options: D2MoE, sensitivity_E: Floats | None = None) -> list[int]:
    """Ranks where nothing is allocated: `uniform`, `frequency` or `full`.

    Args:
        layer, slot: of which projection.
        options: the recipe's method.
        sensitivity_E: what ranks go with, for `frequency`: (f / mean f)^alpha (F / mean F)^beta.
    """
    rank = mean_rank(layer, slot, options)
    if options.ranks != "frequency" or sensitivity_E is None:
        return [rank] * layer.num_experts
    # beyond the break-even rank factors cost more than the matrix, and those of full rank have no prefixes
    most = slot.num_rows * slot.num_columns // (slot.num_rows + slot.num_columns)
    return share_out(rank * layer.num_experts, sensitivity_E, most)


def share_out(total: int, weight_E: Floats, most: int) -> list[int]:
    """Whole numbers of at most `most` that go with weights and add up to `total` (or to all that fits).

    What one may not have goes to the others, and what rounding leaves to the largest fractions.
    """
    weight_E = weight_E if weight_E.sum() > 0 else np.ones_like(weight_E)
    given_E = np.zeros(len(weight_E))
    open_E = weight_E > 0
    while open_E.any() and given_E.sum() < total - 1e-9:
        left = total - given_E.sum()
        given_E += np.where(open_E, left * weight_E / weight_E[open_E].sum(), 0)
        given_E = given_E.clip(max=most)
        open_E &= given_E < most
    whole_E = np.floor(given_E + 1e-9).astype(int)
    order = np.argsort(-(given_E - whole_E), kind="stable")
    for expert in order[: max(min(total, most * len(weight_E)) - int(whole_E.sum()), 0)]:
        whole_E[expert] += whole_E[expert] < most
    return whole_E.tolist()


def budget_parameters(layers: list[MoELayer], options: D2MoE) -> int:
    """Parameters left when `ratio` of all routed-expert parameters is gone."""
    assert options.ratio is not None
    return int((1 - options.ratio) * sum(layer.num_parameters for layer in layers))
