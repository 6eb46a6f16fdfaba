"""Checks a training against its inputs, makes its sequences, takes the digests of student and teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import MANIFEST_NAME, Manifest
from ..checkpoint.reader import CheckpointReader, content_digest, resolve_checkpoint
from ..distillation.examples import Examples
from ..distillation.fit import check_processes
from ..distillation.order import Order
from ..distillation.parameters import choose_trained
from ..distillation.routers import RouterLogits
from ..distillation.sparsity import ColumnPruner
from ..distillation_options import Distillation
from ..errors import CheckpointError, RecipeError
from ..evaluation.tasks.reading import check_task
from ..job import Job
from ..model.architecture import load_config
from ..model.skeleton import Skeleton
from ..model.switch import contract_conversions
from ..progress import Reporter
from ..recipe import Recipe, Training
from ..storage import StoredPath
from .prepare import check_device, check_kind, check_output
from .publish_trained import count_parameters
from .tasks import check_tasks
from .tokens import check_texts, check_vocabulary, evaluation_tokens, load_tokenizer, naming, training_tokens

TEACHER = "teacher"
"""Name of the teacher among the checkpoints that are scored."""


@dataclass(frozen=True)
class PreparedTraining:
    """What the stages know once every input has been checked.

    Attributes:
        recipe: the job.
        student, teacher: folders; None where there is no teacher.
        student_digest, teacher_digest: of their content.
        examples: file of all sequences.
        num_steps: optimizer steps they make.
        evaluation_tokens: file of the evaluation windows; None where no text is evaluated.
        folder: of this training's snapshots and outcome.
        original_parameters: of all routed experts before compression.
    """

    recipe: Training
    student: Path
    teacher: Path | None
    student_digest: str
    teacher_digest: str | None
    examples: Path
    num_steps: int
    evaluation_tokens: Path | None
    folder: Path
    original_parameters: int

    def provenance(self) -> dict[str, Any]:
        """What decides the trained weights, without a path of this machine."""
        settings = self.recipe.distillation
        where = dict.fromkeys(("output", "text", "deepspeed", "micro_batch_size", "checkpoint_every"), True)
        return {
            **settings.model_dump(mode="json", exclude={**where, "task": {"train", "test"}}),
            "examples": self.examples.stem,
            "student_digest": self.student_digest,
            "teacher_digest": self.teacher_digest,
            "threads": self.recipe.cluster.threads,
        }

    def checkpoints(self) -> dict[str, tuple[Path, str]]:
        """What is scored once the trained checkpoint is published: folder, and what its content is known by."""
        output = self.recipe.output_path
        made = (self.student / MANIFEST_NAME).exists()
        student = Manifest.load(self.student).unmeasured().text() if made else self.student_digest
        found = {"before": (self.student, student), "after": (output, Manifest.load(output).text())}
        if self.teacher is None or self.teacher_digest is None:
            return found
        return {TEACHER: (self.teacher, self.teacher_digest)} | found


def student_is_there(recipe: Training, maker: Recipe | None) -> bool:
    """Whether the checkpoint to train need not be made first.

    Args:
        recipe: the training.
        maker: makes its student; None where it is given.

    Raises:
        RecipeError: another job has made what is there.
    """
    if maker is None:
        return True
    student = maker.output_path
    if not (student / MANIFEST_NAME).exists():
        return False
    if Manifest.load(student).recipe.get("method") != maker.method.model_dump(mode="json", exclude={"preset"}):
        raise RecipeError(f"output: {student} holds a checkpoint of another job; choose another folder or remove it")
    return True


def check_training(recipe: Training, maker: Recipe | None) -> None:
    """Refuses what cannot work, from the recipe, configs and first rows alone.

    Args:
        recipe: the training.
        maker: makes its student, unless it is there.

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    settings = recipe.distillation
    if isinstance(recipe.job_path, StoredPath):
        raise RecipeError(
            f"job_dir: {recipe.job_path} is in an object store, and the snapshots of a training need a disk that its"
            " nodes share; give a folder of one"
        )
    check_output(recipe)
    check_device(recipe.cluster)
    if recipe.cluster.local:
        check_processes(settings)
    # what is said of the student's config and tokenizer its original says too
    like = recipe.model if maker is None or student_is_there(recipe, maker) else maker.model
    student = CheckpointReader(resolve_checkpoint(like))
    config = load_config(student)
    if recipe.teacher is not None:
        _check_teacher(recipe.teacher, config.get_text_config().vocab_size, recipe.model)
    check_kind(recipe.evaluation, config, student.folder)
    parts = {"distillation.text": settings, "evaluation.text": recipe.evaluation}
    check_texts(parts, config.is_encoder_decoder)
    if settings.task is not None:
        with naming("distillation.task"):
            check_task(settings.task, "train")
    check_tasks(recipe.evaluation)
    load_tokenizer(student.folder)


