"""Tasks of an evaluation: a checkpoint scored on each, its micro-batches side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.writer import atomic_write
from ..evaluation.tasks.asking import Units
from ..evaluation.tasks.reading import check_task, rows_of
from ..evaluation.tasks.scoring import score_task
from ..executor import Executor
from ..job import Job, digest_of
from ..progress import Reporter
from ..recipe import Evaluation
from ..recipe_fields import TaskSource
from .tokens import naming, text_identity, tokenizer_digest

TaskScores = dict[str, dict[str, Any]]
"""By task what TaskScore holds, and where an original stands beside it `original_metrics`."""


def check_tasks(settings: Evaluation | None) -> None:
    """Refuses tasks that are not known and files that do not fit, from one row of each.

    Raises:
        RecipeError: names the field and the file.
    """
    for task in () if settings is None else settings.tasks:
        with naming("evaluation.tasks"):
            check_task(task, "test")


def score_tasks(
    checkpoint: Path,
    settings: Evaluation,
    device: str,
    executor: Executor,
    reporter: Reporter,
    level: str | None = None,
    whose: str = "",
    kept_in: Callable[[TaskSource], Path] | None = None,
) -> TaskScores:
    """Scores of a checkpoint on every task.

    Args:
        checkpoint: folder.
        settings: the tasks, and how they are scored.
        device: torch device, or `auto`.
        executor, reporter: of the units.
        level: of the checkpoint, if it has several; None for the largest.
        whose: said after the name of the task.
        kept_in: file where the score of a task is kept; what is there is not scored again.

    Raises:
        RecipeError: the rows of a task cannot be used.
    """
    found: TaskScores = {}
    for task in settings.tasks:
        target = None if kept_in is None else kept_in(task)
        if target is not None and target.exists():
            found[task.name] = json.loads(target.read_text())
            continue
        units = _spread(executor, reporter, f"task {task.name}{whose}")
        limits = (settings.max_examples, settings.sequence_length, settings.batch_size)
        with naming("evaluation.tasks"):
            score = score_task(checkpoint, task, *limits, settings.dtype, device, level, units)
        found[task.name] = score.to_dict()
        if target is not None:
            atomic_write(target, json.dumps(found[task.name]) + "\n")
    return found


def beside(scores: TaskScores, original: TaskScores) -> TaskScores:
    """Scores of a checkpoint with the metrics of the original."""
    return {name: score | {"original_metrics": original[name]["metrics"]} for name, score in scores.items()}


def scored_tasks(
    job: Job,
    checkpoint: Path,
    identity: str,
    settings: Evaluation,
    executor: Executor,
    reporter: Reporter,
    whose: str = "",
) -> TaskScores:
    """Scores of a checkpoint whose content `identity` stands for; they are kept in the job folder."""
    how = (settings.max_examples, settings.sequence_length, settings.batch_size, settings.dtype)

    def kept_in(task: TaskSource) -> Path:
        rows = text_identity(rows_of(task, "test"))
        made_from = digest_of("task", identity, tokenizer_digest(checkpoint), task.name, rows, how)
        return job.folder / f"task-{made_from}.json"

    device = job.recipe.cluster.device
    return score_tasks(checkpoint, settings, device, executor, reporter, whose=whose, kept_in=kept_in)


def _spread(executor: Executor, reporter: Reporter, name: str) -> Units:
    """Micro-batches dealt out in turn to as many units as run side by side."""

    def run(function: Callable[..., list[Any]], batches: list[Any], *args: Any) -> list[Any]:
        pieces = min(len(batches), executor.num_slots)
        refs = [executor.submit(function, batches[piece::pieces], *args) for piece in range(pieces)]
        found: list[Any] = [None] * len(batches)
        with reporter.stage(name, len(batches)) as stage:
            for piece, results in executor.results(refs):
                found[piece::pieces] = results
                stage.advance(len(results))
        return found

    return run
