"""The job folder in a store: its events when the store refuses them, and what is left of uploads."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from moe_compress import job as jobs
from moe_compress.errors import StorageError
from moe_compress.job import Job
from moe_compress.storage import unfinished_uploads

from .conftest import Store


@pytest.fixture
def job(store: Store, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("moe_compress.storage.stores.PATIENCE_S", 0.1)
    recipe: Any = SimpleNamespace(
        job_path=store.path("run/job"),
        output_path=store.path("run/out"),
        file_name="recipe.yaml",
        to_yaml=lambda: "recipe",
    )
    return Job(recipe)


def refuse_events(method: str, key: str, query: str) -> int | None:
    return 403 if method == "PUT" and key.endswith(jobs.EVENTS_NAME) else None


def num_stored(store: Store) -> int:
    return sum(request.method == "PUT" and request.key.endswith(jobs.EVENTS_NAME) for request in store.requests)


def test_events_that_are_late_end_no_job(store: Store, job: Job, caplog: pytest.LogCaptureFixture) -> None:
    with job.locked():
        store.before = refuse_events
        with caplog.at_level(logging.WARNING):
            job.event("progress")
            job.event("stage_end")
        assert len(caplog.records) == 2
        store.before = lambda method, key, query: None
    assert len(store.path("run/job/events.jsonl").read_bytes().splitlines()) == 2


def run_and_refuse(store: Store, job: Job, reason: Exception | None) -> None:
    with job.locked():
        store.before = refuse_events
        job.event("run_end")
        if reason:
            raise reason


def test_events_that_never_come_are_told_of_at_the_end(store: Store, job: Job) -> None:
    with pytest.raises(StorageError, match=r"events\.jsonl: cannot be written"):
        run_and_refuse(store, job, None)


def test_the_error_of_the_run_comes_first(store: Store, job: Job) -> None:
    with pytest.raises(ZeroDivisionError):
        run_and_refuse(store, job, ZeroDivisionError())


def test_progress_is_stored_once_a_while(store: Store, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with job.locked():
        for _ in range(3):
            job.event("progress")
        assert num_stored(store) == 1
        monkeypatch.setattr(jobs, "_EVENTS_TO_STORE_S", 0.0)
        job.event("progress")
        assert num_stored(store) == 2


def test_parts_of_workers_that_died_in_the_run_are_given_up(store: Store, job: Job) -> None:
    with job.locked():
        for folder in (job.folder, job.recipe.output_path):
            served, name = (folder / "shard").store
            stream = served.open_output_stream(name)
            stream.write(bytes(12 * 2**20))
            stream.flush()
            KEPT.append(stream)  # closing it would finish the upload
        assert len(unfinished_uploads(store.path("run"))) == 2
    assert unfinished_uploads(store.path("run")) == []


KEPT: list[object] = []
