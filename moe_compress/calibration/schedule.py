"""Who does what, when, in a calibration: a pure state machine, told what happened and asked what to start.

The layers are cut into chunks c = 0 .. C-1, the text into micro-batches b. A step is one of

    forward(c, b)    hidden(c, b) -> hidden(c+1, b)
    loss(b)          hidden(C, b) -> grad(C, b)
    backward(c, b)   hidden(c, b), grad(c+1, b) -> grad(c, b), and adds to the sums of (c, group of b)
    gradient(c, b)   the same without the sums: when these are on disk and the gradient was lost
    finish(c, r)     writes the sums of (c, r)
    merge(c)         adds up what the groups of c have written, where there are several

Micro-batch b belongs to group r = b mod R, R the number of replicas, and each group's sums are taken by one worker in
the order of its micro-batches: whoever that is, the bytes are the same. Chunks are dealt to lanes in turn, each lane
has a worker, and a worker has any number of lanes. A lost worker takes its unwritten sums with it, a lost node also
the values that were made there: what these leave undone is done again, and no more.

Nothing waits for ever: whatever a step needs comes before it in the order of `_rank`, so that the first of all steps
left can always run. A step costs a constant number of set operations and one of a heap; a loss one pass over what is
left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from typing import Literal, NamedTuple

Kind = Literal["forward", "loss", "backward", "gradient", "finish", "merge"]

DEPTH = 2
"""Steps that a worker is given at a time: one to do, one to go on with at once."""


class Value(NamedTuple):
    """What one step makes and others need: hidden states, or their gradient, at the lower border of a chunk."""

    kind: Literal["hidden", "grad"]
    border: int
    batch: int


class Step(NamedTuple):
    """A call of a worker; `part` is the micro-batch, of `finish` the group, of `merge` 0."""

    kind: Kind
    chunk: int
    part: int


class Schedule:
    """The steps of one calibration.

    Args:
        num_chunks: C; 1 for a model that is not chained.
        batch_bytes: size of the hidden states of each micro-batch.
        num_lanes: workers wanted, a multiple of `num_groups`.
        num_groups: R, at most the number of micro-batches.
        limit_bytes: what steps under way may read and write together; one may always run.
        chained: otherwise there is nothing but one `backward` a micro-batch, which needs nothing.
        finished: chunks whose statistics are there already.

    Attributes:
        num_done: steps done.
        running: steps under way by worker, in the order they were given.
    """

    def __init__(
        self,
        num_chunks: int,
        batch_bytes: Sequence[int],
        num_lanes: int = 1,
        num_groups: int = 1,
        limit_bytes: float = float("inf"),
        chained: bool = True,
        finished: Iterable[int] = (),
    ) -> None:
        self.num_chunks, self.batch_bytes, self.num_groups = num_chunks, batch_bytes, num_groups
        self.limit_bytes, self.chained = limit_bytes, chained
        self.num_columns = max(1, num_lanes // num_groups)
        self.num_done = 0
        self.running: dict[int, list[Step]] = {}
        self._worker_of: list[int | None] = [None] * (self.num_columns * num_groups)
        self._values: dict[Value, int] = {}
        self._todo: set[Step] = set()
        self._heaps: list[list[tuple[tuple[int, ...], Step]]] = [[] for _ in self._worker_of]
        self._anyone: list[tuple[tuple[int, ...], Step]] = []
        self._owner: dict[tuple[int, int], int] = {}
        self._given: Counter[tuple[int, int]] = Counter()
        self._summed: Counter[tuple[int, int]] = Counter()
        self._finished = {(chunk, group) for chunk in finished for group in range(num_groups)}
        self._in_flight_bytes = 0
        for chunk in sorted(set(range(num_chunks)) - set(finished)):
            if num_groups > 1:
                self._add(Step("merge", chunk, 0))
            for group in range(num_groups):
                self._add(Step("finish", chunk, group))
                for batch in self._group(group):
                    self._add(Step("backward", chunk, batch))
        self._demand()

    # --- what happened -------------------------------------------------------------------------------------

    def join(self, worker: int) -> None:
        """A worker is there: it takes a lane that nobody has, or one from whoever has most."""
        self.running[worker] = []
        lanes = [lane for lane, at in enumerate(self._worker_of) if at is None]
        if not lanes:
            counts = Counter(self._worker_of)
            most, count = counts.most_common(1)[0]
            lanes = [lane for lane, at in enumerate(self._worker_of) if at == most and count > 1][-1:]
        if lanes:
            self._worker_of[lanes[0]] = worker

    def adopt(self) -> bool:
        """Lanes that nobody has go to the workers that are there; whether there were such lanes and workers."""
        orphans = [lane for lane, at in enumerate(self._worker_of) if at is None]
        for lane in orphans if self.running else ():
            self._worker_of[lane] = min(self.running, key=Counter(self._worker_of).__getitem__)
        return bool(orphans and self.running)

    def done(self, worker: int, step: Step) -> list[Value]:
        """A step is done; the values that nobody will need again."""
        self._end(worker, step)
        self.num_done += 1
        made = self.makes(step)
        if made is not None:
            self._values[made] = worker
        spent = self.needs(step)
        if step.kind == "backward":
            self._summed[self._sums(step)] += 1
        elif step.kind == "finish":
            self._finished.add((step.chunk, step.part))
            self._owner.pop((step.chunk, step.part), None)
            for batch in self._group(step.part):
                spent += [Value("hidden", step.chunk + up, batch) for up in (0, 1)]
                spent += [Value("grad", step.chunk + up, batch) for up in (1, 2)]
        return self._let_go(spent if made is None else [*spent, made])

    def failed(self, worker: int, step: Step, lost: Iterable[Value] = ()) -> Counter[Kind]:
        """A step was not done, because it came too early or values it needs are gone; what is to be done again."""
        self._end(worker, step)
        if step.kind == "backward":
            self._given[self._sums(step)] = min(self._given[self._sums(step)], step.part // self.num_groups)
        for value in lost:
            self._values.pop(value, None)
        return self._again([step])

    def lose(self, worker: int, values_too: bool = False) -> Counter[Kind]:
        """A worker is gone, and with its node perhaps all that it made; how many steps are to be done again.

        Args:
            worker: one that joined, also if it was lost before.
            values_too: what it made is gone as well.
        """
        steps = self.running.pop(worker, [])
        self._in_flight_bytes -= sum(map(self._bytes, steps))
        self._worker_of = [None if at == worker else at for at in self._worker_of]
        for chunk, group in [sums for sums, at in self._owner.items() if at == worker]:
            del self._owner[chunk, group]
            del self._summed[chunk, group]
            done = self._group(group)[: self._given.pop((chunk, group), 0)]
            steps += [step for batch in done if (step := Step("backward", chunk, batch)) not in steps]
        if values_too:
            self._values = {value: by for value, by in self._values.items() if by != worker}
        return self._again(steps)

    # --- what to do ----------------------------------------------------------------------------------------

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self._todo and not any(self.running.values())

    def left(self) -> set[Step]:
        """The steps that are not done, as far as is known now."""
        return self._todo.union(*self.running.values())

    def next(self) -> list[tuple[int, Step]]:
        """Steps to start now, each at its worker, whose steps run in the order they are given."""
        given = []
        while (choice := self._choose()) is not None:
            given.append(choice)
        return given

    def needs(self, step: Step) -> list[Value]:
        """The values that a step is called with: hidden states, then gradient, as far as it takes any."""
        kind, chunk, batch = step
        if kind in ("finish", "merge") or not self.chained:
            return []
        if kind == "loss":
            return [Value("hidden", self.num_chunks, batch)]
        values = [Value("hidden", chunk, batch)] if chunk else []
        return values if kind == "forward" else [*values, Value("grad", chunk + 1, batch)]

    def makes(self, step: Step) -> Value | None:
        """The value that a step makes, if others may need it."""
        kind, chunk, batch = step
        if kind == "forward":
            return Value("hidden", chunk + 1, batch)
        if kind == "loss":
            return Value("grad", self.num_chunks, batch)
        return Value("grad", chunk, batch) if kind in ("backward", "gradient") and chunk else None

    # --- internals -----------------------------------------------------------------------------------------

    def _group(self, group: int) -> range:
        return range(group, len(self.batch_bytes), self.num_groups)

    def _sums(self, step: Step) -> tuple[int, int]:
        """(chunk, group) of a step of the backward half."""
        return step.chunk, step.part if step.kind == "finish" else step.part % self.num_groups

    def _rank(self, step: Step) -> tuple[int, ...]:
        """Forward from the first chunk, then backward from the last; there group by group, to hold few sums."""
        kind, chunk, part = step
        if kind == "forward":
            return 0, chunk, part
        if kind == "loss":
            return 1, part
        if kind == "merge":
            return 2, -chunk, self.num_groups, 0
        return 2, -chunk, self._sums(step)[1], len(self.batch_bytes) if kind == "finish" else part

    def _bytes(self, step: Step) -> int:
        num_values = len(self.needs(step)) + (self.makes(step) is not None)
        return num_values and num_values * self.batch_bytes[step.part]

    def _add(self, step: Step) -> None:
        self._todo.add(step)
        heap = self._anyone
        if step.kind not in ("loss", "merge"):
            lane = step.chunk % self.num_columns * self.num_groups + self._sums(step)[1]
            heap = self._heaps[lane]
        heappush(heap, (self._rank(step), step))

    def _choose(self) -> tuple[int, Step] | None:
        """The first step that can start, at the worker with least to do; it counts as started."""
        options = []
        for heap, worker in zip([*self._heaps, self._anyone], [*self._worker_of, self._idlest()], strict=True):
            while heap and heap[0][1] not in self._todo:
                heappop(heap)
            if not heap:
                continue
            rank, step = heap[0]
            at = self._owner.get(self._sums(step), worker) if step.kind in ("backward", "finish") else worker
            if at is not None and len(self.running[at]) < DEPTH and self._is_ready(step):
                options.append((len(self.running[at]), rank, at, step))
        if not options:
            return None
        _, _, worker, step = min(options)
        size = self._bytes(step)
        if self._in_flight_bytes and self._in_flight_bytes + size > self.limit_bytes:
            return None
        self._todo.discard(step)
        if step.kind == "backward":
            self._owner[self._sums(step)] = worker
            self._given[self._sums(step)] += 1
        self.running[worker].append(step)
        self._in_flight_bytes += size
        return worker, step

    def _idlest(self) -> int | None:
        return min(self.running, key=lambda worker: len(self.running[worker]), default=None)

    def _is_ready(self, step: Step) -> bool:
        if step.kind == "merge":
            return all((step.chunk, group) in self._finished for group in range(self.num_groups))
        if step.kind == "finish":
            return self._summed[self._sums(step)] == len(self._group(step.part))
        if step.kind == "backward" and self._given[self._sums(step)] != step.part // self.num_groups:
            return False
        return all(value in self._values for value in self.needs(step))

    def _end(self, worker: int, step: Step) -> None:
        self.running[worker].remove(step)
        self._in_flight_bytes -= self._bytes(step)

    def _again(self, steps: Iterable[Step]) -> Counter[Kind]:
        """Puts steps back, and before them whatever makes the values that they and others miss."""
        added: Counter[Kind] = Counter()
        for step in steps:
            self._add(step)
            added[step.kind] += 1
        return added + self._demand()

    def _demand(self) -> Counter[Kind]:
        """Adds what makes the values that are missing."""
        added: Counter[Kind] = Counter()
        running = {step for steps in self.running.values() for step in steps}
        stack = list(self._todo)
        while stack:
            for value in self.needs(stack.pop()):
                if value in self._values:
                    continue
                makers = self._makers(value)
                if not any(maker in self._todo or maker in running for maker in makers):
                    self._add(makers[-1])
                    stack.append(makers[-1])
                    added[makers[-1].kind] += 1
        return added

    def _makers(self, value: Value) -> list[Step]:
        """The steps that make a value, last the one that does nothing else."""
        kind, border, batch = value
        if kind == "hidden":
            return [Step("forward", border - 1, batch)]
        if border == self.num_chunks:
            return [Step("loss", 0, batch)]
        return [Step("backward", border, batch), Step("gradient", border, batch)]

    def _let_go(self, values: Iterable[Value]) -> list[Value]:
        spent = [value for value in dict.fromkeys(values) if value in self._values and self._is_spent(value)]
        for value in spent:
            del self._values[value]
        return spent

    def _is_spent(self, value: Value) -> bool:
        """Whether neither it nor, should that be lost, what is made of it can be needed again."""
        kind, border, batch = value
        users = range(border - 1, border + 1) if kind == "hidden" else range(border - 2, border)
        if any(
            0 <= chunk < self.num_chunks and (chunk, batch % self.num_groups) not in self._finished for chunk in users
        ):
            return False
        takers: tuple[Kind, ...] = ("backward", "gradient")
        if kind == "hidden":
            takers += ("forward",) if border < self.num_chunks else ("loss",)
        steps = {Step(taker, users[-1] if taker != "loss" else 0, batch) for taker in takers}
        return not steps & self._todo and not any(step in steps for busy in self.running.values() for step in busy)
