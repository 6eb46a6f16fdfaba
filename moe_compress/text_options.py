"""Where texts and tasks come from, as the parts of a recipe name them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from .method_options import Part


class DatasetText(Part):
    """Text of a `datasets` name."""

    dataset: str
    config: str | None = None
    split: str = "train"


Text = list[str] | DatasetText


def at_home(path: Any) -> Any:
    """The path with a leading ~ spelled out."""
    return str(Path(path).expanduser()) if isinstance(path, str) and path.startswith("~") else path


def _as_text(value: Any) -> Any:
    if not value or not isinstance(value, str | list | dict | DatasetText):
        raise ValueError("names no text; give a file, a list of files or a dataset")
    files = [value] if isinstance(value, str) else value
    return [at_home(file) for file in files] if isinstance(files, list) else files


TextField = Annotated[Text, Field(union_mode="left_to_right"), BeforeValidator(_as_text)]
"""A file, a list of files or a dataset."""


class Task(Part):
    """What a model is trained on or scored by, a question and its answer a row; a name alone stands for `{name: ...}`.

    Attributes:
        name: a task of evaluation/tasks/templates.py, or any name for files whose fields tell what they are.
        train, test: the rows to train on and to score: files (.jsonl, .jsonl.gz, .parquet) or a dataset; for a task of
            the table the published splits where nothing is said.
    """

    name: str = Field(min_length=1)
    train: TextField | None = None
    test: TextField | None = None


def as_task(value: Any) -> Any:
    """A task's name becomes the task."""
    return {"name": value} if isinstance(value, str) else value
