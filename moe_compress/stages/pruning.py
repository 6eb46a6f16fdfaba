"""Pruning as a scheme: the experts of highest saliency stay."""

from __future__ import annotations

import numpy as np

from ..executor import Executor
from ..method_options import Prune
from ..methods.grouping import dominant_experts
from ..methods.merge import LEFT_OUT, Grouping
from ..methods.prune import pruning_scores
from ..progress import Reporter
from .fewer import KeepFewer
from .merge_units import prune_layer
from .scheme import Decision, Pending, Work


class PruneExperts(KeepFewer):
    """The scheme of `prune`."""

    options: Prune

    def analyses(self, path: str) -> list[Work]:
        """None: the statistics say it all."""
        return []

    def decide(self, pending: Pending, executor: Executor, reporter: Reporter) -> Decision:
        """Chooses who stays."""
        layers, options = self.prepared.layers, self.options
        statistics = [self.statistics(layer, "num_tokens", "saliency_sum", "taylor_sum") for layer in layers]
        scores = [pruning_scores(sums, options, index) for index, sums in enumerate(statistics)]
        counts = self.counts()
        groupings, works = {}, {}
        for index, (layer, count, score) in enumerate(zip(layers, counts, scores, strict=True)):
            score[options.keep.get(index, [])] = np.inf
            kept = set(map(int, dominant_experts(score, count, self.router_groups())))
            leaders = [expert if expert in kept else LEFT_OUT for expert in range(layer.num_experts)]
            groupings[layer.path] = Grouping(tuple(leaders))
            if count < layer.num_experts:
                works[layer.path] = Work(prune_layer, (self.prepared.reader.folder, layer.path, groupings[layer.path]))
        return self.decision(groupings, works)
