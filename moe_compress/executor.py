"""What the stages ask of whoever runs them, and the answer of this process.

The stages describe their work as calls; an executor runs them. `InProcess` runs each call when its result is asked
for, in the order it was made; the Ray executor (package `cluster`) runs them wherever there is room. The bytes are
the same, because the calls are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from .calibration.worker import CalibrationSetup, LayerWorker
from .process import settle

Ref = Any
"""A handle of a result that may not be there yet; may be passed to other calls."""


class WorkerLost(Exception):
    """A layer worker's process is gone; what it had not written is lost with it."""


class Executor(Protocol):
    """Runs units of work and layer workers."""

    num_workers: int
    """Layer workers to share the layers of a calibration."""

    num_slots: int
    """Units that run side by side."""

    def start_workers(self, setup: CalibrationSetup) -> None:
        """Brings up `setup.num_workers` layer workers."""

    def call(self, worker: int, method: str, *args: Any) -> Ref:
        """Calls a method of a layer worker; calls of one worker run in the order they are made."""

    def stop_workers(self) -> None:
        """Ends the layer workers."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Ref:
        """Runs a unit of work."""

    def results(self, refs: list[Ref]) -> Iterator[tuple[int, Any]]:
        """(index, result) of each ref as it is done, in any order; a unit's own error is raised.

        Raises:
            WorkerLost: the worker of a call died.
        """

    def close(self) -> None:
        """Gives back what the executor started."""


class _Deferred:
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args

    def run(self) -> Any:
        return self.function(*(None if isinstance(arg, _Deferred) else arg for arg in self.args))


class InProcess:
    """Runs everything here, one call at a time."""

    num_workers = 1
    num_slots = 1

    def __init__(self, threads: int) -> None:
        settle(threads)
        self._worker: LayerWorker | None = None

    def start_workers(self, setup: CalibrationSetup) -> None:
        """Makes the one worker."""
        self._worker = LayerWorker(setup)

    def call(self, worker: int, method: str, *args: Any) -> Ref:
        """Defers a call of the worker. What calls hand on stays inside the one worker, so refs become None."""
        return _Deferred(getattr(self._worker, method), args)

    def stop_workers(self) -> None:
        """Drops the worker and its memory."""
        self._worker = None

    def submit(self, function: Callable[..., Any], *args: Any) -> Ref:
        """Defers a unit."""
        return _Deferred(function, args)

    def results(self, refs: list[Ref]) -> Iterator[tuple[int, Any]]:
        """Runs the calls in order."""
        for index, ref in enumerate(refs):
            yield index, ref.run()

    def close(self) -> None:
        """Nothing was started."""
