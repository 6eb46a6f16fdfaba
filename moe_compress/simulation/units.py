"""What stands in for the units of a job: files of the same names, small and with made-up figures in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..calibration.text import TokenBatch
from ..calibration.worker import statistics_path
from ..checkpoint.writer import write_shard
from ..methods.forms import PLAIN
from ..methods.slots import slots
from ..model.discovery import MoELayer
from ..model.expert_bank import Group
from ..stages.units import Workplace, spectra_path, write_spectra
from .executor import Leave

_DIRECTIONS = 32
"""Of a stand-in's spectrum; the real one has as many as its matrix's smaller side."""

_SUMS = ("weight_sum", "saliency_sum", "taylor_sum", "output_norm_max", "up_fisher", "down_fisher")


def leave_statistics(folder: Path, layers: list[MoELayer]) -> list[str]:
    """Statistics of some layers: what is one number an expert; their paths."""
    for layer in layers:
        random = torch.Generator().manual_seed(int.from_bytes(layer.path.encode()) % 2**63)
        shape = (layer.num_experts,)
        tensors = {name: torch.rand(shape, generator=random, dtype=torch.float64) for name in _SUMS}
        tensors["num_tokens"] = torch.randint(0, 4096, shape, generator=random)
        write_shard(statistics_path(folder, layer.path), tensors)
    return [layer.path for layer in layers]


def stubs(layers: list[MoELayer]) -> dict[str, Leave]:
    """What stands in for each unit, by the name of its function."""
    by_path = {layer.path: layer for layer in layers}

    def decompose_group(place: Workplace, path: str, group: Group) -> None:
        layer = by_path[path]
        random = np.random.default_rng(list(f"{path}.{group}".encode()))
        energies = {
            slot.name: torch.from_numpy(-np.sort(-random.pareto(2.0, (layer.num_experts, _DIRECTIONS)), 1)).float()
            for slot in slots(layer, group, place.options)
        }
        write_spectra(spectra_path(place.spectra, path, group), {PLAIN: energies})

    def evaluate_windows(
        checkpoint: Path,
        against: Path,
        tokens: Path,
        batch_size: int,
        dtype: str,
        device: str,
        start: int,
        stop: int,
        *_: Any,
    ) -> pa.Table:
        batches = list(TokenBatch.load(tokens).batches(batch_size))[start:stop]
        counts = [len(ids) for batch in batches for ids in batch.predicted]
        zeros = [0.0] * len(counts)
        return pa.table({"tokens": counts, "nll": zeros, "original_nll": zeros, "kl": zeros, "agreement": counts})

    def nothing(*_: Any) -> None:
        return None

    return {
        "decompose_group": decompose_group,
        "evaluate_windows": evaluate_windows,
        "factorise_group": nothing,
        "prune_layer": nothing,
    }
