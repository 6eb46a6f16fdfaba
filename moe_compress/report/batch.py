"""The summary of a batch, a row a job."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .tables import bytes_for_people

JOBS = "jobs"
"""The key of the rows in a batch's summary.json, which that of a job does not have."""


def batch_view(rows: list[dict[str, Any]]) -> RenderableType:
    """Name, ratio, status, bytes and perplexity before and after, seconds of each job; below, why some failed."""
    table = Table()
    for column in ("job", "ratio", "status", "bytes", "perplexity", "seconds"):
        table.add_column(column, justify="right" if column in ("ratio", "seconds") else "left", overflow="fold")
    for row in rows:
        size = "" if row["bytes"] is None else " -> ".join(map(bytes_for_people, row["bytes"]))
        quality = "" if row["perplexity"] is None else " -> ".join(f"{value:.3f}" for value in row["perplexity"])
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:g}"
        table.add_row(Text(row["name"]), ratio, row["status"], size, quality, seconds)
    return Group(table, *(Text(f"{row['name']}: {row['reason']}") for row in rows if row["reason"]))
