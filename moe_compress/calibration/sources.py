"""Files and datasets to records: what texts and pairs of texts are read from, each error one line."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet

from ..errors import RecipeError, one_line
from ..storage import as_path

Item = TypeVar("Item")

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

_POOL_ITEMS = 1 << 20
"""Rows are shuffled in pools of this many: an ordinary file is one, a huge dataset is read no further."""


def checked_files(sources: Sequence[str | Path], suffixes: Iterable[str]) -> list[Path]:
    """The paths of files.

    Raises RecipeError for a missing file and one that ends in none of the suffixes.
    """
    paths = [as_path(source) for source in sources]
    for path in paths:
        if not path.is_file():
            raise RecipeError(f"{path.absolute()}: no such text file; check the path")
        if not path.name.endswith(tuple(suffixes)):
            raise RecipeError(f"{path}: unknown kind of text; use one of {', '.join(suffixes)}")
    return paths


def reading(path: Path, reader: Callable[[Path], Iterator[Item]]) -> Iterator[Item]:
    """What `reader` reads of a file.

    Raises RecipeError if it cannot.
    """
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text, gzip or Parquet ({error}); convert it") from error


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """(file and line, record) of each line that is not blank.

    Raises RecipeError for a line that is not JSON.
    """
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else nullcontext(raw) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise RecipeError(f"{where}: not a line of JSON ({error}); correct it") from error
            yield where, record


def file_rows(sources: Sequence[str | Path]) -> Iterator[tuple[str, object]]:
    """(where it is from, row) of local files of rows, in order.

    Raises RecipeError for a missing file and an unknown suffix (both at the call), and for what cannot be read.
    """
    paths = checked_files(sources, ROW_SUFFIXES)
    return (row for path in paths for row in reading(path, _rows))


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    if path.suffix != ".parquet":
        yield from json_records(path)
        return
    with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
        for batch in file.iter_batches():
            yield from ((str(path), row) for row in batch.to_pylist())


def shuffled(items: Iterable[Item], seed: int) -> Iterator[Item]:
    """The items in a random order, the same for the same seed."""
    generator, rest = random.Random(seed), iter(items)
    while pool := list(islice(rest, _POOL_ITEMS)):
        generator.shuffle(pool)
        yield from pool


def dataset_rows(name: str, config: str | None, split: str) -> Iterator[tuple[str, object]]:
    """(where it is from, row) of a Hugging Face dataset, streamed.

    Raises RecipeError if the `datasets` package or the dataset cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RecipeError(f"dataset {name!r}: needs the package datasets; pip install moe-compress[eval]") from error
    where = f"dataset {name!r}, config {config!r}, split {split!r}"
    with _refusing(where):
        rows = load_dataset(name, config, split=split, streaming=True)
    return _dataset_rows(iter(rows), where)


def _dataset_rows(rows: Iterator[object], where: str) -> Iterator[tuple[str, object]]:
    end = object()
    while True:
        with _refusing(where):
            row = next(rows, end)
        if row is end:
            return
        yield where, row


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turns whatever `datasets` and the network raise into one line."""
    try:
        yield
    except Exception as error:
        reason = one_line(error, 300)
        raise RecipeError(f"{where}: cannot be had ({reason}); check its names and the network") from error
