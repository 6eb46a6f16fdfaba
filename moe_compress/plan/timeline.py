"""Hours of a job on a cluster, stage by stage, and what each stage waits for.

A stage takes as long as the resource it needs longest, as if all others were used meanwhile: a lower bound, at the
speeds that machine.py assumes, with nothing lost and nobody else on the cluster. Bytes are counted as if each read came
from storage; a node's cache, or its page cache, saves those that repeat.

The calibration's layers are a pipeline. Chunk c of C lies with worker c mod W, and begins with a micro-batch when chunk
c - 1 is done with it. With B micro-batches, in units of a chunk's time for one of them, each direction takes

    floor((C - 1) / W) max(B, W) + (C - 1) mod W + B          against C B / W with every worker busy

so more workers than micro-batches wait. Replicas are pipelines side by side, each of its share of both. A worker comes
back first to the chunk that it left last: 2 C - W chunks are read, C where each has a worker. Symbols as in costs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from ..method_options import D2MoE
from .costs import Workload
from .machine import Machine


@dataclass(frozen=True, slots=True)
class StageTime:
    """What one stage takes.

    Attributes:
        name: the stage.
        seconds: at least.
        bound: the resource it waits for: compute, storage, network, disk, or driver.
        busy: fraction of the GPUs' time that is spent computing.
        resources: seconds that each resource is needed for.
        storage_bytes, network_bytes, disk_bytes: read and written by all nodes together.
    """

    name: str
    seconds: float
    bound: str
    busy: float
    resources: dict[str, float]
    storage_bytes: int
    network_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """A job on a cluster.

    Attributes:
        gpu, num_gpus, num_nodes: the cluster.
        speed: FLOP/s that a GPU is taken to reach, by kind of work.
        assumed: all else that is assumed.
        stages: in their order.
        hours: at least; gpu_hours: times the GPUs.
        device_bytes: process -> what it holds on its GPU at its peak; gpu_bytes: what there is, if that is known.
        node_bytes: of a node's own memory, all its processes of the stage that needs most.
        store_bytes: hidden states that lie on each node until the gradients come back, in Ray's object store.
        warnings: what makes the cluster a bad choice.
    """

    gpu: str
    num_gpus: int
    num_nodes: int
    speed: dict[str, float]
    assumed: dict[str, float]
    stages: list[StageTime]
    hours: float
    gpu_hours: float
    device_bytes: dict[str, int]
    gpu_bytes: int | None
    node_bytes: int
    store_bytes: int
    warnings: list[str]


_ON_HOST = {
    "calibration worker": {"libraries"},
    "factorisation task": {"libraries", "factors", "experts", "statistics"},
    "evaluation task": {"libraries"},
}
"""Parts of a process's memory that are never on its GPU."""

_USABLE = 0.9
"""Of a GPU's memory; the rest is CUDA's own, and lies between tensors."""


def pipeline_units(num_chunks: int, num_batches: int, num_workers: int) -> int:
    """Time of one direction of a sweep, in units of what a chunk takes for a micro-batch."""
    rounds, last = divmod(num_chunks - 1, num_workers)
    return rounds * max(num_batches, num_workers) + last + num_batches


def timeline(work: Workload, machine: Machine, bytes_before: int) -> Timeline:
    """Times and memory of a job.

    Args:
        work: its costs, for this cluster.
        machine: the cluster.
        bytes_before: of the original on disk.
    """
    assumed = machine.assumed
    stages = list(_Stages(work, machine, bytes_before))
    hours = sum(stage.seconds for stage in stages) / 3600
    memory = work.memory_bytes()
    device = {
        process: sum(size for name, size in parts.items() if name not in _ON_HOST[process])
        for process, parts in memory.items()
        if process in _ON_HOST
    }
    here = {process: sum(parts.values()) - device.get(process, 0) for process, parts in memory.items()}
    driver = here.pop("driver")
    num_processes = min(assumed.node_gpus, machine.num_gpus)
    return Timeline(
        gpu=machine.gpu,
        num_gpus=machine.num_gpus,
        num_nodes=machine.num_nodes,
        speed=machine.speed,
        assumed={name: getattr(assumed, name) for name in assumed.__dataclass_fields__},
        stages=stages,
        hours=hours,
        gpu_hours=hours * machine.num_gpus,
        device_bytes=device,
        gpu_bytes=machine.memory_bytes,
        node_bytes=num_processes * max(here.values()) + driver,
        store_bytes=work.boundary_bytes() // work.resident_layers // machine.num_nodes,
        warnings=list(_warnings(work, machine, device)),
    )


def _warnings(work: Workload, machine: Machine, device: dict[str, int]) -> Iterator[str]:
    cures = {
        "calibration worker": "lower cluster.resident_layers or calibration.batch_size, or take GPUs with more memory",
        "factorisation task": "take GPUs with more memory",
        "evaluation task": "lower evaluation.sequence_length, or take GPUs with more memory",
    }
    for process, size in device.items():
        yield from too_large(machine, process, size, cures[process])
    if work.num_batches < work.num_workers:
        yield (
            f"{work.num_batches} micro-batches keep at most {work.num_batches} of {work.num_workers} layer workers"
            " busy; lower calibration.batch_size, or give more text"
        )


