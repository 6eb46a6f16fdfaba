"""D2-MoE as a scheme: spectra of all layers, experts and projections, forms and ranks from one budget, factors."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..budget import Item, allocate, allocate_levels, error, parameters
from ..calibration.statistics import LayerStatistics
from ..calibration.worker import statistics_path
from ..executor import Executor
from ..job import Job
from ..method_options import D2MoE
from ..methods.forms import Form
from ..methods.grouping import Floats
from ..methods.limits import budget_parameters, fixed_ranks
from ..methods.merge import as_array
from ..methods.slots import Slot, slots
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS, Group
from ..model.levels import factor_names, piece_names, spec_at
from ..model.merged import MAP_NAME
from ..model.slots import slots_of
from ..offers import Offer, choose
from ..progress import Reporter
from .prepare import Prepared
from .scheme import Decision, Pending, Work, wait_for
from .units import Workplace, decompose_group, factorise_group, read_spectra, spectra_path, write_table


@dataclass(frozen=True, slots=True)
class SlotItem:
    """What is given one rank: one expert's matrix, or those of the experts that share a right factor.

    Attributes:
        layer, group, slot, experts: which matrices.
        item: their size, one on top of the other, and energies.
    """

    layer: MoELayer
    group: Group
    slot: Slot
    experts: tuple[int, ...]
    item: Item


class Factorise:
    """The scheme of `d2moe`."""

    def __init__(self, job: Job, prepared: Prepared, options: D2MoE) -> None:
        self.job, self.prepared, self.options = job, prepared, options
        how = options.model_dump(include=_seen_in_spectra(options))
        self.place = Workplace(
            checkpoint=prepared.reader.folder,
            statistics=prepared.statistics,
            alignment=job.place("alignment", prepared.statistics.name),
            spectra=job.place("spectra", prepared.statistics.name, how),
            options=options,
            device=prepared.recipe.cluster.device,
        )

    def analyses(self, path: str) -> list[Work]:
        """Decompositions of the layer's projections."""
        return [
            Work(decompose_group, (self.place, path, group))
            for group in GROUPS
            if not spectra_path(self.place.spectra, path, group).exists()
        ]

    def decide(self, pending: Pending, executor: Executor, reporter: Reporter) -> Decision:
        """Spends the budget on forms and ranks."""
        layers, options = self.prepared.layers, self.options
        wait_for("allocate", pending, executor, reporter)
        forms: dict[tuple[str, Group], Form] = {}
        items: list[SlotItem] = []
        keys = [(layer, group) for layer in layers for group in GROUPS]
        slots_of_keys = [slots(layer, group, options) for layer, group in keys]
        parts = [read_items(self.place.spectra, *key, of) for key, of in zip(keys, slots_of_keys, strict=True)]
        offers = [
            [
                Offer([each.item for each in own], sum(form.num_parameters(slot, options) for slot in of))
                for form, own in part.items()
            ]
            for of, part in zip(slots_of_keys, parts, strict=True)
        ]
        smallest = options.at_levels[-1]
        chosen = choose(offers, 0 if options.ranks == "full" else budget_parameters(layers, smallest))
        for (layer, group), part, index in zip(keys, parts, chosen, strict=True):
            forms[layer.path, group] = list(part)[index]
            items += list(part.values())[index]
        by_level = self._ranks(items, sum(part[index].fixed for part, index in zip(offers, chosen, strict=True)))
        write_table(self.job.folder / "allocation.parquet", allocation_table(items, by_level[0]))
        names = [str(ratio) for ratio in (options.ratio, *options.levels)]
        ranks = dict(zip(names, by_level, strict=True))
        specs = self._specs(forms, items, ranks)
        whole = {path: spec_at(spec, names[0]) for path, spec in specs.items()}
        return Decision(
            layers=specs,
            config={},
            replaced={name for layer in layers for name in layer.owned},
            shards=[self._shard(layer, group, forms[layer.path, group], specs[layer.path]) for layer, group in keys],
            provenance=specs,
            expert_parameters=sum(count_parameters(layer, whole[layer.path]) for layer in layers),
            levels=names if options.levels else [],
        )

    def _ranks(self, items: list[SlotItem], fixed: int) -> list[list[int]]:
        """The rank of each item at each level, the largest first; `fixed` parameters go to bases."""
        layers, at_levels = self.prepared.layers, self.options.at_levels
        if self.options.ranks == "allocated":
            budgets = [budget_parameters(layers, at_level) - fixed for at_level in at_levels]
            matrices = [entry.item for entry in items]
            return allocate_levels(matrices, budgets) if len(budgets) > 1 else [allocate(matrices, budgets[0])]
        by_level = [self._fixed(items, at_level) for at_level in at_levels]
        return [list(ranks) for ranks in accumulate(by_level, lambda more, less: list(map(min, more, less)))]

    def _fixed(self, items: list[SlotItem], options: D2MoE) -> list[int]:
        """Ranks that are not allocated."""
        found: dict[tuple[str, str], list[int]] = {}
        for entry in items:
            key = entry.layer.path, entry.slot.name
            if key not in found:
                weight_E = self._sensitivity(entry.layer, entry.group) if options.ranks == "frequency" else None
                found[key] = fixed_ranks(entry.layer, entry.slot, options, weight_E)
        return [found[entry.layer.path, entry.slot.name][entry.experts[0]] for entry in items]

    def _sensitivity(self, layer: MoELayer, group: Group) -> Floats:
        """(E,) f^alpha F^beta."""
        names = ["num_tokens", f"{group}_fisher"]
        sums = LayerStatistics.load(layer, statistics_path(self.prepared.statistics, layer.path), names)
        frequency, fisher = (as_array(sums[name]) / max(float(sums[name].sum()), 1e-300) for name in names)
        return frequency**self.options.alpha * fisher**self.options.beta

    def _specs(
        self, forms: dict[tuple[str, Group], Form], items: list[SlotItem], by_level: dict[str, list[int]]
    ) -> dict[str, dict[str, Any]]:
        """Specifications (model/slots.py) by layer and slot; `by_level` gives each item's rank, the largest first."""
        specs: dict[str, dict[str, Any]] = defaultdict(dict)
        whole, *levels = by_level
        for index, entry in enumerate(items):
            spec, name, num_experts = specs[entry.layer.path], entry.slot.name, entry.layer.num_experts
            if name not in spec:
                form = forms[entry.layer.path, entry.group]
                spec[name] = {"ranks": [0] * num_experts, **form.spec(entry.slot, self.options)}
                if levels:
                    spec[name]["levels"] = {level: [0] * num_experts for level in levels}
            for expert in entry.experts:
                spec[name]["ranks"][expert] = by_level[whole][index]
                for level in levels:
                    spec[name]["levels"][level][expert] = by_level[level][index]
        return dict(specs)

    def _shard(self, layer: MoELayer, group: Group, form: Form, spec: dict[str, Any]) -> Work:
        own = {slot.name: spec[slot.name] for slot in slots(layer, group, self.options)}
        ranks = {name: [entry["ranks"], *entry.get("levels", {}).values()] for name, entry in own.items()}
        whole = spec_at(own, str(self.options.ratio))
        mapped = [MAP_NAME] if layer.always_mapped and group == "up" else []
        more = [n for slot in own for name in factor_names(slot) for n in piece_names(name, len(ranks[slot]))[1:]]
        names = self.prepared.skeleton.disk_names(layer, parameter_names(layer, whole) + more + mapped)
        return Work(factorise_group, (self.place, layer.path, group, form, ranks, names))


