"""Runs a recipe on a cluster elsewhere: checks it here, sends it, follows it, ends as it ends.

What is sent is the resolved recipe, on the standard input of the same command. The same recipe goes by the same name:
submitted again while it runs it is followed, and later it goes on where it was stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from rich.console import Console

from moe_compress.batch_recipe import expand, parse_batch
from moe_compress.checkpoint.reader import CheckpointReader
from moe_compress.errors import JobFailed, MoECompressError, RecipeError, one_line
from moe_compress.job import digest_of
from moe_compress.recipe import JobRecipe, Recipe, Training, load_recipe, load_training, read_recipe
from moe_compress.recipe_fields import TaskSource, Text
from moe_compress.stages.prepare import open_original

if TYPE_CHECKING:
    from cluster.submission import JobServer

COMMANDS = ("compress", "distill", "batch")
"""What can be submitted; each is a module of this package."""

_END_OF_RECIPE = "END_OF_RECIPE"

_COMMAND_BYTES = 128_000
"""Of an entrypoint, which Ray gives the shell as one argument; Linux takes 128 KiB."""

SomeRecipe = TypeVar("SomeRecipe", bound=JobRecipe)


def submit(
    path: Path,
    overrides: Sequence[str],
    address: str,
    console: Console,
    command: str = "compress",
    name: str | None = None,
    working_dir: Path | None = None,
    runtime_env: Path | None = None,
    wait: bool = True,
) -> None:
    """Submits a recipe, or follows it if it runs already.

    Args:
        path, overrides: the recipe, or the manifest of a batch.
        address: URL of the job server.
        console: where the job's lines go.
        command: of `COMMANDS`.
        name: of the job; made from the recipe unless given.
        working_dir: folder that is sent along; relative paths in the recipe are below it.
        runtime_env: a YAML file with Ray's runtime environment.
        wait: until the job ends; False returns once it is submitted.

    Raises:
        RecipeError: the recipe or what goes with it is refused, or there is no such cluster.
        JobFailed: the job did.
    """
    if command not in COMMANDS:
        raise RecipeError(f"--command {command}: not one of {', '.join(COMMANDS)}; give one of them")
    if command == "batch":
        output, text = resolve_batch(path, overrides, working_dir)
    else:
        recipe = resolve(command, path, overrides, working_dir)
        output, text = recipe.output, recipe.to_yaml()
    environment = _environment(runtime_env, working_dir)
    entrypoint = f"python -m jobs.{command} - <<'{_END_OF_RECIPE}'\n{text}{_END_OF_RECIPE}"
    num_bytes = len(entrypoint.encode())
    if num_bytes > _COMMAND_BYTES:
        raise RecipeError(
            f"{path}: takes {num_bytes:,} bytes as it is sent, and a job can be sent {_COMMAND_BYTES:,}; split it, or"
            " run it on the cluster from a file there"
        )
    if name is None:
        called = re.sub(r"[^\w-]+", "-", output.rstrip("/").rsplit("/", 1)[-1])
        name = f"{called}-{digest_of(entrypoint)[:8]}"
    server = connect(address)
    submission_id, is_new = server.submit(name, entrypoint, environment)
    console.print(f"{submission_id}: {'submitted' if is_new else 'runs already'}", highlight=False, markup=False)
    if wait:
        follow(submission_id, server, console)
    else:
        console.print(_what_now(submission_id, address), highlight=False, markup=False, soft_wrap=True)


def connect(address: str) -> JobServer:
    """The job server of a cluster.

    Raises:
        RecipeError: there is none, or it wants another token.
    """
    from cluster.environment import show_token

    show_token()
    from cluster.submission import JobServer

    return JobServer(address)


def follow(submission_id: str, server: JobServer, console: Console) -> None:
    """Shows what a job says until it ends.

    Raises:
        JobFailed: it did, or was stopped.
        MoECompressError: the person went away.
    """

    def write(text: str) -> None:
        console.file.write(text)
        console.file.flush()

    try:
        job, reason = server.follow(submission_id, write)
    except KeyboardInterrupt:
        raise MoECompressError(f"detached, the job goes on. {_what_now(submission_id, server.address)}") from None
    if job.status == "SUCCEEDED":
        return
    if job.status == "STOPPED":
        raise JobFailed(f"job {submission_id}: was stopped; submit the same recipe again to go on", 1)
    code = job.driver_exit_code
    reason = reason or one_line(f"driver ended with code {code}: {job.message or ''}", 300)
    raise JobFailed(f"job {submission_id}: {reason}", code if code in (1, 2) else 1)


def stop(name: str, server: JobServer, console: Console) -> None:
    """Stops what runs under a name; what is finished is kept."""
    submission_id = str(server.find(name).submission_id)
    stopped = server.stop(submission_id)
    console.print(f"{submission_id}: {'stopped' if stopped else 'had ended before'}", highlight=False, markup=False)


def _what_now(submission_id: str, address: str) -> str:
    command = f"moe-compress submit --address {address}"
    return f"Follow it: {command} --follow {submission_id}; stop it: {command} --stop {submission_id}"


def resolve(command: str, path: Path, overrides: Sequence[str], working_dir: Path | None) -> JobRecipe:
    """The recipe of a job as it is sent, checked as far as it can be here.

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    recipe: JobRecipe
    if command == "compress":
        recipe = load_recipe(path, overrides)
    else:
        made_by, training = load_training(path, overrides)
        recipe = made_by or training
    return _sent(recipe, working_dir)


