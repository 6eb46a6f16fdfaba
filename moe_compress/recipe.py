"""The recipe: the one description of a job, YAML in and out.

Everything that can be refused without reading a tensor is refused here, in one line that names field, value, rule
and fix.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from .distillation_options import Distillation
from .errors import RecipeError, one_line
from .method_options import METHODS, Method, Part
from .recipe_fields import DatasetText, Folder, ModelName, TaskSource, Text, TextPairs, as_task
from .storage import address, as_path

SomePart = TypeVar("SomePart", bound=Part)


class Calibration(TextPairs):
    """The text whose statistics every method lives on.

    Attributes:
        text: files (.txt, .jsonl, .parquet, each also .gz) or a dataset; of pairs for an encoder-decoder model.
        num_sequences, sequence_length: how much of it: sequences (or pairs), and tokens of each.
        batch_size: sequences a micro-batch; bounds the memory of activations, changes no statistic but by rounding.
        seed: of the order of documents and of sampled labels.
        dtype: to compute in; `auto` is the checkpoint's own.
        labels: `text` gives the empirical Fisher information, `sampled` the true one.
        full_covariance: also keep input covariances on the larger side of a projection, which bases other than
            none need; `auto` keeps them where the method asks for them.
        activation_memory_gb: activations each worker keeps in memory before it spills to the job folder.
    """

    text: Text
    num_sequences: int = Field(128, ge=1)
    sequence_length: int = Field(2048, ge=2)
    batch_size: int = Field(8, ge=1)
    seed: int = Field(0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    labels: Literal["text", "sampled"] = "text"
    full_covariance: Literal["auto", "always"] = "auto"
    activation_memory_gb: float = Field(0.015625, ge=0)


class Evaluation(TextPairs):
    """What perplexity and agreement with the original are measured on, and what tasks both are scored by.

    Attributes:
        text: files (tokenised as one string) or a dataset; of pairs for an encoder-decoder model.
        sequence_length: tokens a window; windows do not overlap. Also the most tokens of a task's example.
        max_windows: only the first so many windows (or pairs); None for the whole text.
        generate: for so many pairs, the first ones, the target is also generated greedily and compared.
        tasks: names of evaluation/tasks/templates.py, or `{name: ..., test: files or dataset}`.
        max_examples: only the first so many examples of each task; None for all.
        batch_size: windows, or choices of a task, a micro-batch.
    """

    text: Text | None = None
    sequence_length: int = Field(2048, ge=2)
    max_windows: int | None = Field(None, ge=1)
    generate: int = Field(0, ge=0)
    tasks: tuple[TaskSource, ...] = ()
    max_examples: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"

    @field_validator("tasks", mode="before")
    @classmethod
    def _named_tasks(cls, value: Any) -> Any:
        return tuple(map(as_task, value)) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _measures_something(self) -> Evaluation:
        if self.text is None and not self.tasks:
            raise ValueError("text: missing; give text, or tasks")
        if self.text is None and self.generate:
            raise ValueError(f"generate: {self.generate} targets of a text that is not given; give text")
        twice = [name for name, count in Counter(task.name for task in self.tasks).items() if count > 1]
        if twice:
            raise ValueError(f"tasks: {twice[0]!r} is named twice; give each a name of its own")
        return self


class Cluster(Part):
    """Where the job runs.

    Attributes:
        local: in this process, without Ray; for debugging. The bytes are the same.
        address: a running Ray cluster; None starts one on this machine and stops it at the end.
        layer_workers: actors that share the layers during calibration; None for one a GPU, or one a core up to two.
        threads: numerical threads of every worker and task. One number for all of them, because the order of
            floating-point sums, and so the bytes of the result, may depend on it.
        resident_layers: consecutive layers a worker holds at a time; `auto` takes as many as a worker has memory for,
            balanced by bytes: its whole share if that fits, else part of it after part.
        worker_memory_gb: memory of a worker or task: no more of them go to a node than fit, and `auto` counts on so
            much. None asks for none, and counts on an equal part of a node or GPU.
        replicas: workers that share the micro-batches of each range of layers; their statistics are summed apart and
            then together, so that the bytes of the result depend on this number, and on nobody's being there.
        in_flight_gb: hidden states and gradients that the steps under way of all layer workers read and write together,
            and on a cluster of its own what the object store keeps in memory; None for two steps a worker.
        placement: `spread` puts layer workers on as many nodes as there are, `pack` on as few as have room.
        gpus: GPUs of every worker and task, where the cluster has any; a fraction shares one.
        device: torch device of workers and tasks; `auto` is CUDA where there is one.
    """

    local: bool = False
    address: str | None = None
    layer_workers: int | None = Field(None, ge=1)
    threads: int = Field(1, ge=1)
    resident_layers: int | str = 1
    worker_memory_gb: float | None = Field(None, gt=0)
    replicas: int = Field(1, ge=1)
    in_flight_gb: float | None = Field(None, gt=0)
    placement: Literal["spread", "pack"] = "spread"
    gpus: float = Field(1.0, gt=0)
    device: str = "auto"

    @field_validator("resident_layers")
    @classmethod
    def _some_layers(cls, value: int | str) -> int | str:
        if value != "auto" and (isinstance(value, str) or value < 1):
            raise ValueError("give a number of layers, 1 or more, or auto")
        return value


class JobRecipe(Part):
    """What any job has: a folder that a checkpoint appears at, and a workspace."""

    file_name: ClassVar[str]
    """What the resolved recipe is called in the workspace."""

    model: ModelName
    output: Folder
    job_dir: Folder | None = None
    evaluation: Evaluation | None = None
    cluster: Cluster = Cluster()

    @property
    def output_path(self) -> Path:
        """Folder the job's checkpoint appears at."""
        return as_path(self.output).absolute()

    @property
    def job_path(self) -> Path:
        """The workspace; `<output>.job` unless given."""
        if self.job_dir is not None:
            return as_path(self.job_dir).absolute()
        return self.output_path.with_name(self.output_path.name + ".job")

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class Training(JobRecipe):
    """A job that trains a checkpoint, compressed or not.

    Attributes:
        model: the checkpoint.
        teacher: what it learns from; None where it learns from the text alone.
    """

    file_name = "training.yaml"

    teacher: ModelName | None = None
    distillation: Distillation

    @model_validator(mode="after")
    def _has_teacher(self) -> Training:
        if self.teacher is None and self.distillation.teacher != "none":
            raise ValueError("teacher: missing; give the checkpoint to learn from, or set distillation.teacher: none")
        if self.teacher is not None and self.distillation.teacher == "none":
            raise ValueError(f"teacher: '{self.teacher}' and distillation.teacher: none; leave one of both out")
        return self


