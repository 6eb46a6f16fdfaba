"""The node's cache of objects: a folder of files within a size limit, the longest unused of which go first.

Several processes share it, each of which may be killed at any moment. A file appears under its name whole, by a rename.
Room is reserved before anything is written: one counter, changed under a lock of the kernel, so that the limit holds
for all processes together. What a process has open by name it holds a shared lock on; what cannot be locked
exclusively is not evicted. Blocks are opened once and read from the descriptor, which eviction cannot take away.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from ..errors import StorageError
from .paths import StoredPath

FOLDER_VARIABLE, LIMIT_VARIABLE = "MOE_COMPRESS_CACHE", "MOE_COMPRESS_CACHE_GB"

_DEFAULT_GB = 64.0
_LEFT_FREE = 0.05
"""Fraction of the disk that the default limit leaves free, beside what others have on it."""
_KEPT_AFTER_EVICTION = 0.9
"""Eviction goes on down to this fraction of the limit, so that the folder is not searched for each file."""


class Cache:
    """A cache folder.

    Args:
        folder: it is made.
        limit_bytes: what its files may take; only files in use at the same time, of which each must be there whole,
            may make it more.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        for name in ("objects", "new"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def name(self, identity: str) -> Path:
        """The file of an object (or a part of one) in one version."""
        digest = hashlib.sha256(identity.encode()).hexdigest()[:40]
        return self.folder / "objects" / digest[:2] / digest

    def open(self, name: Path) -> BinaryIO | None:
        """A file that is there, open; it is now the last to go. None where it is not."""
        try:
            file = name.open("rb")
        except FileNotFoundError:
            return None
        with suppress(FileNotFoundError):
            os.utime(name)
        return file

    @contextmanager
    def held(self, name: Path, make: Callable[[BinaryIO], None], num_bytes: int) -> Iterator[Path]:
        """A file, made unless it is there, that stays under its name while the block runs."""
        while True:
            file = self.open(name)
            if file is None:
                self.add(name, make, num_bytes, needed=True)
                continue
            with file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if not _is_open_as(file, name):  # it went between the two calls
                    continue
                yield name
                return

    def add(self, name: Path, make: Callable[[BinaryIO], None], num_bytes: int, needed: bool = False) -> bool:
        """Makes a file of so many bytes; False where there is no room for it and it is not needed."""
        with self.new(num_bytes) as (temporary, file):
            if not self._make_room(num_bytes, needed):
                return False
            make(file)
            file.flush()
            self.place(temporary, name)
        return True

    def place(self, temporary: Path, name: Path) -> None:
        """Gives a finished file of `new` its name."""
        name.parent.mkdir(exist_ok=True)
        os.replace(temporary, name)

    @contextmanager
    def new(self, num_bytes: int = 0) -> Iterator[tuple[Path, BinaryIO]]:
        """(name, file) of a new file, which is gone after the block unless it got another name.

        Its lock tells that its process lives, and its size, which it has from the beginning, what it takes.
        """
        temporary, file = self._new()
        with file:
            file.truncate(num_bytes)
            try:
                yield temporary, file
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def new_needed(self, num_bytes: int) -> Iterator[tuple[Path, BinaryIO]]:
        """As `new`, for a file that must be made whether there is room or not."""
        with self.new(num_bytes) as made:
            self._make_room(num_bytes, needed=True)
            yield made

    @contextmanager
    def new_folder(self) -> Iterator[Path]:
        """A folder for the time of the block."""
        with self.new() as (mark, _):
            folder = mark.with_name(f"{mark.name}.files")
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def used_bytes(self) -> int:
        """What its files take, measured."""
        return sum(size for _, size, _ in self._files())

    def _new(self) -> tuple[Path, BinaryIO]:
        while True:
            temporary = self.folder / "new" / uuid4().hex
            file = temporary.open("x+b")
            fcntl.flock(file, fcntl.LOCK_SH)
            if _is_open_as(file, temporary):  # nobody took it for a dead process's before it was locked
                return temporary, file
            file.close()

    def _make_room(self, num_bytes: int, needed: bool) -> bool:
        """Counts a new file of `new`, others may go for it; what killed processes left goes with them."""
        with (self.folder / "used").open("a+") as counter:
            fcntl.flock(counter, fcntl.LOCK_EX)
            counter.seek(0)
            used_bytes = int(counter.read() or self.limit_bytes) + num_bytes
            if used_bytes > self.limit_bytes:
                used_bytes = self._evict(int(_KEPT_AFTER_EVICTION * self.limit_bytes))
            fits = used_bytes <= self.limit_bytes
            counter.truncate(0)
            counter.write(str(used_bytes if fits or needed else used_bytes - num_bytes))
            return fits or needed

    def _evict(self, keep_bytes: int) -> int:
        """Removes what was not used for longest; returns the bytes that are left."""
        self._remove_unfinished()
        files = sorted(self._files())
        left_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if left_bytes <= keep_bytes:
                break
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                left_bytes -= size
        return left_bytes

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, name) of every file, those that are being made as well."""
        for folder in (*(self.folder / "objects").iterdir(), self.folder / "new"):
            for path in folder.iterdir():
                with suppress(FileNotFoundError):
                    found = path.stat()
                    if path.is_file() and found.st_nlink:
                        yield found.st_mtime_ns, found.st_size, path

    def _remove_unfinished(self) -> None:
        """Removes what killed processes were about to make."""
        for path in sorted((self.folder / "new").iterdir(), key=lambda path: path.suffix):  # marks before folders
            mark = path.with_suffix("")
            if path == mark:
                with suppress(OSError), path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            elif not mark.exists():
                shutil.rmtree(path, ignore_errors=True)


def _is_open_as(file: BinaryIO, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), name.stat())
    except FileNotFoundError:
        return False


def node_cache() -> Cache:
    """The cache of this node, as the environment says; folders of former settings are left alone.

    Raises:
        StorageError: the limit is no number, or the folder cannot be made.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-compress"
    folder = Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser().absolute()
    return _open_cache(folder, os.environ.get(LIMIT_VARIABLE))


