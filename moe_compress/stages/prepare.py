"""Checks a recipe against its inputs, tokenises the texts, takes the digest of the original."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoint.manifest import MANIFEST_NAME, Manifest
from ..checkpoint.reader import CheckpointReader, content_digest, resolve_checkpoint
from ..checkpoint.writer import UNFINISHED_NAME
from ..errors import CheckpointError, RecipeError
from ..job import Job
from ..method_options import D2MoE
from ..methods.counts import check_counts
from ..methods.limits import check_ratio
from ..model.discovery import MoELayer
from ..model.plugin import METHOD
from ..model.skeleton import Skeleton
from ..recipe import Cluster, Evaluation, JobRecipe, Recipe, Training
from ..storage import StoredPath, address, as_path, check_writable
from .tasks import check_tasks
from .tokens import calibration_tokens, check_texts, check_vocabulary, evaluation_tokens, load_tokenizer


@dataclass(slots=True)
class Prepared:
    """What the stages know once every input has been checked.

    Attributes:
        below: compressed checkpoint whose layers calibration runs forward; None for the original.
    """

    recipe: Recipe
    reader: CheckpointReader
    skeleton: Skeleton
    layers: list[MoELayer]
    source_digest: str
    calibration_tokens: Path
    statistics: Path
    evaluation_tokens: Path | None
    below: Path | None = None

    def provenance(self) -> dict[str, Any]:
        """The part of the recipe that decides the bytes of the output, without a path of this machine."""
        calibration = self.recipe.calibration.model_dump(mode="json", exclude={"text", "activation_memory_gb"})
        return {
            "method": self.recipe.method.model_dump(mode="json", exclude={"preset"}),
            "calibration": calibration | {"tokens": self.calibration_tokens.stem},
            "threads": self.recipe.cluster.threads,
            "replicas": self.recipe.cluster.replicas,
        }


def check(recipe: Recipe) -> tuple[CheckpointReader, Skeleton, list[MoELayer]]:
    """Refuses what cannot work, from the recipe, config and headers alone.

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    check_device(recipe.cluster)
    reader = CheckpointReader(resolve_checkpoint(recipe.model).absolute())  # workers may be at home elsewhere
    skeleton, layers = open_original(recipe, reader)
    config = skeleton.model.config
    check_kind(recipe.evaluation, config, reader.folder)
    parts = {"calibration.text": recipe.calibration, "evaluation.text": recipe.evaluation}
    check_texts(parts, config.is_encoder_decoder)
    check_tasks(recipe.evaluation)
    load_tokenizer(reader.folder)
    return reader, skeleton, layers


