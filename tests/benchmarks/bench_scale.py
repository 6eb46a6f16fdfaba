"""Scale on paper, in virtual time, and in the driver.

    python -m tests.benchmarks.bench_scale plan       # five published models on 1, 8 and 64 GPUs
    python -m tests.benchmarks.bench_scale dry-run    # DeepSeek-V3, 61 layers of 256 experts, with and without losses
    python -m tests.benchmarks.bench_scale driver     # the Ray pool over 61 layers with workers that do nothing

The first two read config.json alone. The last one asks whether the driver keeps up: calls a second, and its memory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray
import torch
from rich.console import Console

from cluster import pool
from cluster.executor import RayExecutor
from moe_compress.calibration.schedule import Step
from moe_compress.calibration.text import TokenBatch
from moe_compress.calibration.worker import CalibrationSetup, Description
from moe_compress.job import Job
from moe_compress.plan import make_plan
from moe_compress.plan.machine import machine_of
from moe_compress.progress import Reporter
from moe_compress.recipe import Cluster, Recipe
from moe_compress.simulation.clock import Faults
from moe_compress.simulation.job import dry_run
from moe_compress.stages.sweep import Sweep
from tests.plan.published_models import MODELS, recipe_for

NUM_LAYERS, NUM_BATCHES, NUM_WORKERS = 61, 128, 2


def row(name: str, *figures: object) -> str:
    """A line of a table; what stands last may be long."""
    *short, last = figures
    return f"{name:19}" + "".join(f"{figure!s:>8}" for figure in short) + f"  {last}"


def bench_plan(gpu: str = "h200") -> None:
    """A row a model and cluster; sequences of a micro-batch as few as keep the workers busy."""
    print(row("model", "GPUs", "hours", "GPU-h", "GB/GPU", "GB/node", "net TB", "disk TB", "at least, s"))
    for name in MODELS:
        for num_gpus in (1, 8, 64):
            recipe = recipe_for(name, calibration={"text": "text.txt", "batch_size": 8 if num_gpus < 16 else 2})
            plan = make_plan(recipe, machine_of(gpu, num_gpus))
            cluster = plan.cluster
            assert cluster is not None
            sizes = max(cluster.device_bytes.values()) / 1e9, (cluster.node_bytes + cluster.store_bytes) / 1e9
            moved = plan.network_bytes / 1e12, sum(plan.disk_bytes.values()) / 1e12
            stages = ", ".join(f"{each.name} {each.seconds:,.0f} ({each.bound})" for each in cluster.stages)
            times = f"{cluster.hours:.2f}", f"{cluster.gpu_hours:.1f}"
            print(row(name, num_gpus, *times, *(f"{size:.0f}" for size in sizes), *(f"{m:.2f}" for m in moved), stages))


def bench_dry_run(name: str = "DeepSeek-V3", gpu: str = "h200") -> None:
    """A row a cluster and mean time between losses, of a process or of its node."""
    print(row("model", "GPUs", "lost in", "hours", "busy", "steps", "again", "lost", "real s", "stages, s"))
    for num_gpus, every_s in ((1, None), (8, None), (8, 1800.0), (64, None), (64, 600.0), (64, 60.0)):
        recipe = recipe_for(name, calibration={"text": "text.txt", "batch_size": 8 if num_gpus < 16 else 2})
        began = time.perf_counter()
        run = dry_run(recipe, machine_of(gpu, num_gpus), Faults(every_s))
        took, busy = time.perf_counter() - began, sum(run.busy) / num_gpus
        often = "none" if every_s is None else f"{every_s:.0f} s"
        stages = ", ".join(f"{stage} {seconds:,.0f}" for stage, seconds in run.stages.items())
        counts = run.num_steps, run.num_again, run.num_deaths
        print(row(name, num_gpus, often, f"{run.seconds / 3600:.2f}", f"{busy:.1%}", *counts, f"{took:.1f}", stages))


class IdleActor:
    """A layer worker that does nothing at once, and hands on next to nothing."""

    def __init__(self, threads: int) -> None:
        pass

    def open(self, setup: CalibrationSetup) -> tuple[Description, str]:
        model = Description([[f"layers.{i}"] for i in range(NUM_LAYERS)], True, 2)
        return model, ray.get_runtime_context().get_node_id()

    def run(self, step: Step, *values: Any) -> tuple[Any, list[str]]:
        return torch.zeros(16).numpy(), [f"layers.{step.chunk}.experts"] if step.kind == "finish" else []


def bench_driver() -> None:
    """Calls a second of the driver: its own time, and the clock's with two idle workers."""
    pool.LayerWorkerActor = IdleActor  # type: ignore[assignment,misc]
    executor = RayExecutor(Cluster(layer_workers=NUM_WORKERS), Reporter(None))
    try:
        with TemporaryDirectory() as folder:
            recipe: Recipe = recipe_for("DeepSeek-V3", job_dir=folder)
            ids = torch.zeros(NUM_BATCHES, 16, dtype=torch.int64)
            TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)).save(Path(folder) / "tokens.safetensors")
            setup = CalibrationSetup(
                checkpoint=Path(folder),
                tokens=Path(folder) / "tokens.safetensors",
                statistics=Path(folder),
                scratch=Path(folder) / "scratch",
                batch_size=1,
                dtype=None,
                device="cpu",
                activation_bytes=0,
                full_grams=False,
                sampled_seed=None,
                chunk_layers=1,
                num_workers=NUM_WORKERS,
            )
            job, process = Job(recipe), psutil.Process()
            before, began, own = process.memory_info().rss, time.perf_counter(), time.process_time()
            sweep = Sweep(job, setup, 2.0**32, lambda model: None, lambda paths: None)
            paths = sweep.run(executor, Reporter(job, Console(quiet=True)))
            took, own = time.perf_counter() - began, time.process_time() - own
            grown = (process.memory_info().rss - before) / 1e6
    finally:
        executor.close()
    calls = NUM_LAYERS * NUM_BATCHES * 2 + NUM_BATCHES + NUM_LAYERS
    assert len(paths) == NUM_LAYERS
    print(f"{calls:,} calls of {NUM_WORKERS} idle workers in {took:.1f} s, {calls / took:,.0f} a second;")
    print(f"driver {own:.1f} s of its own, {1e3 * own / calls:.2f} ms a call; its memory grew by {grown:.0f} MB")


if __name__ == "__main__":
    benches = {"plan": bench_plan, "dry-run": bench_dry_run, "driver": bench_driver}
    for wanted in sys.argv[1:] or benches:
        benches[wanted]()
