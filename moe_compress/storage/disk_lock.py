"""One process a folder of a disk: a file that it holds locked, and that the kernel gives back however it dies.

Whoever asks whether a folder is locked locks it himself for a moment, shared; so a lock is tried for again for a while.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import MoECompressError, RecipeError

_LOCK_NAME = "lock"
_PATIENCE_S = 1.0
_PAUSE_S = 0.02


@contextmanager
def locked(folder: Path, field: str = "job_dir") -> Iterator[None]:
    """Holds a folder, which is made, while the block runs.

    Args:
        folder: of the disk, or of a mount that knows locks.
        field: what names it in the recipe or manifest.

    Raises:
        MoECompressError: another process holds it.
        RecipeError: it cannot be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK_NAME, "a+")  # noqa: SIM115
    except OSError as error:
        raise RecipeError(f"{field}: {folder} cannot be written ({error.strerror}); choose another folder") from error
    with lock:
        try:
            _take(lock)
        except BlockingIOError:
            lock.seek(0)
            raise MoECompressError(
                f"{field}: {folder} is in use by process {lock.read().strip() or '?'}; wait for it or give another"
                f" {field}"
            ) from None
        except OSError as error:
            raise RecipeError(f"{field}: {_unlockable(folder, error)}") from error
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process holds a folder.

    Raises:
        RecipeError: its mount does not tell.
    """
    try:
        with open(folder / _LOCK_NAME) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise RecipeError(_unlockable(folder, error)) from error
    return False


def _take(lock: IO[str]) -> None:
    """Raises BlockingIOError if another process holds the lock for longer than a look."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(_PAUSE_S)


def _unlockable(folder: Path, error: OSError) -> str:
    mount = next(path for path in (folder, *folder.absolute().parents) if path.is_mount())
    return (
        f"{folder} cannot be locked ({error.strerror}); let the mount {mount} know locks (of NFS: version 4, or a lock"
        " manager), or choose a folder elsewhere"
    )