def _seen_in_spectra(options: D2MoE) -> set[str]:
    """Options that the energies depend on; all others only spend them."""
    seen = {"base", "num_bases", "share", "weighting", "gate_up", "align", "damping", "min_tokens", "base_sparsity"}
    if options.base_sparsity:
        seen |= {"base_dynamic", "base_metric"}
    if options.num_bases != 1 or options.share not in ("none", 1):
        seen.add("cluster_by")
    return seen


def read_items(spectra: Path, layer: MoELayer, group: Group, of: list[Slot]) -> dict[Form, list[SlotItem]]:
    """The budget's items of one group in each form, from its spectra."""
    return {
        form: [
            SlotItem(layer, group, slot, experts, Item(len(experts) * slot.num_rows, slot.num_columns, energy))
            for slot in of
            for experts, energy in zip(form.items(layer.num_experts), energies[slot.name], strict=True)
        ]
        for form, energies in read_spectra(spectra_path(spectra, layer.path, group)).items()
    }


def allocation_table(items: list[SlotItem], ranks: list[int]) -> pa.Table:
    """What each matrix was given, what that costs and what it leaves out."""
    return pa.table(
        {
            "layer": [entry.layer.path for entry in items],
            "slot": [entry.slot.name for entry in items],
            "expert": [entry.experts[0] for entry in items],
            "num_experts": [len(entry.experts) for entry in items],
            "rank": ranks,
            "parameters": [parameters(e.item, r) for e, r in zip(items, ranks, strict=True)],
            "error": [error(e.item, r) for e, r in zip(items, ranks, strict=True)],
            "energy": [error(e.item, 0) for e in items],
            "break_even_rank": [e.item.dense_parameters // (e.item.num_rows + e.item.num_columns) for e in items],
        }
    )


def parameter_names(layer: MoELayer, spec: dict[str, Any]) -> list[str]:
    """Names of the tensors inside the experts module that a specification calls for."""
    return [name for slot in slots_of(spec, layer.up_shape[0], *layer.down_shape) for name in slot.shapes()]


def count_parameters(layer: MoELayer, spec: dict[str, Any]) -> int:
    """Numbers that a factorised layer stores, indices of sparse columns among them."""
    found = slots_of(spec, layer.up_shape[0], *layer.down_shape)
    return sum(math.prod(shape) for slot in found for shape in slot.shapes().values())
