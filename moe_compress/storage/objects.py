"""Whole objects: copies on this node, uploads, copies from store to store, removal of folders."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pyarrow import fs as pafs

from .cache import node_cache
from .paths import StoredPath
from .stores import retrying

_CHUNK_BYTES = 16 * 2**20
_CHUNKS_UNDER_WAY = 4
_COPY_LIMIT_BYTES = 5 * 10**9
"""What S3 copies by itself in one request; what is larger passes through this node."""
_WITHOUT_FOLDERS = ("s3", "gcs", "abfs")


@contextmanager
def local(path: Path) -> Iterator[Path]:
    """A file of this disk with what `path` holds, for libraries that open files by name.

    It is the file itself, or a copy in the node's cache that stays there while the block runs. Not to be written to.

    Raises:
        FileNotFoundError, StorageError: there is no such object, or it cannot be read.
    """
    if not isinstance(path, StoredPath):
        yield path
        return
    info = path.info()
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", str(path))
    cache = node_cache()
    with cache.held(cache.name(_version(path, info)), lambda file: _download(path, info.size, file), info.size) as name:
        yield name


def files_in(folder: Path) -> set[str]:
    """Names of the files of a folder; a store is asked once."""
    if isinstance(folder, StoredPath):
        return {info.base_name for info in folder.listing() if info.type == pafs.FileType.File}
    return {path.name for path in folder.iterdir() if path.is_file()}


@contextmanager
def local_folder(
    folder: Path, wanted: Callable[[str], bool] = lambda name: not name.endswith(".safetensors")
) -> Iterator[Path]:
    """A folder of this disk with the files of `folder` that are wanted by name, by default all but the weights."""
    if not isinstance(folder, StoredPath):
        yield folder
        return
    cache = node_cache()
    with cache.new_folder() as copies:
        for file in filter(wanted, files_in(folder)):
            with local(folder / file) as name:
                os.link(name, copies / file)
        yield copies


def _version(path: StoredPath, info: pafs.FileInfo) -> str:
    return f"{path.uri} {info.size} {info.mtime_ns}"


def _download(path: StoredPath, num_bytes: int, into: BinaryIO) -> None:
    served, name = path.store

    def fetch() -> None:
        with served.open_input_file(name) as file, ThreadPoolExecutor(_CHUNKS_UNDER_WAY) as pool:

            def copy(begin: int) -> None:
                os.pwrite(into.fileno(), file.read_at(min(_CHUNK_BYTES, num_bytes - begin), begin), begin)

            list(pool.map(copy, range(0, num_bytes, _CHUNK_BYTES)))

    retrying(f"{path}: cannot be read", fetch)


@contextmanager
def writing(path: StoredPath, num_bytes: int) -> Iterator[BinaryIO]:
    """A new local file that becomes the object when the block ends well; then the object is durable.

    Raises:
        StorageError: the store does not take it.
    """
    cache = node_cache()
    with cache.new_needed(num_bytes) as (temporary, file):
        yield file
        file.flush()
        upload(temporary, path)
        cache.place(temporary, cache.name(_version(path, path.info())))


def upload(file: Path, path: StoredPath, patience_s: float | None = None) -> None:
    """Makes a local file an object: in one request, or in parts side by side; until the end it is not to be seen.

    It is tried again as long as `retrying` does.

    Raises:
        StorageError: the store does not take it.
    """
    # In a thread of its own: an exception between the parts, such as Ctrl-C, would end the object there.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(retrying, f"{path}: cannot be written", lambda: _upload(file, path), patience_s).result()


def _upload(file: Path, path: StoredPath) -> None:
    served, name = path.patient_store
    if served.type_name not in _WITHOUT_FOLDERS:
        served.create_dir(name.rpartition("/")[0], recursive=True)
    num_bytes = file.stat().st_size
    with file.open("rb", buffering=0) as reading, served.open_output_stream(name) as stream:
        for number in range(-(-num_bytes // _CHUNK_BYTES)):
            stream.write(reading.read(_CHUNK_BYTES))
            if (number + 1) % _CHUNKS_UNDER_WAY == 0:
                stream.flush()  # waits for the parts under way, which bounds their memory
    found = served.get_file_info(name)
    if found.size != num_bytes:
        served.delete_file(name)
        raise OSError(errno.EIO, f"{found.size} of {num_bytes} bytes arrived")


def copy(source: Path, target: StoredPath) -> None:
    """Makes `target` the same bytes as `source`; within one bucket the store copies by itself, up to 5 GB an object.

    What is larger, or comes from elsewhere, passes through this node and its cache.

    Raises:
        StorageError: it cannot be copied.
    """
    if isinstance(source, StoredPath) and source.bucket == target.bucket:
        (served, name), (_, target_name) = source.patient_store, target.store
        if source.stat().st_size <= _COPY_LIMIT_BYTES:
            retrying(f"{target}: cannot be written", lambda: served.copy_file(name, target_name))
            return
    with local(source) as file:
        upload(file, target)


def remove_folder(folder: Path) -> None:
    """Removes a folder and all that is in it, on a disk or a store; nothing where there is none."""
    if not isinstance(folder, StoredPath):
        shutil.rmtree(folder, ignore_errors=True)
        return
    served, name = folder.store
    if folder.is_dir():
        retrying(f"{folder}: cannot be removed", lambda: served.delete_dir(name))


def check_writable(folder: StoredPath) -> None:
    """Raises StorageError if no object can be put into the folder: no such bucket, wrong or no credentials."""
    probe = folder.with_name(f".{folder.name}.writable")
    served, name = probe.store

    def put() -> None:
        if served.type_name not in _WITHOUT_FOLDERS:
            served.create_dir(name.rpartition("/")[0], recursive=True)
        with served.open_output_stream(name) as stream:
            stream.write(b"")
        served.delete_file(name)

    retrying(f"{folder}: cannot be written", put, patience_s=0)
