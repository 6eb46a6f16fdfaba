"""Distillation as stages: prepare, teach, train, assemble, evaluate."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import MANIFEST_NAME, Manifest
from ..checkpoint.reader import CheckpointReader, content_digest, resolve_checkpoint
from ..checkpoint.writer import atomic_write
from ..distillation.examples import Examples
from ..distillation.fit import Run
from ..distillation.loop import RESULT_NAME, Task
from ..distillation.records import EventsTail
from ..distillation.snapshots import read_progress
from ..distillation.student import choose_dtype
from ..distillation.teacher import TeacherSetup
from ..errors import CheckpointError, RecipeError
from ..evaluation.agreement import Scores
from ..executor import Executor
from ..job import Job
from ..model.architecture import load_config
from ..model.discovery import find_moe_layers
from ..model.skeleton import Skeleton
from ..progress import Reporter
from ..recipe import Training
from .evaluate import scored
from .publish_trained import publish_trained
from .summary import TRAINING_NAME
from .teach import teach
from .tokens import check_vocabulary, evaluation_tokens, training_tokens

Fit = Callable[[Run], None]
"""Runs a training wherever it is to run."""

_POLL_S = 0.5


@dataclass(frozen=True)
class PreparedTraining:
    """What the stages know once every input has been checked.

    Attributes:
        recipe: the job.
        student, teacher: folders; None where there is no teacher.
        student_digest, teacher_digest: of their content.
        examples: file of all sequences.
        evaluation_tokens: file of the evaluation windows; None where nothing is evaluated.
        folder: of this training's snapshots and outcome.
        original_parameters: of all routed experts before compression.
    """

    recipe: Training
    student: Path
    teacher: Path | None
    student_digest: str
    teacher_digest: str | None
    examples: Path
    evaluation_tokens: Path | None
    folder: Path
    original_parameters: int

    def provenance(self) -> dict[str, Any]:
        """What decides the trained weights, without a path of this machine."""
        settings = self.recipe.distillation
        where = {"output", "text", "deepspeed", "micro_batch_size", "checkpoint_every"}
        return {
            **settings.model_dump(mode="json", exclude=where),
            "examples": self.examples.stem,
            "student_digest": self.student_digest,
            "teacher_digest": self.teacher_digest,
            "threads": self.recipe.cluster.threads,
        }


def prepare_training(job: Job, recipe: Training) -> PreparedTraining:
    """Checks the inputs, makes the sequences, takes the digests.

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    settings = recipe.distillation
    student = resolve_checkpoint(recipe.model).absolute()
    teacher = None if recipe.teacher is None else resolve_checkpoint(recipe.teacher).absolute()
    readers = [CheckpointReader(folder) for folder in (student, teacher) if folder is not None]
    sizes = {reader.folder: load_config(reader).get_text_config().vocab_size for reader in readers}
    if len(set(sizes.values())) > 1:
        raise RecipeError(
            f"teacher: its vocabulary has {sizes[readers[1].folder]} tokens and that of {recipe.model} has"
            f" {sizes[student]}; give the checkpoint it was made from"
        )
    tokens = job.folder / "tokens"
    tokens.mkdir(exist_ok=True)
    examples = training_tokens(settings, student, tokens)
    windows = None if recipe.evaluation is None else evaluation_tokens(recipe.evaluation, student, tokens)
    check_vocabulary(student, sizes[student], *(file for file in (windows,) if file is not None))
    _check_examples(settings.validation_sequences, Examples.load(examples), sizes[student])
    digests = [content_digest(reader, job.folder / f"source-{i}.json") for i, reader in enumerate(readers)]
    prepared = PreparedTraining(
        recipe=recipe,
        student=student,
        teacher=teacher,
        student_digest=digests[0],
        teacher_digest=digests[1] if teacher is not None else None,
        examples=examples,
        evaluation_tokens=windows,
        folder=Path(),
        original_parameters=_original_parameters(readers[0]),
    )
    folder = job.place("training", prepared.provenance())
    return PreparedTraining(**(vars(prepared) | {"folder": folder}))


def _check_examples(held_out: int, examples: Examples, vocabulary: int) -> None:
    found = len(examples.input_ids)
    if found <= held_out:
        raise RecipeError(
            f"distillation.validation_sequences: {held_out} of {found} sequences leave none to train on; lower it, or"
            " give more text"
        )
    largest = max(int(examples.input_ids.max()), int(examples.targets.max()))
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer gives id {largest} and the model has {vocabulary} embeddings; the tokenizer is another"
            " model's"
        )


def _original_parameters(student: CheckpointReader) -> int:
    """Of all routed experts before compression."""
    if (student.folder / MANIFEST_NAME).exists():
        return Manifest.load(student.folder).parameters["experts_original"]
    return sum(layer.num_parameters for layer in find_moe_layers(Skeleton(student).model))


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
        events, board = job.folder / "events.jsonl", prepared.folder / "tensorboard"
        run = Run(task, events, board, recipe.cluster.threads, recipe.cluster.device)
        with _following(events, prepared, reporter):
            fit(run)
    outcome = json.loads((prepared.folder / RESULT_NAME).read_text())
    publish_trained(prepared.student, prepared.folder, recipe.output_path, prepared.provenance(), outcome, reporter)
    scores = _scores(job, prepared, executor, reporter)
    summary = {
        "student": recipe.model,
        "teacher": recipe.teacher,
        "output": recipe.output,
        **outcome,
        "scores": {name: found.to_dict() for name, found in scores.items()},
        "returned": returned(scores),
        "stages": reporter.stages,
    }
    atomic_write(job.folder / TRAINING_NAME, json.dumps(summary, indent=2) + "\n")


@contextmanager
def _following(events: Path, prepared: PreparedTraining, reporter: Reporter) -> Iterator[None]:
    """Shows the steps that the training writes down, wherever it runs."""
    tail, over = EventsTail(events), threading.Event()
    settings = prepared.recipe.distillation
    sequences = len(Examples.load(prepared.examples).input_ids) - settings.validation_sequences
    total = settings.epochs * -(-sequences // settings.batch_size)
    with reporter.stage("train", min(total, settings.max_steps or total)) as stage:
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
    """Of the student before and after, beside the teacher if there is one."""
    settings, tokens = prepared.recipe.evaluation, prepared.evaluation_tokens
    if settings is None or tokens is None:
        return {}
    output = prepared.recipe.output_path
    of = {"before": (prepared.student, prepared.student_digest), "after": (output, Manifest.load(output).text())}
    return {
        name: scored(job, folder, identity, prepared.teacher, settings, tokens, executor, reporter)
        for name, (folder, identity) in of.items()
    }


def returned(scores: dict[str, Scores]) -> float | None:
    """The fraction of the perplexity lost by compression that came back; None where nothing tells."""
    if not scores or scores["before"].original_perplexity is None:
        return None
    before, after = scores["before"], scores["after"]
    lost = before.perplexity - scores["before"].original_perplexity
    return (before.perplexity - after.perplexity) / lost if lost > 0 else None
