"""An executor of virtual time: the stages run as ever, and nothing they ask for takes any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..calibration.worker import CalibrationSetup, Description
from ..errors import CompressionError
from ..executor import Pool
from ..stages.compress import make_shard
from .clock import Clock, Gpus
from .costs import Costs
from .pool import SimulatedPool, Traffic

MAX_DEATHS = 4
"""How many processes may die at one unit, as where Ray runs it four times."""

Leave = Callable[..., Any]
"""Stands in for a unit: leaves what it would, and gives what it would give."""


@dataclass(slots=True, eq=False)
class _Task:
    name: str
    args: tuple[Any, ...]
    num_deaths: int = 0
    is_done: bool = False
    result: Any = None


class SimulatedExecutor:
    """Runs units and layer workers in virtual time.

    Args:
        gpus: what they run on.
        clock: the time.
        costs: what they take.
        stubs: by the names of units' functions, what stands in for them.
        num_workers: layer workers.
        model: what a worker would say of the model.
        batch_bytes: hidden states of each micro-batch.
        write: leaves the statistics of a chunk; their experts' paths.
        packs: whether layer workers go to as few nodes as have room.
        memory_bytes: of a GPU.

    Attributes:
        traffic: of all layer workers and units.
        num_units: done; num_again: that died half-way.
    """

    def __init__(
        self,
        gpus: Gpus,
        clock: Clock,
        costs: Costs,
        stubs: dict[str, Leave],
        num_workers: int,
        model: Description,
        batch_bytes: Sequence[int],
        write: Callable[[int], list[str]],
        packs: bool = False,
        memory_bytes: int = 0,
    ) -> None:
        self._packs, self._memory_bytes = packs, memory_bytes
        self._gpus, self._clock, self._costs, self._stubs = gpus, clock, costs, stubs
        self._model, self._batch_bytes, self._write = model, batch_bytes, write
        self.num_workers, self.num_slots = num_workers, len(gpus)
        self.traffic = Traffic()
        self.num_units = self.num_again = 0
        self._failure: CompressionError | None = None

    def memory_bytes(self) -> int:
        """Of a GPU."""
        return self._memory_bytes

    def start_pool(self, setup: CalibrationSetup) -> Pool:
        """Virtual workers."""
        how = (self._model, self._batch_bytes, self._costs, self._clock, self._gpus, self.traffic, self._write)
        return SimulatedPool(setup, *how, self._packs)

    def submit(self, function: Callable[..., Any], *args: Any) -> _Task:
        """Begins when a GPU is free."""
        if function is make_shard:
            function, args = args[0], args[1:]
        task = _Task(function.__name__, args)
        self._queue(task)
        return task

    def results(self, refs: list[_Task]) -> Iterator[tuple[int, Any]]:
        """(index, result) as units are done.

        Raises:
            CompressionError: processes died again and again at one unit.
        """
        left = dict(enumerate(refs))
        while left:
            done = [index for index, task in left.items() if task.is_done]
            for index in done:
                yield index, left.pop(index).result
            if left and not done:
                self._clock.step()
                if self._failure is not None:
                    raise self._failure

    def close(self) -> None:
        """Nothing was started."""

    def _queue(self, task: _Task) -> None:
        """Runs it when a GPU is free: reads, computes, leaves what it leaves."""
        cost = self._costs.units[task.name]
        is_alive = True

        def die(node_too: bool) -> None:
            nonlocal is_alive
            is_alive = False
            self.num_again += 1
            task.num_deaths += 1
            if task.num_deaths >= MAX_DEATHS:
                self._failure = CompressionError(f"{task.name}: its process died {MAX_DEATHS} times")
            self._queue(task)

        def wants() -> bool:
            gpu = self._gpus.take(die)
            if gpu is None:
                return False
            self.traffic.storage += cost.storage_bytes

            def end() -> None:
                if is_alive:
                    task.is_done, task.result = True, self._stubs[task.name](*task.args)
                    self.num_units += 1
                    self._gpus.busy_s[gpu] += cost.seconds
                    self._gpus.give_back(gpu)

            def compute() -> None:
                self._clock.at(self._clock.now + cost.seconds, end)

            self._gpus.storage[self._gpus.node(gpu)].move(cost.storage_bytes, compute)
            return True

        self._gpus.when_free(wants)