def resolve_batch(path: Path, overrides: Sequence[str], working_dir: Path | None) -> tuple[str, str]:
    """(its folder, the manifest as it is sent: every recipe as its job gives it, without what it leaves open).

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    batch = parse_batch(read_recipe(path, overrides))
    if batch.folder is None or _is_relative(batch.folder):
        raise RecipeError(
            f"folder: {batch.folder} is no path from the root, and the batch runs in a folder of its own; give one that"
            " every node of the cluster sees"
        )
    entries, problems = expand(batch, Path(batch.folder))
    if problems:
        raise RecipeError("; ".join(problems))
    jobs = []
    for entry in entries:
        try:
            recipe = _sent(entry.recipe, working_dir)
            jobs.append({"name": entry.name, **recipe.model_dump(mode="json", exclude_unset=True)})
        except RecipeError as error:
            raise RecipeError(f"job {entry.name}: {error}") from error
    sent = {"folder": batch.folder, "max_parallel": batch.max_parallel, "jobs": jobs}
    _, problems = expand(parse_batch(sent), Path(batch.folder))
    if problems:
        raise RecipeError("; ".join(problems))
    return batch.folder, yaml.safe_dump(sent, sort_keys=False)


def _sent(recipe: SomeRecipe, working_dir: Path | None) -> SomeRecipe:
    """A recipe for the cluster that it is sent to."""
    _check_paths(recipe, working_dir)
    model = Path(recipe.model)
    if isinstance(recipe, Recipe) and model.is_dir():
        open_original(recipe, CheckpointReader(model))
    there = recipe.cluster.model_copy(update={"local": False, "address": "auto"})
    return recipe.model_copy(update={"cluster": there})


def _check_paths(recipe: JobRecipe, working_dir: Path | None) -> None:
    """The job runs in a folder that is thrown away: what it leaves lies elsewhere, what it reads is sent along."""
    folders = {"output": recipe.output, "job_dir": recipe.job_dir, "model": recipe.model}
    if isinstance(recipe, Training):
        folders["teacher"] = recipe.teacher
    elif isinstance(recipe, Recipe) and recipe.distillation is not None:
        folders["distillation.output"] = recipe.distillation.output
    for field, folder in folders.items():
        is_hub_id = field in ("model", "teacher") and folder is not None and not Path(folder).exists()
        if folder is not None and not is_hub_id and _is_relative(folder):
            raise RecipeError(
                f"{field}: '{folder}' is relative, and the job runs in a folder of its own; give a path from the root"
                " that every node of the cluster sees"
            )
    for field, file in _texts(recipe):
        if not _is_relative(file):
            continue
        if working_dir is None:
            raise RecipeError(
                f"{field}: '{file}' is relative, and nothing is sent along; give --working-dir, or a path from the root"
            )
        if not (working_dir / file).exists():
            raise RecipeError(f"{field}: {working_dir / file} is not there; relative paths are below --working-dir")


def _is_relative(path: str) -> bool:
    return "://" not in path and not Path(path).is_absolute()


def _texts(recipe: JobRecipe) -> Iterator[tuple[str, str]]:
    """(field, file) of every file of text."""
    given: list[tuple[str, Text | None]] = []

    def add_task(field: str, task: TaskSource) -> None:
        given.extend([(f"{field}.train", task.train), (f"{field}.test", task.test)])

    if isinstance(recipe, Recipe):
        given.append(("calibration.text", recipe.calibration.text))
    if recipe.evaluation is not None:
        given.append(("evaluation.text", recipe.evaluation.text))
        for task in recipe.evaluation.tasks:
            add_task("evaluation.tasks", task)
    training = recipe.distillation if isinstance(recipe, Recipe | Training) else None
    if training is not None:
        given.append(("distillation.text", training.text))
        if training.task is not None:
            add_task("distillation.task", training.task)
    for field, text in given:
        for file in text if isinstance(text, list) else []:
            yield field, file


def _environment(file: Path | None, working_dir: Path | None) -> dict[str, Any]:
    """Ray's runtime environment of the job."""
    found: Any = {}
    if file is not None:
        try:
            found = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(
                f"--runtime-env {file}: cannot be read ({' '.join(str(error).split())}); give a YAML file"
            ) from error
        if not isinstance(found, dict):
            raise RecipeError(
                f"--runtime-env {file}: holds {type(found).__name__}, no mapping of keys; see Ray's manual"
            )
    if working_dir is not None:
        if not working_dir.is_dir():
            raise RecipeError(f"--working-dir {working_dir}: no such folder; give one that exists")
        found = {**found, "working_dir": str(working_dir)}
    return found
