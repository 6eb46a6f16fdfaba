"""One safetensors file, read one tensor at a time.

The file is an 8-byte little-endian header length, a JSON header and the tensors' bytes, back to
back. We read the ranges ourselves and never map a file: mapped pages count as resident memory, and
a job that walks a checkpoint through a map looks as large as the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..errors import CheckpointError
from ..retry import patiently
from ..storage import StoredPath, local, open_ranges, prefetch, read_range

BLOCK_BYTES = 8 * 2**20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

_AHEAD_BYTES = 8 * BLOCK_BYTES
"""How far before its reader a store is asked."""

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor on disk: where its bytes are and what they mean.

    Stands in for the slices of `safetensors.safe_open(...).get_slice(name)`: `entry[...]` reads.
    """

    name: str
    dtype: str  # the safetensors code, such as "BF16"
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the start of the file
    num_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self.read()[key]

    def rows(self, rows: range) -> TensorEntry:
        """The entry of some rows of this tensor, one after the other."""
        row_bytes = self.num_bytes // self.shape[0]
        offset, num_bytes = self.offset + rows.start * row_bytes, len(rows) * row_bytes
        return replace(self, shape=(len(rows), *self.shape[1:]), offset=offset, num_bytes=num_bytes)

    def read(self) -> torch.Tensor:
        """Reads the tensor into fresh memory of exactly `num_bytes`.

        Raises CheckpointError if the file is gone or shorter than its header said, or cannot be read also after a
        while.
        """
        if not self.num_bytes:
            return torch.empty(self.shape, dtype=self.torch_dtype)
        # numpy asks the kernel for huge pages where torch does not: twice as fast to fill.
        raw = np.empty(self.num_bytes, np.uint8)
        patiently(lambda: deque(self._fill(raw.data), maxlen=0))
        return torch.from_numpy(raw).view(self.torch_dtype).reshape(self.shape)

    def blocks(self) -> Iterator[memoryview]:
        """Yields the raw bytes in order, BLOCK_BYTES at a time; a block is valid until the next."""
        return self._fill(memoryview(bytearray(min(self.num_bytes, BLOCK_BYTES))))

    def _fill(self, buffer: memoryview) -> Iterator[memoryview]:
        """Fills `buffer` over and over until the whole tensor has passed through it."""
        try:
            position, end = self.offset, self.offset + self.num_bytes
            with _ranges(self.file, end) as read_at:
                while position < end:
                    block = rest = buffer[: end - position]
                    while rest:  # one call moves at most 2 GiB, and a network mount may give less
                        num_read = read_at(rest, position)
                        if num_read == 0:
                            raise CheckpointError(
                                f"tensor {self.name}: {self.file} ends {end - position} bytes too "
                                "early; it was cut after it was opened; copy it again"
                            )
                        position += num_read
                        rest = rest[num_read:]
                    yield block
        except OSError as error:
            raise CheckpointError(
                f"tensor {self.name}: {self.file} cannot be read ({error.strerror}); "
                "the shard must stay readable during the job; check the disk or the mount"
            ) from error


@contextmanager
def _ranges(file: Path, end: int) -> Iterator[Callable[[memoryview, int], int]]:
    """(buffer, position) -> how many of its bytes were filled; nothing beyond `end` will be asked for."""
    if isinstance(file, StoredPath):

        def read_stored(buffer: memoryview, position: int) -> int:
            prefetch(file, [(position, min(position + max(len(buffer), _AHEAD_BYTES), end))])
            return read_range(file, buffer, position)

        yield read_stored
        return
    with file.open("rb", buffering=0) as opened:
        yield lambda buffer, position: os.preadv(opened.fileno(), [buffer], position)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A small safetensors file of ours as `safe_open` gives it, wherever it lies."""
    with local(path) as here, safe_open(here, "pt") as file:
        yield file


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a small safetensors file of ours, wherever it lies."""
    with local(path) as here:
        return load_file(here)


def read_shard(path: Path) -> dict[str, TensorEntry]:
    """Reads and checks one shard's header; returns its tensors by name, in file order.

    Raises CheckpointError if the file is not exactly one valid safetensors file.
    """
    try:
        if isinstance(path, StoredPath):
            open_ranges(path)  # what is read of it later must be this very object
        with path.open("rb", buffering=0) as file:
            file_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            header_bytes = int.from_bytes(file.read(8), "little")
            data_start = 8 + header_bytes
            if data_start > file_bytes or header_bytes > MAX_HEADER_BYTES:
                raise _bad_shard(
                    path,
                    f"its header claims {header_bytes} bytes in a file of {file_bytes} "
                    f"(at most {MAX_HEADER_BYTES} are allowed)",
                )
            header = json.loads(file.read(header_bytes).decode(), object_pairs_hook=_unique)
    except OSError as error:
        raise _bad_shard(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _bad_shard(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad_shard(path, f"its header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    entries = [_parse_entry(name, info, path, data_start) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    position = data_start
    for entry in entries:
        if entry.offset != position:
            raise _bad_shard(
                path,
                f"tensor {entry.name} begins at byte {entry.offset}, not at {position} where the "
                "one before it ends: tensors may not overlap or leave holes",
            )
        position += entry.num_bytes
    if position != file_bytes:
        raise _bad_shard(path, f"it holds {file_bytes} bytes and its header describes {position}: truncated?")
    return {entry.name: entry for entry in entries}


def _bad_shard(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"shard {path}: {what}; download or save it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        [(name, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {name!r}")
    return dict(pairs)


def _parse_entry(name: str, info: Any, path: Path, data_start: int) -> TensorEntry:
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            pass
        case _:
            raise _bad_shard(path, f"tensor {name} is described by {info}, not by dtype, shape and data_offsets")
    if dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"shard {path}: tensor {name} has the dtype {dtype!r}; known are "
            f"{', '.join(TORCH_DTYPES)}; convert the checkpoint to one of them"
        )
    num_bytes = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if end - begin != num_bytes:
        raise _bad_shard(
            path,
            f"tensor {name} spans {end - begin} bytes and {dtype} {list(shape)} needs {num_bytes}",
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_start + begin, num_bytes)


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Hashes files in parallel threads; returns path -> sha256 in hexadecimal."""

    def sha256(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = list(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(sha256, paths), strict=True))
