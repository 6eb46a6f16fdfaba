"""Parameters, bytes and ranks before and after, from the model on the meta device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..budget import uniform_rank
from ..methods.d2moe import budget_parameters, fixed_ranks, slots
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS
from ..model.skeleton import ROOT, Skeleton
from ..recipe import D2MoE
from .shape import stored_tensors

EXPERTS = "routed experts"
OUTSIDE = "outside the model class"
PARTS = (EXPERTS, "shared experts", "attention", "embeddings and head", "other", OUTSIDE)


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters and bytes on disk of one part of the model, before and after."""

    name: str
    parameters: int
    num_bytes: int
    parameters_after: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class SlotSize:
    """One kind of factorised projection, (num_rows, num_columns) an expert.

    Attributes:
        name: slot name of model/experts.py.
        num_rows, num_columns: M and N.
        count: how many experts of how many layers have it, together.
        uniform_rank: the rank at which all of them together meet the ratio; None where every direction is kept.
        break_even_rank: M N / (M + N); a higher rank costs more than the whole matrix.
    """

    name: str
    num_rows: int
    num_columns: int
    count: int
    uniform_rank: int | None
    break_even_rank: int


def part_sizes(skeleton: Skeleton, layers: list[MoELayer], options: D2MoE) -> list[Part]:
    """Sizes by part.

    Before: elements of the model's tensors times the width of the dtype they lie on disk in, the model's own dtype
    where the shard is not there. What the index holds and the model class has no place for (multi-token prediction)
    is the rest of the declared bytes, and copied. After: all the same but the routed experts (`kept_parameters`), in
    the model's dtype.
    """
    owned = {name for layer in layers for name in layer.owned}
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, tensor in stored_tensors(skeleton):
        sources = skeleton.targets.get(name)
        entry = skeleton.reader.entries.get(sources[0]) if sources else None
        part = EXPERTS if name in owned else _part_of(skeleton, name)
        counts[part] += tensor.numel()
        sizes[part] += tensor.numel() * (skeleton.dtype if entry is None else entry.torch_dtype).itemsize
    if skeleton.extra:
        sizes[OUTSIDE] = max(skeleton.reader.total_bytes - sizes.total(), 0)
        counts[OUTSIDE] = sizes[OUTSIDE] // skeleton.dtype.itemsize
    kept = kept_parameters(layers, options)
    after = {EXPERTS: (kept, kept * skeleton.dtype.itemsize)}
    return [Part(p, counts[p], sizes[p], *after.get(p, (counts[p], sizes[p]))) for p in PARTS if counts[p]]


def _part_of(skeleton: Skeleton, name: str) -> str:
    words = name.split(".")
    if any("shared" in word for word in words[:-1]):
        return "shared experts"
    if any("attn" in word or "attention" in word for word in words[:-1]):
        return "attention"
    module = skeleton.model.get_submodule(name.rpartition(".")[0])
    is_head = module is skeleton.model.get_output_embeddings()
    if skeleton.owner(name) == ROOT and (is_head or isinstance(module, nn.Embedding)):
        return "embeddings and head"
    return "other"


def kept_parameters(layers: list[MoELayer], options: D2MoE) -> int:
    """Routed-expert parameters afterwards: the budget, or sum over slots of E r (M + N), and the bases."""
    bases = sum(layer.num_parameters // layer.num_experts for layer in layers) if options.base != "none" else 0
    if options.ranks == "allocated":
        return budget_parameters(layers, options) + bases
    return bases + sum(
        sum(fixed_ranks(layer, slot, options)) * (slot.num_rows + slot.num_columns)
        for layer in layers
        for group in GROUPS
        for slot in slots(layer, group, options)
    )


def slot_sizes(layers: list[MoELayer], options: D2MoE) -> list[SlotSize]:
    """The kinds of slots there are, in order of appearance."""
    kinds: Counter[tuple[str, int, int, int]] = Counter()
    for layer in layers:
        for group in GROUPS:
            for slot in slots(layer, group, options):
                kinds[slot.name, slot.num_rows, slot.num_columns, layer.num_experts] += layer.num_experts
    based, ratio = options.base != "none", options.ratio
    return [
        SlotSize(
            name,
            rows,
            columns,
            count,
            None if ratio is None else uniform_rank(rows, columns, num_experts, ratio, based),
            rows * columns // (rows + columns),
        )
        for (name, rows, columns, num_experts), count in kinds.items()
    ]


def highest_ratio(layers: list[MoELayer], options: D2MoE) -> float:
    """The bound that the ratio must stay under (uniform ranks: may reach).

    Allocated: 1, less 1/E for a base. Uniform: rank one everywhere, 1 - (M + N) / (M N), less 1/E for a base.
    """
    based = options.base != "none"
    bounds = []
    for layer in layers:
        base = 1 / layer.num_experts if based else 0.0
        for group in GROUPS:
            for slot in slots(layer, group, options):
                rank_one = (slot.num_rows + slot.num_columns) / (slot.num_rows * slot.num_columns)
                bounds.append(1 - base - (rank_one if options.ranks == "uniform" else 0))
    return min(bounds)
