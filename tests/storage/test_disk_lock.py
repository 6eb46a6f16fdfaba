"""One process a folder of a disk, whoever looks meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_compress.errors import MoECompressError, RecipeError
from moe_compress.storage import disk_lock, is_locked, locked

ROOT = Path(__file__).parents[2]


def test_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert not is_locked(folder)
    with locked(folder):
        assert is_locked(folder)
        said = f"folder: {folder} is in use by process {os.getpid()}; wait for it or give another folder"
        with pytest.raises(MoECompressError) as refused, locked(folder, "folder"):
            pass
        assert (str(refused.value), refused.value.exit_code) == (said, 1)
    assert not is_locked(folder)
    with locked(folder):
        pass


def test_the_dead_hold_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from moe_compress.storage import locked\n"
        "with locked(Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    assert not is_locked(tmp_path)


def test_who_looks_is_in_nobodys_way(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    over = threading.Event()

    def look() -> None:
        with open(tmp_path / "lock") as lock:
            while not over.is_set():
                fcntl.flock(lock, fcntl.LOCK_SH)
                time.sleep(0.03)
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(0.03)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(10):
            with locked(tmp_path):
                pass
    finally:
        over.set()
        thread.join()


def test_a_mount_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").touch()
    mount = next(path for path in tmp_path.parents if path.is_mount())

    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(disk_lock.fcntl, "flock", refuse)
    said = f"{tmp_path} cannot be locked (No locks available); let the mount {mount} know locks"
    with pytest.raises(RecipeError) as refused, locked(tmp_path):
        pass
    assert str(refused.value).startswith(f"job_dir: {said}")
    with pytest.raises(RecipeError) as refused:
        is_locked(tmp_path)
    assert str(refused.value).startswith(said)
