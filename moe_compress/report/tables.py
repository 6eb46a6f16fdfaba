"""Tables on the terminal: a finished job, and the structure of a checkpoint."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..checkpoint.manifest import MANIFEST_NAME, Manifest
from ..checkpoint.reader import CheckpointReader, resolve_checkpoint
from ..errors import RecipeError
from ..model.experts import DENSE
from ..model.plugin import METHOD
from ..model.skeleton import Skeleton
from ..stages.summary import SUMMARY_NAME


def megabytes(count: float) -> str:
    """Bytes for people, in powers of ten."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def show_job(job_dir: Path, console: Console) -> None:
    """Prints what a finished job did.

    Raises:
        RecipeError: the folder holds no finished job.
    """
    path = job_dir / SUMMARY_NAME
    if not path.is_file():
        raise RecipeError(f"job_dir: {job_dir} holds no finished job; run moe-compress compress first")
    summary: dict[str, Any] = json.loads(path.read_text())
    console.print(_quality_table(summary))
    console.print(_stage_table(summary["stages"]))


def _quality_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['model']} -> {summary['output']}")
    for column in ("", "original", "compressed", "change"):
        table.add_column(column, justify="right" if column else "left")
    parameters, size, scores = summary["parameters"], summary["bytes"], summary["scores"]

    def add(name: str, before: float, after: float, show: Any) -> None:
        table.add_row(name, show(before), show(after), f"{after / before - 1:+.1%}")

    add("parameters", parameters["original"], parameters["compressed"], "{:,.0f}".format)
    add("  routed experts", parameters["experts_original"], parameters["experts_compressed"], "{:,.0f}".format)
    add("bytes on disk", size["original"], size["compressed"], megabytes)
    if scores is not None:
        add("perplexity", scores["original_perplexity"], scores["perplexity"], "{:.3f}".format)
        table.add_row("top-1 agreement", "", f"{scores['agreement']:.2%}", "")
        table.add_row("KL, nats a token", "", f"{scores['kl']:.4f} ± {scores['kl_error']:.4f}", "")
    return table


def _stage_table(stages: dict[str, dict[str, float]]) -> Table:
    table = Table(title="this run, by stage")
    for column in ("stage", "seconds", "tokens/s", "peak memory"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, figures in stages.items():
        speed = f"{figures['tokens'] / max(figures['seconds'], 1e-9):,.0f}" if figures["tokens"] else ""
        peak = megabytes(figures["peak_bytes"]) if "peak_bytes" in figures else ""
        table.add_row(name, f"{figures['seconds']:.1f}", speed, peak)
    return table


def inspect_checkpoint(checkpoint: str, console: Console) -> None:
    """Prints MoE layers, experts, ranks and bytes of a checkpoint."""
    reader = CheckpointReader(resolve_checkpoint(checkpoint))
    skeleton = Skeleton(reader)
    quantization = reader.config.get("quantization_config") or {}
    compressed = quantization.get("layers", {}) if quantization.get("quant_method") == METHOD else {}
    table = Table(title=f"{checkpoint}: {reader.config.get('model_type')}, {megabytes(reader.total_bytes)}")
    for column in ("experts", "number", "shape", "bytes", "ranks"):
        table.add_column(column, justify="left" if column == "experts" else "right")
    for path, spec in compressed.items():
        names = skeleton.source_names(path)
        size = sum(reader.entries[name].num_bytes for name in names)
        ranks = "; ".join(f"{slot} {_ranks(entry['ranks'])}" for slot, entry in spec.items())
        number = len(next(iter(spec.values()))["ranks"])
        table.add_row(path, str(number), "", megabytes(size), ranks)
    for layer in [] if compressed else skeleton.moe_layers():
        names = skeleton.source_names(layer.path)
        size = sum(reader.entries[name].num_bytes for name in names)
        shape = f"{layer.hidden_size} x {layer.intermediate_size}"
        table.add_row(layer.path, str(layer.num_experts), shape, megabytes(size), "")
    console.print(table)
    total = sum(prod(entry.shape) for entry in reader.entries.values())
    console.print(f"{total:,} parameters in {len(reader.entries)} tensors, {len(reader.files)} shards")
    if (reader.folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(reader.folder)
        console.print(f"made from {manifest.source.name} by moe-compress {manifest.tool_version}")


def _ranks(ranks: list[int]) -> str:
    low = [rank for rank in ranks if rank != DENSE]
    dense = len(ranks) - len(low)
    spread = f"{min(low)}..{max(low)}" if low else "none"
    return f"{spread} ({dense} whole)" if dense else spread
