"""What a method leaves of the routed experts, as far as that can be known before calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor

import numpy as np
from transformers import PreTrainedModel

from ..method_options import D2MoE, Fewer, MCSMoE, Method
from ..methods.counts import kept_counts
from ..methods.limits import budget_parameters, fixed_ranks, num_bases, num_shared
from ..methods.slots import slots
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS

NOTES = {
    "allocated": "ranks are allocated once the calibration statistics are there; they spend the same total",
    "uniform": "every expert gets the uniform rank",
    "frequency": "calibration shares the ranks out among the experts of a layer; they spend the same total",
    "full": "every direction is kept: larger than the original",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is left of the routed experts.

    Attributes:
        layers: the MoE layers with the experts that are stored; adaptive counts as if all experts were alike.
        factorised: how the stored experts are factorised; None where they stay whole.
        kept_parameters: of all stored experts.
        note: what calibration will decide.
    """

    layers: list[MoELayer]
    factorised: D2MoE | None
    kept_parameters: int
    note: str


def outcome(model: PreTrainedModel, layers: list[MoELayer], options: Method) -> Outcome:
    """What `options` leave of the experts of `layers`.

    Raises:
        RecipeError: the counts asked for cannot be.
    """
    if isinstance(options, D2MoE):
        return Outcome(layers, options, _factorised_parameters(layers, options), NOTES[options.ranks])
    stored = _stored(model, layers, options)
    note = f"{sum(layer.num_experts for layer in stored):,} of {sum(layer.num_experts for layer in layers):,} experts"
    if options.counts == "adaptive":
        note += "; calibration decides how many in which layer"
    if not isinstance(options, MCSMoE):
        return Outcome(stored, None, sum(layer.num_parameters for layer in stored), note)
    total = sum(layer.num_parameters for layer in layers)
    # Ranks are given out of what is left without the sparse columns.
    for_ranks = (1 - options.ratio) * (1 - options.sparse_share) * total
    ratio = min(max(1 - for_ranks / sum(layer.num_parameters for layer in stored), 1e-9), 1 - 1e-9)
    factorised = D2MoE(name="d2moe", ratio=ratio)
    kept = floor((1 - options.ratio) * total)
    if options.start is not None:
        columns = sum(
            layer.num_experts * slot.num_columns * (slot.num_rows + 1)
            for layer in stored
            for group in GROUPS
            for slot in slots(layer, group, factorised)
        )
        whole = floor(for_ranks) + columns
        kept = whole if options.start == "residual" else min(whole, floor((1 - options.start) * total))
    return Outcome(stored, factorised, kept, f"{note}; {NOTES['allocated']}")


def _stored(model: PreTrainedModel, layers: list[MoELayer], options: Fewer) -> list[MoELayer]:
    alike = [np.full(layer.num_experts, 1 / layer.num_experts) for layer in layers]
    counts = kept_counts(model, layers, options, alike)
    return [replace(layer, num_experts=count) for layer, count in zip(layers, counts, strict=True)]


def _factorised_parameters(layers: list[MoELayer], options: D2MoE) -> int:
    """The budget, or sum over slots of r (E M + C N), C right factors, and the bases."""
    if options.ranks == "allocated":
        return budget_parameters(layers, options)
    return sum(
        fixed_ranks(layer, slot, options)[0]
        * (layer.num_experts * slot.num_rows + num_shared(layer, options) * slot.num_columns)
        + round(num_bases(layer, slot, options) * slot.num_rows * slot.num_columns)
        for layer in layers
        for group in GROUPS
        for slot in slots(layer, group, options)
    )
