"""What the schemes share that keep fewer experts: counts, the router's part, the decision."""

from __future__ import annotations

from typing import Any

from ..calibration.statistics import LayerStatistics
from ..calibration.worker import statistics_path
from ..job import Job
from ..method_options import Fewer
from ..methods.counts import kept_counts
from ..methods.merge import Grouping, as_array
from ..model.discovery import MoELayer
from ..model.merged import MAP_NAME
from ..model.routing import ResizedModel, resize_experts, router_groups
from .merge_units import RouterChange
from .prepare import Prepared
from .scheme import Decision, Work


class KeepFewer:
    """What the schemes of all methods that keep fewer experts share."""

    def __init__(self, job: Job, prepared: Prepared, options: Fewer) -> None:
        self.job, self.prepared, self.options = job, prepared, options
        self.model = prepared.skeleton.model

    def statistics(self, layer: MoELayer, *names: str) -> LayerStatistics:
        """The statistics of one layer, or some of them."""
        return LayerStatistics.load(layer, statistics_path(self.prepared.statistics, layer.path), names)

    def counts(self) -> list[int]:
        """Experts each layer keeps; adaptive ones by how often each is chosen, relative to its layer's best."""
        layers = self.prepared.layers
        tokens = [as_array(self.statistics(layer, "num_tokens")["num_tokens"]) for layer in layers]
        return kept_counts(self.model, layers, self.options, [each / max(each.max(), 1) for each in tokens])

    def router_groups(self) -> int:
        """Groups of experts that the router must find equally large; 1 where it stays."""
        return 1 if self.options.router == "keep" else router_groups(self.model.config)[0]

    def decision(self, groupings: dict[str, Grouping], works: dict[str, Work]) -> Decision:
        """The decision that follows from who stays.

        Args:
            groupings: experts path -> grouping, of every layer.
            works: experts path -> what writes it, of the layers that change; `RouterChange` is appended.
        """
        router, layers = self.options.router, {layer.path: layer for layer in self.prepared.layers}
        resized: dict[int, ResizedModel] = {}
        specs: dict[str, dict[str, Any]] = {}
        replaced: set[str] = set()
        shards: list[Work] = []
        for path, work in works.items():
            layer, count = layers[path], len(groupings[path].leaders)
            is_kept = router == "keep" or count == layer.num_experts
            specs[path] = {"num_experts": count, "router": "keep" if is_kept else "slice"}
            replaced.update(self._expert_tensors(layer))
            if is_kept and (count < layer.num_experts or layer.always_mapped):
                change = RouterChange(map_name=self.prepared.skeleton.disk_names(layer, [MAP_NAME])[MAP_NAME])
            elif is_kept:
                change = RouterChange()
            else:
                if count not in resized:
                    resized[count] = resize_experts(self.model, count)
                axes = self._router_of(layer, resized[count].axes)
                replaced |= axes.keys()
                change = RouterChange(groupings[path].leaders, axes)
            shards.append(Work(work.unit, (*work.args, change)))
        is_stock = router == "shrink"
        config: dict[str, Any] = next(iter(resized.values())).config if is_stock and resized else {}
        if router == "slice" and self.prepared.reader.config.get("output_router_logits"):
            config = {"output_router_logits": False}  # the balancing loss wants the same experts in every layer
        return Decision(
            layers={} if is_stock else specs,
            config=config,
            replaced=replaced,
            shards=shards,
            provenance={path: {**specs[path], "leader_of": list(groupings[path].leader_of)} for path in specs},
            expert_parameters=sum(
                layer.num_parameters // layer.num_experts * len(groupings[path].leaders)
                for path, layer in layers.items()
            ),
        )

    def _expert_tensors(self, layer: MoELayer) -> list[str]:
        """Names in memory of everything that counts the layer's experts inside the experts module."""
        module = self.model.get_submodule(layer.path)
        return [
            f"{layer.path}.{name}"
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.shape[0] == layer.num_experts
        ]

    def _router_of(self, layer: MoELayer, axes: dict[str, int]) -> dict[str, int]:
        """The router's tensors of one layer."""
        owner = self.prepared.skeleton.owner(layer.path)
        return {name: axis for name, axis in axes.items() if self.prepared.skeleton.owner(name) == owner}
