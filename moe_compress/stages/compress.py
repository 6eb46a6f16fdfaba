"""Compress: the shards of the output, written side by side into the job folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..checkpoint.writer import ShardInfo, describe_shard, record_path, record_shard
from ..executor import Executor
from ..job import Job
from ..progress import Reporter
from .prepare import Prepared
from .scheme import Decision, Work, run_all
from .units import copy_tensors, read_table, write_table

MERGES_NAME = "merges.parquet"
"""What became of each merged expert, where experts were merged."""


def make_shard(unit: Callable[..., ShardInfo], *args: Any) -> ShardInfo:
    """Runs the unit that writes a shard, its last argument, and leaves a record of it, unless both are there."""
    target = args[-1]
    if record_path(target).exists() and target.exists():
        return describe_shard(target)
    info = unit(*args)
    record_shard(target, info)
    return info


def compress_layers(
    job: Job, prepared: Prepared, decision: Decision, executor: Executor, reporter: Reporter
) -> list[Path]:
    """Writes every shard of the output into the job folder: those of the decision, and the untouched rest."""
    skeleton, reader = prepared.skeleton, prepared.reader
    method = prepared.recipe.method.model_dump(mode="json")
    folder = job.place("shards", prepared.statistics.name, method, decision.provenance)
    replaced = {source for name in decision.replaced for source in skeleton.targets[name]}
    rest: dict[Path, list[str]] = defaultdict(list)
    for name, entry in reader.entries.items():
        if name not in replaced:
            rest[entry.file].append(name)
    works = [Work(copy_tensors, (reader.folder, names)) for names in rest.values()] + decision.shards
    targets = [folder / f"model-{i:05d}-of-{len(works):05d}.safetensors" for i in range(1, len(works) + 1)]
    shards = [Work(make_shard, (work.unit, *work.args, target)) for work, target in zip(works, targets, strict=True)]
    run_all("compress", shards, executor, reporter)
    merges = job.folder / MERGES_NAME
    merges.unlink(missing_ok=True)  # another method's, in the same folder
    if decision.diagnostics:
        write_table(merges, pa.concat_tables(read_table(path) for path in decision.diagnostics))
    return targets
