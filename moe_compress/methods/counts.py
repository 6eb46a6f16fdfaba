"""How many experts each layer keeps, for the methods that keep fewer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import floor

from transformers import PreTrainedModel

from ..errors import RecipeError
from ..method_options import Fewer, MCSMoE, Merge, Prune
from ..model.discovery import MoELayer
from ..model.routing import experts_per_token, resize_experts, router_groups, router_weight
from .grouping import Floats, adaptive_counts


def fewest(model: PreTrainedModel, layers: list[MoELayer], options: Fewer) -> list[int]:
    """The fewest experts each layer may keep.

    Raises:
        RecipeError: a layer or expert that is named is not there.
    """
    at_least, groups = 1, 1
    if options.router != "keep":  # the router itself must still find top_k experts
        groups, chosen = router_groups(model.config)
        per_group = -(-(experts_per_token(model.config) or 1) // chosen)
        at_least = groups * max(per_group, 2 if groups > 1 else 1)
    max_group = getattr(options, "max_group", None)
    room = [1 if max_group is None else _multiple(-(-layer.num_experts // max_group), groups) for layer in layers]
    found = [min(max(at_least, low), layer.num_experts) for low, layer in zip(room, layers, strict=True)]
    for index in options.exclude_layers:
        if not 0 <= index < len(layers):
            raise RecipeError(f"method.exclude_layers: {index} is not a MoE layer; there are {len(layers)}, from 0")
        found[index] = layers[index].num_experts
    if set(options.exclude_layers) >= set(range(len(layers))):
        raise RecipeError(f"method.exclude_layers: excludes all {len(layers)} MoE layers; leave one to compress")
    for index, experts in options.keep.items() if isinstance(options, Prune) else ():
        if not 0 <= index < len(layers):
            raise RecipeError(f"method.keep: {index} is not a MoE layer; there are {len(layers)}, from 0")
        wrong = [expert for expert in experts if not 0 <= expert < layers[index].num_experts]
        if wrong:
            raise RecipeError(
                f"method.keep: MoE layer {index} has no expert {wrong[0]}; it has {layers[index].num_experts}, from 0"
            )
        block_size = layers[index].num_experts // groups
        fullest = max(Counter(expert // block_size for expert in set(experts)).values(), default=0)
        found[index] = max(found[index], fullest * groups)
    return found


def _multiple(number: int, of: int) -> int:
    """The next multiple."""
    return -(-number // of) * of


def kept_counts(
    model: PreTrainedModel, layers: list[MoELayer], options: Fewer, scores: Sequence[Floats] | None
) -> list[int]:
    """Experts each layer keeps; at least the fraction of them that is asked for goes.

    Args:
        model: for its config.
        layers: the MoE layers.
        options: the method's.
        scores: (E,) of each layer, what adaptive counts go by; None to check only: the fewest of each layer then.

    Raises:
        RecipeError: the counts asked for cannot be.
    """
    ratio = options.expert_ratio
    sizes, lowest = [layer.num_experts for layer in layers], fewest(model, layers, options)
    groups = router_groups(model.config)[0] if options.router != "keep" else 1
    if isinstance(options.counts, list):
        return _given(options.counts, sizes, lowest, groups)
    if options.counts == "uniform":
        return _uniform(options, sizes, lowest, groups)
    if groups > 1:
        raise RecipeError(
            f"method.counts: adaptive counts do not keep the router's {groups} groups of experts even; set counts:"
            " uniform, or router: keep"
        )
    num_kept = floor((1 - ratio) * sum(sizes) + 1e-9)
    if num_kept < sum(lowest):
        raise RecipeError(
            f"{_ratio_field(options)}: {ratio} leaves {num_kept} experts where {sum(lowest)} must stay; the highest"
            f" possible is {1 - sum(lowest) / sum(sizes):.4g}; lower it"
        )
    return adaptive_counts(scores, num_kept, lowest) if scores is not None else lowest


def _ratio_field(options: Fewer) -> str:
    """What a recipe calls the fraction of the experts to remove."""
    return "method.merge_ratio" if isinstance(options, MCSMoE) else "method.ratio"


def _uniform(options: Fewer, sizes: list[int], lowest: list[int], groups: int) -> list[int]:
    """The same fraction of every layer that is not excluded, such that the ratio is that of all layers."""
    excluded = set(options.exclude_layers)
    num_all, num_free = sum(sizes), sum(n for i, n in enumerate(sizes) if i not in excluded)
    share = 1 - options.expert_ratio * num_all / max(num_free, 1)
    counts = [n if i in excluded else floor(share * n + 1e-9) // groups * groups for i, n in enumerate(sizes)]
    for count, low in zip(counts, lowest, strict=True):
        if count < low:
            removable = [1 - low / n for i, (low, n) in enumerate(zip(lowest, sizes, strict=True)) if i not in excluded]
            raise RecipeError(
                f"{_ratio_field(options)}: {options.expert_ratio} leaves {max(count, 0)} experts in a layer that must"
                f" keep {low}; the highest possible is {min(removable) * num_free / num_all:.4g}; lower it"
            )
    return counts


def _given(counts: list[int], sizes: list[int], lowest: list[int], groups: int) -> list[int]:
    if len(counts) != len(sizes):
        raise RecipeError(f"method.counts: {len(counts)} numbers for {len(sizes)} MoE layers; give one for each")
    for index, (count, size, low) in enumerate(zip(counts, sizes, lowest, strict=True)):
        if not low <= count <= size or count % groups:
            multiple = f", a multiple of {groups}" if groups > 1 else ""
            raise RecipeError(
                f"method.counts: {count} for MoE layer {index}; it can keep {low} to {size} experts{multiple}"
            )
    return counts


def check_counts(model: PreTrainedModel, layers: list[MoELayer], options: Fewer) -> None:
    """Refuses what cannot work, before any tensor is read.

    Raises:
        RecipeError: counts that cannot be, or a router that cannot be made shorter.
    """
    counts = kept_counts(model, layers, options, None)
    if options.router == "shrink" and len(set(counts)) > 1:
        raise RecipeError(
            f"method.router: shrink writes a stock checkpoint, whose layers all have the same number of experts, not"
            f" {sorted(set(counts))}; set counts: uniform, or router: keep or slice"
        )
    if options.router != "keep":
        for count in set(counts) - {layer.num_experts for layer in layers}:
            resize_experts(model, count)
    if isinstance(options, Merge) and (options.similarity == "router_weights" or options.repair == "logsumexp"):
        for layer in layers:
            router_weight(model, layer)
