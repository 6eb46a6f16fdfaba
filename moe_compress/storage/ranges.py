"""Ranges of large objects, read in blocks through the node's cache.

A block is BLOCK_BYTES at a multiple of BLOCK_BYTES; what is read is fetched in whole blocks, several at a time, and
kept in the cache while there is room, so that a second pass reads the disk. An object that changes under its name is
refused: blocks are known by the object's version (its ETag, else size and time), which is looked up again after each
block that was fetched.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from threading import Lock
from typing import Any, BinaryIO

from ..errors import StorageError
from .cache import node_cache
from .paths import StoredPath
from .stores import retrying

BLOCK_BYTES = 8 * 2**20
_THREADS = 8
"""Blocks under way in a process; they bound the memory, too."""


class _Source:
    """One version of one object, open."""

    def __init__(self, path: StoredPath) -> None:
        self.path = path
        self.file, self.version = self._open()
        self.size: int = self.file.size()
        self._pending: dict[int, Future[bytes]] = {}
        self._lock = Lock()

    def _open(self) -> tuple[Any, str]:
        served, path = self.path.store

        def open_it() -> tuple[Any, str]:
            file = served.open_input_file(path)
            etag = (file.metadata() or {}).get("ETag")
            if etag:
                return file, etag.decode()
            info = served.get_file_info(path)
            return file, f"{info.size} {info.mtime_ns}"

        return retrying(f"{self.path}: cannot be read", open_it)

    def read_into(self, buffer: memoryview, position: int) -> int:
        """Fills a buffer from a position; returns the bytes that there were."""
        end = min(position + len(buffer), self.size)
        wanted = range(position // BLOCK_BYTES, -(-end // BLOCK_BYTES) if end > position else 0)
        done = position
        ahead = iter(wanted)
        coming: dict[int, Future[bytes]] = {}
        for number in wanted:
            for following in ahead:
                found = self._start(following)
                if found is not None:
                    coming[following] = found
                if len(coming) >= _THREADS:
                    break
            begin = number * BLOCK_BYTES
            into = buffer[done - position : min(begin + BLOCK_BYTES, end) - position]
            if number in coming or not self._read_cached(number, into, done - begin):
                raw = (coming.pop(number, None) or self._start(number, always=True)).result()  # type: ignore[union-attr]
                into[:] = raw[done - begin : done - begin + len(into)]
            done += len(into)
        return end - position

    def prefetch(self, begin: int, end: int) -> None:
        """Starts fetching blocks into the cache."""
        for number in range(begin // BLOCK_BYTES, -(-min(end, self.size) // BLOCK_BYTES)):
            self._start(number)

    def _name(self, number: int) -> str:
        return f"{self.path.uri} {self.version} {number}"

    def _read_cached(self, number: int, into: memoryview, offset: int) -> bool:
        cache = node_cache()
        file = cache.open(cache.name(self._name(number)))
        if file is None:
            return False
        with file:
            return os.preadv(file.fileno(), [into], offset) == len(into)

    def _start(self, number: int, always: bool = False) -> Future[bytes] | None:
        """The fetch of a block, which may be under way already; None where the cache has the block."""
        cache = node_cache()
        with self._lock:
            if number in self._pending:
                return self._pending[number]
            if not always and cache.name(self._name(number)).exists():
                return None
            future = self._pending[number] = _pool().submit(self._fetch, number)
        future.add_done_callback(lambda _: self._pending.pop(number, None))
        return future

    def _fetch(self, number: int) -> bytes:
        begin = number * BLOCK_BYTES
        length = min(BLOCK_BYTES, self.size - begin)
        raw: bytes = retrying(f"{self.path}: cannot be read", lambda: self.file.read_at(length, begin))
        if len(raw) != length or self._open()[1] != self.version:
            raise StorageError(errno.ESTALE, f"{self.path}: was replaced after it was opened; begin the job again")
        cache = node_cache()
        with suppress(OSError):  # a disk that is full keeps nothing, but the bytes are here
            cache.add(cache.name(self._name(number)), partial(_write, raw), length)
        return raw


def _write(raw: bytes, file: BinaryIO) -> None:
    file.write(raw)


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="storage")


_sources: dict[StoredPath, _Source] = {}
_sources_lock = Lock()


def _source(path: StoredPath) -> _Source:
    with _sources_lock:
        if path not in _sources:
            _sources[path] = _Source(path)
        return _sources[path]


def _forget(path: StoredPath) -> None:
    with _sources_lock:
        _sources.pop(path, None)


def open_ranges(path: StoredPath) -> int:
    """Opens the object as it is now, for `read_range` and `prefetch` in this process; returns its size in bytes.

    Raises:
        FileNotFoundError, StorageError: it cannot be.
    """
    _forget(path)
    return _source(path).size


def read_range(path: StoredPath, buffer: memoryview, position: int) -> int:
    """Fills a buffer from a position of an object; returns the bytes that there were.

    Raises:
        FileNotFoundError, StorageError: it cannot be read, or is no more what it was when this process opened it.
    """
    return _source(path).read_into(buffer, position)


def prefetch(path: StoredPath, spans: Iterable[tuple[int, int]]) -> None:
    """Starts fetching (begin, end) ranges into the cache and does not wait."""
    for begin, end in spans:
        _source(path).prefetch(begin, end)
