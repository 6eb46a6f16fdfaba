"""Runs recipes: picks the executor, watches memory, prints the closing table."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_compress.calibration.text import TokenBatch
from moe_compress.checkpoint.reader import CheckpointReader, resolve_checkpoint
from moe_compress.errors import CheckpointError, RecipeError
from moe_compress.evaluation.agreement import merge_scores
from moe_compress.executor import Executor, InProcess
from moe_compress.job import Job
from moe_compress.memory import PeakMemory
from moe_compress.model.architecture import load_config
from moe_compress.model.levels import level_names, levels_read
from moe_compress.pipeline import compress
from moe_compress.plan import known_flops
from moe_compress.progress import Reporter, Watch
from moe_compress.recipe import Cluster, Evaluation, JobRecipe, Recipe, parse_part
from moe_compress.report.tables import show_job
from moe_compress.stages.evaluate import run_evaluation
from moe_compress.stages.prepare import check, check_output, prepare
from moe_compress.stages.tasks import beside, check_tasks, score_tasks
from moe_compress.stages.tokens import check_vocabulary, evaluation_tokens
from moe_compress.stages.units import write_table
from moe_compress.storage import StoredPath, remove_folder


@contextmanager
def executor_for(cluster: Cluster, reporter: Reporter) -> Iterator[Executor]:
    """The executor a recipe asks for; closed at the end."""
    executor: Executor
    if cluster.local:
        executor = InProcess(cluster.threads)
    else:
        from cluster.environment import prepare_private_cluster, running_cluster

        cluster = cluster.model_copy(update={"address": cluster.address or running_cluster()})
        if cluster.address is None:
            prepare_private_cluster()
        from cluster.executor import RayExecutor

        executor = RayExecutor(cluster, reporter)
    try:
        yield executor
    finally:
        executor.close()


def run(recipe: Recipe, console: Console) -> None:
    """Runs or resumes a job and prints its table; what is refused leaves no job folder behind."""
    inputs = check(recipe)
    check_output(recipe)
    job = Job(recipe)
    created = missing_folders(job.folder)
    with job.locked(), PeakMemory() as memory, ExitStack() as stack:
        reporter = Reporter(job, memory=memory)
        stack.enter_context(reporter.run("compress"))
        with without_trace(created):
            prepared = prepare(job, *inputs)
            executor = stack.enter_context(executor_for(recipe.cluster, reporter))
        if not recipe.cluster.local:
            reporter.watch = stage_metrics(recipe, known_flops(recipe, *inputs[1:]))
        _tell_short(recipe, prepared.calibration_tokens, reporter)
        compress(job, prepared, executor, reporter)
    show_job(recipe.job_path, console)


def stage_metrics(recipe: JobRecipe, flops: dict[str, float]) -> Watch:
    """What tells Prometheus of the stages of a job on a cluster.

    Args:
        recipe: the job.
        flops: operations of stages, by name.
    """
    from cluster.metrics import StageMetrics

    return StageMetrics(recipe.output_path.name, flops)


def missing_folders(folder: Path) -> list[Path]:
    """A folder and those above it that are not there, innermost first."""
    if isinstance(folder, StoredPath):
        return [] if folder.exists() else [folder]
    return list(takewhile(lambda each: not each.exists(), (folder, *folder.parents)))


@contextmanager
def without_trace(created: list[Path]) -> Iterator[None]:
    """Removes the folder of a job or batch and those above it made with it, innermost first, if input is refused."""
    try:
        yield
    except (RecipeError, CheckpointError):
        for folder in created[:1]:
            remove_folder(folder)
        for folder in created[1:]:
            with suppress(OSError):  # another job has put something there
                folder.rmdir()
        raise


def _tell_short(recipe: Recipe, tokens: Path, reporter: Reporter) -> None:
    found, asked = len(TokenBatch.load(tokens).input_ids), recipe.calibration.num_sequences
    if found < asked:
        reporter.say(f"calibration.num_sequences: the text has {found} of the {asked} sequences asked for")


def run_evaluation_only(
    checkpoint: str,
    against: str | None,
    settings: dict[str, Any],
    console: Console,
    parquet: Path | None = None,
    level: str | None = None,
) -> dict[str, Any]:
    """What a checkpoint scores on a text and on tasks, by itself or beside the original.

    Args:
        checkpoint, against: folders or hub ids.
        settings: the `evaluation` part of a recipe.
        console: for progress.
        parquet: file for the table of the text's windows, if wanted.
        level: of the checkpoint, if it has several; None for the largest.
    """
    evaluation = parse_part(Evaluation, settings)
    folder = resolve_checkpoint(checkpoint)
    original = None if against is None else resolve_checkpoint(against)
    if level is not None:
        levels_read(level_names(CheckpointReader(folder).config), level)
    num_ids = _vocabulary(folder)
    if original is not None and _vocabulary(original) != num_ids:
        raise RecipeError(
            f"--against {against}: its vocabulary has {_vocabulary(original)} tokens and that of {checkpoint} has"
            f" {num_ids}; give the checkpoint it was made from"
        )
    check_tasks(evaluation)
    reporter = Reporter(None, console)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        tokens = evaluation_tokens(evaluation, folder, Path(scratch))
        executor = stack.enter_context(executor_for(Cluster(local=True), reporter))
        if tokens is not None:
            check_vocabulary(folder, num_ids, tokens)
            how = (evaluation.batch_size, evaluation.dtype, "auto", executor, reporter, evaluation.generate, level)
            table = run_evaluation(folder, original, tokens, *how)
            found |= merge_scores(table).to_dict()
            if parquet is not None:
                write_table(parquet, table)
        if evaluation.tasks:
            tasks = score_tasks(folder, evaluation, "auto", executor, reporter, level)
            if original is not None:
                given = score_tasks(original, evaluation, "auto", executor, reporter, whose=" of the original")
                tasks = beside(tasks, given)
            found["tasks"] = tasks
    return found


def _vocabulary(checkpoint: Path) -> int:
    size: int = load_config(CheckpointReader(checkpoint)).get_text_config().vocab_size
    return size
