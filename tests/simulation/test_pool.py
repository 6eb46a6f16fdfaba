"""Virtual layer workers one call at a time."""

from __future__ import annotations

from pathlib import Path

from moe_compress.calibration.schedule import Schedule, Step, Value
from moe_compress.calibration.worker import CalibrationSetup, Description
from moe_compress.executor import Alone, Done, Event, Failed, Joined, Lost
from moe_compress.simulation.clock import Clock, Faults, Gpus
from moe_compress.simulation.costs import Costs
from moe_compress.simulation.pool import SimulatedPool, Traffic

SIZES = [10, 10, 10]


class Cluster:
    """A pool of layer workers over three chunks and three micro-batches, a GPU a node."""

    def __init__(self, num_workers: int, num_gpus: int, faults: Faults | None = None) -> None:
        self.clock, self.traffic, self.written = Clock(), Traffic(), list[int]()
        self.gpus = Gpus(self.clock, num_gpus, 1, 1e9, 1e9, faults or Faults())
        nowhere = Path()
        setup = CalibrationSetup(
            *(nowhere, nowhere, nowhere, nowhere),
            1,
            None,
            "cpu",
            0,
            False,
            None,
            chunk_layers=1,
            num_workers=num_workers,
        )
        steps = {"forward": 1.0, "loss": 1.0, "backward": 2.0, "gradient": 2.0, "finish": 0.0, "merge": 0.0}
        costs = Costs(steps, {}, 0, 0, 0, 0, start_s=1.0)  # type: ignore[arg-type]
        model = Description([["a"], ["b"], ["c"]], True, 1)
        self.pool = SimulatedPool(
            setup, model, SIZES, costs, self.clock, self.gpus, self.traffic, self.write, packs=False
        )

    def write(self, chunk: int) -> list[str]:
        self.written.append(chunk)
        return [f"{chunk}.experts"]

    def until(self, kind: type[Event]) -> list[Event]:
        """Everything until an event of a kind."""
        heard: list[Event] = []
        while not any(isinstance(event, kind) for event in heard):
            heard += self.pool.wait()
        return heard


def test_a_step_that_comes_too_early_fails() -> None:
    cluster = Cluster(1, 1)
    cluster.until(Joined)
    for batch in (0, 1):
        cluster.pool.start(0, Step("forward", 0, batch), [], Value("hidden", 1, batch))
    assert [type(event) for event in (*cluster.until(Done), *cluster.until(Done))] == [Alone, Done, Done]
    early, gone = Step("backward", 0, 1), Step("forward", 2, 0)
    cluster.pool.start(0, early, [Value("hidden", 1, 1)], None)
    assert cluster.pool.wait() == [Failed(0, early)]
    cluster.pool.start(0, gone, [Value("hidden", 2, 0)], Value("hidden", 3, 0))
    assert cluster.pool.wait() == [Failed(0, gone, (Value("hidden", 2, 0),))]
    assert cluster.traffic.num_steps == 2


def test_a_node_takes_along_what_was_made_there() -> None:
    cluster = Cluster(1, 1, Faults(every_s=20.0, node_share=1.0, absent_s=1.0))
    cluster.until(Joined)
    cluster.pool.start(0, Step("forward", 0, 0), [], Value("hidden", 1, 0))
    assert cluster.until(Done)[-1] == Done(0, Step("forward", 0, 0), [])
    assert cluster.traffic.values == SIZES[0]
    assert Lost(0, "its node died", values_too=True) in cluster.until(Lost)
    joined = next(event for event in cluster.until(Joined) if isinstance(event, Joined))
    assert joined.worker == 1
    again = Step("forward", 1, 0)
    cluster.pool.start(1, again, [Value("hidden", 1, 0)], Value("hidden", 2, 0))
    assert Failed(1, again, (Value("hidden", 1, 0),)) in cluster.pool.wait()


def test_a_process_leaves_what_it_made() -> None:
    cluster = Cluster(1, 1, Faults(every_s=20.0, node_share=0.0))
    cluster.until(Joined)
    cluster.pool.start(0, Step("forward", 0, 0), [], Value("hidden", 1, 0))
    cluster.until(Done)
    assert Lost(0, "its process died") in cluster.until(Lost)
    cluster.until(Joined)
    cluster.pool.start(1, Step("forward", 1, 0), [Value("hidden", 1, 0)], Value("hidden", 2, 0))
    assert isinstance(cluster.until(Done)[-1], Done)


def test_fewer_gpus_than_workers_do_it_all() -> None:
    cluster, schedule = Cluster(3, 1), Schedule(3, SIZES, 3)
    while not schedule.is_finished:
        for worker, step in schedule.next():
            cluster.pool.start(worker, step, schedule.needs(step), schedule.makes(step))
        for event in cluster.pool.wait():
            if isinstance(event, Joined):
                schedule.join(event.worker)
            elif isinstance(event, Alone):
                schedule.adopt()
            else:
                assert isinstance(event, Done)
                cluster.pool.let_go(schedule.done(event.worker, event.step))
    assert cluster.written == [2, 1, 0]
    assert cluster.clock.now == 1 + 9 + 3 + 18
    cluster.pool.close()
    assert cluster.gpus.take(lambda _: None) == 0
