"""One job a folder of an object store."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_compress.errors import MoECompressError
from moe_compress.storage import StoredLock

from .conftest import Store

ROOT = Path(__file__).parents[2]
BEAT_S, STALE_S = 0.1, 0.8


def test_one_at_a_time(store: Store) -> None:
    path = store.path("job/lock")
    with StoredLock(path, BEAT_S, STALE_S).held():
        time.sleep(2 * STALE_S)
        with pytest.raises(MoECompressError, match=r"s3://bucket/job is in use by process \d+ of"):
            StoredLock(path, BEAT_S, STALE_S)._take()
    assert not path.exists()
    with StoredLock(path, BEAT_S, STALE_S).held():
        pass


def test_of_many_that_begin_at_once_one_wins(store: Store) -> None:
    path, won, lost = store.path("job/lock"), [], []

    def begin() -> None:
        try:
            with StoredLock(path, BEAT_S, STALE_S).held():
                won.append(1)
                time.sleep(2)
        except MoECompressError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 3)


def test_the_dead_are_succeeded(store: Store) -> None:
    code = (
        "import os, sys; from moe_compress.storage import StoredLock, as_path\n"
        "with StoredLock(as_path(sys.argv[1])).held():\n    os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code, store.address("job/lock")], cwd=ROOT)
    assert died.returncode == -9
    path = store.path("job/lock")
    assert path.exists()
    began = time.monotonic()
    with StoredLock(path).held():
        assert time.monotonic() - began < 5  # of this node: no need to wait
    mark = {"token": "other", "beat": 1, "pid": 1, "host": "elsewhere", "began": 0.0}
    with path.store[0].open_output_stream(path.store[1]) as stream:
        stream.write(json.dumps(mark).encode())
    began = time.monotonic()
    with StoredLock(path, BEAT_S, STALE_S).held():
        assert time.monotonic() - began > STALE_S


def test_an_owner_that_lost_it_stops(store: Store) -> None:
    path = store.path("job/lock")
    first = StoredLock(path, BEAT_S, STALE_S)
    with first.held():
        first.check()
        StoredLock(path, BEAT_S, STALE_S)._write()
        time.sleep(4 * BEAT_S)
        with pytest.raises(MoECompressError, match="was taken over by another job"):
            first.check()
    assert path.exists()  # it is the other's
