"""The sweep in this process: ranges, replicas, storage that refuses, a driver that dies, workers that die again."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from moe_compress import retry
from moe_compress.calibration.schedule import Schedule, Step, Value
from moe_compress.calibration.worker import CalibrationSetup, LayerWorker
from moe_compress.errors import CalibrationError
from moe_compress.executor import Event, InProcess, Joined, LocalPool, Lost, Pool
from moe_compress.stages.sweep import MAX_DEATHS
from tests.cluster.cases import Hashes, Run, left_behind


def test_ranges_by_memory_change_no_byte(tmp_path: Path, model: Path, text: Path, wanted: Hashes) -> None:
    run = Run(tmp_path, model, text, local=True, resident_layers="auto")
    assert run.go() == wanted


def test_a_driver_that_died_finds_what_was_finished(
    tmp_path: Path, model: Path, text: Path, wanted: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, model, text, local=True)
    done, ran = Schedule.done, Counter[str]()

    def dying(self: Schedule, worker: int, step: Step) -> list[Value]:
        if (step.kind, step.chunk, step.part) == ("backward", 2, 3):
            raise KeyboardInterrupt
        return done(self, worker, step)

    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "done", dying)
        with pytest.raises(KeyboardInterrupt):
            run.go()
    assert not left_behind(run.job.folder)

    def counting(self: Schedule, worker: int, step: Step) -> list[Value]:
        ran[step.kind] += 1
        return done(self, worker, step)

    monkeypatch.setattr(Schedule, "done", counting)
    assert run.go() == wanted
    assert ran == {"forward": 30, "loss": 5, "gradient": 15, "backward": 15, "finish": 3}, "five micro-batches"


def test_storage_that_refuses_now_and_then_is_waited_for(
    tmp_path: Path, model: Path, text: Path, wanted: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, model, text, local=True)
    rename, writes, pauses = os.replace, count(1), []

    def refusing(source: Any, target: Any) -> None:
        refused = "statistics" in str(target) or ".out.partial" in str(target)
        if refused and next(writes) % 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    monkeypatch.setattr("moe_compress.stages.assemble.atomic_write", lambda path, data: path.write_text(data))
    assert run.go() == wanted
    assert pauses
    assert not left_behind(run.job.folder)


class DyingPool(LocalPool):
    """Its worker dies at every loss, and another comes."""

    def wait(self) -> list[Event]:
        if not self._queue or self._queue[0][0].kind != "loss":
            return [
                replace(event, worker=self.worker) if hasattr(event, "worker") else event for event in super().wait()
            ]
        self._queue.clear()
        self.worker += 1
        return [Lost(self.worker - 1, "its process died"), Joined(self.worker, self._worker.describe())]

    worker = 0


class DyingExecutor(InProcess):
    """Its workers die at every loss."""

    def start_pool(self, setup: CalibrationSetup) -> Pool:
        return DyingPool(setup)


def test_a_step_that_kills_its_workers_ends_the_job(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, model, text, local=True)
    monkeypatch.setattr("tests.cluster.cases.InProcess", DyingExecutor)
    with pytest.raises(CalibrationError, match=r"^4 layer workers were lost at loss .*more memory"):
        run.go()
    assert len(run.events("worker_lost")) == MAX_DEATHS + 1
    assert not left_behind(run.job.folder)


def test_replicas_give_the_same_bytes_wherever_they_run(
    tmp_path: Path, model: Path, text: Path, wanted: Hashes
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    grouped = Run(one, model, text, local=True, replicas=2)
    assert grouped.go() != wanted, "sums of groups are rounded otherwise"
    assert Run(other, model, text, local=True, replicas=2, resident_layers=3).go() == grouped.go()


def test_what_replicas_wrote_is_merged_once(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, model, text, local=True, replicas=2)
    merge, merged = LayerWorker._merge, Counter[int]()

    def twice(self: LayerWorker, chunk: int) -> list[str]:
        merged[chunk] += 1
        paths = merge(self, chunk)
        assert merge(self, chunk) == paths
        return paths

    monkeypatch.setattr(LayerWorker, "_merge", twice)
    run.go()
    assert set(merged.values()) == {1}
    assert not left_behind(run.job.folder)
