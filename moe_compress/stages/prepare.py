"""Checks a recipe against its inputs, tokenises the texts, takes the digest of the original."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.manifest import MANIFEST_NAME
from ..checkpoint.reader import CheckpointReader, content_digest, resolve_checkpoint
from ..errors import RecipeError
from ..job import Job
from ..methods.d2moe import check_ratio
from ..model.discovery import MoELayer
from ..model.plugin import METHOD
from ..model.skeleton import Skeleton
from ..recipe import Recipe
from .tokens import calibration_tokens, evaluation_tokens


@dataclass(slots=True)
class Prepared:
    """What the stages know once every input has been checked."""

    recipe: Recipe
    reader: CheckpointReader
    skeleton: Skeleton
    layers: list[MoELayer]
    source_digest: str
    calibration_tokens: Path
    evaluation_tokens: Path | None


def check(recipe: Recipe) -> tuple[CheckpointReader, Skeleton, list[MoELayer]]:
    """Refuses what cannot work, from the recipe, config and headers alone.

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    reader = CheckpointReader(resolve_checkpoint(recipe.model))
    if (reader.config.get("quantization_config") or {}).get("quant_method") == METHOD:
        raise RecipeError(f"model: {recipe.model} is a compressed checkpoint already; give the original")
    skeleton = Skeleton(reader)
    layers = skeleton.moe_layers()
    check_ratio(layers, recipe.method)
    return reader, skeleton, layers


def check_output(recipe: Recipe) -> None:
    """The output must be free, or hold what an earlier run of this job put there.

    Raises:
        RecipeError: it is taken, or cannot be written.
    """
    output = recipe.output_path
    if output.exists() and not (output / MANIFEST_NAME).exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"output: {output} exists and is not ours; choose another folder or remove it")
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise RecipeError(f"output: {parent} cannot be written; choose another folder")


def prepare(job: Job, reader: CheckpointReader, skeleton: Skeleton, layers: list[MoELayer]) -> Prepared:
    """Tokenises the texts and takes the digest of the original."""
    recipe = job.recipe
    folder = job.folder / "tokens"
    folder.mkdir(exist_ok=True)
    tokens = calibration_tokens(recipe.calibration, reader.folder, folder)
    windows = None
    if recipe.evaluation is not None:
        windows = evaluation_tokens(recipe.evaluation, reader.folder, folder)
    digest = content_digest(reader, job.folder / "source.json")
    return Prepared(recipe, reader, skeleton, layers, digest, tokens, windows)
