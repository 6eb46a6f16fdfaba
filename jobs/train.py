"""Runs recipes that train: makes the student first where the recipe says how, then trains it."""

from __future__ import annotations

from contextlib import ExitStack

from rich.console import Console

from moe_compress.distillation.engine import require_deepspeed
from moe_compress.distillation.fit import Run, train_here
from moe_compress.job import Job
from moe_compress.memory import PeakMemory
from moe_compress.progress import Reporter
from moe_compress.recipe import Recipe, Training
from moe_compress.report.tables import show_training
from moe_compress.stages.prepare_training import check_training, prepare_training, student_is_there
from moe_compress.stages.train import train

from .run import executor_for, missing_folders, run, without_trace


def distill(recipe: Recipe | None, training: Training, console: Console) -> None:
    """Runs or resumes a training and prints its table.

    Args:
        recipe: makes the student, unless it is there; None where the student is given.
        training: the training.
        console: for the table.
    """
    require_deepspeed()
    check_training(training, recipe)
    if recipe is not None and not student_is_there(training, recipe):
        run(recipe, console)
    job = Job(training)
    created = missing_folders(job.folder)
    with job.locked(), PeakMemory() as memory, ExitStack() as stack:
        reporter = Reporter(job, memory=memory)
        with without_trace(created):
            prepared = prepare_training(job, training, reporter)
            executor = stack.enter_context(executor_for(training.cluster))
        train(job, prepared, executor, _on_ray if not training.cluster.local else train_here, reporter)
    show_training(training.job_path, console)


def _on_ray(how: Run) -> None:
    from cluster.training import train_on_ray

    train_on_ray(how)
