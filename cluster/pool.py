"""Layer workers as Ray actors, and what goes between them as objects.

Hidden states and gradients stay in the object store of the node where they were made, which spills what it has no room
for; the driver holds references alone. An actor that dies is replaced wherever there is room, now or once a node has
come; its objects outlive it, but not its node. Ray itself retries nothing here: what is to be done again is the
schedule's to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import exceptions as rex
from torch import Tensor

from moe_compress.calibration.schedule import Step, Value
from moe_compress.calibration.worker import CalibrationSetup, Description, LayerWorker, TooEarly
from moe_compress.errors import CalibrationError, StorageError, one_line
from moe_compress.executor import Alone, Done, Event, Failed, Joined, Lost
from moe_compress.process import settle

from .metrics import report_process
from .placement import Needs, alive_nodes, pause_s, strategy

PATIENCE_S = 30.0
"""How long lanes wait for a worker that does not come before others take them over, and between two such messages."""

MAX_BAD_STARTS = 10
"""How many workers in a row may die before they are ready, or find no way to the storage."""

_POLL_S = 1.0
"""How often dead nodes are looked for."""

_LOST_OBJECT = (rex.ObjectLostError, rex.ObjectFetchTimedOutError)
_LOST_ACTOR = (rex.ActorDiedError, rex.ActorUnavailableError, rex.WorkerCrashedError, rex.NodeDiedError)


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor as bytes that travel, and are read, without being pickled."""

    data: NDArray[np.uint8]
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> Packed:
        """Packs; copies only what is not on the CPU and in order."""
        flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
        return cls(flat.numpy(), tensor.dtype, tensor.shape)

    def tensor(self) -> Tensor:
        """A tensor of its own, for the store's memory cannot be written to."""
        return torch.from_numpy(self.data.copy()).view(self.dtype).view(self.shape)


class LayerWorkerActor:
    """A LayerWorker in a process of its own."""

    def __init__(self, threads: int) -> None:
        settle(threads)

    def open(self, setup: CalibrationSetup) -> tuple[Description, str]:
        """Makes the worker; (the model, the id of this node)."""
        self.worker = LayerWorker(setup)
        return self.worker.describe(), ray.get_runtime_context().get_node_id()

    def run(self, step: Step, *values: Packed) -> tuple[Packed | None, list[str]]:
        """(what other workers read, what the driver reads)."""
        made, paths = self.worker.run(step, [value.tensor() for value in values])
        report_process("worker")
        return None if made is None else Packed.of(made), paths


@dataclass(slots=True)
class _Call:
    worker: int
    step: Step
    needs: Sequence[Value]
    makes: Value | None
    made: ray.ObjectRef


