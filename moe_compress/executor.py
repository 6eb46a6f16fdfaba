"""What the stages ask of whoever runs them, and the answer of this process.

Units of work are calls; an executor runs them. Layer workers form a pool, which is told which step to do where and
tells what became of it. `InProcess` runs each call when its result is asked for, in the order it was made; the Ray
executor (package `cluster`) runs them wherever there is room. The bytes are the same, because the calls are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .calibration.activations import ActivationStore
from .calibration.schedule import Step, Value
from .calibration.worker import CalibrationSetup, Description, LayerWorker
from .process import device_bytes, settle
from .retry import patiently

Ref = Any
"""A handle of a result that may not be there yet."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker is ready."""

    worker: int
    model: Description


@dataclass(frozen=True, slots=True)
class Done:
    """A step is done; `paths` are the experts whose statistics are on disk now."""

    worker: int
    step: Step
    paths: list[str]


@dataclass(frozen=True, slots=True)
class Failed:
    """A step could not be done yet, because of the `lost` values or of one before it; its worker goes on."""

    worker: int
    step: Step
    lost: tuple[Value, ...] = ()


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker is gone, and where its node is gone too (`values_too`) also what it had made. May be told twice."""

    worker: int
    reason: str
    values_too: bool = False


@dataclass(frozen=True, slots=True)
class Alone:
    """Workers that were asked for do not come for now: those that are there should do their part."""


Event = Joined | Done | Failed | Lost | Alone


class Pool(Protocol):
    """The layer workers of one calibration, and the values that go between them."""

    def start(self, worker: int, step: Step, needs: Sequence[Value], makes: Value | None) -> None:
        """Gives a worker a step, which it does after those it has."""

    def wait(self) -> list[Event]:
        """What has happened, in order; waits for something.

        Raises:
            MoECompressError: what a step, or the start of a worker, has raised.
        """

    def let_go(self, values: Sequence[Value]) -> None:
        """These values will not be needed again."""

    def close(self) -> None:
        """Ends the workers and gives back their memory."""


class Executor(Protocol):
    """Runs units of work and layer workers."""

    @property
    def num_workers(self) -> int:
        """Layer workers to share the layers of a calibration that starts now."""

    @property
    def num_slots(self) -> int:
        """Units that run side by side."""

    def memory_bytes(self) -> int:
        """What a layer worker may hold."""

    def start_pool(self, setup: CalibrationSetup) -> Pool:
        """Brings up layer workers."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Ref:
        """Runs a unit of work."""

    def results(self, refs: list[Ref]) -> Iterator[tuple[int, Any]]:
        """(index, result) of each ref as it is done, in any order; a unit's own error is raised."""

    def close(self) -> None:
        """Gives back what the executor started."""


class LocalPool:
    """One worker in this process, which does its steps one at a time.

    Args:
        setup: the calibration.
    """

    def __init__(self, setup: CalibrationSetup) -> None:
        self._worker = LayerWorker(setup)
        self._values = ActivationStore(setup.scratch / "values", setup.activation_bytes)
        self._queue: list[tuple[Step, Sequence[Value], Value | None]] = []
        self._told = False

    def start(self, worker: int, step: Step, needs: Sequence[Value], makes: Value | None) -> None:
        """Puts the step at the end of the queue."""
        self._queue.append((step, needs, makes))

    def wait(self) -> list[Event]:
        """Does one step."""
        if not self._told:
            self._told = True
            return [Joined(0, self._worker.describe()), Alone()]
        step, needs, makes = self._queue.pop(0)
        made, paths = self._worker.run(step, [self._values.get(value) for value in needs])
        if made is not None and makes is not None:
            self._values.put(makes, made)
        return [Done(0, step, paths)]

    def let_go(self, values: Sequence[Value]) -> None:
        """Forgets the values."""
        for value in values:
            self._values.drop(value)

    def close(self) -> None:
        """Drops the worker and its memory."""
        del self._worker, self._values


class InProcess:
    """Runs everything here, one call at a time."""

    num_workers = 1
    num_slots = 1

    def __init__(self, threads: int) -> None:
        settle(threads)

    def memory_bytes(self) -> int:
        """All there is; of the GPU, where there is one."""
        return device_bytes()

    def start_pool(self, setup: CalibrationSetup) -> Pool:
        """A pool of one worker."""
        return LocalPool(setup)

    def submit(self, function: Callable[..., Any], *args: Any) -> Ref:
        """Defers a unit."""
        return lambda: patiently(function, *args)

    def results(self, refs: list[Ref]) -> Iterator[tuple[int, Any]]:
        """Runs the calls in order."""
        for index, ref in enumerate(refs):
            yield index, ref()

    def close(self) -> None:
        """Nothing was started."""
