"""Distillation as stages, once it is prepared: teach, train, assemble, evaluate."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.writer import atomic_write
from ..distillation.fit import Run
from ..distillation.loop import RESULT_NAME, Task
from ..distillation.records import EventsTail
from ..distillation.snapshots import read_progress
from ..distillation.student import choose_dtype
from ..distillation.teacher import TeacherSetup
from ..evaluation.agreement import Scores
from ..executor import Executor
from ..job import Job
from ..progress import Reporter
from ..storage import as_path
from .evaluate import scored
from .prepare_training import TEACHER, PreparedTraining
from .publish_trained import publish_trained
from .summary import TRAINING_NAME
from .tasks import TaskScores, scored_tasks
from .teach import teach

Fit = Callable[[Run], None]
"""Runs a training wherever it is to run."""

_POLL_S = 0.5


def train(job: Job, prepared: PreparedTraining, executor: Executor, fit: Fit, reporter: Reporter) -> None:
    """Runs or resumes a training, whose folder the caller has locked; leaves `training.json` there.

    Args:
        job: the job.
        prepared: its inputs, checked.
        executor: runs the units of the teacher's cache and of the evaluation.
        fit: runs the training.
        reporter: told of the stages.
    """
    recipe, settings = prepared.recipe, prepared.recipe.distillation
    dtype = choose_dtype(prepared.student, settings.dtype)
    cache = None
    if prepared.teacher is not None and settings.teacher == "cached":
        temperature = settings.loss.temperature
        made_from = (prepared.teacher_digest, prepared.examples.stem, settings.teacher_top_k, temperature, str(dtype))
        cache = job.place("teacher", *made_from)
        setup = TeacherSetup(
            checkpoint=prepared.teacher,
            examples=prepared.examples,
            folder=cache,
            top_k=settings.teacher_top_k,
            temperature=temperature,
            batch_size=settings.micro_batch_size,
            dtype=str(dtype).removeprefix("torch."),
            device=recipe.cluster.device,
        )
        teach(setup, executor, reporter)
    if not (prepared.folder / RESULT_NAME).exists():
        task = Task(
            settings=settings,
            student=prepared.student,
            teacher=prepared.teacher if settings.teacher == "live" else None,
            cache=cache,
            examples=prepared.examples,
            folder=prepared.folder,
            dtype=dtype,
            original_parameters=prepared.original_parameters,
        )
        events, board = job.events, prepared.folder / "tensorboard"
        run = Run(task, events, board, recipe.cluster.threads, recipe.cluster.device)
        with _following(events, prepared, reporter):
            fit(run)
    outcome = json.loads((prepared.folder / RESULT_NAME).read_text())
    publish_trained(prepared.student, prepared.folder, recipe.output_path, prepared.provenance(), outcome, reporter)
    scores = _scores(job, prepared, executor, reporter)
    tasks = _task_scores(job, prepared, executor, reporter)
    summary = {
        "student": recipe.model,
        "teacher": recipe.teacher,
        "output": str(as_path(recipe.output)),
        **outcome,
        "scores": {name: found.to_dict() for name, found in scores.items()},
        "tasks": tasks,
        "returned": returned(scores),
        "stages": reporter.stages,
    }
    atomic_write(job.folder / TRAINING_NAME, json.dumps(summary, indent=2) + "\n")


@contextmanager
def _following(events: Path, prepared: PreparedTraining, reporter: Reporter) -> Iterator[None]:
    """Shows the steps that the training writes down, wherever it runs."""
    tail, over = EventsTail(events), threading.Event()
    with reporter.stage("train", prepared.num_steps) as stage:
        stage.begin_at(read_progress(prepared.folder)[1].step)

        def show() -> None:
            for figures in tail.read():
                if figures["event"] == "step":
                    note = f"loss {figures['loss']:.4f}, KL {figures['kl']:.4f}, lr {figures['learning_rate']:.1e}"
                    if "memory_bytes" in figures:
                        note += f", {figures['memory_bytes'] / 1e9:.1f} GB"
                    stage.advance(figures["step"] - stage.done, figures["tokens"], note)
                elif figures["event"] == "restart":
                    stage.begin_at(figures["step"])
                    reporter.say(f"{figures['reason']}; all processes go on from step {figures['step']}")
                elif figures["event"] == "validation":
                    reporter.say(f"step {figures['step']}: held-out loss {figures['validation_loss']:.4f}")

        def poll() -> None:
            while not over.wait(_POLL_S):
                show()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            show()


def _scores(job: Job, prepared: PreparedTraining, executor: Executor, reporter: Reporter) -> dict[str, Scores]:
    """Of the student before and after, beside the teacher if there is one; nothing without a text."""
    settings, tokens = prepared.recipe.evaluation, prepared.evaluation_tokens
    if settings is None or tokens is None:
        return {}
    teacher, its_digest = prepared.teacher, prepared.teacher_digest
    return {
        name: scored(job, folder, [identity, its_digest], teacher, settings, tokens, executor, reporter)
        for name, (folder, identity) in prepared.checkpoints().items()
        if name != TEACHER
    }


def _task_scores(job: Job, prepared: PreparedTraining, executor: Executor, reporter: Reporter) -> dict[str, TaskScores]:
    """Of the student before and after, and of the teacher if there is one, on each task; nothing without tasks."""
    settings = prepared.recipe.evaluation
    if settings is None or not settings.tasks:
        return {}
    return {
        name: scored_tasks(job, folder, identity, settings, executor, reporter, whose=f", {name}")
        for name, (folder, identity) in prepared.checkpoints().items()
    }


def returned(scores: dict[str, Scores]) -> float | None:
    """The fraction of the perplexity lost by compression that came back; None where nothing tells."""
    if not scores or scores["before"].original_perplexity is None:
        return None
    before, after = scores["before"], scores["after"]
    lost = before.perplexity - scores["before"].original_perplexity
    return (before.perplexity - after.perplexity) / lost if lost > 0 else None