class RayPool:
    """The layer workers of one calibration.

    Args:
        setup: the calibration; it says how many workers.
        threads: of each.
        needs: resources of each.
        placement: of all.
        say: tells a person something.
        tend: called now and then while this waits.
    """

    def __init__(
        self,
        setup: CalibrationSetup,
        threads: int,
        needs: Needs,
        placement: Literal["spread", "pack"],
        say: Callable[[str], None],
        tend: Callable[[], None],
    ) -> None:
        self._setup, self._threads, self._needs, self._placement = setup, threads, needs, placement
        self._say, self._tend = say, tend
        self._num_started = self._bad_starts = 0
        self._due: list[float] = []  # when others are to be hired
        self._actors: dict[int, Any] = {}
        self._starting: dict[ray.ObjectRef, int] = {}
        self._node_of: dict[int, str] = {}
        self._dead_nodes: set[str] = set()
        self._calls: dict[ray.ObjectRef, _Call] = {}
        self._values: dict[Value, ray.ObjectRef] = {}
        self._polled = self._changed = time.monotonic()
        self._is_told_alone = False
        for _ in range(setup.num_workers):
            self._hire()

    def start(self, worker: int, step: Step, needs: Sequence[Value], makes: Value | None) -> None:
        """Calls the worker's actor."""
        given = [self._values[value] for value in needs]
        made, done = self._actors[worker].run.options(num_returns=2).remote(step, *given)
        self._calls[done] = _Call(worker, step, needs, makes, made)

    def wait(self) -> list[Event]:
        """What has happened, in order.

        Raises:
            MoECompressError: of a step, or of the start of a worker.
            CalibrationError: workers die as they start.
        """
        events: list[Event] = []
        while not events:
            for when in [when for when in self._due if when <= time.monotonic()]:
                self._due.remove(when)
                self._hire()
            refs = [*self._starting, *self._calls]
            if not refs:
                time.sleep(_POLL_S)
            ready, rest = ray.wait(refs, num_returns=1, timeout=_POLL_S, fetch_local=False) if refs else ([], [])
            if ready and rest:
                ready += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
            for ref in ready:
                if ref in self._starting:
                    self._meet(ref, events)
                elif ref in self._calls:
                    self._take(ref, events)
            self._look_around(events)
            self._look_for_missing(events)
        return events

    def let_go(self, values: Sequence[Value]) -> None:
        """Drops the references."""
        for value in values:
            self._values.pop(value, None)

    def close(self) -> None:
        """Ends the actors, and those that have not started yet."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors, self._starting, self._calls, self._values, self._due = {}, {}, {}, {}, []

    # --- internals -----------------------------------------------------------------------------------------

    def _hire(self) -> None:
        """Asks Ray for one more actor, which comes once there is room."""
        worker, self._num_started = self._num_started, self._num_started + 1
        where = strategy(self._placement, self._needs, [self._node_of.get(at, "") for at in self._actors])
        options = {**self._needs.options(), "scheduling_strategy": where, "max_restarts": 0, "max_task_retries": 0}
        self._actors[worker] = actor = ray.remote(**options)(LayerWorkerActor).remote(self._threads)
        if isinstance(where, str):
            self._node_of.pop(worker, None)
        else:
            self._node_of[worker] = where.node_id
        self._starting[actor.open.remote(self._setup)] = worker

    def _meet(self, ref: ray.ObjectRef, events: list[Event]) -> None:
        worker = self._starting.pop(ref)
        try:
            model, self._node_of[worker] = ray.get(ref)
        except _LOST_ACTOR as error:
            self._start_badly(worker, _why(error))
        except rex.RayTaskError as error:
            cause = _cause(error)
            if not isinstance(cause, StorageError):
                raise cause from None
            self._start_badly(worker, one_line(cause, 160))
        else:
            self._bad_starts = 0
            self._changed, self._is_told_alone = time.monotonic(), False
            events.append(Joined(worker, model))

    def _start_badly(self, worker: int, reason: str) -> None:
        """Where other workers are ready the job can do without this one."""
        self._bad_starts += 1
        self._drop(worker)
        others = len(self._actors) > len(self._starting)
        if self._bad_starts <= MAX_BAD_STARTS:
            self._due.append(time.monotonic() + pause_s(self._bad_starts))
        elif others:
            self._say(f"{self._bad_starts} layer workers in a row died as they started ({reason}); going on without")
        else:
            raise CalibrationError(
                f"{self._bad_starts} layer workers in a row died as they started, last: {reason}; give them more"
                " memory and run the job again"
            )

    def _take(self, ref: ray.ObjectRef, events: list[Event]) -> None:
        call = self._calls.pop(ref)
        try:
            paths = ray.get(ref)
        except _LOST_ACTOR as error:
            self._lose(call.worker, _why(error), events)
        except _LOST_OBJECT as error:
            events.append(self._failed(call, error))
        except rex.RayTaskError as error:
            cause = _cause(error)
            if isinstance(cause, TooEarly | rex.ObjectLostError | rex.ObjectFetchTimedOutError):
                events.append(self._failed(call, cause))
            elif isinstance(cause, StorageError):  # waited for there; another node may find its way
                self._lose(call.worker, one_line(cause, 160), events)
            else:
                raise cause from None
        else:
            if call.makes is not None:
                self._values[call.makes] = call.made
            events.append(Done(call.worker, call.step, paths))

    def _failed(self, call: _Call, error: Exception) -> Failed:
        if isinstance(error, TooEarly):
            return Failed(call.worker, call.step)
        name = getattr(error, "object_ref_hex", "")
        refs = {value: self._values.get(value) for value in call.needs}
        lost = [value for value, ref in refs.items() if ref is not None and ref.hex() == name] or list(refs)
        self.let_go(lost)
        return Failed(call.worker, call.step, tuple(lost))

    def _lose(self, worker: int, reason: str, events: list[Event]) -> None:
        self._drop(worker)
        events.append(Lost(worker, reason))
        self._hire()
        self._changed, self._is_told_alone = time.monotonic(), False

    def _drop(self, worker: int) -> None:
        ray.kill(self._actors.pop(worker))
        self._calls = {ref: call for ref, call in self._calls.items() if call.worker != worker}
        self._starting = {ref: at for ref, at in self._starting.items() if at != worker}

    def _look_around(self, events: list[Event]) -> None:
        """A dead node takes its workers with it, and what they had made."""
        if time.monotonic() - self._polled < _POLL_S:
            return
        self._polled = time.monotonic()
        self._tend()
        dead = set(self._node_of.values()) - alive_nodes().keys() - self._dead_nodes
        self._dead_nodes |= dead
        for worker, node in list(self._node_of.items()):
            if node in dead:
                if worker in self._actors:
                    self._lose(worker, "its node died", events)
                events.append(Lost(worker, "its node died", values_too=True))

    def _look_for_missing(self, events: list[Event]) -> None:
        """When all are there, or some do not come, those that are there take over what nobody has."""
        waited_s = time.monotonic() - self._changed
        missing = len(self._starting) + len(self._due)
        if not missing:
            if not self._is_told_alone:
                events.append(Alone())
            self._is_told_alone = True
        elif waited_s > PATIENCE_S:
            self._changed = time.monotonic()
            self._say(
                f"waiting for {missing} of {self._setup.num_workers} layer workers to start;"
                f" each needs room for {self._needs}"
            )
            events.append(Alone())


def _cause(error: rex.RayTaskError) -> Exception:
    return error.cause if isinstance(error.cause, Exception) else error


def _why(error: Exception) -> str:
    """Briefly: Ray's own words fill a page."""
    return f"its process died ({type(error).__name__})"
