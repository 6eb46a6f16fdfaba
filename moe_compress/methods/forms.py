"""The ways to put the experts of a group of projections together, among which a budget may choose.

No base, one, or one of each cluster of experts; right factors of their own, or shared by clusters. Many small experts
have little in common as a whole, but some are close to some. Clusters are by average linkage of the cosines of the
experts' weights (of a sketch W_e R, R random), or of the rows of the router logits' Gram, as in arXiv 2310.01334.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..calibration.statistics import LayerStatistics
from ..linalg.similarity import cosine, gram_cosine
from ..method_options import D2MoE
from ..model.discovery import MoELayer
from ..model.expert_bank import Group
from .grouping import Floats, cluster_experts
from .metric import input_gram
from .slots import Slot

_SKETCH_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class Form:
    """How the experts of a group of projections are put together.

    Attributes:
        base_of: which base each expert's matrix builds on; None where there is none.
        share_of: the expert whose right factor each uses, its own id for its own; None where nothing is shared.
    """

    base_of: tuple[int, ...] | None = None
    share_of: tuple[int, ...] | None = None

    @property
    def num_bases(self) -> int:
        """Bases stored."""
        return 0 if self.base_of is None else max(self.base_of) + 1

    def spec(self, slot: Slot, options: D2MoE) -> dict[str, Any]:
        """What a slot's specification (model/slots.py) says of the form."""
        spec: dict[str, Any] = {}
        if self.base_of is not None:
            spec["bases"] = list(self.base_of)
            if options.base_sparsity:
                spec["base_columns"] = options.num_base_columns(slot.num_columns)
                spec["skip"] = options.base_skip(slot.num_columns)
        if self.share_of is not None:
            spec["share"] = list(self.share_of)
        return spec

    def num_parameters(self, slot: Slot, options: D2MoE) -> int:
        """What is stored of a slot whatever the ranks: bases, and the numbers of their columns."""
        if self.base_of is None:
            return 0
        columns = options.num_base_columns(slot.num_columns)
        return columns * (self.num_bases * slot.num_rows + bool(options.base_sparsity))

    def items(self, num_experts: int) -> list[tuple[int, ...]]:
        """The experts that are given one rank together, by ascending leader."""
        if self.share_of is None:
            return [(expert,) for expert in range(num_experts)]
        leaders = sorted(set(self.share_of))
        return [tuple(e for e, of in enumerate(self.share_of) if of == leader) for leader in leaders]


PLAIN = Form()
"""Every expert by itself."""


def cluster_counts(num_experts: int) -> list[int]:
    """Numbers of clusters that a budget may choose among: one, and from eight experts each to two."""
    return sorted({1, num_experts // 8, num_experts // 4, num_experts // 2} - {0, num_experts})


def candidates(
    layer: MoELayer,
    group: Group,
    options: D2MoE,
    statistics: LayerStatistics,
    blocks: Callable[[], Iterator[Tensor]],
) -> list[Form]:
    """The forms that the options ask for; the first is the plainest.

    Args:
        layer, group: which.
        options: the recipe's method.
        statistics: what the layer saw.
        blocks: gives all experts, (n, M, N) a block, whenever it is called.
    """
    num_experts = layer.num_experts

    @cache
    def similarity_EE() -> Floats:
        array: Floats = _similarity(options, statistics, blocks).numpy()
        return array

    @cache
    def clusters(count: int) -> tuple[int, ...]:
        """The leader of each expert's cluster."""
        if count == 1:
            return (0,) * num_experts
        score_E = statistics["num_tokens"].double().numpy()
        return tuple(cluster_experts(similarity_EE(), min(count, num_experts), score_E).tolist())

    def form(num_bases: int, num_shared: int) -> Form:
        base_of = share_of = None
        if num_bases:
            place = {leader: base for base, leader in enumerate(sorted(set(clusters(num_bases))))}
            base_of = tuple(place[leader] for leader in clusters(num_bases))
        if num_shared:
            share_of = clusters(num_shared)
        return Form(base_of, share_of)

    fixed_bases = options.num_bases if options.has_fixed_bases else 0
    fixed_share = 0 if options.share in ("none", "budget") else options.share
    forms = [form(int(fixed_bases), int(fixed_share))]
    gram = input_gram(group, options)
    if gram is None or gram in statistics:  # without it only experts themselves can be weighed
        counts = cluster_counts(num_experts)
        if options.num_bases == "budget":
            forms += [form(count, int(fixed_share)) for count in counts]
        if options.share == "budget":
            forms += [form(int(fixed_bases), count) for count in counts]
    return forms


def _similarity(options: D2MoE, statistics: LayerStatistics, blocks: Callable[[], Iterator[Tensor]]) -> Tensor:
    """(E, E) fp64, higher is more alike."""
    if options.cluster_by == "routing":
        return gram_cosine(statistics["router_gram"])
    generator, sketches = torch.Generator().manual_seed(0), []
    random_NR: Tensor | None = None
    for weight_nMN in blocks():
        if random_NR is None:
            random_NR = torch.randn(weight_nMN.shape[2], _SKETCH_COLUMNS, generator=generator).to(weight_nMN.device)
        sketches.append((weight_nMN @ random_NR).flatten(1).cpu())
    return cosine(torch.cat(sketches))
