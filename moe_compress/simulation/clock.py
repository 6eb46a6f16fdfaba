"""Virtual time, GPUs that are there or not, and who uses them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, at times that a seed decides.

    Attributes:
        every_s: mean seconds between the deaths of processes, of the whole cluster; None for none.
        node_share: fraction of these that take their whole node along.
        absent_s: until a dead node is back.
        seed: of all of it.
    """

    every_s: float | None = None
    node_share: float = 0.2
    absent_s: float = 300.0
    seed: int = 0


class Clock:
    """Calls what is due, one after the other, and is then as late as that was due."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Calls at a time to come; of several at one time, the first asked for is the first."""
        heappush(self._due, (time, next(self._order), call))

    def step(self) -> None:
        """Goes on to what is due next.

        Raises:
            RuntimeError: nothing is: whoever waits would wait for ever.
        """
        if not self._due:
            raise RuntimeError("nothing is under way, and somebody waits")
        self.now, _, call = heappop(self._due)
        call()


class Link:
    """Bytes on their way to or from one node, which share its bandwidth evenly.

    Args:
        clock: tells the time.
        bandwidth: bytes/s of all together.
    """

    def __init__(self, clock: Clock, bandwidth: float) -> None:
        self.clock, self.bandwidth = clock, bandwidth
        self._left: list[tuple[float, Callable[[], None]]] = []
        self._since = 0.0
        self._round = 0

    def move(self, num_bytes: int, done: Callable[[], None]) -> None:
        """Calls `done` once they are there."""
        self._pass_time()
        self._left.append((float(num_bytes), done))
        self._plan()

    def _pass_time(self) -> None:
        if self._left:
            moved = (self.clock.now - self._since) * self.bandwidth / len(self._left)
            self._left = [(left - moved, done) for left, done in self._left]
        self._since = self.clock.now

    def _plan(self) -> None:
        """Waits for the smallest; what is added meanwhile plans anew."""
        self._round += 1
        if self._left:
            left = max(min(left for left, _ in self._left), 0.0)
            this = self._round
            self.clock.at(self.clock.now + left * len(self._left) / self.bandwidth, lambda: self._arrive(this))

    def _arrive(self, planned: int) -> None:
        if planned != self._round:
            return
        self._pass_time()
        least = min(left for left, _ in self._left)
        there = [done for left, done in self._left if left <= least]
        self._left = [(left, done) for left, done in self._left if left > least]
        self._plan()
        for done in there:
            done()


class Gpus:
    """The GPUs of a cluster, each of which one process uses at a time.

    Args:
        clock: tells the time.
        num_gpus, node_gpus: of the cluster, and of each node.
        storage, network: bytes/s of each node.
        faults: what goes wrong.

    Attributes:
        storage, network: the links of each node.
        busy_s: seconds of computing of each GPU.
        num_deaths: of processes, used or not.
    """

    def __init__(
        self, clock: Clock, num_gpus: int, node_gpus: int, storage: float, network: float, faults: Faults
    ) -> None:
        self.clock, self.node_gpus, self.faults = clock, node_gpus, faults
        num_nodes = -(-num_gpus // node_gpus)
        self.storage = [Link(clock, storage) for _ in range(num_nodes)]
        self.network = [Link(clock, network) for _ in range(num_nodes)]
        self.busy_s = [0.0] * num_gpus
        self.num_deaths = 0
        self._user: dict[int, Callable[[bool], None]] = {}
        self._absent: set[int] = set()
        self._waiting: list[Callable[[], bool]] = []
        self._random = random.Random(faults.seed)
        if faults.every_s is not None:
            self._next_fault()

    def __len__(self) -> int:
        return len(self.busy_s)

    def node(self, gpu: int) -> int:
        """Of a GPU."""
        return gpu // self.node_gpus

    def take(self, on_death: Callable[[bool], None], pack: bool = False) -> int | None:
        """A GPU that nobody uses, on the node with fewest in use, or with `pack` the first.

        `on_death` is told whether the whole node died, and the GPU is then given back.
        """
        free = [gpu for gpu in range(len(self)) if gpu not in self._user and gpu not in self._absent]
        if not free:
            return None
        used = Counter(map(self.node, self._user))
        chosen = free[0] if pack else min(free, key=lambda gpu: used[self.node(gpu)])
        self._user[chosen] = on_death
        return chosen

    def give_back(self, gpu: int) -> None:
        """To whoever waits."""
        del self._user[gpu]
        self._offer()

    def when_free(self, wants: Callable[[], bool]) -> None:
        """Asks whenever a GPU may be free, in the order of the asking, until the answer is that it was taken."""
        self._waiting.append(wants)
        self._offer()

    def _offer(self) -> None:
        self._waiting = [wants for wants in self._waiting if not wants()]

    def _next_fault(self) -> None:
        assert self.faults.every_s is not None
        self.clock.at(self.clock.now + self._random.expovariate(1 / self.faults.every_s), self._fault)

    def _fault(self) -> None:
        gpu, takes_node = self._random.randrange(len(self)), self._random.random() < self.faults.node_share
        dead = [each for each in range(len(self)) if self.node(each) == self.node(gpu)] if takes_node else [gpu]
        dead = [each for each in dead if each not in self._absent]
        if takes_node:
            self._absent.update(dead)
            self.clock.at(self.clock.now + self.faults.absent_s, lambda: self._come_back(dead))
        self.num_deaths += len(dead)
        for each in dead:
            on_death = self._user.pop(each, None)
            if on_death is not None:
                on_death(takes_node)
        self._offer()
        self._next_fault()

    def _come_back(self, gpus: list[int]) -> None:
        self._absent.difference_update(gpus)
        self._offer()
