"""The units of work of a job: plain functions of paths and settings, idempotent, each leaving one durable file.

An executor may run them anywhere, in any order that respects their inputs, and more than once: a unit whose file
exists does nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..calibration.statistics import LayerStatistics
from ..calibration.worker import pick_device, statistics_path
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.shard import load_tensors
from ..checkpoint.writer import ShardInfo, atomic_write, describe_shard, write_shard
from ..method_options import D2MoE
from ..methods.d2moe import GroupProblem, channel_alignment
from ..methods.forms import PLAIN, Form, candidates
from ..methods.metric import sums_used
from ..model.discovery import MoELayer
from ..model.expert_bank import Group, stock_name, to_canonical
from ..model.levels import factor_names, piece_names, piece_position, pieces_of, split_rows
from ..model.merged import MAP_NAME
from ..model.skeleton import Skeleton
from ..model.stored_experts import StoredExperts
from ..storage import local

FORMS_KEY = b"forms"
"""Key of a spectra table's metadata: its forms, JSON."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where the units of one job find their inputs and leave their files.

    Attributes:
        checkpoint: folder of the original.
        statistics, alignment, spectra: folders of those artifacts.
        options: the method.
        device: torch device, or `auto`.
    """

    checkpoint: Path
    statistics: Path
    alignment: Path
    spectra: Path
    options: D2MoE
    device: str


@lru_cache(maxsize=1)
def open_checkpoint(checkpoint: Path) -> tuple[Skeleton, dict[str, MoELayer]]:
    """The skeleton of a checkpoint; a process runs many units of the same one."""
    skeleton = Skeleton(CheckpointReader(checkpoint))
    return skeleton, {layer.path: layer for layer in skeleton.moe_layers()}


def read_weight(checkpoint: Path, path: str, group: Group) -> tuple[MoELayer, Tensor]:
    """(layer, its experts (E, M, N) in the checkpoint's dtype); memory is the caller's."""
    skeleton, layers = open_checkpoint(checkpoint)
    layer = layers[path]
    return layer, to_canonical(layer, group, skeleton.take(f"{path}.{stock_name(layer, group)}"))


def spectra_path(folder: Path, path: str, group: Group) -> Path:
    """File of the energies of one group of projections of one layer."""
    return folder / f"{path}.{group}.parquet"


def align_layer(place: Workplace, path: str) -> None:
    """Finds the channel order of every expert of a layer."""
    target = place.alignment / f"{path}.safetensors"
    if target.exists():
        return
    layer, up = read_weight(place.checkpoint, path, "up")
    _, down = read_weight(place.checkpoint, path, "down")
    statistics = LayerStatistics.load(layer, statistics_path(place.statistics, path))
    write_shard(target, {"order": channel_alignment(layer, up, down, statistics)})


class _Setup:
    """Everything that the factorisations of one group of projections of one layer start from."""

    def __init__(self, place: Workplace, path: str, group: Group) -> None:
        self.place, self.group = place, group
        self.skeleton, layers = open_checkpoint(place.checkpoint)
        self.layer = layers[path]
        used = sums_used(self.layer, group, place.options)
        self.statistics = LayerStatistics.load(self.layer, statistics_path(place.statistics, path), used)
        self.order: Tensor | None = None
        if place.options.align:
            align_layer(place, path)
            self.order = load_tensors(place.alignment / f"{path}.safetensors")["order"]

    def problem(self, form: Form) -> GroupProblem:
        """The factorisation in one form."""
        weight, device = StoredExperts(self.skeleton, self.layer, self.group), pick_device(self.place.device)
        options = self.place.options
        return GroupProblem(self.layer, self.group, weight, self.statistics, options, self.order, device, form)

    def forms(self) -> list[Form]:
        """The forms that the options ask for."""
        plain = self.problem(PLAIN)
        return candidates(self.layer, self.group, self.place.options, self.statistics, plain.weights)


def decompose_group(place: Workplace, path: str, group: Group) -> None:
    """Writes the energies of a group's weighted factorisation in every form that may be chosen."""
    target = spectra_path(place.spectra, path, group)
    if target.exists():
        return
    setup = _Setup(place, path, group)
    write_spectra(target, {form: setup.problem(form).energies() for form in setup.forms()})


def write_spectra(target: Path, energies: dict[Form, dict[str, Tensor]]) -> None:
    """Writes energies (I, K) by form and slot as a table, a row an item; its metadata lists the forms."""
    rows = [
        (index, name, row.numpy())
        for index, by_slot in enumerate(energies.values())
        for name, energy_IK in by_slot.items()
        for row in energy_IK
    ]
    schema = pa.schema([("form", pa.int32()), ("slot", pa.string()), ("energy", pa.list_(pa.float32()))])
    forms = json.dumps([asdict(form) for form in energies])
    table = pa.table(dict(zip(schema.names, zip(*rows, strict=True), strict=True)), schema)
    write_table(target, table.replace_schema_metadata({FORMS_KEY: forms}))


def read_spectra(target: Path) -> dict[Form, dict[str, list[NDArray[np.float32]]]]:
    """What `write_spectra` wrote: the energies of each item by form and slot."""
    table = read_table(target)
    stored = json.loads(table.schema.metadata[FORMS_KEY])
    forms = [Form(**{name: of and tuple(of) for name, of in each.items()}) for each in stored]
    found: dict[Form, dict[str, list[NDArray[np.float32]]]] = {form: defaultdict(list) for form in forms}
    energies = table["energy"].combine_chunks()
    for row, (index, slot) in enumerate(zip(table["form"].to_pylist(), table["slot"].to_pylist(), strict=True)):
        found[forms[index]][slot].append(energies[row].values.to_numpy())
    return found


def factorise_group(
    place: Workplace,
    path: str,
    group: Group,
    form: Form,
    ranks: dict[str, list[list[int]]],
    names: dict[str, str],
    target: Path,
) -> ShardInfo:
    """Writes the factors of a group of one layer as a shard of the output.

    Args:
        place: inputs.
        path: experts module.
        group: `up` or `down`.
        form: how the experts are put together.
        ranks: slot -> for each level, the largest first, one rank an expert.
        names: parameter of the experts module -> its name on disk.
        target: the shard.
    """
    if target.exists():
        return describe_shard(target)
    problem = _Setup(place, path, group).problem(form)
    tensors = problem.factors({slot: levels[0] for slot, levels in ranks.items()}, problem.weight_EMN.dtype)
    for slot, levels in ranks.items():
        if len(levels) == 1:
            continue
        pieces = pieces_of(levels)
        for name in factor_names(slot):
            parts = split_rows(tensors.pop(name), pieces)
            tensors |= zip(piece_names(name, len(parts)), parts, strict=True)
    if MAP_NAME in names:
        tensors[MAP_NAME] = torch.arange(len(problem.weight_EMN))
    # what a level reads lies together: reading ahead reads little that is not wanted
    return write_shard(target, {names[name]: tensor for name, tensor in tensors.items()}, order=piece_position)


def copy_tensors(checkpoint: Path, names: list[str], target: Path) -> ShardInfo:
    """Writes tensors of the original, byte for byte, as a shard of the output."""
    if target.exists():
        return describe_shard(target)
    entries = CheckpointReader(checkpoint).entries
    return write_shard(target, {name: entries[name] for name in names})


def write_table(path: Path, table: pa.Table) -> None:
    """Writes Parquet atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    atomic_write(path, sink.getvalue().to_pybytes())


def read_table(path: Path) -> pa.Table:
    """What `write_table` wrote."""
    with local(path) as here:
        return pq.read_table(here)


def statistics_seen(layers: list[MoELayer], folder: Path) -> list[MoELayer]:
    """The layers that calibration reached, of those that there are."""
    return [layer for layer in layers if statistics_path(folder, layer.path).exists()]
