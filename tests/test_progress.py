"""The line of a stage that begins in the middle, and goes back."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from moe_compress import progress
from moe_compress.progress import Stage


def test_what_was_done_before_says_nothing_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    clock = {"s": 0.0}
    monkeypatch.setattr(progress, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock["s"])}))
    stage = Stage("train", 100, Console(file=out, width=80))

    def advance(at_s: float, step: int) -> None:
        clock["s"] = at_s
        stage.advance(step - stage.done)

    stage.begin_at(40)
    advance(30, 41)
    advance(50, 51)
    stage.begin_at(45)
    advance(110, 46)
    advance(130, 56)
    assert [" ".join(line.split()) for line in out.getvalue().splitlines()] == [
        "train 41/100",
        "train 51/100 98 s left",
        "train 46/100",
        "train 56/100 88 s left",
    ]
