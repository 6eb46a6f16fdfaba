"""The manifest of a batch: many checkpoints and ratios, YAML in.

    folder: batches/may              # outputs and job folders; the manifest's name without its suffix unless given
    max_parallel: 1                  # jobs side by side
    defaults:                        # parts of a recipe that every job has
      calibration: {text: calibration.jsonl}
      method: {name: d2moe}
      evaluation: {text: held-out.txt}
    jobs:
    - {name: mixtral, model: mistralai/Mixtral-8x7B-v0.1, ratios: [0.4, 0.6]}
    - {name: qwen, model: Qwen/Qwen3-30B-A3B, method: {ratio: 0.5}, output: "{folder}/{name}-half"}

A job is the defaults with what it says itself put over them, key by key. With `ratios` it is a job a ratio, NAME-RATIO.
Jobs of one model and calibration share a job folder, and so the statistics.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from .errors import RecipeError
from .job import digest_of
from .method_options import Part
from .recipe import Recipe, parse_part, parse_recipe
from .recipe_fields import DiskFolder

_OUTPUT = "{folder}/{name}"


class BatchJob(Part):
    """One line of the manifest; keys beside these are those of a recipe."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    ratios: Annotated[list[float], Field(min_length=1)] | None = None


class Batch(Part):
    """The manifest.

    Attributes:
        folder: of a disk, where logs and the summary go, and outputs and job folders unless they say where else.
        max_parallel: jobs side by side; those of one job folder run one after the other all the same.
        defaults: of every job. `output` may hold {folder} and {name}.
        jobs: see above.
    """

    folder: DiskFolder | None = None
    max_parallel: int = Field(1, ge=1)
    defaults: dict[str, Any] = Field(default_factory=dict)
    jobs: Annotated[list[BatchJob], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Entry:
    """One job of a batch: its name in the summary, and its recipe."""

    name: str
    recipe: Recipe

    @property
    def digest(self) -> str:
        """Of the whole recipe: what was done for it is done."""
        return digest_of("batch", self.recipe.model_dump(mode="json"))


def parse_batch(data: dict[str, Any]) -> Batch:
    """Validates plain data as a manifest; its recipes are not looked at.

    Raises:
        RecipeError: field, value, rule and fix of the first thing that is wrong.
    """
    return parse_part(Batch, {key: value for key, value in data.items() if value is not None})


def expand(batch: Batch, folder: Path) -> tuple[list[Entry], list[str]]:
    """(the jobs whose recipes are valid, a line for each thing that is wrong).

    Args:
        batch: the manifest.
        folder: of the batch.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    names: Counter[str] = Counter()
    for name, data in _jobs(batch):
        names[name] += 1
        output = str(data.get("output") or _OUTPUT).replace("{folder}", str(folder)).replace("{name}", name)
        try:
            recipe = parse_recipe(data | {"output": output})
            if recipe.job_dir is None:
                recipe = recipe.model_copy(update={"job_dir": str(_shared_folder(recipe, folder))})
            if recipe.job_path == folder.absolute():
                raise RecipeError(f"job_dir: {folder} is the batch's own folder; give another, or leave it out")
            if batch.max_parallel > 1:
                _check_share(recipe, batch.max_parallel)
            entries.append(Entry(name, recipe))
        except RecipeError as error:
            problems.append(f"job {name}: {error}")
    problems += [f"job {name}: is there {count} times; give each a name" for name, count in names.items() if count > 1]
    outputs = Counter(entry.recipe.output_path for entry in entries)
    for output_path, count in outputs.items():
        if count > 1:
            problems.append(f"output: {output_path} is that of {count} jobs; put {{name}} into it")
    return entries, problems


def _jobs(batch: Batch) -> list[tuple[str, dict[str, Any]]]:
    """(name, plain recipe) of every job, one a ratio."""
    found = []
    for job in batch.jobs:
        data = _merged(batch.defaults, job.model_extra or {})
        if job.ratios is None:
            found.append((job.name, data))
        for ratio in job.ratios or []:
            found.append((f"{job.name}-{ratio:g}", _merged(data, {"method": {"ratio": ratio}})))
    return found


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two recipes put over each other, key by key; a method of another name keeps nothing of the one below."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _are_two(old, value):
            found[key] = _merged(old, value)
        else:
            found[key] = value
    return found


def _are_two(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether they are named, and differently."""
    return "name" in old and "name" in new and old["name"] != new["name"]


def _shared_folder(recipe: Recipe, folder: Path) -> Path:
    """The job folder of all jobs of one model and calibration."""
    called = Path(recipe.model.rstrip("/")).name
    made_from = digest_of(recipe.model, recipe.calibration.model_dump(mode="json"))
    return folder / f"{called}-{made_from[:8]}.job"


def _check_share(recipe: Recipe, max_parallel: int) -> None:
    """Jobs side by side must leave each other room: half of the layer workers of each would wait for ever."""
    if not recipe.cluster.local and recipe.cluster.layer_workers is None:
        raise RecipeError(
            f"cluster.layer_workers: missing, and max_parallel is {max_parallel}; give each job its share, so that"
            f" {max_parallel} times as many find room in the cluster"
        )
