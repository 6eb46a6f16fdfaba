"""MC-SMoE as a scheme: groups as M-SMoE's, then ranks, then sparse columns, each from one budget over all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import Any

import torch

from ..budget import DENSE, allocate, parameters
from ..calibration.statistics import LayerStatistics
from ..calibration.worker import pick_device, statistics_path
from ..checkpoint.shard import load_tensors, open_tensors
from ..checkpoint.writer import ShardInfo, describe_shard, write_shard
from ..executor import Executor
from ..method_options import D2MoE, MCSMoE
from ..methods.d2moe import GroupProblem
from ..methods.forms import PLAIN
from ..methods.mcsmoe import choose_columns, column_scores, residual
from ..methods.merge import Grouping, merge_statistics, merge_weights, shares
from ..methods.metric import sums_used
from ..methods.slots import slots
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS, Group, bias_name, to_canonical, to_stock
from ..model.slots import INDEX_SUFFIX, FactorisedSlot, slots_of
from ..progress import Reporter
from .factorise import SlotItem, allocation_table, count_parameters, parameter_names, read_items
from .merge_units import MergePlace, RouterChange, change_router, read_orders
from .merging import MergeExperts
from .scheme import Decision, Pending, Work, run_all
from .units import open_checkpoint, read_weight, spectra_path, write_spectra, write_table


@dataclass(frozen=True, slots=True)
class SparsePlace:
    """Where the units find their inputs and leave their files.

    Attributes:
        merge: the groups' inputs.
        spectra, factors: folders of those artifacts.
        options: the method.
    """

    merge: MergePlace
    spectra: Path
    factors: Path
    options: MCSMoE

    @property
    def factorisation(self) -> D2MoE:
        """How each merged matrix is factorised."""
        return D2MoE(name="d2moe", ranks="full", damping=self.options.damping, min_tokens=self.options.min_tokens)


class _MergedGroup:
    """One group of projections of a layer, its experts merged."""

    def __init__(self, place: SparsePlace, path: str, group: Group, grouping: Grouping) -> None:
        self.place, self.group, self.grouping = place, group, grouping
        self.layer, weight = read_weight(place.merge.checkpoint, path, group)
        factorised = sums_used(self.layer, group, place.factorisation)
        used = {*factorised, f"{group}_fisher_columns", "num_tokens", f"{group}_fisher", "saliency_sum"}
        self.statistics = LayerStatistics.load(self.layer, statistics_path(place.merge.statistics, path), list(used))
        self.orders = read_orders(place.merge, path, grouping)
        self.share_E = shares(self.statistics, place.options.weights, group)
        self.weight_GMN = self.merge(weight)

    def merge(self, tensor: torch.Tensor) -> torch.Tensor:
        """The means of a canonical tensor of the group: its weights, or its bias."""
        return merge_weights(self.layer, self.group, tensor, self.grouping, self.share_E, self.orders)

    def problem(self) -> GroupProblem:
        """The factorisation of the merged experts."""
        layer, merged = merge_statistics(self.statistics, self.grouping, self.orders)
        device = pick_device(self.place.merge.device)
        return GroupProblem(layer, self.group, self.weight_GMN, merged, self.place.factorisation, None, device)


def decompose_merged(place: SparsePlace, path: str, group: Group, grouping: Grouping) -> None:
    """Writes the energies of a group of projections of the merged experts."""
    target = spectra_path(place.spectra, path, group)
    if not target.exists():
        write_spectra(target, {PLAIN: _MergedGroup(place, path, group, grouping).problem().energies()})


def factorise_merged(
    place: SparsePlace, path: str, group: Group, grouping: Grouping, ranks: dict[str, list[int]]
) -> None:
    """Writes the factors of a group, and the score of every column that they leave."""
    target = place.factors / f"{path}.{group}.safetensors"
    if target.exists():
        return
    problem = _MergedGroup(place, path, group, grouping).problem()
    tensors = problem.factors(ranks, problem.weight_EMN.dtype)
    sums = problem.statistics
    for slot in problem.slots:
        layout = FactorisedSlot(slot.name, slot.num_rows, slot.num_columns, ranks[slot.name])
        scores = torch.zeros(len(problem.weight_EMN), slot.num_columns, dtype=torch.float64)
        for expert in range(len(scores)):
            if expert in layout.dense_index:
                continue
            left_MN = residual(problem.weight_EMN[expert : expert + 1][0, slot.rows], tensors, layout, expert)
            gradient = sums[f"{group}_fisher_columns"][expert] if place.options.importance == "gradient" else None
            scores[expert] = column_scores(left_MN, gradient)
        tensors[f"{slot.name}_scores"] = scores
    write_shard(target, tensors)


def write_sparse(
    place: SparsePlace,
    path: str,
    grouping: Grouping,
    columns: dict[str, list[list[int]]],
    spec: dict[str, Any],
    names: dict[str, str],
    router: RouterChange,
    target: Path,
) -> ShardInfo:
    """Writes a layer's factors, sparse columns, biases and map as a shard of the output.

    Args:
        place: inputs.
        path: experts module.
        grouping: the layer's groups.
        columns: slot -> the sparse columns of each stored expert.
        spec: the layer's specification.
        names: parameter of the experts module -> its name on disk.
        router: what becomes of the router.
        target: the shard.
    """
    if target.exists():
        return describe_shard(target)
    checkpoint = place.merge.checkpoint
    tensors: dict[str, torch.Tensor] = {}
    for group in GROUPS:
        merged = _MergedGroup(place, path, group, grouping)
        layer, weight_GMN = merged.layer, merged.weight_GMN
        factors = load_tensors(place.factors / f"{path}.{group}.safetensors")
        layouts = {slot.name: slot for slot in slots_of(spec, layer.up_shape[0], *layer.down_shape)}
        for slot in slots(layer, group, place.factorisation):
            layout = layouts[slot.name]
            own = layout.shapes()
            tensors |= {name: factors[name] for name in own if name in factors}
            if f"{slot.name}_s" in own:
                kept = columns[slot.name]
                tensors[f"{slot.name}_s"] = torch.cat(
                    [
                        residual(weight_GMN[e, slot.rows], factors, layout, e)[:, kept[e]].mT.to(weight_GMN.dtype)
                        for e in range(len(kept))
                        if kept[e]
                    ]
                )
                flat = [column for each in kept for column in each]
                tensors[f"{slot.name}{INDEX_SUFFIX}"] = torch.tensor(flat, dtype=torch.int32)
        if layer.has_bias:
            name = bias_name(layer, group)
            skeleton, _ = open_checkpoint(checkpoint)
            bias = to_canonical(layer, group, skeleton.take(f"{path}.{name}"))
            stock = to_stock(layer, group, merged.merge(bias))
            names = names | {name: next(iter(skeleton.on_disk({f"{path}.{name}": stock})))}
            tensors[name] = stock
    on_disk = {names[name]: tensor for name, tensor in tensors.items()}
    return write_shard(target, on_disk | change_router(checkpoint, grouping, router))


class LowRankSparse(MergeExperts):
    """The scheme of `mcsmoe`."""

    options: MCSMoE

    def analyses(self, path: str) -> list[Work]:
        """As M-SMoE's, if anything is merged at all."""
        return super().analyses(path) if self.options.merge_ratio > 0 else []

    def decide(self, pending: Pending, executor: Executor, reporter: Reporter) -> Decision:
        """Groups, then ranks, then columns."""
        layers, options = self.prepared.layers, self.options
        groupings = self.group(pending, executor, reporter)
        place = self._place(groupings)
        keys = [(layer, group) for layer in layers for group in GROUPS]
        works = [Work(decompose_merged, (place, lay.path, group, groupings[lay.path])) for lay, group in keys]
        run_all("decompose", works, executor, reporter)
        items = [
            entry
            for layer, group in keys
            for entry in read_items(
                place.spectra, _with_experts(layer, groupings), group, slots(layer, group, place.factorisation)
            )[PLAIN]
        ]
        total = sum(layer.num_parameters for layer in layers)
        budget = floor((1 - options.ratio) * total)
        ranks = allocate([entry.item for entry in items], floor((1 - options.sparse_share) * budget))
        write_table(self.job.folder / "allocation.parquet", allocation_table(items, ranks))
        columns = self._columns(place, groupings, items, ranks, total, executor, reporter)
        return self._decide(place, groupings, items, ranks, columns)

    def _place(self, groupings: dict[str, Grouping]) -> SparsePlace:
        options = self.options
        who = {path: grouping.leader_of for path, grouping in groupings.items()}
        how = (options.weights, options.align, options.damping, options.min_tokens)
        spectra = self.job.place("spectra", self.prepared.statistics.name, who, how)
        factors = self.job.place("factors", spectra.name, options.model_dump(mode="json"))
        return SparsePlace(self.place, spectra, factors, options)

    def _columns(
        self,
        place: SparsePlace,
        groupings: dict[str, Grouping],
        items: list[SlotItem],
        ranks: list[int],
        total: int,
        executor: Executor,
        reporter: Reporter,
    ) -> list[list[int]]:
        """The sparse columns of every item; `total` parameters are those of the original."""
        by_group: dict[tuple[str, Group], dict[str, list[int]]] = {}
        for entry, rank in zip(items, ranks, strict=True):
            by_group.setdefault((entry.layer.path, entry.group), {}).setdefault(entry.slot.name, []).append(rank)
        works = [
            Work(factorise_merged, (place, path, group, groupings[path], own))
            for (path, group), own in by_group.items()
        ]
        run_all("factorise", works, executor, reporter)
        if self.options.start == "residual":
            return [list(range(e.item.num_columns * (rank != DENSE))) for e, rank in zip(items, ranks, strict=True)]
        budget = floor((1 - (self.options.start or self.options.ratio)) * total)
        scores = []
        for path, group in by_group:
            with open_tensors(place.factors / f"{path}.{group}.safetensors") as stored:  # the factors stay there
                for name in by_group[path, group]:
                    scores += list(stored.get_tensor(f"{name}_scores").numpy())
        spent = sum(parameters(entry.item, rank) for entry, rank in zip(items, ranks, strict=True))
        costs = [entry.item.num_rows + 1 for entry in items]
        chosen = choose_columns(scores, costs, budget - spent)
        return [list(map(int, each)) for each in chosen]

    def _decide(
        self,
        place: SparsePlace,
        groupings: dict[str, Grouping],
        items: list[SlotItem],
        ranks: list[int],
        columns: list[list[int]],
    ) -> Decision:
        layers = {layer.path: layer for layer in self.prepared.layers}
        specs: dict[str, dict[str, Any]] = {path: {} for path in layers}
        kept: dict[str, dict[str, list[list[int]]]] = {path: {} for path in layers}
        for entry, rank, own in zip(items, ranks, columns, strict=True):
            slot = specs[entry.layer.path].setdefault(entry.slot.name, {"ranks": [], "num_sparse": []})
            slot["ranks"].append(rank)
            slot["num_sparse"].append(len(own))
            kept[entry.layer.path].setdefault(entry.slot.name, []).append(own)
        works = {}
        for path, layer in layers.items():
            names = self.prepared.skeleton.disk_names(layer, parameter_names(layer, specs[path]))
            works[path] = Work(write_sparse, (place, path, groupings[path], kept[path], specs[path], names))
        decision = self.decision(groupings, works)
        for path, spec in decision.layers.items():
            spec |= specs[path]
            decision.provenance[path] |= specs[path]
        decision.expert_parameters = sum(count_parameters(layers[path], specs[path]) for path in specs)
        return decision


def _with_experts(layer: MoELayer, groupings: dict[str, Grouping]) -> MoELayer:
    return replace(layer, num_experts=len(groupings[layer.path].leaders))
