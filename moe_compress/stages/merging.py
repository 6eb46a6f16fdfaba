"""M-SMoE as a scheme: who stays and who joins whom, from the statistics of all layers; alignments; merged experts."""

from __future__ import annotations

import numpy as np

from ..checkpoint.shard import load_tensors
from ..errors import CompressionError
from ..executor import Executor
from ..job import Job
from ..linalg.similarity import cosine, gram_cosine
from ..method_options import Merge
from ..methods.grouping import Floats, cluster_experts, dominant_experts, join_dominant, join_in_turn
from ..methods.merge import Grouping, as_array
from ..model.discovery import MoELayer
from ..progress import Reporter
from .fewer import KeepFewer
from .merge_units import (
    WEIGHT_FREE,
    MergePlace,
    align_members,
    diagnostics_path,
    measure_similarity,
    merge_layer,
    order_path,
    similarity_path,
)
from .prepare import Prepared
from .scheme import Decision, Pending, Work, run_all, wait_for

_PAIRS_A_TASK = 4
"""Alignments of one unit: enough to be worth reading the layer for, few enough to keep all workers busy."""


class MergeExperts(KeepFewer):
    """The scheme of `msmoe`."""

    options: Merge

    def __init__(self, job: Job, prepared: Prepared, options: Merge) -> None:
        super().__init__(job, prepared, options)
        base = prepared.statistics.name
        self.place = MergePlace(
            checkpoint=prepared.reader.folder,
            statistics=prepared.statistics,
            similarity=job.place("similarity", base, options.similarity),
            alignment=job.place("alignment", base, options.align),
            diagnostics=job.place("diagnostics", base, options.model_dump(mode="json")),
            options=options,
            device=prepared.recipe.cluster.device,
        )

    def analyses(self, path: str) -> list[Work]:
        """How alike the layer's experts are, where that takes their weights."""
        if self.options.similarity in WEIGHT_FREE or similarity_path(self.place.similarity, path).exists():
            return []
        return [Work(measure_similarity, (self.place, path))]

    def group(self, pending: Pending, executor: Executor, reporter: Reporter) -> dict[str, Grouping]:
        """Who joins whom in every layer, and the alignments of those that are merged."""
        layers = self.prepared.layers
        wait_for("similarity", pending, executor, reporter)
        name = "saliency_sum" if self.options.grouping == "salient" else "num_tokens"
        scores = [as_array(self.statistics(layer, name)[name]) for layer in layers]
        counts = self.counts()
        groupings = {
            layer.path: self._group_layer(i, layer, count, score)
            for i, (layer, count, score) in enumerate(zip(layers, counts, scores, strict=True))
        }
        run_all("align", self._alignments(groupings), executor, reporter)
        return groupings

    def decide(self, pending: Pending, executor: Executor, reporter: Reporter) -> Decision:
        """Groups, aligns, and says who is merged into whom."""
        groupings = self.group(pending, executor, reporter)
        works = {
            path: Work(merge_layer, (self.place, path, grouping))
            for path, grouping in groupings.items()
            if grouping.merged
        }
        decision = self.decision(groupings, works)
        decision.diagnostics = [diagnostics_path(self.place.diagnostics, path) for path in works]
        return decision

    def _group_layer(self, index: int, layer: MoELayer, count: int, score_E: Floats) -> Grouping:
        if count == layer.num_experts:
            return Grouping(tuple(range(count)))
        similarity = self._similarity(index, layer)
        options = self.options
        dominant = dominant_experts(score_E, count, self.router_groups())
        if options.grouping == "hierarchical":
            leaders = cluster_experts(similarity, count, score_E)
        elif options.grouping == "salient":
            leaders = join_in_turn(similarity, dominant, score_E, options.max_group or layer.num_experts - count + 1)
        else:
            leaders = join_dominant(similarity, dominant, options.max_group)
        return Grouping(tuple(leaders.tolist()))

    def _similarity(self, index: int, layer: MoELayer) -> Floats:
        kind = self.options.similarity
        if kind == "router_logits":
            gram_EE = self.statistics(layer, "router_gram")["router_gram"]
            if not bool(gram_EE.any()):
                raise CompressionError(
                    f"{layer.path}: its router gives no logits of its experts; set similarity: expert_weights"
                )
            return as_array(gram_cosine(gram_EE))
        if kind == "input_features":
            return as_array(cosine(self.statistics(layer, "input_sum")["input_sum"]))
        if kind == "random":
            return np.random.default_rng([self.options.seed, index]).random((layer.num_experts,) * 2)
        return as_array(load_tensors(similarity_path(self.place.similarity, layer.path))["similarity"])

    def _alignments(self, groupings: dict[str, Grouping]) -> list[Work]:
        if self.options.align == "none":
            return []
        works = []
        for path, grouping in groupings.items():
            pairs = [(expert, grouping.leader_of[expert]) for expert in grouping.merged]
            todo = [pair for pair in pairs if not order_path(self.place.alignment, path, *pair).exists()]
            batches = [todo[i : i + _PAIRS_A_TASK] for i in range(0, len(todo), _PAIRS_A_TASK)]
            works += [Work(align_members, (self.place, path, batch)) for batch in batches]
        return works
