"""Clusters of several nodes on this machine, jobs driven from the test's own process, and means to harm them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

from moe_compress.calibration.schedule import Schedule, Value
from moe_compress.executor import Executor, InProcess
from moe_compress.job import Job
from moe_compress.pipeline import compress
from moe_compress.progress import Reporter
from moe_compress.recipe import parse_recipe
from moe_compress.stages.prepare import check, prepare
from tests.cluster_cases import hashes, write_recipe

Hashes = dict[str, str]


@contextmanager
def cluster_of(num_nodes: int, cpus: int = 1, **options: Any) -> Iterator[Any]:
    """A head without CPUs and nodes beside it; this process is connected to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_health_check_period_ms", "500")  # five missed, and a node is dead
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(num_nodes):
                cluster.add_node(num_cpus=cpus, **options)
            quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
            ray.init(address=cluster.address, **quiet)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


class Run:
    """A job: its recipe, and what came of it.

    Args:
        folder: of recipe, output and job folder.
        model, text: inputs.
        num_sequences: of the calibration.
        cluster: that part of the recipe.
    """

    def __init__(self, folder: Path, model: Path, text: Path, num_sequences: int = 48, **cluster: Any) -> None:
        self.recipe_path = write_recipe(folder / "recipe.yaml", model, text, folder / "out", cluster)
        data = yaml.safe_load(self.recipe_path.read_text())
        data["calibration"] |= {
            "num_sequences": num_sequences,
            "batch_size": 8,
        }  # hidden states too large for Ray to send along
        del data["evaluation"]
        self.recipe_path.write_text(yaml.safe_dump(data))
        self.recipe = parse_recipe(data)
        self.job = Job(self.recipe)
        self.console = Console(record=True, quiet=True)

    def go(self) -> Hashes:
        """Runs the job here; hashes of the output."""
        executor: Executor = InProcess(1)
        reporter = Reporter(self.job, self.console)
        if not self.recipe.cluster.local:
            from cluster.executor import RayExecutor

            executor = RayExecutor(self.recipe.cluster, reporter)
        with self.job.locked(), closing(executor):
            prepared = prepare(self.job, *check(self.recipe))
            compress(self.job, prepared, executor, reporter)
        return hashes(self.recipe.output_path)

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.job.folder / "events.jsonl").read_text().splitlines()
        return [event for line in lines if (event := yaml.safe_load(line))["event"] == name]


def processes(title: str) -> list[psutil.Process]:
    """Workers of this process's clusters, by how their title begins."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


def kill(title: str, which: int = 0) -> bool:
    """SIGKILL for a worker; False where there is none."""
    victims = sorted(processes(title), key=lambda process: process.pid)
    with suppress(psutil.NoSuchProcess):
        victims[which % max(1, len(victims))].kill() if victims else None
    return bool(victims)


@contextmanager
def at_steps(*numbers: int, harm: Callable[[], object]) -> Iterator[None]:
    """Does harm whenever so many steps of the calibration are done."""
    left = sorted(numbers)
    with pytest.MonkeyPatch.context() as patch:
        done = Schedule.done

        def counting(self: Schedule, *args: Any) -> list[Value]:
            if left and self.num_done >= left[0]:
                left.pop(0)
                harm()
            return done(self, *args)

        patch.setattr(Schedule, "done", counting)
        yield
    assert not left, "the job was over before"


def left_behind(folder: Path) -> list[str]:
    """Temporary files under a folder."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if ".part" in name or "scratch" in name.split(os.sep)]
