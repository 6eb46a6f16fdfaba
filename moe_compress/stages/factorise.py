"""D2-MoE as a scheme: spectra of all layers, experts and projections, every rank from one budget, factors."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..budget import Item, allocate, error, parameters
from ..executor import Executor
from ..job import Job
from ..method_options import D2MoE
from ..methods.d2moe import Slot, budget_parameters, fixed_ranks, slots
from ..model.discovery import MoELayer
from ..model.expert_bank import GROUPS, Group
from ..model.merged import MAP_NAME
from ..model.slots import slots_of
from ..progress import Reporter
from .prepare import Prepared
from .scheme import Decision, Pending, Work, wait_for
from .units import Workplace, decompose_group, factorise_group, spectra_path, write_table


@dataclass(frozen=True, slots=True)
class SlotItem:
    """One expert's matrix in the budget.

    Attributes:
        layer, group, slot, expert: which matrix.
        item: its size and energies.
    """

    layer: MoELayer
    group: Group
    slot: Slot
    expert: int
    item: Item


class Factorise:
    """The scheme of `d2moe`."""

    def __init__(self, job: Job, prepared: Prepared, options: D2MoE) -> None:
        self.job, self.prepared, self.options = job, prepared, options
        how = options.model_dump(include={"base", "weighting", "gate_up", "align", "damping", "min_tokens"})
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
        """Spends the budget on ranks."""
        layers, options = self.prepared.layers, self.options
        wait_for("allocate", pending, executor, reporter)
        items = [
            entry
            for layer in layers
            for group in GROUPS
            for entry in read_items(self.place.spectra, layer, group, slots(layer, group, options))
        ]
        if options.ranks == "allocated":
            ranks = allocate([entry.item for entry in items], budget_parameters(layers, options))
        else:
            fixed = {(e.layer.path, e.slot.name): fixed_ranks(e.layer, e.slot, options) for e in items}
            ranks = [fixed[e.layer.path, e.slot.name][e.expert] for e in items]
        write_table(self.job.folder / "allocation.parquet", allocation_table(items, ranks))
        specs: dict[str, dict[str, Any]] = defaultdict(dict)
        for entry, rank in zip(items, ranks, strict=True):
            bases = {"bases": [0] * entry.layer.num_experts} if options.base != "none" else {}
            slot = specs[entry.layer.path].setdefault(entry.slot.name, {"ranks": [], **bases})
            slot["ranks"].append(rank)
        return Decision(
            layers=dict(specs),
            config={},
            replaced={name for layer in layers for name in layer.owned},
            shards=[self._shard(layer, group, specs[layer.path]) for layer in layers for group in GROUPS],
            provenance=dict(specs),
            expert_parameters=sum(count_parameters(layer, specs[layer.path]) for layer in layers),
        )

    def _shard(self, layer: MoELayer, group: Group, spec: dict[str, Any]) -> Work:
        own = {slot.name: spec[slot.name] for slot in slots(layer, group, self.options)}
        ranks = {name: entry["ranks"] for name, entry in own.items()}
        mapped = [MAP_NAME] if layer.always_mapped and group == "up" else []
        names = self.prepared.skeleton.disk_names(layer, parameter_names(layer, own) + mapped)
        return Work(factorise_group, (self.place, layer.path, group, ranks, names))


def read_items(spectra: Path, layer: MoELayer, group: Group, of: list[Slot]) -> list[SlotItem]:
    """The budget's items of one group, from its spectra."""
    table = pq.read_table(spectra_path(spectra, layer.path, group))
    energies = table["energy"].combine_chunks()
    names = table["slot"].to_pylist()
    return [
        SlotItem(layer, group, slot, expert, Item(slot.num_rows, slot.num_columns, energies[row].values.to_numpy()))
        for slot in of
        for expert, row in enumerate(range(names.index(slot.name), names.index(slot.name) + layer.num_experts))
    ]


def allocation_table(items: list[SlotItem], ranks: list[int]) -> pa.Table:
    """What each matrix was given, what that costs and what it leaves out."""
    return pa.table(
        {
            "layer": [entry.layer.path for entry in items],
            "slot": [entry.slot.name for entry in items],
            "expert": [entry.expert for entry in items],
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
