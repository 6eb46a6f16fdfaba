"""Runs recipes: picks the executor, watches memory, prints the closing table."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_compress.checkpoint.reader import resolve_checkpoint
from moe_compress.errors import CheckpointError, RecipeError
from moe_compress.evaluation.agreement import Scores, merge_scores
from moe_compress.executor import Executor, InProcess
from moe_compress.job import Job
from moe_compress.memory import PeakMemory
from moe_compress.pipeline import compress
from moe_compress.progress import Reporter
from moe_compress.recipe import Cluster, Evaluation, Recipe, parse_part
from moe_compress.report.tables import show_job
from moe_compress.stages.evaluate import run_evaluation
from moe_compress.stages.prepare import check, check_output, prepare
from moe_compress.stages.tokens import evaluation_tokens


@contextmanager
def executor_for(cluster: Cluster) -> Iterator[Executor]:
    """The executor a recipe asks for; closed at the end."""
    executor: Executor
    if cluster.local:
        executor = InProcess(cluster.threads)
    else:
        from cluster.environment import prepare_private_cluster

        if cluster.address is None:
            prepare_private_cluster()
        from cluster.executor import RayExecutor

        executor = RayExecutor(cluster)
    try:
        yield executor
    finally:
        executor.close()


def run(recipe: Recipe, console: Console) -> None:
    """Runs or resumes a job and prints its table; what is refused leaves no job folder behind."""
    inputs = check(recipe)
    check_output(recipe)
    job = Job(recipe)
    is_new = not job.folder.exists()
    with job.locked(), PeakMemory() as memory, ExitStack() as stack:
        try:
            prepare(job, *inputs)  # its files are there when `compress` asks again
            executor = stack.enter_context(executor_for(recipe.cluster))
        except (RecipeError, CheckpointError):
            if is_new:
                shutil.rmtree(job.folder)
            raise
        compress(job, executor, Reporter(job, memory=memory))
    show_job(recipe.job_path, console)


def run_evaluation_only(checkpoint: str, against: str | None, settings: dict[str, Any], console: Console) -> Scores:
    """Scores a checkpoint by itself, or beside the original."""
    evaluation = parse_part(Evaluation, settings)
    folder = resolve_checkpoint(checkpoint)
    original = None if against is None else resolve_checkpoint(against)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = evaluation_tokens(evaluation, folder, Path(scratch))
        with executor_for(Cluster(local=True)) as executor:
            table = run_evaluation(
                folder,
                original,
                tokens,
                evaluation.batch_size,
                evaluation.dtype,
                "auto",
                executor,
                Reporter(None, console),
            )
    return merge_scores(table)
