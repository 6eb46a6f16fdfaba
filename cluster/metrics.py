"""What jobs tell Prometheus, through Ray: the driver of its stages, every process of its bytes and memory.

Ray serves what its processes record at the MetricsExportPort of their node: a gauge as ray_NAME, a counter as
ray_NAME_total. Rates are for the reader to take.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

import psutil
import torch
from ray.util.metrics import Counter, Gauge

from moe_compress.progress import Stage

OF_A_STAGE = ("output", "stage")
OF_A_PROCESS = ("process",)

COUNTERS = {
    "moe_compress_tokens": ("Tokens that went through a stage.", OF_A_STAGE),
    "moe_compress_flops": ("Operations of a stage by the plan, as far as it is done.", OF_A_STAGE),
    "moe_compress_read_bytes": ("Bytes that a process read, from files and pipes.", OF_A_PROCESS),
    "moe_compress_written_bytes": ("Bytes that a process wrote, to files and pipes.", OF_A_PROCESS),
}
GAUGES = {
    "moe_compress_stage_progress": ("Fraction of a stage that is done.", OF_A_STAGE),
    "moe_compress_stage_left_seconds": ("Time that the rest of a stage will take at its speed so far.", OF_A_STAGE),
    "moe_compress_memory_bytes": ("Resident memory of a process.", OF_A_PROCESS),
    "moe_compress_gpu_memory_bytes": ("Most memory of its GPU that a process has held.", OF_A_PROCESS),
}
"""Name -> what it is, its tags. `output` is the name of a job's output (`job` would be in the way of Prometheus' own);
`process` is driver, worker (of layers) or task."""


def exported_names() -> set[str]:
    """The names that Prometheus sees."""
    return {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}


class StageMetrics:
    """Watches the stages of a job in its driver.

    Args:
        output: name of the job's output.
        flops: operations of each stage of which they are known, by name.
    """

    def __init__(self, output: str, flops: Mapping[str, float]) -> None:
        self._output, self._flops = output, flops
        self._told: tuple[Stage | None, int, float] = (None, 0, 0.0)

    def __call__(self, stage: Stage) -> None:
        """Records what has changed since the last call."""
        told, steps, tokens = self._told
        if told is not stage:
            steps, tokens = stage.done, 0.0
        self._told = stage, stage.done, stage.tokens
        tags = {"output": self._output, "stage": stage.name}
        share = 1 / max(stage.total, 1)
        _gauge("moe_compress_stage_progress").set(stage.done * share, tags)
        if stage.left_s is not None:
            _gauge("moe_compress_stage_left_seconds").set(stage.left_s, tags)
        _count("moe_compress_tokens", stage.tokens - tokens, tags)
        _count("moe_compress_flops", self._flops.get(stage.name, 0.0) * share * (stage.done - steps), tags)
        report_process("driver")


def report_process(process: str) -> None:
    """Records what this process, of the kind given, has read and written since the last time, and its memory."""
    tags = {"process": process}
    this = psutil.Process()
    _gauge("moe_compress_memory_bytes").set(this.memory_info().rss, tags)
    if torch.cuda.is_available():
        _gauge("moe_compress_gpu_memory_bytes").set(torch.cuda.max_memory_allocated(), tags)
    for name, total in _transferred(this).items():
        _count(name, total - _reported.get(name, 0), tags)
        _reported[name] = total


def _transferred(process: psutil.Process) -> dict[str, int]:
    """What a process has read and written so far; nothing where the system does not tell."""
    if sys.platform != "linux":  # others do not count what comes from the page cache
        return {}
    found = process.io_counters()
    return {"moe_compress_read_bytes": found.read_chars, "moe_compress_written_bytes": found.write_chars}


_reported = _transferred(psutil.Process())
"""What is not the job's: the libraries that this process has loaded."""


def _count(name: str, amount: float, tags: dict[str, str]) -> None:
    if amount > 0:  # a stage may go back, a counter may not
        _counter(name).inc(amount, tags)


@cache
def _counter(name: str) -> Counter:
    what, tags = COUNTERS[name]
    return Counter(name, what, tag_keys=tags)


@cache
def _gauge(name: str) -> Gauge:
    what, tags = GAUGES[name]
    return Gauge(name, what, tag_keys=tags)
