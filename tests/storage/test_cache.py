"""The cache of a node: its limit, what is in use, several processes, and their deaths."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.errors import StorageError
from moe_compress.storage import Cache, as_path, node_cache, node_scratch

FORK = multiprocessing.get_context("fork")  # so that it need not import everything


def of(raw: bytes) -> Callable[[BinaryIO], None]:
    def make(file: BinaryIO) -> None:
        file.write(raw)

    return make


def use(cache: Cache, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(300):
        raw = chance.randrange(40).to_bytes() * 50_000
        with cache.held(cache.name(str(raw[0])), of(raw), 50_000) as name:
            assert name.read_bytes() == raw


def die_while_writing(cache: Cache) -> None:
    def make(file: BinaryIO) -> None:
        file.write(b"x")
        os.kill(os.getpid(), signal.SIGKILL)

    with cache.new_folder() as folder:
        (folder / "copy").touch()
        cache.add(cache.name("a"), make, 70)


def add(cache: Cache, name: str, num_bytes: int) -> bool:
    return cache.add(cache.name(name), of(bytes(num_bytes)), num_bytes)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), max_size=25))
def test_limit_and_order(sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"), 100)
    for number, size in enumerate(sizes):
        assert add(cache, str(number), size)
        assert cache.used_bytes <= 100
        assert cache.open(cache.name(str(number))) is not None  # the newest stays


def test_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    for name in "abc":
        add(cache, name, 30)
        time.sleep(0.01)
    opened = cache.open(cache.name("a"))
    assert opened is not None
    add(cache, "d", 30)
    there = [name for name in "abcd" if cache.name(name).exists()]
    assert there == ["a", "c", "d"]
    assert opened.read() == bytes(30)


def test_what_is_held_stays_and_what_is_not_needed_waits(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    with cache.held(cache.name("held"), of(b"x" * 80), 80) as name:
        assert not add(cache, "other", 30)
        assert name.read_bytes() == b"x" * 80
        with cache.held(cache.name("needed"), of(b"y" * 50), 50):  # both must be there whole
            assert cache.used_bytes == 130
    assert add(cache, "other", 90)
    assert cache.used_bytes == 90


def test_killed_while_writing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    process = FORK.Process(target=die_while_writing, args=(cache,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not cache.name("a").exists()
    assert add(cache, "b", 60)
    assert not list((tmp_path / "new").iterdir())


def test_many_processes_keep_the_limit(tmp_path: Path) -> None:
    cache, most = Cache(tmp_path, 10**6), 0
    processes = [FORK.Process(target=use, args=(cache, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        with (tmp_path / "used").open("a") as counter:
            fcntl.flock(counter, fcntl.LOCK_EX)  # nobody takes room while it is measured
            most = max(most, cache.used_bytes)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 500_000 < most <= 10**6 + 3 * 50_000  # each may wait for room with a file, or move one under the eyes
    assert cache.used_bytes <= 10**6


@pytest.mark.parametrize("limit", ["many", "0", "-1", "nan"])
def test_settings(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOE_COMPRESS_CACHE_GB", "0.5")
    assert node_cache().limit_bytes == 5 * 10**8
    assert node_cache().folder == tmp_path / "cache"
    monkeypatch.setenv("MOE_COMPRESS_CACHE_GB", limit)
    with pytest.raises(StorageError, match=f"'{limit}' is not a number of gigabytes above 0"):
        node_cache()


def test_a_cache_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOE_COMPRESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"MOE_COMPRESS_CACHE: .* cannot be written"):
        node_cache()


def test_scratch_stays_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_COMPRESS_CACHE", str(tmp_path / "cache"))
    assert node_scratch(tmp_path / "scratch" / "run") == tmp_path / "scratch" / "run"
    earlier, later = (node_scratch(as_path(f"s3://bucket/job/scratch/{run}")) for run in "ab")
    earlier.mkdir(parents=True)
    assert node_scratch(as_path("s3://bucket/job/scratch/b")) == later
    assert later.is_relative_to(tmp_path / "cache")
    assert not earlier.exists()
    assert os.path.samefile(later.parents[1], tmp_path / "cache" / "scratch")


def test_the_default_limit_is_what_others_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_COMPRESS_CACHE_GB", raising=False)
    for name, free, limit in (("a", 10 * 10**9, 5 * 10**9), ("b", 10**9, 0), ("c", 10**12, 64 * 10**9)):
        usage = SimpleNamespace(total=100 * 10**9, free=free)
        monkeypatch.setattr("moe_compress.storage.cache.shutil.disk_usage", lambda folder, usage=usage: usage)
        monkeypatch.setenv("MOE_COMPRESS_CACHE", str(tmp_path / name))
        assert node_cache().limit_bytes == limit
