"""Wall time of calibration and factorisation by number of nodes, one thread and one core a worker, beside this process.

    python -m tests.benchmarks.bench_cluster [--workers 1 2 4] [--layers 8] [--sequences 32] [--batch 8]
        [--repeats 1]

Each row is a fresh job on nodes of a `ray.cluster_utils.Cluster` with one CPU each and a head without any; starting
those is not counted, starting workers is. `processor` is the processor time of all processes that work, the driver
among them. Times mean something on a machine that does nothing else: the load beside each row says how far it did.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from moe_compress.executor import Executor, InProcess
from moe_compress.job import Job
from moe_compress.progress import Reporter
from moe_compress.recipe import parse_recipe
from moe_compress.stages.calibrate import calibrate
from moe_compress.stages.compress import compress_layers
from moe_compress.stages.prepare import check, prepare
from moe_compress.stages.schemes import scheme_of
from tests.benchmarks.bench_memory import TEXT, write_checkpoint
from tests.cluster.cases import cluster_of
from tests.cluster_cases import hashes


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one job."""

    wall_s: float
    processor_s: float
    load: float
    shards: dict[str, str]


class ProcessorTime:
    """Processor time of Ray's workers, which end before their parents do: sampled."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProcessorTime:
        self._thread.start()
        self._own = time.process_time()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._thread.join()
        self.seconds = time.process_time() - self._own + sum(self._seconds.values())

    def _watch(self) -> None:
        before: dict[int, float] = {}
        while True:
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.cmdline()[0].startswith("ray::"):
                        used = sum(process.cpu_times()[:2])
                        self._seconds[process.pid] = used - before.setdefault(process.pid, 0.0)
                except (psutil.Error, IndexError):
                    continue
            if self._over.wait(1.0):
                return


def run(folder: Path, model: Path, text: Path, sequences: int, batch: int, cluster: dict[str, Any]) -> Figures:
    """One job, as far as its shards."""
    recipe = parse_recipe(
        {
            "model": str(model),
            "output": str(folder / "out"),
            "calibration": {"text": str(text), "num_sequences": sequences, "sequence_length": 256, "batch_size": batch},
            "method": {"name": "d2moe", "ratio": 0.5},
            "cluster": cluster,
        }
    )
    job = Job(recipe)
    with job.locked():
        prepared = prepare(job, *check(recipe))
        reporter = Reporter(job, Console(quiet=True))
        executor: Executor
        if recipe.cluster.local:
            executor = InProcess(1)
        else:
            from cluster.executor import RayExecutor

            executor = RayExecutor(recipe.cluster, reporter)
        began = time.perf_counter()
        with closing(executor), ProcessorTime() as used:
            scheme = scheme_of(job, prepared)
            pending = calibrate(job, prepared, scheme, executor, reporter)
            shards = compress_layers(job, prepared, scheme.decide(pending, executor, reporter), executor, reporter)
            wall_s = time.perf_counter() - began
    return Figures(wall_s, used.seconds, os.getloadavg()[0], hashes(shards[0].parent))


def main() -> None:
    """Prints a row a job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="sequences a micro-batch")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    table = Table(title="calibration and factorisation")
    for column in ("run by", "wall s", "processor s", "against this process", "load", "bytes"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_checkpoint(root / "model", options.layers, options.hidden, 2 * options.hidden)
        (root / "text.txt").write_text(TEXT)
        first: Figures | None = None

        def measure(label: str, cluster: dict[str, Any]) -> None:
            nonlocal first
            folder = Path(tempfile.mkdtemp(dir=root))
            figures = run(folder, root / "model", root / "text.txt", options.sequences, options.batch, cluster)
            first = first or figures
            row = [f"{figures.wall_s:.1f}", f"{figures.processor_s:.1f}", f"{figures.wall_s / first.wall_s:.2f}"]
            same = "same" if figures.shards == first.shards else "DIFFERENT"
            table.add_row(label, *row, f"{figures.load:.1f}", same)
            Console(file=sys.stderr).print(label, *row, f"{figures.load:.1f}", same)

        for _ in range(options.repeats):
            measure("this process", {"local": True})
            for workers in options.workers:
                with cluster_of(workers):
                    measure(f"{workers} nodes", {"layer_workers": workers})
    Console().print(table)


if __name__ == "__main__":
    main()