def stage_time(
    machine: Machine,
    name: str,
    *,
    compute: float = 0.0,
    busy_s: float = 0.0,
    driver: float = 0.0,
    storage: int = 0,
    network: int = 0,
    disk: int = 0,
    nodes: int | None = None,
) -> StageTime:
    """What a stage takes.

    Args:
        machine: the cluster.
        name: the stage.
        compute: seconds of the process that computes longest; busy_s: of all GPUs on average.
        driver: seconds of the driver.
        storage, network, disk: bytes, of all nodes together.
        nodes: that take part; None for all.
    """
    assumed, nodes = machine.assumed, nodes or machine.num_nodes
    resources = {
        "compute": compute,
        "driver": driver,
        "storage": storage / nodes / assumed.storage,
        "network": network / nodes / assumed.network,
        "disk": disk / nodes / assumed.disk,
    }
    bound = max(resources, key=lambda each: resources[each])
    seconds = resources[bound]
    return StageTime(name, seconds, bound, busy_s / seconds if seconds else 0.0, resources, storage, network, disk)


def too_large(machine: Machine, process: str, size: int, cure: str) -> Iterator[str]:
    """Says so if a process does not fit its GPU."""
    if machine.memory_bytes is not None and size > _USABLE * machine.memory_bytes:
        yield (
            f"{process}: {size / 1e9:,.0f} GB are more than {_USABLE:.0%} of the {machine.memory_bytes / 1e9:,.0f} GB"
            f" of a {machine.gpu}; {cure}"
        )


class _Stages:
    """Goes through the stages of a job."""

    def __init__(self, work: Workload, machine: Machine, bytes_before: int) -> None:
        self.work, self.machine, self.before, self.after = work, machine, bytes_before, work.bytes_after
        flops = work.flops()
        seconds = {name: work.seconds(name, count, machine.speed) for name, count in flops.items()}
        self.calibrating = sum(s for name, s in seconds.items() if name.startswith("calibrate"))
        self.evaluating = seconds["evaluate"]
        self.compressing = sum(seconds.values()) - self.calibrating - self.evaluating

    def __iter__(self) -> Iterator[StageTime]:
        yield self._prepare()
        yield self._calibrate()
        if directions := self.work.passes * self.work.num_directions():
            yield stage_time(self.machine, "allocate", driver=directions / self.machine.assumed.allocating)
        yield self._compress()
        yield self._assemble()
        if self.work.recipe.evaluation is not None:
            yield self._evaluate()

    def _prepare(self) -> StageTime:
        """The digest: one node reads the original once, its cores side by side."""
        assumed = self.machine.assumed
        hashing = self.before / (assumed.checking * assumed.node_cores)
        return stage_time(self.machine, "prepare", driver=hashing, storage=self.before, nodes=1)

    def _calibrate(self) -> StageTime:
        """Model and statistics through the pipeline; weights for every group of micro-batches; sums written once, those
        of several groups also apart and read again."""
        work, disk, groups = self.work, self.work.disk_bytes(), self.work.num_groups
        chunks, batches, workers = work.num_chunks, work.num_batches, work.num_workers
        columns = max(1, workers // groups)
        stretch = pipeline_units(chunks, ceil(batches / groups), columns) * workers / (chunks * batches)
        weights = work.passes * groups * self.before * (2 * chunks - min(chunks, columns)) // chunks
        times = 1 if groups == 1 else 2 * groups + 1
        return stage_time(
            self.machine,
            "calibrate",
            compute=self.calibrating * stretch,
            busy_s=self.calibrating * workers / self.machine.num_gpus,
            storage=weights + times * disk["statistics"],
            network=work.network_bytes() if self.machine.num_nodes > 1 else 0,
            disk=2 * work.passes * disk["spilled activations"],
        )

    def _compress(self) -> StageTime:
        """Units of two groups a layer: experts and statistics read twice (analysed, then written), once where experts
        go whole; the rest of the original copied."""
        work, disk = self.work, self.work.disk_bytes()
        units, gpus = 2 * len(work.model.layers), self.machine.num_gpus
        stretch = ceil(units / gpus) * gpus / units
        is_twice = isinstance(work.recipe.method, D2MoE) or work.result.factorised is not None
        reads = (2 if is_twice else 1) * (work.passes * self.before + disk["statistics"])
        return stage_time(
            self.machine,
            "compress",
            compute=self.compressing * stretch,
            busy_s=self.compressing,
            storage=reads + work.passes * (self.after + 2 * disk["spectra"]),
        )

    def _assemble(self) -> StageTime:
        """The driver takes the digests of the output's shards, its cores side by side."""
        passes, assumed = self.work.passes, self.machine.assumed
        hashing = passes * self.after / (assumed.hashing * assumed.node_cores)
        return stage_time(self.machine, "assemble", driver=hashing, storage=passes * self.after, nodes=1)

    def _evaluate(self) -> StageTime:
        """Every process streams both checkpoints whole, for its share of the windows."""
        work = self.work
        processes = max(1, min(work.num_evaluation_batches(), self.machine.num_gpus))
        compute = self.evaluating * self.machine.num_gpus / processes
        nodes = min(processes, self.machine.num_nodes)
        reads = processes * work.num_levels * (self.before + self.after)
        return stage_time(self.machine, "evaluate", compute=compute, busy_s=self.evaluating, storage=reads, nodes=nodes)
