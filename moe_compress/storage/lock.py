"""One job a folder of an object store: an object that its owner writes anew every few seconds.

What is promised: a second job is refused within seconds while the first lives. A job that died on this node is
succeeded at once, one that died elsewhere after STALE_S without a sign of life; no clocks are compared. Stores have no
lock that a death gives back, so two jobs that start within the same moment, or one that was cut off from the store for
longer than STALE_S, may both believe themselves the owner until the next beat, when all but the last writer stop. Even
then nothing is mixed up: artifacts are named by what they are made from, and each appears whole.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ..errors import MoECompressError
from .paths import StoredPath
from .stores import retrying

BEAT_S, STALE_S = 5.0, 30.0

_SETTLE_S = 0.5
"""How long after its first mark an owner looks whether the mark is still its own."""


class StoredLock:
    """The lock of a folder.

    Args:
        path: the object.
        beat_s, stale_s: how often the owner writes, and after what silence it counts as dead.

    Attributes:
        lost: set when another owner's mark was found.
    """

    def __init__(self, path: StoredPath, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> None:
        self.path, self.beat_s, self.stale_s = path, beat_s, stale_s
        self.token = secrets.token_hex(8)
        self.lost = threading.Event()
        self._over = threading.Event()
        self._beats = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock while the block runs.

        Raises:
            MoECompressError: another job has it.
        """
        self._take()
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            if not self.lost.is_set():
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises MoECompressError once another job has taken the folder."""
        if self.lost.is_set():
            raise MoECompressError(f"job_dir: {self.path.parent} was taken over by another job; wait for it")

    @property
    def is_held(self) -> bool:
        """Whether an owner has given a sign of life lately, by the clocks of the store and of this node."""
        found = self._read()
        if not found or _died_here(found):
            return False
        return time.time() - self.path.stat().st_mtime < self.stale_s

    def _take(self) -> None:
        found, since = self._read(), time.monotonic()
        while found and not _died_here(found):
            if time.monotonic() - since > self.stale_s:
                break
            time.sleep(min(self.beat_s, self.stale_s) / 4)
            seen = self._read()
            if seen and seen != found:
                raise MoECompressError(
                    f"job_dir: {self.path.parent} is in use by process {seen.get('pid')} of {seen.get('host')}; wait"
                    " for it or give this job its own job_dir"
                )
            found = seen
        self._write()
        time.sleep(_SETTLE_S)
        self._look()
        self.check()

    def _beat(self) -> None:
        while not self._over.wait(self.beat_s):
            with suppress(OSError):  # a store that fails for a while: the next beat may get through
                self._look()
                if self.lost.is_set():
                    return
                self._write()

    def _look(self) -> None:
        found = self._read()
        if found and found.get("token") != self.token:
            self.lost.set()

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.path.read_bytes() or b"null")
        except FileNotFoundError:
            return None
        return found if isinstance(found, dict) else None

    def _write(self) -> None:
        self._beats += 1
        mark = {"token": self.token, "beat": self._beats, "pid": os.getpid(), **_place(), "began": _began(os.getpid())}
        served, name = self.path.store

        def put() -> None:
            with served.open_output_stream(name) as stream:
                stream.write(json.dumps(mark).encode())

        retrying(f"{self.path}: cannot be written", put)


def _place() -> dict[str, str]:
    """Within which process ids mean something."""
    found = {"host": platform.node()}
    for name, file in (("boot", "/proc/sys/kernel/random/boot_id"), ("space", "/proc/self/ns/pid")):
        with suppress(OSError):
            found[name] = os.readlink(file) if name == "space" else Path(file).read_text().strip()
    return found


def _began(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _died_here(mark: dict[str, Any]) -> bool:
    """Whether a mark is that of a process of this node that is no more."""
    if any(mark.get(name) != value for name, value in _place().items()):
        return False
    began = _began(int(mark["pid"]))
    return began is None or abs(began - mark["began"]) > 1
