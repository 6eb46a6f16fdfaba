"""The layer workers of a dry run: what calibration/worker.py does, as far as others can see it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..calibration.schedule import Step, Value
from ..calibration.worker import CalibrationSetup, Description
from ..executor import Alone, Done, Event, Failed, Joined, Lost
from .clock import Clock, Gpus
from .costs import Costs

Work = tuple[Step, Sequence[Value], Value | None]


@dataclass(slots=True)
class Traffic:
    """What a calibration moved and held, in bytes.

    Attributes:
        storage, network: read and written, and sent from node to node.
        in_flight: the most that steps under way read and wrote together.
        values: the most that lay on one node for others to read.
        device: the most that one worker held.
        num_steps: done; num_lost: workers.
    """

    storage: int = 0
    network: int = 0
    in_flight: int = 0
    values: int = 0
    device: int = 0
    num_steps: int = 0
    num_lost: int = 0


@dataclass(slots=True)
class _Worker:
    gpu: int
    queue: deque[Work] = field(default_factory=deque)
    is_busy: bool = False
    loaded: int | None = None
    fetched: set[int] = field(default_factory=set)
    fetching: int | None = None
    then: Callable[[], None] | None = None
    forwarded: set[tuple[int, int]] = field(default_factory=set)
    next: Counter[tuple[int, int]] = field(default_factory=Counter)
    sums: set[tuple[int, int]] = field(default_factory=set)


class SimulatedPool:
    """Workers that do nothing, in the time it takes.

    Args:
        setup: the calibration.
        model: what a worker would say of the model.
        batch_bytes: hidden states of each micro-batch.
        costs: what steps take.
        clock, gpus: of the cluster.
        traffic: is added to.
        write: leaves the statistics of a chunk; their experts' paths.
        packs: workers go to as few nodes as have room, not to as many as there are.
    """

    def __init__(
        self,
        setup: CalibrationSetup,
        model: Description,
        batch_bytes: Sequence[int],
        costs: Costs,
        clock: Clock,
        gpus: Gpus,
        traffic: Traffic,
        write: Callable[[int], list[str]],
        packs: bool,
    ) -> None:
        self._packs = packs
        self._setup, self._model, self._batch_bytes, self._costs = setup, model, batch_bytes, costs
        self._clock, self._gpus, self._traffic, self._write = clock, gpus, traffic, write
        self._workers: dict[int, _Worker] = {}
        self._events: list[Event] = []
        self._values: dict[Value, int] = {}
        self._copies: dict[Value, set[int]] = {}
        self._on_node: Counter[int] = Counter()
        self._in_flight = self._num_asked = 0
        self._is_open = True
        for _ in range(setup.num_workers):
            self._hire()
        self._say_alone()

    def start(self, worker: int, step: Step, needs: Sequence[Value], makes: Value | None) -> None:
        """Puts the step at the end of the worker's queue."""
        if worker not in self._workers:
            return  # it died in this very moment, and that it did is among the events
        work = step, needs, makes
        self._fly(work, 1)
        self._workers[worker].queue.append(work)
        self._go_on(worker)

    def wait(self) -> list[Event]:
        """Lets time pass until something happens."""
        while not self._events:
            self._clock.step()
        events, self._events = self._events, []
        return events

    def let_go(self, values: Sequence[Value]) -> None:
        """They take no room any more."""
        for value in values:
            if value in self._values:
                self._on_node[self._values.pop(value)] -= self._size(value)

    def close(self) -> None:
        """Gives the GPUs back."""
        self._is_open = False
        for worker in self._workers.values():
            self._gpus.give_back(worker.gpu)
        self._workers = {}

    # --- workers that come and go --------------------------------------------------------------------------

    def _hire(self) -> None:
        number, self._num_asked = self._num_asked, self._num_asked + 1

        def wants() -> bool:
            if not self._is_open:
                return True
            gpu = self._gpus.take(lambda node_too: self._die(number, node_too), self._packs)
            if gpu is not None:
                self._workers[number] = _Worker(gpu, is_busy=True)
                self._clock.at(self._clock.now + self._costs.start_s, lambda: self._join(number))
            return gpu is not None

        self._gpus.when_free(wants)

    def _join(self, number: int) -> None:
        if number in self._workers:
            self._workers[number].is_busy = False
            self._events.append(Joined(number, self._model))

    def _say_alone(self) -> None:
        """Where all are there that will come soon, those adopt what nobody has; a node that is gone may take long."""

        def tell() -> None:
            if self._is_open:
                self._events.append(Alone())

        self._clock.at(self._clock.now + self._costs.start_s + 1e-6, tell)

    def _die(self, number: int, node_too: bool) -> None:
        worker = self._workers.pop(number)
        self._traffic.num_lost += 1
        for work in worker.queue:
            self._fly(work, -1)
        if node_too:
            node = self._gpus.node(worker.gpu)
            gone = [value for value, at in self._values.items() if at == node]
            self.let_go(gone)
        self._events.append(Lost(number, "its node died" if node_too else "its process died", node_too))
        self._hire()
        self._say_alone()

    # --- steps ---------------------------------------------------------------------------------------------

    def _go_on(self, number: int) -> None:
        """Begins the first step of the queue, if the worker does none."""
        worker = self._workers[number]
        while worker.queue and not worker.is_busy:
            step, needs, _ = worker.queue[0]
            lost = tuple(value for value in needs if value not in self._values)
            sums = step.chunk, step.part % self._setup.num_groups
            is_early = step.kind == "backward" and worker.next[sums] != step.part // self._setup.num_groups
            if lost or is_early:
                self._fly(worker.queue.popleft(), -1)
                self._events.append(Failed(number, step, lost))
                continue
            worker.is_busy = True
            self._prepare(worker, step, needs, partial(self._compute, number, self._seconds(worker, step)))

    def _prepare(self, worker: _Worker, step: Step, needs: Sequence[Value], then: Callable[[], None]) -> None:
        """Goes on when values, and then weights, are there; a worker asks for its next weights ahead of time."""
        node = self._gpus.node(worker.gpu)
        if step.kind == "backward":
            worker.sums.add((step.chunk, step.part % self._setup.num_groups))
        held = self._costs.root_bytes + self._costs.chunk_bytes + len(worker.sums) * self._costs.sums_bytes
        self._traffic.device = max(self._traffic.device, held + self._costs.working_bytes)
        if step.kind in ("finish", "merge"):
            moved = self._costs.sums_bytes * (1 if step.kind == "finish" else self._setup.num_groups + 1)
            self._traffic.storage += moved
            self._gpus.storage[node].move(moved, then)
            return
        far = sum(self._size(value) for value in needs if node not in self._copies[value])
        for value in needs:
            self._copies[value].add(node)  # it stays there until nobody needs it
        self._traffic.network += far
        if far:
            self._gpus.network[node].move(far, lambda: self._enter(worker, step, then))
        else:
            self._enter(worker, step, then)

    def _enter(self, worker: _Worker, step: Step, then: Callable[[], None]) -> None:
        """Has the weights of the step's chunk in place of others."""
        if step.kind == "loss" or worker.loaded == step.chunk:
            then()
            return

        def go_on() -> None:
            worker.loaded = step.chunk
            worker.fetched.discard(step.chunk)
            following = step.chunk + self._setup.num_columns * (1 if step.kind == "forward" else -1)
            if 0 <= following < len(self._model.chunks) and following not in worker.fetched:
                self._fetch(worker, following)
            then()

        if step.chunk in worker.fetched:
            go_on()
            return
        worker.then = go_on
        if worker.fetching != step.chunk:
            self._fetch(worker, step.chunk)

    def _fetch(self, worker: _Worker, chunk: int) -> None:
        def there() -> None:
            worker.fetched.add(chunk)
            if worker.fetching == chunk:
                worker.fetching = None
                if worker.then is not None:
                    go_on, worker.then = worker.then, None
                    go_on()

        worker.fetching = chunk
        self._traffic.storage += self._costs.chunk_bytes
        self._gpus.storage[self._gpus.node(worker.gpu)].move(self._costs.chunk_bytes, there)

    def _compute(self, number: int, computing: float) -> None:
        self._clock.at(self._clock.now + computing, lambda: self._end(number, computing))

    def _seconds(self, worker: _Worker, step: Step) -> float:
        """Of computing; what lies between the layers of a chunk is remade where another worker ran it forward."""
        again = step.kind in ("backward", "gradient") and len(self._model.chunks[step.chunk]) > 1
        is_remade = again and (step.chunk, step.part) not in worker.forwarded
        return self._costs.steps[step.kind] + (self._costs.steps["forward"] if is_remade else 0)

    def _end(self, number: int, computing: float) -> None:
        worker = self._workers.get(number)
        if worker is None:
            return
        work = worker.queue.popleft()
        self._fly(work, -1)
        step, _, makes = work
        kind, chunk, part = step
        self._gpus.busy_s[worker.gpu] += computing
        self._traffic.num_steps += 1
        worker.is_busy = False
        if makes is not None:
            self.let_go([makes])
            node = self._gpus.node(worker.gpu)
            self._values[makes], self._copies[makes] = node, {node}
            self._on_node[node] += self._size(makes)
            self._traffic.values = max(self._traffic.values, self._on_node[node])
        if kind == "forward":
            worker.forwarded.add((chunk, part))
        elif kind == "backward":
            worker.next[chunk, part % self._setup.num_groups] += 1
        elif kind == "finish":
            worker.sums.discard((chunk, part))
        is_last = kind == ("finish" if self._setup.num_groups == 1 else "merge")
        self._events.append(Done(number, step, self._write(chunk) if is_last else []))
        self._go_on(number)

    def _size(self, value: Value) -> int:
        return self._batch_bytes[value.batch]

    def _fly(self, work: Work, sign: int) -> None:
        """Counts what a step under way reads and writes."""
        step, needs, makes = work
        if num_values := len(needs) + (makes is not None):
            self._in_flight += sign * num_values * self._batch_bytes[step.part]
            self._traffic.in_flight = max(self._traffic.in_flight, self._in_flight)
