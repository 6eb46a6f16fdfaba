"""What each step and unit of a dry run takes, from a plan or as somebody recorded it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..calibration.schedule import Kind
from ..plan.costs import Workload
from ..plan.machine import Machine


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a unit: seconds of computing, and bytes read from and written to storage before and after."""

    seconds: float
    storage_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """Of all that a cluster does.

    Attributes:
        steps: seconds of computing of a calibration step, by kind; what it reads and writes comes on top.
        units: of the units of work, by the name of their function.
        chunk_bytes: weights of a chunk of layers, read when a worker comes to it.
        sums_bytes: statistics of a chunk, held from its first backward step until they are written.
        root_bytes, working_bytes: held by a worker all the time, and while it does a step.
        start_s: from the asking for a worker, or a process for units, until it is ready.
    """

    steps: Mapping[Kind, float]
    units: Mapping[str, Cost]
    chunk_bytes: int
    sums_bytes: int
    root_bytes: int
    working_bytes: int
    start_s: float = 20.0


def planned_costs(work: Workload, machine: Machine, bytes_before: int) -> Costs:
    """Costs that add up to those of the plan.

    Args:
        work: of the job.
        machine: the cluster.
        bytes_before: of the original on disk.
    """
    seconds = {name: _alone(work, machine, name, count) for name, count in work.flops().items()}
    calls = work.num_chunks * work.num_batches
    forward = seconds["calibrate: model"] / work.passes / 3 / calls
    sums = seconds["calibrate: statistics"] / work.passes / calls
    disk, memory = work.disk_bytes(), work.memory_bytes()["calibration worker"]
    groups = 2 * len(work.model.layers) * work.passes
    compressing = sum(s for name, s in seconds.items() if not name.startswith(("calibrate", "evaluate")))
    read, written = (
        (bytes_before * work.passes + disk["statistics"]) // groups,
        work.bytes_after * work.passes // groups,
    )
    both = Cost(compressing / groups, read + written)
    windows = max(1, min(work.num_evaluation_batches(), machine.num_gpus))
    sums_bytes = disk["statistics"] // work.passes // work.num_chunks
    return Costs(
        steps={
            "forward": forward,
            "loss": 0.0,
            "backward": 2 * forward + sums,
            "gradient": 2 * forward,
            "finish": 0.0,
            "merge": 0.0,
        },
        units={
            "decompose_group": Cost(compressing / groups / 2, read),
            "factorise_group": Cost(compressing / groups / 2, read + written),
            "prune_layer": Cost(2 * both.seconds, 2 * both.storage_bytes),
            "evaluate_windows": Cost(seconds["evaluate"] / windows, bytes_before + work.bytes_after),
        },
        chunk_bytes=work.resident_layers * work.model.largest_layer * work.dtype.itemsize,
        sums_bytes=sums_bytes,
        root_bytes=memory["libraries"] + memory["embeddings and head"],
        working_bytes=memory.get("backward of a micro-batch", 0),
    )


def _alone(work: Workload, machine: Machine, stage: str, flops: float) -> float:
    """Seconds of a stage on one GPU."""
    side_by_side = work.num_workers if stage.startswith("calibrate") else work.num_units
    return work.seconds(stage, flops, machine.speed) * side_by_side
