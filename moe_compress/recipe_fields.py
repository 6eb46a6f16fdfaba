"""Kinds of fields that several parts of a recipe have: texts, folders, names of models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from .method_options import Part
from .storage import as_path, is_stored

_PARTS_OF_A_KEY = 4


class DatasetText(Part):
    """Text of a `datasets` name."""

    dataset: str
    config: str | None = None
    split: str = "train"


def _as_text(value: Any) -> Any:
    if not value or not isinstance(value, str | list | dict | DatasetText):
        raise ValueError("names no text; give a file, a list of files or a dataset")
    files = [value] if isinstance(value, str) else value
    return [_at_home(file) for file in files] if isinstance(files, list) else files


def _at_home(path: Any) -> Any:
    """The path with a leading ~ spelled out."""
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~") else path


def _named(path: Any) -> Any:
    if path == "":
        raise ValueError("names nothing; give a path")
    return _at_home(path)


def _in_a_bucket(path: Any) -> Any:
    found = _named(path)
    if isinstance(found, str) and is_stored(found) and len(as_path(found).parts) < _PARTS_OF_A_KEY:
        raise ValueError("names a bucket; give a folder in it, such as s3://bucket/folder")
    return found


def _on_a_disk(path: Any) -> Any:
    if isinstance(path, str) and "://" in path:
        raise ValueError("names no folder of a disk; give one here, and buckets to output and job_dir")
    return _named(path)


ModelName = Annotated[str, BeforeValidator(_named)]
"""A folder of a disk or an object store, or a hub id."""

Folder = Annotated[str, BeforeValidator(_in_a_bucket)]
"""A folder to write, of a disk or an object store."""

DiskFolder = Annotated[str, BeforeValidator(_on_a_disk)]
"""A folder to write, of a disk."""

Text = Annotated[list[str] | DatasetText, Field(union_mode="left_to_right"), BeforeValidator(_as_text)]
"""Files, or a dataset; one file may stand without a list."""


class TaskSource(Part):
    """A task, a question and its answer a row; a name alone stands for `{name: ...}`.

    Attributes:
        name: one of evaluation/tasks/templates.py, or any name for files whose fields tell what they are.
        train, test: the rows to train on and to score: files (.jsonl, .jsonl.gz, .parquet) or a dataset; for a task of
            the table the published splits where nothing is said.
    """

    name: str = Field(min_length=1)
    train: Text | None = None
    test: Text | None = None


def as_task(value: Any) -> Any:
    """A task's name becomes the task."""
    return {"name": value} if isinstance(value, str) else value


class TextPairs(Part):
    """What the text of an encoder-decoder model is: rows of two fields, in .jsonl, .jsonl.gz, .parquet or a dataset.

    `sequence_length` is then the most tokens of a source and of a target. Other models take no notice.

    Attributes:
        source_field, target_field: what the rows call the two texts.
    """

    source_field: str = "source"
    target_field: str = "target"
