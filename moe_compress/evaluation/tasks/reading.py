"""Tasks to examples: which rows, in which layout, each error one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from ...calibration.sources import dataset_rows, file_rows
from ...errors import RecipeError
from ...recipe_fields import DatasetText, TaskSource
from .examples import Example
from .templates import LOCAL, TASKS, Layout, Row

Part = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class TaskRows:
    """A task whose layout is known.

    Attributes:
        layout: of all rows.
        examples: in the order of the rows; RecipeError for a row that does not fit.
    """

    layout: Layout
    examples: Iterator[Example]


def check_task(task: TaskSource, part: Part) -> None:
    """Refuses a task that is not known, and files that are missing or hold no row of it; reads one row at most.

    Raises:
        RecipeError: one line.
    """
    if not isinstance(rows_of(task, part), DatasetText):
        next(read_task(task, part, text_to_text=False).examples)


def read_task(task: TaskSource, part: Part, text_to_text: bool) -> TaskRows:
    """The rows of one part of a task.

    Args:
        task: which.
        part: the rows to train on, or those to score.
        text_to_text: whether they are for an encoder-decoder model.

    Raises:
        RecipeError: as `check_task`, and for a dataset that cannot be had.
    """
    source = rows_of(task, part)
    if isinstance(source, DatasetText):
        rows = dataset_rows(source.dataset, source.config, source.split)
    else:
        rows = file_rows(source)
    first = next(rows, None)
    if first is None:
        raise RecipeError(f"{task.name}: its {part} files hold no row; give others")
    layout = _layout(task.name, *first)
    return TaskRows(layout, (_example(layout, *row, text_to_text) for row in chain([first], rows)))


def rows_of(task: TaskSource, part: Part) -> list[str] | DatasetText:
    """Where the rows of a part of a task are.

    Raises:
        RecipeError: nothing is said of it, and the table has no such task.
    """
    given = task.train if part == "train" else task.test
    if given is not None:
        return given
    if task.name not in TASKS:
        raise RecipeError(f"{task.name!r} is no task; give files, {task.name}=FILE, or one of {', '.join(TASKS)}")
    template = TASKS[task.name]
    split = template.train if part == "train" else template.test
    return DatasetText(dataset=template.dataset, config=template.config, split=split)


def _layout(name: str, where: str, row: object) -> Layout:
    own = (TASKS[name].layout,) if name in TASKS else ()
    layouts = dict.fromkeys((*own, *LOCAL))
    found = next((layout for layout in layouts if isinstance(row, Mapping) and row.keys() >= {*layout.fields}), None)
    if found is None:
        known = "; or ".join(", ".join(layout.fields) for layout in layouts)
        raise RecipeError(f"{where}: no row of the task {name!r}; a row has the fields {known}")
    return found


def _example(layout: Layout, where: str, row: object, text_to_text: bool) -> Example:
    fields: Row = row if isinstance(row, Mapping) else {}
    missing = [field for field in layout.fields if fields.get(field) is None]
    if missing:
        raise RecipeError(
            f"{where}: the field {missing[0]!r} holds nothing; every row needs {', '.join(layout.fields)}"
        )
    try:
        example = layout.read(fields, text_to_text)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RecipeError(f"{where}: not a row of {', '.join(layout.fields)} ({error}); correct it") from error
    if len(example.prompts) < 2 and not example.answers:
        raise RecipeError(f"{where}: {len(example.prompts)} choices to choose from; give two or more")
    if not all(prompt.text.strip() for prompt in example.prompts) or not all(map(str.strip, example.targets)):
        raise RecipeError(f"{where}: a question or an answer is blank; fill it in")
    return example
