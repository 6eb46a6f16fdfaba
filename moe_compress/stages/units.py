"""The units of work of a job: plain functions of paths and settings, idempotent, each leaving one durable file.

An executor may run them anywhere, in any order that respects their inputs, and more than once: a unit whose file
exists does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..calibration.statistics import LayerStatistics
from ..calibration.worker import pick_device, statistics_path
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.writer import ShardInfo, atomic_write, describe_shard, write_shard
from ..method_options import D2MoE
from ..methods.d2moe import GroupProblem, channel_alignment, sums_used
from ..model.discovery import MoELayer
from ..model.expert_bank import Group, stock_name, to_canonical
from ..model.levels import factor_names, piece_names, piece_position, pieces_of, split_rows
from ..model.merged import MAP_NAME
from ..model.skeleton import Skeleton
from ..model.stored_experts import StoredExperts


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


def _problem(place: Workplace, path: str, group: Group) -> GroupProblem:
    skeleton, layers = open_checkpoint(place.checkpoint)
    layer = layers[path]
    statistics = LayerStatistics.load(layer, statistics_path(place.statistics, path), sums_used(place.options, group))
    order = None
    if place.options.align:
        align_layer(place, path)
        order = load_file(place.alignment / f"{path}.safetensors")["order"]
    device = pick_device(place.device)
    return GroupProblem(layer, group, StoredExperts(skeleton, layer, group), statistics, place.options, order, device)


def decompose_group(place: Workplace, path: str, group: Group) -> None:
    """Writes the energies of a group's weighted factorisation: (slot, expert, energy list)."""
    target = spectra_path(place.spectra, path, group)
    if target.exists():
        return
    write_spectra(target, _problem(place, path, group).energies())


def write_spectra(target: Path, energies: dict[str, Tensor]) -> None:
    """Writes energies (E, K) by slot as a table."""
    table = pa.table(
        {
            "slot": [name for name, rows in energies.items() for _ in rows],
            "expert": [expert for rows in energies.values() for expert in range(len(rows))],
            "energy": [row.numpy() for rows in energies.values() for row in rows],
        },
        schema=pa.schema([("slot", pa.string()), ("expert", pa.int32()), ("energy", pa.list_(pa.float32()))]),
    )
    write_table(target, table)


def factorise_group(
    place: Workplace, path: str, group: Group, ranks: dict[str, list[list[int]]], names: dict[str, str], target: Path
) -> ShardInfo:
    """Writes the factors of a group of one layer as a shard of the output.

    Args:
        place: inputs.
        path: experts module.
        group: `up` or `down`.
        ranks: slot -> for each level, the largest first, one rank an expert.
        names: parameter of the experts module -> its name on disk.
        target: the shard.
    """
    if target.exists():
        return describe_shard(target)
    problem = _problem(place, path, group)
    tensors = problem.factors({slot: levels[0] for slot, levels in ranks.items()}, problem.weight_EMN.dtype)
    for slot, levels in ranks.items():
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


def statistics_seen(layers: list[MoELayer], folder: Path) -> list[MoELayer]:
    """The layers that calibration reached, of those that there are."""
    return [layer for layer in layers if statistics_path(folder, layer.path).exists()]
