"""Paths of object stores that work like those of a disk, and mean the same on every node.

A `StoredPath` is a path whose files are objects. What asks a store is asked of the store (`exists`, `stat`, `iterdir`);
`open` reads. Nothing but `local` (cache.py) gives a name that other libraries can open: such a file is a copy in the
cache of the node it is called on. Pickled, a path is its address.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Generator
from fnmatch import fnmatchcase
from pathlib import Path, PosixPath
from typing import Any, NoReturn

from pyarrow import fs as pafs

from ..errors import StorageError
from .stores import filesystem, patient_filesystem, retrying

_BUFFER_BYTES = 8 * 2**20
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*):/{1,2}(?!/)(.+)", re.DOTALL)


def as_path(name: str | Path) -> Path:
    """The path that a name means: one of an object store for `scheme://bucket/key?options`, else one of the disk.

    `file://` is the disk; a leading ~ is spelled out. A `Path` that swallowed one of two slashes is understood.
    """
    if isinstance(name, StoredPath):
        return name
    found = _ADDRESS.fullmatch(str(name))
    if found is None:
        local = str(name).removeprefix("file://")
        return Path(local).expanduser()
    scheme, rest = found.groups()
    if scheme == "file":
        return Path(f"/{rest}")
    place, _, options = rest.partition("?")
    bucket, _, key = place.partition("/")
    return StoredPath("/", f"{scheme}:", f"{bucket}?{options.replace('/', '%2F')}" if options else bucket, key)


def address(path: Path) -> str:
    """What `as_path` makes this path of, on every node."""
    return path.uri if isinstance(path, StoredPath) else str(path)


def is_stored(name: str | Path) -> bool:
    """Whether a name means an object store."""
    return isinstance(as_path(name), StoredPath)


class StoredPath(PosixPath):
    """`/scheme:/bucket?options#seal/key`; make it with `as_path`.

    Its folders are prefixes: they need not be made, and one without an object does not exist.
    """

    def __new__(cls, *parts: Any) -> StoredPath:
        return super().__new__(cls, *parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self.parts)

    def __str__(self) -> str:
        """The address for people: without options and secrets."""
        if len(self.parts) < 3:
            return super().__str__()
        return "/".join((f"{self.parts[1]}/", self._bucket.partition("?")[0].rpartition("@")[2], *self.parts[3:]))

    def __fspath__(self) -> str:
        raise TypeError(f"{self}: an object has no name on the disk; use storage.local")

    @property
    def _bucket(self) -> str:
        return self.parts[2].partition("#")[0]

    @property
    def bucket(self) -> str:
        """`scheme://bucket?options`."""
        return f"{self.parts[1]}//{self._bucket}"

    @property
    def uri(self) -> str:
        """The whole address, as recipes write it."""
        bucket, _, options = self._bucket.partition("?")
        return "/".join((f"{self.parts[1]}/", bucket, *self.parts[3:])) + (f"?{options}" if options else "")

    @property
    def store(self) -> tuple[pafs.FileSystem, str]:
        """(filesystem, path in it)."""
        served, base = filesystem(self.bucket)
        return served, "/".join((base, *self.parts[3:]))

    @property
    def patient_store(self) -> tuple[pafs.FileSystem, str]:
        """As `store`, for requests of long work in the store."""
        return patient_filesystem(self.bucket), self.store[1]

    def info(self) -> pafs.FileInfo:
        """What the store says of the object or prefix; its type is NotFound where there is none."""
        served, path = self.store
        found: pafs.FileInfo = retrying(f"{self}: cannot be looked up", lambda: served.get_file_info(path))
        return found

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return bool(self.info().type != pafs.FileType.NotFound)

    def is_file(self) -> bool:
        return bool(self.info().type == pafs.FileType.File)

    def is_dir(self) -> bool:
        return bool(self.info().type == pafs.FileType.Directory)

    def is_symlink(self) -> bool:
        return False

    def is_mount(self) -> bool:
        return False

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        info = self.info()
        if info.type == pafs.FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        mode = stat.S_IFDIR if info.type == pafs.FileType.Directory else stat.S_IFREG
        time_s = info.mtime_ns // 10**9 if info.mtime_ns else 0
        size = info.size or 0
        fields = (mode, 0, 0, 1, 0, 0, size, time_s, time_s, time_s)
        return os.stat_result(fields, {"st_mtime_ns": time_s * 10**9, "st_atime_ns": 0, "st_ctime_ns": 0})

    def iterdir(self) -> Generator[StoredPath, None, None]:
        return (self / info.base_name for info in self.listing())

    def listing(self, recursive: bool = False) -> list[pafs.FileInfo]:
        """What the store says of everything in this folder, by name; nothing for one that does not exist."""
        served, path = self.store
        selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
        found = retrying(f"{self}: cannot be listed", lambda: served.get_file_info(selector))
        return sorted(found, key=lambda info: str(info.path))

    def glob(self, pattern: str) -> Generator[StoredPath, None, None]:
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def open(self, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        if mode not in ("r", "rb"):
            self._refuse(f"open({mode!r})")
        served, path = self.store
        file = retrying(f"{self}: cannot be read", lambda: served.open_input_file(path))
        if buffering == 0:
            return _Object(self, file)
        stream = io.BufferedReader(_Object(self, file), _BUFFER_BYTES)
        return stream if mode == "rb" else io.TextIOWrapper(stream, *(args or ("utf-8",)), **options)

    def read_bytes(self) -> bytes:
        served, path = self.store

        def read() -> bytes:
            with served.open_input_file(path) as file:
                return bytes(file.read())

        return retrying(f"{self}: cannot be read", read)

    def read_text(self, *args: Any, **options: Any) -> str:
        return self.read_bytes().decode()

    def unlink(self, missing_ok: bool = False) -> None:
        served, path = self.store
        try:
            retrying(f"{self}: cannot be deleted", lambda: served.delete_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix is there once an object is."""

    def resolve(self, strict: bool = False) -> StoredPath:
        return self

    def absolute(self) -> StoredPath:
        return self

    def sealed(self) -> StoredPath:
        """This folder as it is now: `check_seal` on it, wherever it travels, tells whether its objects changed since.

        Raises:
            StorageError: it cannot be listed.
        """
        bucket = f"{self._bucket}#{self._listing_digest()}"
        return type(self)("/", self.parts[1], bucket, *self.parts[3:])

    def check_seal(self) -> None:
        """Raises StorageError if the objects of a sealed folder are no more what they were."""
        _, _, seal = self.parts[2].partition("#")
        if seal and seal != self._listing_digest():
            raise StorageError(errno.ESTALE, f"{self}: its objects changed since the job began; begin again")

    def _listing_digest(self) -> str:
        # Whole seconds: a listing and a look at one object may round differently.
        files = [info for info in self.listing() if info.type == pafs.FileType.File]
        text = "\n".join(f"{info.base_name} {info.size} {(info.mtime_ns or 0) // 10**9}" for info in files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _refuse(self, what: str) -> NoReturn:
        raise StorageError(errno.EROFS, f"{self}: objects are written whole; {what} cannot be")


class _Object(io.RawIOBase):
    """An object as a file of Python's; each read is tried again by itself."""

    def __init__(self, path: StoredPath, file: Any) -> None:
        self._path, self._file, self._place, self._size = path, file, 0, file.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._place)
        if length <= 0:
            return 0
        raw = retrying(f"{self._path}: cannot be read", lambda: self._file.read_at(length, self._place))
        buffer[: len(raw)] = raw
        self._place += len(raw)
        return len(raw)
