"""The Ray executor: layer workers are actors (pool.py), units of work are tasks (units.py)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from moe_compress.calibration.worker import CalibrationSetup
from moe_compress.errors import RecipeError, one_line
from moe_compress.executor import Pool
from moe_compress.process import device_bytes
from moe_compress.progress import Reporter
from moe_compress.recipe import Cluster
from moe_compress.stages.units import open_checkpoint

from .placement import Needs, alive_nodes, room_for
from .pool import RayPool
from .units import Unit, Units

_REACH_S = 10.0
"""How long a cluster's address may take to answer."""

_STORE_GB = 0.25
"""What a cluster of our own keeps of activations in memory, unless the recipe says; the rest lies on disk."""

_LEAST_STORE_BYTES = 80 * 2**20
"""Ray takes no less."""


def _open(checkpoint: Path) -> None:
    """Leaves a process ready for units of a checkpoint."""
    open_checkpoint(checkpoint)


class RayExecutor:
    """Runs the stages on a Ray cluster.

    Args:
        settings: the recipe's `cluster`. Without an address a cluster is started on this machine, reachable only
            from here, and stopped by `close`. A `device` that names CUDA asks for GPUs although none may be up yet.
        reporter: hears of what is lost.

    Raises:
        RecipeError: there is no cluster at the address, or no room or GPU on this machine.
    """

    def __init__(self, settings: Cluster, reporter: Reporter) -> None:
        self.settings, self._reporter = settings, reporter
        self._started = not ray.is_initialized()
        if self._started:
            _connect(settings)
        self._has_gpus = self._find_gpus()
        memory = 0 if self._has_gpus else int((settings.worker_memory_gb or 0) * 2**30)
        self._needs = Needs(settings.threads, settings.gpus if self._has_gpus else 0, memory)
        self._units = Units(self._needs, settings.threads, reporter)
        if self._started and settings.address is None and self.num_workers > self.num_slots:
            raise RecipeError(
                f"cluster.layer_workers: {self.num_workers} workers need {self._needs} each and this machine has room"
                f" for {self.num_slots}; lower it"
            )

    def _find_gpus(self) -> bool:
        device, found = self.settings.device, ray.cluster_resources().get("GPU", 0) > 0
        if device.startswith("cuda") and not found:
            if self.settings.address is None:
                raise RecipeError(f"cluster.device: {device}, and Ray finds no GPU here; leave it out, or set cpu")
            self._reporter.say(f"cluster.device is {device} and no GPU is there yet; waiting for nodes that have some")
        return device != "cpu" and (found or device.startswith("cuda"))

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
        how = (self.settings.threads, self._needs, self.settings.placement)
        pool = RayPool(setup, *how, say=self._reporter.say, tend=self._units.tend)
        if setup.num_workers < self.num_slots:  # it imports for seconds: not when a layer's statistics are there
            self.submit(_open, setup.checkpoint)
        return pool

    def submit(self, function: Callable[..., Any], *args: Any) -> Unit:
        """Runs a unit as a task."""
        return self._units.submit(function, *args)

    def results(self, units: list[Unit]) -> Iterator[tuple[int, Any]]:
        """(index, result) as units are done.

        Raises:
            CompressionError: processes die of a unit, one after the other.
        """
        return self._units.results(units)

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