class Recipe(JobRecipe):
    """A job that compresses: which checkpoint, how small, where to; and how the outcome recovers, if it is to."""

    file_name = "recipe.yaml"

    calibration: Calibration
    method: Method
    distillation: Distillation | None = None

    def training(self) -> Training:
        """The job that trains what this one compresses.

        Raises:
            RecipeError: nothing is said about it.
        """
        settings = self.distillation
        if settings is None:
            raise RecipeError("distillation: missing; this key says what to train on, such as {text: train.txt}")
        return Training(
            model=self.output,
            teacher=None if settings.teacher == "none" else self.model,
            output=settings.output or address(self.output_path.with_name(f"{self.output_path.name}-distilled")),
            job_dir=address(self.job_path),
            distillation=settings,
            evaluation=self.evaluation,
            cluster=self.cluster,
        )


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a recipe as plain data and applies `--set a.b=value` overrides.

    Args:
        path: a YAML file, - for standard input. Relative paths inside it are relative to the current directory.
        overrides: `dotted.key=value`, the value read as YAML.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        data = yaml.safe_load(sys.stdin.read() if str(path) == "-" else Path(path).read_text())
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not YAML ({one_line(error)}); see jobs/recipes/") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path}: holds {type(data).__name__}, not a mapping of keys; see jobs/recipes/")
    for override in overrides:
        _override(data, override)
    return data


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe that compresses.

    Args:
        path, overrides: as of `read_recipe`.

    Raises:
        RecipeError: anything in it cannot be run.
    """
    return parse_recipe(read_recipe(path, overrides))


def load_training(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe | None, Training]:
    """Reads a recipe that trains: what makes its student first, if that is part of the recipe, and the training.

    Args:
        path, overrides: as of `read_recipe`.

    Raises:
        RecipeError: anything in it cannot be run.
    """
    data = read_recipe(path, overrides)
    if data.get("method") is None:
        return None, parse_part(Training, {key: value for key, value in data.items() if value is not None})
    recipe = parse_recipe(data)
    return recipe, recipe.training()


def parse_recipe(data: dict[str, Any]) -> Recipe:
    """Validates plain data as a recipe.

    Raises:
        RecipeError: field, value, rule and fix of the first thing that is wrong.
    """
    method = data.get("method")
    if isinstance(method, dict) and method.get("name") not in [*METHODS]:
        names = ", ".join(METHODS)
        if "name" not in method:
            raise RecipeError(f"method.name: missing; this key is required; the methods are: {names}")
        raise RecipeError(f"method.name: '{method['name']}' is not a method; the methods are: {names}")
    try:
        # a part whose every line is commented out is null
        return Recipe.model_validate({key: value for key, value in data.items() if value is not None})
    except ValidationError as error:
        raise RecipeError(_explain(error, Recipe)) from None


def parse_part(kind: type[SomePart], data: dict[str, Any]) -> SomePart:
    """Validates one part of a recipe by itself.

    Raises:
        RecipeError: as `parse_recipe`.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error, kind)) from None


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set '{override}': not of the form key.subkey=value; write it like method.ratio=0.4")
    *parents, leaf = key.split(".")
    here = data
    for parent in parents:
        if here.get(parent) is None:
            here[parent] = {}
        here = here[parent]
        if not isinstance(here, dict):
            raise RecipeError(f"--set '{override}': '{parent}' is a value and holds no keys; see jobs/recipes/")
    try:
        here[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set '{override}': value is not YAML ({one_line(error)}); quote it") from error


def _explain(error: ValidationError, kind: type[Part]) -> str:
    # A union reports every branch: first those of the kind that was given, and of those the shortest path with a
    # real complaint, which is the one a person meant.
    def unlikely(e: ErrorDetails) -> tuple[bool, bool, int]:
        is_other_branch = e["type"] in ("list_type", "model_type") and isinstance(e["input"], dict | list)
        return is_other_branch, e["type"] == "missing", len(e["loc"])

    first = min(error.errors(), key=unlikely)
    parts = [str(part) for part in first["loc"] if part not in ("list[str]", "DatasetText", *METHODS)]
    where = ".".join(parts)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = sorted(_fields(kind, first["loc"][:-1]))
        return f"{where}: unknown key; known here: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where}: missing; this key is required"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: {first['input']!r} is not a mapping of keys; give its keys one a line, see jobs/recipes/"
    if first["type"] == "value_error" and isinstance(first["input"], dict) and re.match(r"[\w.]+: ", message):
        return f"{where}.{message}".lstrip(".")  # of a part as a whole: it names the key
    return f"{where}: {first['input']!r} is not valid; {one_line(message[:1].lower() + message[1:])}"


def _fields(kind: type[Part], location: tuple[int | str, ...]) -> set[str]:
    model: Any = kind
    for part in location:
        if part == "DatasetText":
            return set(DatasetText.model_fields)
        if part in METHODS:
            return set(METHODS[str(part)].model_fields)
        annotation = getattr(model, "model_fields", {}).get(part)
        if annotation is None:
            continue
        model = next(
            (
                a
                for a in (annotation.annotation, *getattr(annotation.annotation, "__args__", ()))
                if isinstance(a, type) and issubclass(a, BaseModel)
            ),
            model,
        )
    return set(model.model_fields)
