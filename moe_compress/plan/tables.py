"""A plan as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ..report.tables import bytes_for_people


def _table(*columns: str) -> Table:
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def tables(plan: dict[str, Any]) -> Iterator[str | Table]:
    """Headlines and tables of `Plan.to_dict()`."""
    yield (
        f"{plan['model']}: {plan['model_type']}, {plan['num_moe_layers']} of {plan['num_layers']} layers with"
        f" {plan['num_experts']} experts, {plan['top_k']} a token"
    )
    yield _sizes(plan)
    ratio = "Every direction kept" if plan["ratio"] is None else f"Ratio {plan['ratio']}"
    limit = "" if plan["highest_ratio"] is None else f" (possible below {plan['highest_ratio']:.4g})"
    yield f"{ratio}{limit}: {plan['note']}"
    if plan["slots"]:
        yield _ranks(plan)
    yield "Memory of one process at its peak"
    yield _memory(plan)
    speeds = ", ".join(f"{name} {speed / 1e9:,.0f} GFLOP/s" for name, speed in plan["speed"].items())
    whose = "this machine" if plan["cluster"] is None else f"a {plan['cluster']['gpu']}, assumed"
    yield f"Costs with {plan['num_workers']} layer workers; times at the speed of {whose}: {speeds}"
    yield _costs(plan)
    if plan["cluster"] is not None:
        yield from _cluster(plan["cluster"])
    if plan["training"] is not None:
        yield from _training(plan["training"])
    yield from (f"Not as it is: {problem}" for problem in plan["problems"])


def _sizes(plan: dict[str, Any]) -> Table:
    table = _table("part", "parameters", "bytes", "parameters after", "bytes after")
    for part in [*plan["parts"], {"name": "total", **plan["total"]}]:
        if part["name"] == "total":
            table.add_section()
        table.add_row(
            part["name"],
            f"{part['parameters']:,}",
            bytes_for_people(part["num_bytes"]),
            f"{part['parameters_after']:,}",
            bytes_for_people(part["bytes_after"]),
        )
    return table


def _ranks(plan: dict[str, Any]) -> Table:
    table = _table("projection", "shape", "experts", "uniform rank", "break-even rank")
    for slot in plan["slots"]:
        rank = "" if slot["uniform_rank"] is None else str(slot["uniform_rank"])
        shape = f"{slot['num_rows']} x {slot['num_columns']}"
        table.add_row(slot["name"], shape, f"{slot['count']:,}", rank, str(slot["break_even_rank"]))
    return table


def _memory(plan: dict[str, Any]) -> Table:
    table = _table("process", "of it", "bytes")
    for process, parts in plan["memory_bytes"].items():
        table.add_section()
        table.add_row(process, "", bytes_for_people(sum(parts.values())))
        for name, size in parts.items():
            table.add_row("", name, bytes_for_people(size))
    return table


def _costs(plan: dict[str, Any]) -> Table:
    table = _table("what", "how much", "time")
    for stage, count in plan["flops"].items():
        table.add_row(stage, f"{count / 1e12:,.2f} TFLOP", f"{plan['seconds'][stage]:,.0f} s")
    table.add_section()
    for name, size in plan["disk_bytes"].items():
        table.add_row(f"disk: {name}", bytes_for_people(size), "")
    table.add_row("between workers", bytes_for_people(plan["network_bytes"]), "")
    return table


def _cluster(cluster: dict[str, Any]) -> Iterator[str | Table]:
    yield (
        f"On {cluster['num_gpus']} {cluster['gpu']} of {cluster['num_nodes']} nodes, every stage as long as what it"
        " waits for: a lower bound"
    )
    yield from _stages(cluster)
    device = ", ".join(f"{name} {bytes_for_people(size)}" for name, size in cluster["device_bytes"].items())
    there = "" if cluster["gpu_bytes"] is None else f" of {bytes_for_people(cluster['gpu_bytes'])}"
    node, store = bytes_for_people(cluster["node_bytes"]), bytes_for_people(cluster["store_bytes"])
    yield f"On a GPU{there}: {device}; in a node's own memory: processes {node}, hidden states {store}"
    assumed = ", ".join(f"{name} {value:g}" for name, value in cluster["assumed"].items())
    yield f"Assumed (see --assume): {assumed}"
    yield from (f"Warning: {warning}" for warning in cluster["warnings"])


def _stages(timeline: dict[str, Any]) -> Iterator[str | Table]:
    table = _table("stage", "at least", "waits for", "GPUs busy", "storage", "network", "disk")
    for stage in timeline["stages"]:
        moved = (bytes_for_people(stage[f"{name}_bytes"]) for name in ("storage", "network", "disk"))
        table.add_row(stage["name"], f"{stage['seconds']:,.0f} s", stage["bound"], f"{stage['busy']:.0%}", *moved)
    yield table
    yield f"{timeline['hours']:,.2f} h, {timeline['gpu_hours']:,.1f} GPU-hours"


def _training(training: dict[str, Any]) -> Iterator[str | Table]:
    yield (
        f"Training: {training['trained_parameters']:,} of {training['parameters']:,} parameters, {training['steps']:,}"
        f" steps, {training['tokens']:,} tokens, {training['num_processes']} processes at ZeRO stage"
        f" {training['zero_stage']}" + (f" ({training['note']})" if training["note"] else "")
    )
    yield _memory({"memory_bytes": {"training process": training["memory_bytes"]}})
    host, first = training["host_bytes"], training["first_process_bytes"]
    yield (
        f"Of it {bytes_for_people(host)} in the memory of the node; where the first process is,"
        f" {bytes_for_people(first)} more when the best weights are kept"
    )
    yield _costs(training)
    if training["stages"]:
        yield from _stages(training)
    yield from (f"Warning: {warning}" for warning in training["warnings"])