@lru_cache(maxsize=4)
def _open_cache(folder: Path, limit_gb: str | None) -> Cache:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if limit_gb is None:
            cache, disk = Cache(folder, 0), shutil.disk_usage(folder)
            room_bytes = cache.used_bytes + disk.free - disk.total * _LEFT_FREE
            return Cache(folder, int(max(0, min(_DEFAULT_GB * 10**9, room_bytes))))
        return Cache(folder, int(_positive(limit_gb) * 10**9))
    except OSError as error:
        raise StorageError(
            error.errno or errno.EIO,
            f"{FOLDER_VARIABLE}: {folder} cannot be written ({error.strerror}); set it to a folder of this node's disk",
        ) from error


def _positive(limit_gb: str) -> float:
    try:
        if float(limit_gb) > 0:
            return float(limit_gb)
    except ValueError:
        pass
    raise StorageError(
        errno.EINVAL, f"{LIMIT_VARIABLE}: {limit_gb!r} is not a number of gigabytes above 0; give one, such as 64"
    )


def node_staging(output: StoredPath) -> Path:
    """The folder of this node in which an output of a store is put together."""
    return node_cache().folder / "staging" / hashlib.sha256(output.uri.encode()).hexdigest()[:16]


def node_scratch(path: Path) -> Path:
    """Where a run keeps on this node what it needs for a while: the folder itself, or one beside the cache's files.

    Args:
        path: `root/run`. Folders of the root's other runs are removed here, as they are where the root is on a disk.
    """
    if not isinstance(path, StoredPath):
        return path
    root = node_cache().folder / "scratch" / hashlib.sha256(path.parent.uri.encode()).hexdigest()[:16]
    for earlier in root.iterdir() if root.is_dir() else ():
        if earlier.name != path.name:
            shutil.rmtree(earlier, ignore_errors=True)
    return root / path.name
