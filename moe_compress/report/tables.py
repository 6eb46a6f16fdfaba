"""Tables on the terminal: a finished job, and the structure of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checkpoint.manifest import MANIFEST_NAME, Manifest
from ..checkpoint.reader import CheckpointReader, resolve_checkpoint
from ..errors import RecipeError
from ..model.plugin import METHOD
from ..model.skeleton import Skeleton
from ..model.slots import DENSE
from ..stages.summary import SUMMARY_NAME, TRAINING_NAME

_TRAINING_COLUMNS = ("teacher", "before", "after")


def bytes_for_people(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{count:.0f} B"


def show_job(job_dir: Path, console: Console) -> None:
    """Prints what a finished job did.

    Raises:
        RecipeError: the folder holds no finished job.
    """
    summary = _read_summary(job_dir / SUMMARY_NAME, "compress")
    console.print(_quality_table(summary))
    if summary.get("levels"):
        console.print(_level_table(summary["levels"], (summary["scores"] or {}).get("levels", {})))
    if (summary["scores"] or {}).get("tasks"):
        console.print(_task_table(summary["scores"]["tasks"]))
    console.print(_stage_table(summary["stages"]))


def _read_summary(path: Path, command: str) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"job_dir: {path.parent} holds no finished job; run moe-compress {command} first")
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise RecipeError(f"job_dir: {path} is not JSON ({error}); run moe-compress {command} again") from error
    return summary


def _quality_table(summary: dict[str, Any]) -> Table:
    table = Table(title=Text(f"{summary['model']} -> {summary['output']}"))
    for column in ("", "original", "compressed", "change"):
        table.add_column(column, justify="right" if column else "left")
    parameters, size, scores = summary["parameters"], summary["bytes"], summary["scores"]

    def add(name: str, before: float, after: float, show: Callable[[float], str]) -> None:
        table.add_row(name, show(before), show(after), f"{after / before - 1:+.1%}" if before else "")

    add("parameters", parameters["original"], parameters["compressed"], "{:,.0f}".format)
    add("  routed experts", parameters["experts_original"], parameters["experts_compressed"], "{:,.0f}".format)
    add("bytes on disk", size["original"], size["compressed"], bytes_for_people)
    if scores is not None and "perplexity" in scores:
        add("perplexity", scores["original_perplexity"], scores["perplexity"], "{:.3f}".format)
        if scores.get("exact_match") is not None:
            add("exact match, generated", scores["original_exact_match"], scores["exact_match"], "{:.2%}".format)
            add("token F1, generated", scores["original_token_f1"], scores["token_f1"], "{:.2%}".format)
        table.add_row("top-1 agreement", "", f"{scores['agreement']:.2%}", "")
        table.add_row("KL, nats a token", "", f"{scores['kl']:.4f} ± {scores['kl_error']:.4f}", "")
    return table


def _task_table(tasks: dict[str, dict[str, Any]]) -> Table:
    """A row a metric of each task."""
    table = _task_columns("original", "compressed", "change")
    for task, score in tasks.items():
        for metric, found in score["metrics"].items():
            given = score["original_metrics"][metric]
            change = f"{100 * (found['value'] - given['value']):+.1f}"
            table.add_row(*_task_name(task, metric, score), _interval(given), _interval(found), change)
    return table


def _task_columns(*columns: str) -> Table:
    table = Table(title="tasks, % [95 % confidence interval]")
    for column in ("", "examples", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    return table


def _task_name(task: str, metric: str, score: dict[str, Any]) -> tuple[Text, str]:
    return Text(f"{task} {metric.replace('_', ' ')}"), f"{score['num_examples']:,}"


def _interval(estimate: dict[str, float], separator: str = " ") -> Text:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return Text(f"{value:.1f}{separator}[{low:.1f}, {high:.1f}]")


def show_training(job_dir: Path, console: Console) -> None:
    """Prints the table of a finished training.

    Raises:
        RecipeError: the folder holds none.
    """
    summary = _read_summary(job_dir / TRAINING_NAME, "distill")
    table = Table(title=Text(f"{summary['student']} -> {summary['output']}"))
    for column in ("", *_TRAINING_COLUMNS):
        table.add_column(column, justify="left" if not column else "right")
    scores = summary["scores"]
    if scores:
        before, after = scores["before"], scores["after"]
        original = before["original_perplexity"]
        known = "" if original is None else f"{original:.3f}"
        table.add_row("perplexity", known, f"{before['perplexity']:.3f}", f"{after['perplexity']:.3f}")
        if original is not None:
            kl = [f"{one['kl']:.4f} ± {one['kl_error']:.4f}" for one in (before, after)]
            table.add_row("KL, nats a token", "", *kl)
            table.add_row("top-1 agreement", "", f"{before['agreement']:.2%}", f"{after['agreement']:.2%}")
    losses = {entry["step"]: entry["validation_loss"] for entry in summary["validation"]}
    best = summary["best_step"]
    table.add_row(f"held-out loss, kept from step {best}", "", f"{losses[0]:.4f}", f"{losses[best]:.4f}")
    console.print(table)
    if summary["tasks"]:
        console.print(_trained_task_table(summary["tasks"]))
    if summary["returned"] is not None:
        console.print(f"{summary['returned']:.1%} of the lost perplexity came back", highlight=False)
    console.print(_stage_table(summary["stages"]))


def _trained_task_table(tasks: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """A row a metric of each task; `tasks` are by checkpoint."""
    table = _task_columns(*_TRAINING_COLUMNS)
    for task, score in tasks["after"].items():
        for metric in score["metrics"]:
            found = [tasks[each][task]["metrics"][metric] if each in tasks else None for each in _TRAINING_COLUMNS]
            cells = ["" if estimate is None else _interval(estimate, "\n") for estimate in found]
            table.add_row(*_task_name(task, metric, score), *cells)
    return table


def _level_table(levels: dict[str, dict[str, Any]], scores: dict[str, dict[str, float]]) -> Table:
    """A row a level, the largest first, with what is measured of it."""
    table = Table(title="levels")
    for column in ("level", "parameters", "bytes read", "perplexity", "top-1 agreement", "KL, nats a token"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for name, level in sorted(levels.items(), key=lambda each: -each[1]["bytes"]):
        row = [name, f"{level['parameters']:,}", bytes_for_people(level["bytes"])]
        row.append("" if level["perplexity"] is None else f"{level['perplexity']:.3f}")
        if name in scores:
            row += [f"{scores[name]['agreement']:.2%}", f"{scores[name]['kl']:.4f} ± {scores[name]['kl_error']:.4f}"]
        table.add_row(*row)
    return table


def _stage_table(stages: dict[str, dict[str, float]]) -> Table:
    table = Table(title="this run, by stage")
    for column in ("stage", "seconds", "tokens/s", "peak memory"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, figures in stages.items():
        speed = f"{figures['tokens'] / max(figures['seconds'], 1e-9):,.0f}" if figures["tokens"] else ""
        peak = bytes_for_people(figures["peak_bytes"]) if "peak_bytes" in figures else ""
        table.add_row(name, f"{figures['seconds']:.1f}", speed, peak)
    return table


def inspect_checkpoint(checkpoint: str, console: Console) -> None:
    """Prints MoE layers, experts, ranks and bytes of a checkpoint."""
    reader = CheckpointReader(resolve_checkpoint(checkpoint))
    skeleton = Skeleton(reader)
    quantization = reader.config.get("quantization_config") or {}
    compressed = quantization.get("layers", {}) if quantization.get("quant_method") == METHOD else {}
    table = Table(
        title=Text(f"{checkpoint}: {reader.config.get('model_type')}, {bytes_for_people(reader.total_bytes)}")
    )
    table.add_column("experts", overflow="fold")
    for column in ("number", "bytes", "each"):
        table.add_column(column, justify="right")

    def add(path: str, number: int, each: str) -> None:
        size = sum(reader.entries[name].num_bytes for name in skeleton.source_names(path))
        table.add_row(path, str(number), bytes_for_people(size), each)

    for path, spec in compressed.items():
        ranks = {slot: entry["ranks"] for slot, entry in spec.items() if isinstance(entry, dict)}
        each = [f"{slot} {_ranks(of_slot)}" for slot, of_slot in ranks.items()]
        if "router" in spec:
            each.insert(0, "shorter router" if spec["router"] == "slice" else "led to by the original's router")
        add(path, spec.get("num_experts") or len(next(iter(ranks.values()))), "\n".join(each))
    for layer in [] if compressed else skeleton.moe_layers():
        add(layer.path, layer.num_experts, f"{layer.hidden_size} x {layer.intermediate_size}")
    console.print(table)
    total = sum(prod(entry.shape) for entry in reader.entries.values())
    console.print(f"{total:,} parameters in {len(reader.entries)} tensors, {len(reader.files)} shards", highlight=False)
    if (reader.folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(reader.folder)
        if manifest.levels:
            console.print(_level_table(manifest.model_dump()["levels"], {}))
        made = f"made from {manifest.source.name} by moe-compress {manifest.tool_version}"
        console.print(made, highlight=False, markup=False)


def _ranks(ranks: list[int]) -> str:
    low = [rank for rank in ranks if rank != DENSE]
    dense = len(ranks) - len(low)
    found = [f"rank {min(low)}..{max(low)}"] if low else []
    return ", ".join(found + ([f"{dense} whole"] if dense else []))
