"""Units of work as Ray tasks.

A unit is idempotent and leaves a durable file, so what a dead task was to do is given to another one, wherever there is
room. Ray itself retries nothing: what was lost is to be told of, and what dies again and again waits longer and longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions as rex

from moe_compress.errors import CompressionError, StorageError, one_line
from moe_compress.process import settle
from moe_compress.progress import Reporter
from moe_compress.retry import patiently

from .metrics import report_process
from .placement import Needs, pause_s

MAX_DEATHS = 3
"""How many processes may die of the same unit, or find no way to the storage, before the job gives up."""

MAX_NODE_DEATHS = 10
"""How many nodes may: most of them are taken away for reasons of their own."""

_NODE = (rex.NodeDiedError, rex.ObjectLostError, rex.LocalRayletDiedError)
_DEAD = (*_NODE, rex.WorkerCrashedError, rex.OutOfMemoryError, rex.OutOfDiskError, rex.RuntimeEnvSetupError)


@dataclass(slots=True, eq=False)
class Unit:
    """One call, and what came of it.

    Attributes:
        function, args: the call.
        deaths, node_deaths: how often it was lost with a process, or with a whole node.
        ref: of the task that runs, or waits for room.
        due: when it is to run again; None where it runs.
        result, error: of a unit that is over.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    deaths: int = 0
    node_deaths: int = 0
    ref: ray.ObjectRef | None = None
    due: float | None = None
    result: Any = None
    error: Exception | None = None


class Units:
    """The units that are not over.

    Args:
        needs: resources of each.
        threads: of each.
        reporter: hears of what is lost.
    """

    def __init__(self, needs: Needs, threads: int, reporter: Reporter) -> None:
        self._threads, self._reporter = threads, reporter
        self._task = ray.remote(max_retries=0, **needs.options())(_run_unit)
        self._running: dict[ray.ObjectRef, Unit] = {}
        self._resting: list[Unit] = []

    def submit(self, function: Callable[..., Any], *args: Any) -> Unit:
        """Runs a unit as soon as there is room."""
        unit = Unit(function, args)
        self._start(unit)
        return unit

    def tend(self, timeout_s: float = 0.0) -> None:
        """Takes in what tasks have made, and gives out again what dead ones were to do; waits for one that long."""
        for unit in [unit for unit in self._resting if (unit.due or 0) <= time.monotonic()]:
            self._resting.remove(unit)
            self._start(unit)
        refs = list(self._running)
        if not refs:
            time.sleep(timeout_s)
            return
        ready, rest = ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for ref in ready:
            self._take(self._running.pop(ref), ref)

    def results(self, units: list[Unit]) -> Iterator[tuple[int, Any]]:
        """(index, result) as units are done.

        Raises:
            CompressionError: processes die of a unit, one after the other.
        """
        waiting = dict(enumerate(units))
        while waiting:
            over = [index for index, unit in waiting.items() if unit.ref is None and unit.due is None]
            for index in over:
                unit = waiting.pop(index)
                if unit.error is not None:
                    raise unit.error from None
                yield index, unit.result
            if not over:
                self.tend(0.5)

    def _start(self, unit: Unit) -> None:
        unit.due, unit.ref = None, self._task.remote(self._threads, unit.function, *unit.args)
        self._running[unit.ref] = unit

    def _take(self, unit: Unit, ref: ray.ObjectRef) -> None:
        unit.ref = None
        try:
            unit.result = ray.get(ref)
        except rex.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, StorageError):
                self._lose(unit, cause, one_line(cause, 160))
            else:
                unit.error = cause
        except _DEAD as error:
            self._lose(unit, error, type(error).__name__)

    def _lose(self, unit: Unit, error: Exception, reason: str) -> None:
        of_node = isinstance(error, _NODE)
        unit.deaths, unit.node_deaths = unit.deaths + (not of_node), unit.node_deaths + of_node
        count, most = (unit.node_deaths, MAX_NODE_DEATHS) if of_node else (unit.deaths, MAX_DEATHS)
        if count > most:
            unit.error = error
            if not isinstance(error, StorageError):
                unit.error = CompressionError(
                    f"a task's process died {count} times at the same unit of work ({reason}); finished work is kept;"
                    " give the tasks more memory and run the job again"
                )
            return
        unit.due = time.monotonic() + pause_s(unit.deaths + unit.node_deaths)
        self._resting.append(unit)
        self._reporter.event("task_lost", unit=unit.function.__name__, reason=reason)
        self._reporter.say(f"a task was lost ({reason}); its unit of work is done again")


def _run_unit(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    settle(threads)
    result = patiently(function, *args)
    report_process("task")
    return result
