"""The schedule under random losses: every sum is taken once, whole and in order, and nothing stands still."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.calibration.schedule import DEPTH, Schedule, Step, Value


@dataclass
class Cluster:
    """Simulated workers: values live on nodes, sums in workers, and steps fail for what is not there."""

    schedule: Schedule
    rng: random.Random
    node_of: dict[int, int] = field(default_factory=dict)
    values: dict[Value, int] = field(default_factory=dict)
    sums: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    written: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    merged: list[int] = field(default_factory=list)
    executed: list[Step] = field(default_factory=list)
    most_bytes: int = 0

    def start(self, node: int) -> int:
        worker = len(self.node_of)
        self.node_of[worker] = node
        self.schedule.join(worker)
        return worker

    def alive(self) -> list[int]:
        return sorted(self.schedule.running)

    def run_one(self) -> bool:
        """Runs the first step of some worker; False where none has any."""
        self.schedule.next()
        busy = [worker for worker in self.alive() if self.schedule.running[worker]]
        self.most_bytes = max(self.most_bytes, self.bytes_under_way())
        if not busy:
            return False
        worker = self.rng.choice(busy)
        assert len(self.schedule.running[worker]) <= DEPTH
        step = self.schedule.running[worker][0]
        needs = self.schedule.needs(step)
        missing = [value for value in needs if value not in self.values]
        key = (worker, step.chunk, step.part % self.schedule.num_groups)
        if missing or (step.kind == "backward" and self._position(key) != step.part // self.schedule.num_groups):
            self.schedule.failed(worker, step, missing)
            return True
        self.executed.append(step)
        if step.kind == "backward":
            self.sums.setdefault(key, []).append(step.part)
        elif step.kind == "finish":
            self.written[step.chunk, step.part] = self.sums.pop((worker, step.chunk, step.part))
        elif step.kind == "merge":
            assert all((step.chunk, group) in self.written for group in range(self.schedule.num_groups))
            self.merged.append(step.chunk)
        made = self.schedule.makes(step)
        if made is not None:
            self.values[made] = self.node_of[worker]
        for value in self.schedule.done(worker, step):
            del self.values[value]
        return True

    def _position(self, key: tuple[int, int, int]) -> int:
        return len(self.sums.get(key, []))

    def bytes_under_way(self) -> int:
        return sum(self.schedule._bytes(step) for steps in self.schedule.running.values() for step in steps)

    def kill(self, worker: int, node_too: bool) -> None:
        node = self.node_of[worker]
        gone = [w for w in self.node_of if self.node_of[w] == node] if node_too else [worker]
        if node_too:
            self.values = {value: at for value, at in self.values.items() if at != node}
        self.sums = {key: rows for key, rows in self.sums.items() if key[0] not in gone}
        for each in gone:
            self.schedule.lose(each, values_too=node_too)

    def finish(self) -> None:
        for _ in range(100_000):
            if self.schedule.is_finished:
                return
            assert self.run_one(), f"stands still with {len(self.schedule.left())} steps left"
        raise AssertionError("does not end")


def expect_whole(cluster: Cluster, num_chunks: int, num_batches: int, skip: frozenset[int] = frozenset()) -> None:
    groups = cluster.schedule.num_groups
    chunks = set(range(num_chunks)) - skip
    assert cluster.written == {
        (chunk, group): list(range(group, num_batches, groups)) for chunk in chunks for group in range(groups)
    }
    if groups > 1:
        assert set(cluster.merged) == chunks


shapes = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 5), st.integers(1, 3))


@settings(deadline=None, max_examples=150)
@given(shape=shapes, seed=st.integers(0, 2**32), kills=st.integers(0, 8), limit=st.sampled_from([1, 5, 10**9]))
def test_every_sum_is_whole_and_in_order_whatever_dies(
    shape: tuple[int, int, int, int], seed: int, kills: int, limit: int
) -> None:
    num_chunks, num_batches, num_workers, groups = shape
    groups = min(groups, num_batches)
    rng = random.Random(seed)
    finished = frozenset(c for c in range(num_chunks) if rng.random() < 0.2)
    sizes = [rng.randint(1, 3) for _ in range(num_batches)]
    schedule = Schedule(num_chunks, sizes, num_workers, groups, limit, finished=finished)
    cluster = Cluster(schedule, rng)
    for _ in range(num_workers):
        cluster.start(node=rng.randrange(2))
    schedule.adopt()
    for _ in range(kills):
        for _ in range(rng.randrange(3 * num_chunks * num_batches)):
            if not cluster.run_one():
                break
        cluster.kill(rng.choice(cluster.alive()), node_too=rng.random() < 0.5)
        if not cluster.alive() or rng.random() < 0.7:
            cluster.start(node=rng.randrange(2))
        schedule.adopt()
    cluster.finish()
    expect_whole(cluster, num_chunks, num_batches, finished)
    assert not cluster.values, "everything is let go at the end"
    assert cluster.most_bytes <= max(limit, 9)


@given(shape=shapes)
def test_undisturbed_nothing_is_done_twice(shape: tuple[int, int, int, int]) -> None:
    num_chunks, num_batches, num_workers, groups = shape
    groups = min(groups, num_batches)
    cluster = Cluster(Schedule(num_chunks, [1] * num_batches, num_workers, groups), random.Random(0))
    for node in range(num_workers):
        cluster.start(node)
    cluster.schedule.adopt()
    total = len(cluster.schedule.left())
    cluster.finish()
    assert len(set(cluster.executed)) == len(cluster.executed) == total == cluster.schedule.num_done


@pytest.mark.parametrize("node_too", [False, True])
@given(seed=st.integers(0, 2**32), moment=st.floats(0, 1))
def test_a_loss_costs_at_most_the_range_of_the_lost(node_too: bool, seed: int, moment: float) -> None:
    num_chunks, num_batches, num_workers = 6, 4, 3
    schedule = Schedule(num_chunks, [1] * num_batches, num_workers)
    cluster = Cluster(schedule, random.Random(seed))
    for node in range(num_workers):
        cluster.start(node)
    for _ in range(int(moment * len(schedule.left()))):
        cluster.run_one()
    before = set(cluster.executed)
    victim = cluster.rng.randrange(num_workers)
    mine = {step for step in before if step.chunk % num_workers == victim or step.kind == "loss"}
    cluster.kill(victim, node_too)
    cluster.start(node=9)
    already = len(cluster.executed)
    cluster.finish()
    again = [step for step in cluster.executed[already:] if step in before or step.kind == "gradient"]
    as_made = {step._replace(kind="backward") if step.kind == "gradient" else step for step in again}
    assert as_made <= mine
    if not node_too:
        assert len({step.chunk for step in again}) <= 2, "at most the sums under way, and those being written"
        assert all(step.kind == "backward" for step in again)


def test_a_worker_that_joins_takes_a_lane_from_who_has_most() -> None:
    schedule = Schedule(4, [1] * 3, num_lanes=4)
    cluster = Cluster(schedule, random.Random(0))
    cluster.start(0)
    schedule.adopt()
    cluster.run_one()
    cluster.start(1)
    assert sorted(schedule._worker_of) == [0, 0, 0, 1]
    cluster.finish()
    expect_whole(cluster, 4, 3)


def test_without_workers_nothing_is_given() -> None:
    schedule = Schedule(2, [1])
    assert schedule.next() == []
    assert not schedule.adopt()


def test_a_model_that_is_not_chained_is_one_chunk_of_sums() -> None:
    schedule = Schedule(1, [1] * 5, num_lanes=2, num_groups=2, chained=False)
    cluster = Cluster(schedule, random.Random(0))
    cluster.start(0)
    cluster.start(1)
    cluster.finish()
    assert {step.kind for step in cluster.executed} == {"backward", "finish", "merge"}
    expect_whole(cluster, 1, 5)
