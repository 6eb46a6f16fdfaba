"""What the router does, as a table, and what of it a person should know before trusting weights and groups."""

from __future__ import annotations

import pyarrow as pa
import torch

from ..calibration.statistics import LayerStatistics
from ..calibration.worker import statistics_path
from ..job import Job
from ..progress import Reporter
from .prepare import Prepared
from .units import write_table

ROUTING_NAME = "routing.parquet"

TOKEN_FLOOR = 64
"""Experts that saw fewer tokens are named: what is estimated for them is thin."""

UNIFORM_ENTROPY = 0.98
"""Of its greatest value; a router beyond it uses all experts alike, and frequency has nothing to hold on to."""


def report_routing(job: Job, prepared: Prepared, reporter: Reporter) -> None:
    """Writes routing.parquet, one row an expert, and says which layers route evenly and which experts are rare.

    `entropy` is the layer's, of its activation frequencies, over its greatest value log E.
    """
    tables = []
    even: list[str] = []
    num_rare = 0
    for layer in prepared.layers:
        names = ("num_tokens", "weight_sum", "saliency_sum", "taylor_sum", "output_norm_max")
        sums = LayerStatistics.load(layer, statistics_path(prepared.statistics, layer.path), names)
        tokens_E = sums["num_tokens"].double()
        frequency_E = tokens_E / tokens_E.sum().clamp_min(1)
        greatest = torch.tensor(float(layer.num_experts), dtype=torch.float64).log().clamp_min(1e-12)
        entropy = float(-torch.special.xlogy(frequency_E, frequency_E).sum() / greatest)
        num_rare += int((tokens_E < TOKEN_FLOOR).sum())
        if entropy > UNIFORM_ENTROPY:
            even.append(layer.path)
        tables.append(
            pa.table(
                {
                    "layer": [layer.path] * layer.num_experts,
                    "expert": range(layer.num_experts),
                    "num_tokens": sums["num_tokens"].numpy(),
                    "frequency": frequency_E.numpy(),
                    "mean_weight": (sums["weight_sum"] / tokens_E.clamp_min(1)).numpy(),
                    "saliency": (sums["saliency_sum"] / tokens_E.clamp_min(1)).numpy(),
                    "taylor": sums["taylor_sum"].numpy(),
                    "output_norm_max": sums["output_norm_max"].numpy(),
                    "is_rare": (tokens_E < TOKEN_FLOOR).numpy(),
                    "entropy": [entropy] * layer.num_experts,
                }
            )
        )
    write_table(job.folder / ROUTING_NAME, pa.concat_tables(tables))
    if num_rare:
        reporter.say(f"{num_rare} experts saw fewer than {TOKEN_FLOOR} tokens (routing.parquet); more text helps them")
    if even:
        reporter.say(
            f"{len(even)} of {len(tables)} layers use all experts alike (entropy over {UNIFORM_ENTROPY:.0%}, first"
            f" {even[0]}): there frequency tells experts little apart"
        )
