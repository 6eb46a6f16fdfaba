"""Runs recipes that train: makes the student first where the recipe says how, then trains it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from rich.console import Console

from moe_compress.distillation.engine import require_deepspeed
from moe_compress.distillation.fit import train_here
from moe_compress.errors import RecipeError
from moe_compress.job import Job
from moe_compress.memory import PeakMemory
from moe_compress.progress import Reporter
from moe_compress.recipe import Recipe, Training
from moe_compress.report.tables import show_training
from moe_compress.stages.prepare_training import check_training, prepare_training, student_is_there
from moe_compress.stages.train import Fit, train

from .run import executor_for, missing_folders, run, stage_metrics, without_trace


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
        stack.enter_context(reporter.run("distill"))
        with without_trace(created):
            prepared = prepare_training(job, training, reporter)
            executor = stack.enter_context(executor_for(training.cluster, reporter))
            if not training.cluster.local:
                reporter.watch = stage_metrics(training, {})
            fit = train_here if training.cluster.local else _on_ray(training, reporter)
        train(job, prepared, executor, fit, reporter)
    show_training(training.job_path, console)


def _on_ray(training: Training, reporter: Reporter) -> Fit:
    """Trains on the cluster that this process is connected to.

    Raises:
        RecipeError: Ray Train is missing, or room for the processes.
    """
    try:
        from cluster.environment import running_cluster
        from cluster.training import find_room, train_on_ray
    except ImportError as error:
        raise RecipeError(
            f"distillation: needs Ray Train, which does not import ({error}); pip install 'moe-compress[distill]', or"
            " set cluster.local: true"
        ) from None
    may_grow = training.cluster.address or running_cluster()
    say = reporter.say if may_grow else None
    find_room(training.distillation.deepspeed.processes, training.cluster.threads, training.cluster.device, say)
    return partial(train_on_ray, say=say)
