"""The job folder: what is done, what it was made from, who works on it.

Artifacts lie in folders named after the digest of everything they were made from (`statistics-1f3a...`): what exists
there is valid, whatever killed the run that made it, because every file is written under a temporary name, flushed
and renamed. A rerun skips it; a changed recipe looks in another folder. Jobs of several methods and ratios over one
checkpoint and text share a folder and, through the digests, the calibration.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint.writer import append_event, atomic_write
from .errors import MoECompressError, RecipeError
from .recipe import JobRecipe
from .retry import patiently

FORMAT = 2
"""Part of every digest: raised when a change of the code changes what an artifact means."""


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
    """

    def __init__(self, recipe: JobRecipe) -> None:
        self.recipe = recipe
        self.folder = recipe.job_path

    @contextmanager
    def locked(self) -> Iterator[Job]:
        """Holds the folder's lock. The kernel gives it back when the process dies, however it dies.

        Raises:
            MoECompressError: another job works on the folder.
            RecipeError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "a+")  # noqa: SIM115
        except OSError as error:
            raise RecipeError(
                f"job_dir: {self.folder} cannot be written ({error.strerror}); choose another folder"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                raise MoECompressError(
                    f"job_dir: {self.folder} is in use by process {lock.read().strip() or '?'}; wait for it"
                    " or give this job its own job_dir"
                ) from None
            lock.seek(0)
            lock.truncate()
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            atomic_write(self.folder / self.recipe.file_name, self.recipe.to_yaml())
            yield self

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
        shutil.rmtree(root, ignore_errors=True)
        return root / secrets.token_hex(8)

    def event(self, name: str, **fields: Any) -> None:
        """Appends one line to events.jsonl."""
        patiently(lambda: append_event(self.folder / "events.jsonl", name, **fields))


def in_use(folder: Path) -> bool:
    """Whether a process holds the lock of a job folder."""
    try:
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
