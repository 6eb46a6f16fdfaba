"""Allocate: every rank, from the energies of all layers, experts and projections."""

from __future__ import annotations

from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq

from ..budget import Item, allocate, error, parameters
from ..executor import Executor
from ..job import Job
from ..methods.d2moe import budget_parameters, fixed_ranks, slots
from ..model.expert_bank import GROUPS, Group
from ..progress import Reporter
from .calibrate import Decomposing
from .prepare import Prepared
from .units import Workplace, decompose_group, spectra_path, write_table

Ranks = dict[tuple[str, Group], dict[str, list[int]]]
"""(experts path, group) -> slot -> one rank an expert."""


def allocate_ranks(
    job: Job, prepared: Prepared, place: Workplace, decomposing: Decomposing, executor: Executor, reporter: Reporter
) -> Ranks:
    """Decides every rank, from the energies of all layers, experts and projections."""
    options, layers = prepared.recipe.method, prepared.layers
    keys = [(layer, group) for layer in layers for group in GROUPS]
    missing = [k for k in keys if not spectra_path(place.spectra, k[0].path, k[1]).exists()]
    with reporter.stage("allocate", len(missing)) as stage:
        refs = [
            decomposing.get((layer.path, group)) or executor.submit(decompose_group, place, layer.path, group)
            for layer, group in missing
        ]
        for _ in executor.results(refs):
            stage.advance()
    owners: list[tuple[str, Group, str, int]] = []
    items: list[Item] = []
    ranks: list[int] = []
    for layer, group in keys:
        table = pq.read_table(spectra_path(place.spectra, layer.path, group))
        energies = table["energy"].combine_chunks()
        names = table["slot"].to_pylist()
        for slot in slots(layer, group, options):
            start = names.index(slot.name)
            for expert in range(layer.num_experts):
                energy = energies[start + expert].values.to_numpy()
                owners.append((layer.path, group, slot.name, expert))
                items.append(Item(slot.num_rows, slot.num_columns, energy))
            if options.ranks != "allocated":
                ranks += fixed_ranks(layer, slot, options)
    if options.ranks == "allocated":
        budget = budget_parameters(layers, options)
        ranks = allocate(items, budget)
    chosen: Ranks = defaultdict(lambda: defaultdict(list))
    for (path, group, slot_name, _), rank in zip(owners, ranks, strict=True):
        chosen[path, group][slot_name].append(rank)
    columns = list(zip(*owners, strict=True))
    table = pa.table(
        {
            "layer": columns[0],
            "slot": columns[2],
            "expert": columns[3],
            "rank": ranks,
            "parameters": [parameters(i, r) for i, r in zip(items, ranks, strict=True)],
            "error": [error(i, r) for i, r in zip(items, ranks, strict=True)],
            "energy": [error(i, 0) for i in items],
            "break_even_rank": [i.dense_parameters // (i.num_rows + i.num_columns) for i in items],
        }
    )
    write_table(job.folder / "allocation.parquet", table)
    return {key: dict(value) for key, value in chosen.items()}
