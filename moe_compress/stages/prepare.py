"""Checks a recipe against its inputs, tokenises the texts, takes the digest of the original."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.manifest import MANIFEST_NAME, Manifest
from ..checkpoint.reader import CheckpointReader, check_finite, content_digest, resolve_checkpoint
from ..checkpoint.writer import atomic_write
from ..errors import RecipeError
from ..job import Job
from ..methods.d2moe import check_ratio
from ..model.discovery import MoELayer
from ..model.plugin import METHOD
from ..model.skeleton import Skeleton
from ..recipe import Cluster, Recipe
from .tokens import calibration_tokens, check_texts, evaluation_tokens, load_tokenizer


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
    _check_device(recipe.cluster)
    check_texts(recipe)
    reader = CheckpointReader(resolve_checkpoint(recipe.model))
    skeleton, layers = open_original(recipe, reader)
    load_tokenizer(reader.folder)
    return reader, skeleton, layers


def open_original(recipe: Recipe, reader: CheckpointReader) -> tuple[Skeleton, list[MoELayer]]:
    """The skeleton of the original and its MoE layers, which the method can compress as far as the recipe asks.

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    if (reader.config.get("quantization_config") or {}).get("quant_method") == METHOD:
        raise RecipeError(f"model: {recipe.model} is a compressed checkpoint already; give the original")
    skeleton = Skeleton(reader)
    layers = skeleton.moe_layers()
    check_ratio(layers, recipe.method)
    return skeleton, layers


def check_output(recipe: Recipe) -> None:
    """The output must be free, or hold what an earlier run of this job put there.

    Raises:
        RecipeError: it is taken, or it or the job folder cannot be written.
        CheckpointError: a compressed checkpoint stands there whose manifest cannot be read.
    """
    output, job_dir = recipe.output_path, recipe.job_path
    model = Path(recipe.model).expanduser().resolve()
    for field, folder in (("output", output), ("job_dir", job_dir)):
        if folder.resolve().is_relative_to(model):
            raise RecipeError(f"{field}: {folder} lies in the model's own folder; choose another folder")
    if job_dir.resolve().is_relative_to(output.resolve()):
        raise RecipeError(f"job_dir: {job_dir} lies in the output, {output}; choose a folder outside of it")
    _check_writable("output", output.parent)
    _check_writable("job_dir", job_dir)
    if (output / MANIFEST_NAME).exists():
        made_by = Manifest.load(output).recipe.get("method")
        if made_by != recipe.method.model_dump(mode="json", exclude={"preset"}):
            raise RecipeError(
                f"output: {output} holds a compressed checkpoint of another job; choose another folder or remove it"
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"output: {output} exists and is not ours; choose another folder or remove it")


def _check_writable(field: str, folder: Path) -> None:
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RecipeError(f"{field}: {folder} is not a folder that can be written; choose another folder")


def _check_device(settings: Cluster) -> None:
    """A device of this machine must be there; what nodes of another cluster have, only they know."""
    if settings.device == "auto":
        return
    try:
        if settings.address is None:
            torch.empty(0, device=settings.device)
        else:
            torch.device(settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"cluster.device: '{settings.device}' is not to be had ({reason}); give auto, cpu or cuda"
        ) from error


def prepare(job: Job, reader: CheckpointReader, skeleton: Skeleton, layers: list[MoELayer]) -> Prepared:
    """Tokenises the texts, takes the digest of the original and looks for NaN in it; cached in the job folder.

    Raises:
        RecipeError, CheckpointError: a text or a weight that cannot be used.
    """
    recipe = job.recipe
    folder = job.folder / "tokens"
    folder.mkdir(exist_ok=True)
    tokens = calibration_tokens(recipe.calibration, reader.folder, folder)
    windows = None
    if recipe.evaluation is not None:
        windows = evaluation_tokens(recipe.evaluation, reader.folder, folder)
    digest = content_digest(reader, job.folder / "source.json")
    finite = job.place("source", digest) / "finite"
    if not finite.exists():
        check_finite(reader)
        atomic_write(finite, "")
    return Prepared(recipe, reader, skeleton, layers, digest, tokens, windows)
