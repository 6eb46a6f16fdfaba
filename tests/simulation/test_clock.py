"""Virtual time, links and GPUs by themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_compress.simulation.clock import Clock, Faults, Gpus, Link


def test_time_goes_from_one_thing_to_the_next() -> None:
    clock, heard = Clock(), list[tuple[float, str]]()
    for time, name in ((2.0, "b"), (1.0, "a"), (2.0, "c")):
        clock.at(time, lambda name=name: heard.append((clock.now, name)))  # type: ignore[misc]
    for _ in range(3):
        clock.step()
    assert heard == [(1.0, "a"), (2.0, "b"), (2.0, "c")]
    with pytest.raises(RuntimeError, match="nothing is under way"):
        clock.step()


def test_a_link_is_shared_evenly() -> None:
    clock, done = Clock(), dict[str, float]()
    link = Link(clock, 10.0)
    link.move(100, lambda: done.update(long=clock.now))
    clock.at(2.0, lambda: link.move(20, lambda: done.update(short=clock.now)))
    while len(done) < 2:
        clock.step()
    assert done == {"short": pytest.approx(6.0), "long": pytest.approx(12.0)}  # 20 alone, then 5 a second each


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 1000)), min_size=1, max_size=12))
def test_a_link_never_idles_and_loses_nothing(moves: list[tuple[float, int]]) -> None:
    clock, done = Clock(), list[float]()
    link = Link(clock, 7.0)
    for time, size in moves:
        clock.at(time, lambda size=size: link.move(size, lambda: done.append(clock.now)))  # type: ignore[misc]
    while len(done) < len(moves):
        clock.step()
    end = 0.0
    for time, size in sorted(moves):
        end = max(end, time) + size / 7.0
    assert max(done) == pytest.approx(end)


def test_gpus_are_taken_from_the_node_with_fewest_in_use() -> None:
    gpus = Gpus(Clock(), 4, 2, 1.0, 1.0, Faults())
    assert [gpus.take(lambda _: None) for _ in range(5)] == [0, 2, 1, 3, None]
    packed = Gpus(Clock(), 4, 2, 1.0, 1.0, Faults())
    assert [packed.take(lambda _: None, pack=True) for _ in range(3)] == [0, 1, 2]
    came: list[int | None] = []
    gpus.when_free(lambda: came.append(gpus.take(lambda _: None)) or came[-1] is not None)
    gpus.give_back(3)
    assert came == [None, 3]


def test_a_node_that_dies_is_away_for_a_while() -> None:
    clock, deaths = Clock(), list[bool]()
    gpus = Gpus(clock, 2, 2, 1.0, 1.0, Faults(every_s=10.0, node_share=1.0, absent_s=1e-6))
    gpus.take(deaths.append)
    clock.step()
    assert deaths == [True]
    assert gpus.num_deaths == 2
    assert gpus.take(deaths.append) is None
    clock.step()
    assert gpus.take(deaths.append) == 0