def _check_teacher(teacher: str, vocabulary: int, student: str) -> None:
    try:
        theirs = load_config(CheckpointReader(resolve_checkpoint(teacher))).get_text_config().vocab_size
    except CheckpointError as error:
        raise CheckpointError(f"teacher: {error}") from error
    if theirs != vocabulary:
        raise RecipeError(
            f"teacher: its vocabulary has {theirs} tokens and that of {student} has {vocabulary}; give the checkpoint"
            " it was made from"
        )


def prepare_training(job: Job, recipe: Training, reporter: Reporter) -> PreparedTraining:
    """Makes the sequences, takes the digests, and checks what takes the student itself.

    Args:
        job: where the sequences are kept.
        recipe: the training, after `check_training`.
        reporter: told of what there is less of than was asked for.

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    settings = recipe.distillation
    student = resolve_checkpoint(recipe.model).absolute()  # workers may be at home elsewhere
    teacher = None if recipe.teacher is None else resolve_checkpoint(recipe.teacher).absolute()
    readers = [CheckpointReader(folder) for folder in (student, teacher) if folder is not None]
    original_parameters = count_parameters(readers[0])["experts_original"]
    _check_student(settings, readers[0], original_parameters)
    if settings.deepspeed.zero_stage == 3:
        _check_spreads(readers if settings.teacher == "live" else readers[:1])
    vocabulary = load_config(readers[0]).get_text_config().vocab_size
    tokens = job.folder / "tokens"
    tokens.mkdir(exist_ok=True)
    examples = training_tokens(settings, student, tokens, reporter)
    found = _check_examples(settings, Examples.load(examples), vocabulary, reporter)
    windows = None if recipe.evaluation is None else evaluation_tokens(recipe.evaluation, student, tokens)
    if windows is not None:
        check_vocabulary(student, vocabulary, windows)
    digests = [content_digest(reader, job.folder / f"source-{i}.json") for i, reader in enumerate(readers)]
    prepared = PreparedTraining(
        recipe=recipe,
        student=student,
        teacher=teacher,
        student_digest=digests[0],
        teacher_digest=digests[1] if teacher is not None else None,
        examples=examples,
        num_steps=Order.of(settings, found).num_steps,
        evaluation_tokens=windows,
        folder=Path(),
        original_parameters=original_parameters,
    )
    _check_earlier_output(prepared)
    return replace(prepared, folder=job.place("training", prepared.provenance()))


def _check_student(settings: Distillation, student: CheckpointReader, original_parameters: int) -> None:
    """What is asked for must be there to be trained, listened to and pruned."""
    model = Skeleton(student).model
    choose_trained(model, settings.train)
    if settings.loss.router:
        RouterLogits(model)
    if settings.sparsity is not None:
        ColumnPruner(model, settings.sparsity, 1, original_parameters)


def _check_spreads(readers: list[CheckpointReader]) -> None:
    """ZeRO 3 must not keep apart what loading puts together."""
    for skeleton in map(Skeleton, readers):
        if skeleton.quantizer is None and contract_conversions(skeleton.model):
            raise RecipeError(
                f"distillation.deepspeed.zero_stage: 3 cannot spread '{skeleton.model.config.model_type}' before"
                f" it is compressed ({skeleton.reader.folder}); set 2"
            )


def _check_examples(settings: Distillation, examples: Examples, vocabulary: int, reporter: Reporter) -> int:
    """How many there are."""
    found, held_out = len(examples.input_ids), settings.validation_sequences
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
    asked = settings.num_sequences + held_out
    if found < asked:
        reporter.say(
            f"distillation.num_sequences: there are {found} of the {asked} sequences asked for, {held_out} of them held"
            " out"
        )
    return found


def _check_earlier_output(prepared: PreparedTraining) -> None:
    """A checkpoint of ours at the output must be the one that this very training makes."""
    output = prepared.recipe.output_path
    if not (output / MANIFEST_NAME).exists():
        return
    training = Manifest.load(output).training or {}
    if any(training.get(key) != value for key, value in prepared.provenance().items()):
        raise RecipeError(f"output: {output} holds a checkpoint of another job; choose another folder or remove it")
