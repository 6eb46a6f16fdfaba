"""The layers of a job on the terminal: what their routers do, and what merging did to their experts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from ..stages.compress import MERGES_NAME
from ..stages.routing import ROUTING_NAME
from ..stages.units import read_table


def show_layers(job_dir: Path, console: Console) -> None:
    """Prints a row a MoE layer, from the tables in a job folder; nothing where there are none yet."""
    if not (job_dir / ROUTING_NAME).is_file():
        return
    routing = read_table(job_dir / ROUTING_NAME)
    merges = read_table(job_dir / MERGES_NAME) if (job_dir / MERGES_NAME).is_file() else None
    table = Table(title="layers")
    columns = ["experts", "entropy", "most used", "least used", "rare"]
    if merges is not None:
        columns += ["merged", "CKA to leader", "distance, aligned", "error", "stable rank up, down"]
    table.add_column("experts module", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    for path in dict.fromkeys(routing["layer"].to_pylist()):
        row = _routing_row(_of_layer(routing, path))
        table.add_row(path, *row, *([] if merges is None else _merge_row(_of_layer(merges, path))))
    console.print(table)


def _of_layer(table: pa.Table, path: str) -> dict[str, list[float]]:
    """The columns of one layer's rows."""
    found: dict[str, list[float]] = table.filter(pc.equal(table["layer"], path)).to_pydict()
    return found


def _routing_row(rows: dict[str, list[float]]) -> list[str]:
    frequency = rows["frequency"]
    rare = sum(map(bool, rows["is_rare"]))
    return [
        str(len(frequency)),
        f"{rows['entropy'][0]:.0%}",
        f"{max(frequency):.1%}",
        f"{min(frequency):.1%}",
        str(rare or ""),
    ]


def _merge_row(rows: dict[str, list[float]]) -> list[str]:
    """Means over the layer's merged experts."""
    if not rows["expert"]:
        return ["0", "", "", "", ""]

    def mean(name: str) -> float:
        return sum(rows[name]) / len(rows[name])

    return [
        str(len(rows["expert"])),
        f"{mean('cka'):.2f}",
        f"{mean('distance_before'):.2f} -> {mean('distance_after'):.2f}",
        f"{mean('merge_error'):.1%}",
        f"x{mean('up_stable_rank_change'):.2f}, x{mean('down_stable_rank_change'):.2f}",
    ]
