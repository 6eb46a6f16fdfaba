"""The Ray executor: layer workers are actors, units of work are tasks.

Hidden states and gradients go from actor to actor as object refs and never through the driver. A unit is idempotent
and leaves a durable file, so a task that dies is simply run again, here or on another node; an actor that dies loses
the sums it had not written, and the stage starts it anew (`WorkerLost`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as rex

from moe_compress.calibration.worker import CalibrationSetup, LayerWorker
from moe_compress.errors import CompressionError, RecipeError
from moe_compress.executor import WorkerLost
from moe_compress.process import settle
from moe_compress.recipe import Cluster
from moe_compress.stages.units import open_checkpoint

from .metrics import report_process

UNIT_RETRIES = 3
"""How often a task is run again when its process dies."""

_HANDED_ON = ("forward", "backward")
"""Methods whose results go to other workers, not to the driver."""


class _LayerWorkerActor:
    """A LayerWorker in a process of its own."""

    def __init__(self, setup: CalibrationSetup, index: int, threads: int) -> None:
        settle(threads)
        self.worker = LayerWorker(setup, index)

    def call(self, method: str, *args: Any) -> tuple[Any, Any]:
        """(what other workers read, what the driver reads)."""
        result = getattr(self.worker, method)(*args)
        report_process("worker")
        return (result, None) if method in _HANDED_ON else (None, result)


def _run_unit(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    settle(threads)
    result = function(*args)
    report_process("task")
    return result


def _open(checkpoint: Path) -> None:
    """Leaves a process ready for units of a checkpoint."""
    open_checkpoint(checkpoint)


@dataclass(slots=True)
class _Call:
    """A call under way: the driver waits for `done`; `value` is for other calls."""

    done: ray.ObjectRef
    value: ray.ObjectRef | None = None


class RayExecutor:
    """Runs the stages on a Ray cluster.

    Args:
        settings: the recipe's `cluster`. Without an address a cluster is started on this machine, reachable only
            from here, and stopped by `close`.

    Raises:
        RecipeError: there is no cluster at the address.
    """

    def __init__(self, settings: Cluster) -> None:
        self.settings = settings
        self._started = not ray.is_initialized()
        if self._started:
            _connect(settings)
        resources = ray.cluster_resources()
        cpus, self._gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        slots = max(1, cpus // settings.threads)
        self.num_slots = self._gpus or slots
        self.num_workers = settings.layer_workers or self._gpus or min(2, slots)
        if self.num_workers > self.num_slots:
            raise RecipeError(
                f"cluster.layer_workers: {self.num_workers} workers need {self.num_workers} x {settings.threads}"
                f" CPUs (or a GPU each) and the cluster has {cpus} CPUs and {self._gpus} GPUs; lower it"
            )
        needs = {"num_cpus": settings.threads, "num_gpus": 1 if self._gpus else 0}
        self._actor = ray.remote(**needs)(_LayerWorkerActor)
        self._unit = ray.remote(max_retries=UNIT_RETRIES, **needs)(_run_unit)
        self._workers: list[Any] = []

    def start_workers(self, setup: CalibrationSetup) -> None:
        """Brings up `setup.num_workers` actors, and where there is room a process for the first units."""
        self._workers = [self._actor.remote(setup, index, self.settings.threads) for index in range(setup.num_workers)]
        if setup.num_workers < self.num_slots:  # it imports for seconds: not when a layer's statistics are there
            self._unit.remote(self.settings.threads, _open, setup.checkpoint)

    def call(self, worker: int, method: str, *args: Any) -> _Call:
        """Calls a method of a layer worker; its calls run in the order they are made."""
        given = [arg.value if isinstance(arg, _Call) else arg for arg in args]
        value, done = self._workers[worker].call.options(num_returns=2).remote(method, *given)
        return _Call(done, value)

    def stop_workers(self) -> None:
        """Ends the actors and gives back their memory."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def submit(self, function: Callable[..., Any], *args: Any) -> _Call:
        """Runs a unit as a task."""
        return _Call(self._unit.remote(self.settings.threads, function, *args))

    def results(self, refs: list[_Call]) -> Iterator[tuple[int, Any]]:
        """(index, result) as calls are done; what only other workers read is let go."""
        index_of = {call.done: index for index, call in enumerate(refs)}
        pending = list(index_of)
        while pending:
            ready, pending = ray.wait(pending, num_returns=min(len(pending), 16), timeout=0.5)
            for ref in ready:
                index = index_of[ref]
                refs[index].value = None
                yield index, _get(ref)

    def close(self) -> None:
        """Stops the cluster, if it was started here."""
        self.stop_workers()
        if self._started:
            ray.shutdown()


def _get(ref: ray.ObjectRef) -> Any:
    try:
        return ray.get(ref)
    except rex.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, rex.ActorDiedError | rex.ObjectLostError):
            raise WorkerLost("its process died") from None
        raise (cause if isinstance(cause, Exception) else error) from None
    except (rex.ActorDiedError, rex.ActorUnavailableError, rex.ObjectLostError) as error:
        raise WorkerLost(" ".join(str(error).split())[:120]) from None
    except (rex.WorkerCrashedError, rex.OutOfMemoryError) as error:
        raise CompressionError(
            f"a task's process died {UNIT_RETRIES + 1} times ({type(error).__name__}); finished work is kept; give"
            " the tasks more memory and run the job again"
        ) from None


def _connect(settings: Cluster) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if settings.address is not None:
        try:
            ray.init(address=settings.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise RecipeError(
                f"cluster.address: no Ray cluster at {settings.address} ({reason}); start one, or leave address out"
            ) from error
        return
    ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
