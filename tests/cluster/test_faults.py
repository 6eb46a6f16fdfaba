"""Whatever dies, the job ends with the same bytes, says what was done again, and leaves nothing behind.

MOE_COMPRESS_KILLS says how often something is killed in one job (default 5; 30 for a thorough run).
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from moe_compress.errors import CompressionError, RecipeError
from moe_compress.progress import Reporter
from moe_compress.recipe import Cluster
from tests.cluster.cases import Hashes, Run, at_steps, kill, left_behind, processes
from tests.cluster_cases import finish, start

ACTOR, TASK = "ray::LayerWorkerActor", "ray::_run_unit"
KILLS = int(os.environ.get("MOE_COMPRESS_KILLS", "5"))

pytestmark = pytest.mark.slow


def test_lost_workers_cost_their_sums_alone(
    cluster: Any, tmp_path: Path, model: Path, text: Path, wanted: Hashes
) -> None:
    run = Run(tmp_path, model, text, layer_workers=2)
    with at_steps(10, 60, harm=lambda: kill(ACTOR)):
        assert run.go() == wanted
    losses = run.events("worker_lost")
    assert len(losses) == 2
    assert not {"gradient", "loss"} & {kind for loss in losses for kind in loss["again"]}, "what was made is kept"
    assert sum(loss["again"].get("backward", 0) for loss in losses) <= 2 * 2 * 6
    assert not left_behind(run.job.folder)


def test_lost_tasks_are_done_again(
    cluster: Any, tmp_path: Path, model: Path, text: Path, wanted: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, model, text, layer_workers=2)
    with killing(2, TASK, pause_s=0.01):
        assert run.go() == wanted
    assert run.events("task_lost")
    assert not run.events("worker_lost")
    assert not left_behind(run.job.folder)


def test_a_unit_that_kills_its_tasks_ends_the_job(cluster: Any) -> None:
    from cluster.executor import RayExecutor

    executor = RayExecutor(Cluster(), Reporter(None))
    with pytest.raises(CompressionError, match="a task's process died 4 times at the same unit of work"):
        list(executor.results([executor.submit(os.abort)]))


def test_nodes_come_and_go(
    cluster: Any, tmp_path: Path, model: Path, text: Path, wanted: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is gone for long enough to be done without; then another comes, and the first of all goes."""
    monkeypatch.setattr("cluster.pool.PATIENCE_S", 3.0)
    run = Run(tmp_path, model, text, layer_workers=2)

    def add() -> None:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def remove(node: Any) -> None:
        cluster.remove_node(node, allow_graceful=False)

    first, second = cluster.list_all_nodes()[1:]  # the head is before them
    harms = iter([partial(remove, second), add, partial(remove, first)])
    try:
        with at_steps(15, 35, 60, harm=lambda: next(harms)()):
            assert run.go() == wanted
    finally:
        while len(cluster.list_all_nodes()) < 3:
            add()
    assert len(run.events("worker_lost")) >= 2
    assert not left_behind(run.job.folder)


def test_a_full_object_store_spills(cluster: Any, tmp_path: Path, model: Path, text: Path, wanted: Hashes) -> None:
    import ray
    from ray._private.internal_api import memory_summary

    fill = ray.remote(scheduling_strategy="SPREAD", num_cpus=1)(lambda: np.zeros(30 * 2**20, np.uint8))
    filled = [fill.remote() for _ in range(14)]  # more than all nodes have room for
    _, unmade = ray.wait(filled, num_returns=len(filled), timeout=60, fetch_local=False)
    assert not unmade

    def is_on_disk() -> bool:
        """Ray says so in two ways: a node whose spilling has yet to start puts objects on a file system at once."""
        said = memory_summary(address=cluster.address, stats_only=True)
        return "Spilled" in said or "filesystem mmap" in said

    wait_until(is_on_disk)
    assert Run(tmp_path, model, text, layer_workers=2).go() == wanted


def test_a_slow_worker_is_waited_for(cluster: Any, tmp_path: Path, model: Path, text: Path, wanted: Hashes) -> None:
    run = Run(tmp_path, model, text, layer_workers=2)

    def stop() -> None:
        victim = processes(ACTOR)[0]
        victim.send_signal(signal.SIGSTOP)
        threading.Timer(3.0, victim.send_signal, [signal.SIGCONT]).start()

    with at_steps(30, 70, harm=stop):
        assert run.go() == wanted
    assert not run.events("worker_lost")


def test_a_driver_that_is_killed_leaves_the_cluster_free(
    cluster: Any, tmp_path: Path, model: Path, text: Path, wanted: Hashes
) -> None:
    import ray

    run = Run(tmp_path, model, text, address=cluster.address, layer_workers=2)
    for moment in ("statistics-*/finished.json", "shards-*/*"):
        job = start(run.recipe_path)
        deadline = time.monotonic() + 120
        while job.poll() is None and time.monotonic() < deadline and not list(run.job.folder.glob(moment)):
            time.sleep(0.02)
        job.kill()
        finish(job)
    assert run.go() == wanted
    assert not left_behind(run.job.folder)
    wait_until(lambda: not processes(ACTOR) and ray.available_resources().get("CPU") == 2)


def test_random_kills_in_one_job(cluster: Any, tmp_path: Path, model: Path) -> None:
    factor = max(1, KILLS // 3 - 1)  # a job long enough for so many
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the quick brown fox jumps over a lazy dog {i}" for i in range(200 * factor)))
    size = {"num_sequences": 48 * factor}
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    wanted = Run(tmp_path / "here", model, text, local=True, **size).go()
    run = Run(tmp_path / "there", model, text, layer_workers=2, **size)
    with killing(KILLS, ACTOR, TASK, pause_s=3) as killed:
        assert run.go() == wanted
    losses = run.events("worker_lost")
    num_lost = len(losses) + len(run.events("task_lost"))
    print(f"{len(killed)} kills, {len(losses)} layer workers and {num_lost - len(losses)} tasks lost")
    assert 0 < num_lost <= len(killed)
    assert all(sum(loss["again"].values()) <= 6 * size["num_sequences"] // 8 for loss in losses)
    assert not left_behind(run.job.folder)
    assert not list(tmp_path.glob("there/.*partial"))
    wait_until(lambda: not processes(ACTOR) + processes(TASK))


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.2)


@contextmanager
def killing(count: int, *titles: str, pause_s: float) -> Iterator[list[int]]:
    """Kills a random process of these titles while the block runs, so many times at most, after random pauses."""
    killed: list[int] = []
    over, rng = threading.Event(), random.Random(0)

    def reap() -> None:
        while len(killed) < count and not over.wait(rng.uniform(0, pause_s)):
            victims = [process for title in titles for process in processes(title)]
            if victims:
                victim = rng.choice(victims)
                killed.append(victim.pid)
                try:
                    victim.kill()
                except psutil.NoSuchProcess:
                    killed.pop()

    reaper = threading.Thread(target=reap)
    reaper.start()
    try:
        yield killed
    finally:
        over.set()
        reaper.join()
    assert killed


def test_an_address_where_nothing_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    from cluster.executor import RayExecutor

    began = time.monotonic()
    with pytest.raises(RecipeError, match=r"cluster\.address: no Ray cluster at 127\.0\.0\.1:1 \(.*refused\)"):
        RayExecutor(Cluster(address="127.0.0.1:1"), Reporter(None))
    assert time.monotonic() - began < 10
