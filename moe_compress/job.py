"""The job folder: what is done, what it was made from, who works on it.

Artifacts lie in folders named after the digest of everything they were made from (`statistics-1f3a...`): what exists
there is valid, whatever killed the run that made it, because every file is written under a temporary name, flushed
and renamed. A rerun skips it; a changed recipe looks in another folder. Jobs of several methods and ratios over one
checkpoint and text share a folder and, through the digests, the calibration.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint.writer import PARTIAL_SUFFIX, append_event, atomic_write
from .errors import StorageError
from .recipe import JobRecipe
from .retry import patiently
from .storage import StoredLock, StoredPath, abort_unfinished, is_locked, locked, node_cache, upload

FORMAT = 2
"""Part of every digest: raised when a change of the code changes what an artifact means."""

EVENTS_NAME = "events.jsonl"
_EVENTS_TO_STORE_S = 60.0
"""Between two copies of a stage's progress to an object store; whoever follows a job there sees it this often."""

log = logging.getLogger(__name__)


def digest_of(*parts: Any) -> str:
    """Short hex digest of plain data."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Job:
    """A job folder, locked by this process while the context is open.

    Args:
        recipe: the resolved recipe; it is written into the folder.

    Attributes:
        folder: the job folder.
        events: the file that events are appended to, on this node.
    """

    def __init__(self, recipe: JobRecipe) -> None:
        self.recipe = recipe
        self.folder = recipe.job_path
        self.events = self.folder / EVENTS_NAME
        self._lock: StoredLock | None = None
        self._events_stored_s = 0.0

    @contextmanager
    def locked(self) -> Iterator[Job]:
        """Holds the folder's lock. The kernel gives it back when the process dies, however it dies.

        What a lock in an object store promises stands in storage/lock.py. There the events are written on this node
        and follow to the store now and then. What was written or uploaded in part, by earlier runs or by workers that
        died in this one, is removed when it begins and ends.

        Raises:
            MoECompressError: another job works on the folder.
            RecipeError: it cannot be written or locked.
            StorageError: the run went well, but its events did not reach the store.
        """
        with self._locked_store() if isinstance(self.folder, StoredPath) else locked(self.folder):
            self._clear()
            try:
                atomic_write(self.folder / self.recipe.file_name, self.recipe.to_yaml())
                yield self
            finally:
                self._clear()

    @contextmanager
    def _locked_store(self) -> Iterator[None]:
        assert isinstance(self.folder, StoredPath)
        self._lock, stored = StoredLock(self.folder / "lock"), self.folder / EVENTS_NAME
        with self._lock.held(), node_cache().new_folder() as here:
            self.events = here / EVENTS_NAME
            if stored.exists():
                self.events.write_bytes(stored.read_bytes())
            try:
                yield
            except BaseException:
                self._try_to_store_events()  # what ended the run is the error to tell of
                raise
            else:
                self._store_events()
            finally:
                self.events = stored

    def _clear(self) -> None:
        if not isinstance(self.folder, StoredPath):
            for file in self.folder.rglob(f".*{PARTIAL_SUFFIX}"):
                if file.is_file():
                    file.unlink(missing_ok=True)
        for folder in (self.folder, self.recipe.output_path):
            if isinstance(folder, StoredPath) and not (self._lock is not None and self._lock.lost.is_set()):
                abort_unfinished(folder)

    def _store_events(self, patience_s: float | None = None) -> None:
        if isinstance(self.folder, StoredPath) and self.events.exists():
            self._events_stored_s = time.monotonic()
            upload(self.events, self.folder / EVENTS_NAME, patience_s)

    def _try_to_store_events(self, patience_s: float | None = None) -> None:
        """No job ends because its events are late."""
        try:
            self._store_events(patience_s)
        except StorageError as error:
            log.warning("%s; the job goes on", error)

    def place(self, kind: str, *made_from: Any) -> Path:
        """The folder of one kind of artifact made from these things; it is created."""
        folder = self.folder / f"{kind}-{digest_of(kind, *made_from)}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def scratch(self) -> Path:
        """A fresh folder for this run's spilled activations; those of killed runs are removed.

        Each run has its own: workers that outlive their killed driver must not meet those of the next run.
        """
        root = self.folder / "scratch"
        if not isinstance(root, StoredPath):  # else each node has its own, see node_scratch
            shutil.rmtree(root, ignore_errors=True)
        return root / secrets.token_hex(8)

    def event(self, name: str, **fields: Any) -> None:
        """Appends one line to the events.

        Raises:
            MoECompressError: another job has taken the folder over, as can happen in an object store.
        """
        if self._lock is not None:
            self._lock.check()
        patiently(lambda: append_event(self.events, name, **fields))
        if name == "stage_end":
            self._try_to_store_events()
        elif name == "progress" and time.monotonic() - self._events_stored_s > _EVENTS_TO_STORE_S:
            self._try_to_store_events(patience_s=0)


def in_use(folder: Path) -> bool:
    """Whether a process holds the lock of a job or a batch.

    Raises:
        RecipeError: the folder's mount does not tell.
    """
    return StoredLock(folder / "lock").is_held if isinstance(folder, StoredPath) else is_locked(folder)
