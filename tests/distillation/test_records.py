"""The figures of steps, when a run was killed and goes on from an earlier step."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moe_compress.distillation.records import EventsTail, StepRecords

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard_shows_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, board = tmp_path / "events.jsonl", tmp_path / "board"
    for run, steps in enumerate([range(1, 6), range(4, 8)]):
        began = time.time() + run  # the files are read in the order of the seconds in their names
        monkeypatch.setattr(time, "time", lambda began=began: began)
        records = StepRecords(events, board)
        for step in steps:
            records({"step": step, "loss": 10.0 * run + step})
    shown = accumulator.EventAccumulator(str(board)).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in shown] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 14),
        (5, 15),
        (6, 16),
        (7, 17),
    ]


def test_the_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text('{"event": "before"}\n')
    tail = EventsTail(events)
    with events.open("a") as file:
        file.write('{"event": "a"}\n{"event": ')
    assert [line["event"] for line in tail.read()] == ["a"]
    with events.open("a") as file:
        file.write('"b"}\n')
    assert [line["event"] for line in tail.read()] == ["b"]
    assert not list(tail.read())


def test_lines_that_were_torn_are_passed_over(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    tail = EventsTail(events)
    torn = b'{"time_s": 1, "event": "st{"time_s": 2, "event": "b"}\nep"}\n3\n\xff\x00\n'
    events.write_bytes(b'{"event": "a"}\n' + torn + b'{"event": "c"}\n')
    assert [line["event"] for line in tail.read()] == ["a", "c"]
