"""Parameters, bytes and ranks before and after, from the model on the meta device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..methods.limits import mean_rank
from ..methods.slots import slots
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS
from ..model.skeleton import ROOT, Skeleton
from .outcome import Outcome
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
        name: slot name of model/slots.py.
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


def part_sizes(skeleton: Skeleton, layers: list[MoELayer], kept_parameters: int, num_outside: int = 0) -> list[Part]:
    """Sizes by part.

    Before: elements of the model's tensors times the width of the dtype they lie on disk in, the model's own dtype
    where the shard is not there. What the index holds and the model class has no place for (multi-token prediction)
    is the rest of the declared bytes, and copied. After: all the same but the routed experts, in the model's dtype; of
    a shorter router, and of the biases of experts that go, nothing is taken off.

    Args:
        skeleton: the original.
        layers: its MoE layers.
        kept_parameters: of their experts.
        num_outside: parameters outside the model class where there is no index that would tell.
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
    elif num_outside:
        counts[OUTSIDE], sizes[OUTSIDE] = num_outside, num_outside * skeleton.dtype.itemsize
    after = {EXPERTS: (kept_parameters, kept_parameters * skeleton.dtype.itemsize)}
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


def slot_sizes(result: Outcome) -> list[SlotSize]:
    """The kinds of slots there are, in order of appearance."""
    options = result.factorised
    if options is None:
        return []
    kinds: Counter[tuple[str, int, int, int | None]] = Counter()
    for layer in result.layers:
        for group in GROUPS:
            for slot in slots(layer, group, options):
                rank = None if options.ratio is None else mean_rank(layer, slot, options)
                kinds[slot.name, slot.num_rows, slot.num_columns, rank] += layer.num_experts
    return [
        SlotSize(
            name,
            rows,
            columns,
            count,
            rank,
            rows * columns // (rows + columns),
        )
        for (name, rows, columns, rank), count in kinds.items()
    ]
