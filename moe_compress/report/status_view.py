"""The status of a job or of a batch, for people and for scripts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..job import in_use
from ..stages.summary import SUMMARY_NAME
from ..storage import as_path
from .batch import JOBS, batch_view
from .status import StageStatus, Status, read_status
from .tables import bytes_for_people

_STOPPED = "stopped; run the same command again to go on"


def look(folder: Path) -> tuple[RenderableType, dict[str, Any], bool]:
    """(what a person is shown of a folder of a job or a batch, the same as plain data, whether anything runs).

    Raises:
        RecipeError: the folder is neither.
    """
    summary = folder / SUMMARY_NAME
    if summary.is_file() and JOBS in json.loads(summary.read_text()):
        return _look_at_batch(folder)
    status = read_status(folder)
    return _job_view(status), status.to_dict(), status.state == "running"


def _look_at_batch(folder: Path) -> tuple[RenderableType, dict[str, Any], bool]:
    runs = in_use(folder)  # before its summary is read, which else may be older than its end
    batch = json.loads((folder / SUMMARY_NAME).read_text())
    below = []
    for row in batch[JOBS]:
        if row["status"] != "running":
            continue
        if not runs:
            row["status"] = "stopped"
        elif in_use(as_path(row["job_dir"])):
            status = read_status(as_path(row["job_dir"]))
            row["stage"] = status.to_dict()["stage"]
            if status.current is not None:
                below.append(Text(f"{row['name']}: {_stage_line(status.current)}"))
    if not runs and any(row["status"] in ("stopped", "waiting") for row in batch[JOBS]):
        below.append(Text(_STOPPED))
    return Group(batch_view(batch[JOBS]), *below), batch, runs


def _job_view(status: Status) -> RenderableType:
    """What a person is shown."""
    table = Table.grid(padding=(0, 2))
    now = status.last_event_s if status.state in ("done", "failed", "stopped") else time.time()
    state = _STOPPED if status.state == "stopped" else status.state
    table.add_row("job", Text(status.folder))
    table.add_row("state", Text(state if status.reason is None else f"{state}: {status.reason}"))
    if status.num_runs:
        where = f"{status.command}, process {status.process} on {status.host}, {_duration(now - status.started_s)}"
        table.add_row("run", Text(where))
    current = status.current
    if current is not None:
        table.add_row("stage", Text(_stage_line(current)))
    if status.remaining:
        table.add_row("remain", ", ".join(status.remaining))
    if status.peak_bytes is not None:
        table.add_row("peak memory", bytes_for_people(status.peak_bytes))
    if status.worker_losses or status.task_losses or status.restarts or status.num_runs > 1:
        lost = f"{status.worker_losses} layer workers and {status.task_losses} tasks lost"
        again = f"{status.num_runs - 1} earlier runs, {status.restarts} restarts of a training"
        table.add_row("faults", f"{again}, {lost}")
    if status.training:
        table.add_row("training", ", ".join(f"{key} {value:g}" for key, value in _of_interest(status.training)))
    if status.last_event:
        table.add_row(
            "last event", f"{status.last_event}, {_duration(max(0.0, time.time() - status.last_event_s))} ago"
        )
    return Group(table, *([_stage_table(status)] if any(stage.is_over for stage in status.stages) else []))


def _of_interest(figures: dict[str, float]) -> list[tuple[str, float]]:
    return [(key, figures[key]) for key in ("step", "loss", "kl", "validation_loss") if key in figures]


def _stage_line(stage: StageStatus) -> str:
    parts = [f"{stage.name} {stage.done}/{stage.total}"]
    if stage.tokens_per_s is not None:
        parts.append(f"{stage.tokens_per_s:,.0f} tokens/s")
    if stage.left_s is not None:
        parts.append(f"{_duration(stage.left_s)} left")
    if stage.note:
        parts.append(stage.note)
    return ", ".join(parts)


def _stage_table(status: Status) -> Table:
    table = Table(title="this run, by stage")
    for column in ("stage", "steps", "seconds", "tokens/s", "peak memory"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in status.stages:
        if stage.is_over:
            speed = "" if stage.tokens_per_s is None else f"{stage.tokens_per_s:,.0f}"
            peak = "" if stage.peak_bytes is None else bytes_for_people(stage.peak_bytes)
            table.add_row(stage.name, f"{stage.done}/{stage.total}", f"{stage.seconds:.1f}", speed, peak)
    return table


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