def check_kind(settings: Evaluation | None, config: PreTrainedConfig, folder: Path) -> None:
    """What only an encoder-decoder model can be asked for, and what it must tell.

    Args:
        settings: what is asked.
        config, folder: of the model.

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    if not config.is_encoder_decoder:
        if settings is not None and settings.generate:
            raise RecipeError(
                f"evaluation.generate: {settings.generate} targets of pairs, which only encoder-decoder models have and"
                f" '{config.model_type}' is none; leave it out"
            )
    elif config.decoder_start_token_id is None or config.pad_token_id is None:
        raise CheckpointError(
            f"{folder}: config.json has no decoder_start_token_id or no pad_token_id, by which targets become the"
            " decoder's input; add them"
        )


def open_original(recipe: Recipe, reader: CheckpointReader) -> tuple[Skeleton, list[MoELayer]]:
    """The skeleton of the original and its MoE layers, which the method can compress as far as the recipe asks.

    Raises:
        RecipeError, CheckpointError: one line each.
    """
    if (reader.config.get("quantization_config") or {}).get("quant_method") == METHOD:
        raise RecipeError(f"model: {recipe.model} is a compressed checkpoint already; give the original")
    skeleton = Skeleton(reader)
    layers = skeleton.moe_layers()
    if isinstance(recipe.method, D2MoE):
        for at_level in recipe.method.at_levels:
            check_ratio(layers, at_level)
        _check_alignment(layers, recipe.method)
        _check_sequential(skeleton, recipe.method)
    else:
        check_counts(skeleton.model, layers, recipe.method)
    return skeleton, layers


def _check_alignment(layers: list[MoELayer], options: D2MoE) -> None:
    biased = next((layer for layer in layers if layer.has_bias), None)
    if options.align and biased is not None:
        raise RecipeError(
            f"method.align: true cannot be: the experts of {biased.path} have biases, which alignment does not move;"
            " leave align out"
        )


def _check_sequential(skeleton: Skeleton, options: D2MoE) -> None:
    """What the config tells; other models whose layers hand on more are found when calibration opens them."""
    config = skeleton.model.config
    if options.sequential and config.is_encoder_decoder:
        raise RecipeError(
            f"method.sequential: true cannot be: '{config.model_type}' is encoder-decoder, and its layers hand on"
            " more than hidden states; leave sequential out"
        )


def check_output(recipe: JobRecipe) -> None:
    """The output must be a folder that can appear with one rename: free, or a compressed checkpoint.

    In an object store, which renames nothing, what a killed publication left is free as well.

    Raises:
        RecipeError: it is taken, or it or the job folder cannot be written.
        CheckpointError: a compressed checkpoint stands there whose manifest cannot be read.
    """
    output, job_dir = recipe.output_path, recipe.job_path
    models = [recipe.model, *([recipe.teacher] if isinstance(recipe, Training) and recipe.teacher else [])]
    for field, folder in (("output", output), ("job_dir", job_dir)):
        if any(folder.resolve().is_relative_to(as_path(model).resolve()) for model in models):
            raise RecipeError(f"{field}: {folder} lies in the model's own folder; choose another folder")
    if job_dir.resolve().is_relative_to(output.resolve()):
        raise RecipeError(f"job_dir: {job_dir} lies in the output, {output}; choose a folder outside of it")
    _check_writable("output", output if isinstance(output, StoredPath) else output.parent)
    _check_writable("job_dir", job_dir)
    if output.is_symlink() or output.is_mount():
        kind = "symbolic link" if output.is_symlink() else "mount point"
        raise RecipeError(f"output: {output} is a {kind}, which no rename can replace; give a new folder below it")
    is_ours = any((output / name).exists() for name in (MANIFEST_NAME, UNFINISHED_NAME))
    if output.exists() and not is_ours and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"output: {output} exists and is not ours; choose another folder or remove it")


def _check_writable(field: str, folder: Path) -> None:
    if isinstance(folder, StoredPath):
        try:
            check_writable(folder)
        except OSError as error:
            raise RecipeError(f"{field}: {error.strerror}") from error
        return
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RecipeError(f"{field}: {folder} is not a folder that can be written; choose another folder")


def check_device(settings: Cluster) -> None:
    """A device of this machine must be there; what nodes of another cluster have, only they know.

    Raises:
        RecipeError: it is not.
    """
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

    Every byte of the original is read once, for its digest: by name and size alone a resumed job could mix two
    checkpoints. NaN and infinity are looked for in the same read.

    Raises:
        RecipeError: a text cannot be used, or the output holds the checkpoint of another job.
        CheckpointError: a weight is not finite, the tokenizer does not belong to the model.
    """
    recipe = job.recipe
    assert isinstance(recipe, Recipe)
    folder = job.folder / "tokens"
    folder.mkdir(exist_ok=True)
    tokens = calibration_tokens(recipe.calibration, reader.folder, folder)
    windows = None
    if recipe.evaluation is not None:
        windows = evaluation_tokens(recipe.evaluation, reader.folder, folder)
    digest = content_digest(reader, job.folder / "source.json")
    statistics = statistics_place(job, recipe, digest, tokens)
    num_ids = skeleton.model.get_input_embeddings().weight.shape[0]
    check_vocabulary(reader.folder, num_ids, *(file for file in (tokens, windows) if file is not None))
    prepared = Prepared(recipe, reader, skeleton, layers, digest, tokens, statistics, windows)
    _check_earlier_output(prepared)
    return prepared


def _check_earlier_output(prepared: Prepared) -> None:
    """A compressed checkpoint at the output must be the one that this very job makes."""
    output = prepared.recipe.output_path
    if not (output / MANIFEST_NAME).exists():
        return
    found = Manifest.load(output)
    if (found.source.digest, found.recipe) != (prepared.source_digest, prepared.provenance()):
        raise RecipeError(
            f"output: {output} holds a compressed checkpoint of another job; choose another folder or remove it"
        )


def statistics_place(job: Job, recipe: Recipe, source_digest: str, tokens: Path) -> Path:
    """The folder of the statistics that a recipe asks for; every method and ratio on the same text shares it."""
    text = recipe.calibration
    made_from = (source_digest, tokens.stem, text.batch_size, text.dtype, sums_full_grams(recipe), sampled_seed(recipe))
    return job.place("statistics", *made_from, recipe.cluster.threads, recipe.cluster.replicas)


def first_pass(job: Job, prepared: Prepared) -> Prepared:
    """The inputs of the job that a sequential one begins with: not sequential, its output in the job folder."""
    recipe = prepared.recipe
    method = recipe.method.model_copy(update={"sequential": False})
    output = job.place("checkpoint", prepared.statistics.name, method.model_dump(mode="json"))
    return replace(prepared, recipe=recipe.model_copy(update={"method": method, "output": address(output)}))


def second_pass(job: Job, prepared: Prepared, below: Path) -> Prepared:
    """The inputs of a sequential job once its first pass lies at `below`."""
    outcome = (below / MANIFEST_NAME).read_text()
    return replace(prepared, statistics=job.place("statistics", prepared.statistics.name, outcome), below=below)


def sums_full_grams(recipe: Recipe) -> bool:
    """Whether calibration keeps input covariances on the larger side too."""
    return recipe.calibration.full_covariance == "always" or recipe.method.needs_full_covariance


def sampled_seed(recipe: Recipe) -> int | None:
    """Seed of the labels that the model samples; None for the text's own."""
    return recipe.calibration.seed if recipe.calibration.labels == "sampled" else None
