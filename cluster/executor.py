"""The Ray executor: layer workers are actors (pool.py), units of work are tasks.

A unit is idempotent and leaves a durable file, so what a dead task was to do is given to another one, wherever there is
room.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as rex

from moe_compress.calibration.worker import CalibrationSetup
from moe_compress.errors import CompressionError, RecipeError, one_line
from moe_compress.executor import Pool
from moe_compress.process import device_bytes, settle
from moe_compress.progress import Reporter
from moe_compress.recipe import Cluster
from moe_compress.retry import patiently
from moe_compress.stages.units import open_checkpoint

from .metrics import report_process
from .placement import Needs, alive_nodes, room_for
from .pool import RayPool

_REACH_S = 10.0
"""How long a cluster's address may take to answer."""

_STORE_GB = 0.25
"""What a cluster of our own keeps of activations in memory, unless the recipe says; the rest lies on disk."""

_LEAST_STORE_BYTES = 80 * 2**20
"""Ray takes no less."""

MAX_DEATHS = 3
"""How many processes may die of the same unit before the job gives up. A node's death is none of its units' doing."""

_DEAD = (rex.WorkerCrashedError, rex.OutOfMemoryError, rex.NodeDiedError, rex.ObjectLostError)


@dataclass(slots=True)
class _Unit:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    num_deaths: int = 0


def _run_unit(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    settle(threads)
    result = patiently(function, *args)
    report_process("task")
    return result


def _open(checkpoint: Path) -> None:
    """Leaves a process ready for units of a checkpoint."""
    open_checkpoint(checkpoint)


class RayExecutor:
    """Runs the stages on a Ray cluster.

    Args:
        settings: the recipe's `cluster`. Without an address a cluster is started on this machine, reachable only
            from here, and stopped by `close`.
        reporter: hears of what is lost.

    Raises:
        RecipeError: there is no cluster at the address.
    """

    def __init__(self, settings: Cluster, reporter: Reporter) -> None:
        self.settings, self._reporter = settings, reporter
        self._units: dict[ray.ObjectRef, _Unit] = {}
        self._started = not ray.is_initialized()
        if self._started:
            _connect(settings)
        self._has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        memory = 0 if self._has_gpus else int((settings.worker_memory_gb or 0) * 2**30)
        self._needs = Needs(settings.threads, settings.gpus if self._has_gpus else 0, memory)
        self._unit = ray.remote(max_retries=0, **self._needs.options())(_run_unit)
        if self._started and settings.address is None and self.num_workers > self.num_slots:
            raise RecipeError(
                f"cluster.layer_workers: {self.num_workers} workers need {self._needs} each and this machine has room"
                f" for {self.num_slots}; lower it"
            )

    @property
    def num_slots(self) -> int:
        """Units that the cluster as it is now runs side by side."""
        return max(1, room_for(self._needs))

    @property
    def num_workers(self) -> int:
        """Layer workers of a calibration that starts now."""
        return self.settings.layer_workers or (self.num_slots if self._has_gpus else min(2, self.num_slots))

    def memory_bytes(self) -> int:
        """What the recipe says; else a GPU's, or a node's divided by how many workers it has room for."""
        if self.settings.worker_memory_gb is not None:
            return int(self.settings.worker_memory_gb * 2**30)
        if self._has_gpus:
            found: int = ray.get(ray.remote(**self._needs.options())(device_bytes).remote())
            return int(found * min(self.settings.gpus, 1))
        nodes = ((resources, self._needs.room_on(resources)) for resources in alive_nodes().values())
        return int(min((resources["memory"] / room for resources, room in nodes if room), default=0))

    def start_pool(self, setup: CalibrationSetup) -> Pool:
        """Brings up `setup.num_workers` actors, and where there is room a process for the first units."""
        pool = RayPool(setup, self.settings.threads, self._needs, self.settings.placement, self._reporter.say)
        if setup.num_workers < self.num_slots:  # it imports for seconds: not when a layer's statistics are there
            self._unit.remote(self.settings.threads, _open, setup.checkpoint)
        return pool

    def submit(self, function: Callable[..., Any], *args: Any) -> ray.ObjectRef:
        """Runs a unit as a task."""
        return self._run(_Unit(function, args))

    def results(self, refs: list[ray.ObjectRef]) -> Iterator[tuple[int, Any]]:
        """(index, result) as units are done.

        Raises:
            CompressionError: processes die of a unit, one after the other.
        """
        index_of = {ref: index for index, ref in enumerate(refs)}
        while index_of:
            ready, rest = ray.wait(list(index_of), num_returns=1, timeout=0.5)
            if ready and rest:
                ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
            for ref in ready:
                index, unit = index_of.pop(ref), self._units.pop(ref)
                try:
                    result = ray.get(ref)
                except rex.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, Exception) else error) from None
                except _DEAD as error:
                    index_of[self._run_again(unit, error)] = index
                else:
                    yield index, result

    def _run(self, unit: _Unit) -> ray.ObjectRef:
        ref = self._unit.remote(self.settings.threads, unit.function, *unit.args)
        self._units[ref] = unit
        return ref

    def _run_again(self, unit: _Unit, error: Exception) -> ray.ObjectRef:
        reason = type(error).__name__
        unit.num_deaths += not isinstance(error, rex.NodeDiedError)
        if unit.num_deaths > MAX_DEATHS:
            raise CompressionError(
                f"a task's process died {unit.num_deaths} times at the same unit of work ({reason}); finished work is"
                " kept; give the tasks more memory and run the job again"
            ) from None
        self._reporter.event("task_lost", unit=unit.function.__name__, reason=reason)
        self._reporter.say(f"a task was lost ({reason}); its unit of work is done again")
        return self._run(unit)

    def close(self) -> None:
        """Stops the cluster, if it was started here."""
        if self._started:
            ray.shutdown()


def _connect(settings: Cluster) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if settings.address is not None:
        try:
            _reach(settings.address)
            ray.init(address=settings.address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            reason = one_line(error, 160)
            raise RecipeError(
                f"cluster.address: no Ray cluster at {settings.address} ({reason}); start one, or leave address out"
            ) from error
        return
    store_bytes = int((settings.in_flight_gb or _STORE_GB) * 2**30)
    private = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(address="local", object_store_memory=max(store_bytes, _LEAST_STORE_BYTES), **private, **quiet)


def _reach(address: str) -> None:
    """Ray itself waits for minutes at an address where nothing answers.

    Raises:
        OSError: nothing does.
        ValueError: it is no address.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
