"""The main path of a job, stage by stage: plan -> calibrate -> allocate -> compress -> assemble -> evaluate.

Each stage asks an executor for units of work and leaves durable artifacts in the job folder; what is there is not
made again. Start reading at `compress`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from . import __version__
from .budget import Item, allocate, error, parameters
from .calibration.text import TokenBatch
from .calibration.worker import CalibrationSetup
from .checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, Source
from .checkpoint.reader import CheckpointReader, content_digest
from .checkpoint.writer import (
    ShardInfo,
    atomic_write,
    copy_side_files,
    fresh_staging,
    link_or_copy,
    publish,
    save_index,
)
from .errors import CalibrationError, RecipeError
from .evaluation.agreement import Scores, evaluate_windows, merge_scores
from .executor import Executor, Ref, WorkerLost
from .job import Job, digest_of
from .methods.d2moe import budget_parameters, check_ratio, fixed_ranks, slots
from .model.discovery import MoELayer
from .model.expert_bank import GROUPS, Group
from .model.experts import slots_of
from .model.plugin import FORMAT_VERSION, METHOD
from .model.skeleton import Skeleton
from .progress import Reporter
from .recipe import Recipe
from .tokens import calibration_tokens, evaluation_tokens
from .units import (
    Workplace,
    copy_tensors,
    decompose_group,
    factorise_group,
    spectra_path,
    statistics_seen,
    write_table,
)

MAX_WORKER_LOSSES = 3
"""How often lost layer workers are replaced before the job gives up."""

Ranks = dict[tuple[str, Group], dict[str, list[int]]]
"""(experts path, group) -> slot -> one rank an expert."""


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
    from .checkpoint.reader import resolve_checkpoint

    reader = CheckpointReader(resolve_checkpoint(recipe.model))
    if (reader.config.get("quantization_config") or {}).get("quant_method") == METHOD:
        raise RecipeError(f"model: {recipe.model} is a compressed checkpoint already; give the original")
    skeleton = Skeleton(reader)
    layers = skeleton.moe_layers()
    check_ratio(layers, recipe.method)
    return reader, skeleton, layers


def compress(recipe: Recipe, executor: Executor, reporter: Reporter | None = None) -> Scores | None:
    """Runs or resumes a job.

    Args:
        recipe: what to do.
        executor: who runs the units of work.
        reporter: where progress is shown.

    Returns:
        Quality beside the original, where the recipe asks for an evaluation.

    Raises:
        RecipeError, CheckpointError: refused before any tensor was read.
        CalibrationError, CompressionError: stopped half-way; finished work is kept in the job folder.
    """
    reader, skeleton, layers = check(recipe)
    _check_output(recipe)
    job = Job(recipe)
    with job.locked():
        reporter = reporter or Reporter(job)
        prepared = prepare(job, reader, skeleton, layers)
        place = calibrate(job, prepared, executor, reporter)
        ranks = allocate_ranks(job, prepared, place, executor, reporter)
        shards, names = compress_layers(job, prepared, place, ranks, executor, reporter)
        assemble(job, prepared, shards, names, ranks, reporter)
        return evaluate(job, prepared, executor, reporter)


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


# --- calibrate ---------------------------------------------------------------------------------------------


def calibrate(job: Job, prepared: Prepared, executor: Executor, reporter: Reporter) -> Workplace:
    """Gathers the statistics of every MoE layer, and the energies of its factorisation as soon as they are in."""
    recipe, text = prepared.recipe, prepared.recipe.calibration
    full = text.full_covariance == "always" or recipe.method.needs_full_covariance
    sampled = text.seed if text.labels == "sampled" else None
    sums_of = (prepared.source_digest, prepared.calibration_tokens.stem, text.batch_size, text.dtype, full, sampled)
    statistics = job.place("statistics", *sums_of, recipe.cluster.threads)
    how = recipe.method.model_dump(include={"base", "weighting", "gate_up", "align", "damping", "min_tokens"})
    place = Workplace(
        checkpoint=prepared.reader.folder,
        statistics=statistics,
        alignment=job.place("alignment", statistics.name),
        spectra=job.place("spectra", statistics.name, how),
        options=recipe.method,
        device=recipe.cluster.device,
    )
    setup = CalibrationSetup(
        checkpoint=prepared.reader.folder,
        tokens=prepared.calibration_tokens,
        statistics=statistics,
        scratch=job.folder / "scratch",
        batch_size=text.batch_size,
        dtype=None if text.dtype == "auto" else getattr(torch, text.dtype),
        device=recipe.cluster.device,
        activation_bytes=int(text.activation_memory_gb * 2**30),
        full_grams=full,
        sampled_seed=sampled,
        chunk_layers=recipe.cluster.resident_layers,
        num_workers=executor.num_workers,
    )
    units: list[Ref] = []
    done = statistics / "done.json"
    if not done.exists():
        for losses in range(MAX_WORKER_LOSSES + 1):
            try:
                seen = _sweep(setup, place, executor, reporter, units)
                break
            except WorkerLost as lost:
                job.event("worker_lost", reason=str(lost), losses=losses + 1)
                reporter.say(f"a layer worker was lost ({lost}); starting the sweep again")
                executor.stop_workers()
                if losses == MAX_WORKER_LOSSES:
                    raise CalibrationError(
                        f"layer workers were lost {losses + 1} times, last: {lost}; finished layers are kept in"
                        f" {job.folder}; give the workers more memory and run the job again"
                    ) from lost
        atomic_write(done, json.dumps(sorted(seen)))
    else:
        reporter.say("calibrate: statistics are there already")
    layers = statistics_seen(prepared.layers, statistics)
    if not layers:
        raise CalibrationError("no MoE layer saw a token of the calibration text; nothing can be compressed")
    unseen = [layer.path for layer in prepared.layers if layer not in layers]
    if unseen:
        job.event("layers_not_reached", layers=unseen)
        reporter.say(f"left as they are, for the text never reaches them: {', '.join(unseen)}")
    prepared.layers = layers
    return place


def _sweep(
    setup: CalibrationSetup, place: Workplace, executor: Executor, reporter: Reporter, units: list[Ref]
) -> list[str]:
    """One forward and backward of the whole calibration text; the paths of the MoE layers it reached."""
    executor.start_workers(setup)
    ((_, (num_chunks, chained)),) = executor.results([executor.call(0, "describe")])
    tokens = TokenBatch.load(setup.tokens)
    sizes = [batch.num_tokens for batch in tokens.batches(setup.batch_size)]
    batches = range(len(sizes))
    refs: list[Ref] = []
    weight: list[int] = []
    finishing: set[int] = set()

    def count(ref: Ref, num_tokens: int) -> Ref:
        refs.append(ref)
        weight.append(num_tokens)
        return ref

    def finish(worker: int, *chunk: int) -> None:
        finishing.add(len(refs))
        count(executor.call(worker, "finish", *chunk), 0)

    if chained:
        handed: list[Ref] = [None for _ in batches]
        owner = [chunk % setup.num_workers for chunk in range(num_chunks)]
        for chunk in range(num_chunks):
            for b in batches:
                handed[b] = count(executor.call(owner[chunk], "forward", chunk, b, handed[b]), sizes[b])
        for b in batches:
            count(executor.call(owner[-1], "loss", b), 0)
        handed = [None for _ in batches]
        for chunk in reversed(range(num_chunks)):
            for b in batches:
                handed[b] = count(executor.call(owner[chunk], "backward", chunk, b, handed[b]), sizes[b])
            finish(owner[chunk], chunk)
    else:
        for b in batches:
            count(executor.call(0, "drive", b), sizes[b] * 2 * num_chunks)
        finish(0)
    seen: list[str] = []
    with reporter.stage("calibrate", len(refs)) as stage:
        for index, result in executor.results(refs):
            # a token counts once it has been through all layers both ways
            stage.advance(1, weight[index] / (2 * num_chunks))
            if index in finishing:
                seen += result
                units += [executor.submit(decompose_group, place, path, g) for path in result for g in GROUPS]
    executor.stop_workers()
    return seen


# --- allocate ----------------------------------------------------------------------------------------------


def allocate_ranks(job: Job, prepared: Prepared, place: Workplace, executor: Executor, reporter: Reporter) -> Ranks:
    """Decides every rank, from the energies of all layers, experts and projections."""
    options, layers = prepared.recipe.method, prepared.layers
    keys = [(layer, group) for layer in layers for group in GROUPS]
    missing = [k for k in keys if not spectra_path(place.spectra, k[0].path, k[1]).exists()]
    with reporter.stage("allocate", len(missing)) as stage:
        refs = [executor.submit(decompose_group, place, layer.path, group) for layer, group in missing]
        for _ in executor.results(refs):
            stage.advance()
    owners: list[tuple[str, Group, str, int]] = []
    items: list[Item] = []
    ranks: list[int] = []
    for layer, group in keys:
        table = pq.read_table(spectra_path(place.spectra, layer.path, group))
        energies = table["energy"].combine_chunks()
        names = table["slot"].to_pylist()
        for slot in slots(layer, group, options):
            start = names.index(slot.name)
            for expert in range(layer.num_experts):
                energy = energies[start + expert].values.to_numpy()
                owners.append((layer.path, group, slot.name, expert))
                items.append(Item(slot.num_rows, slot.num_columns, energy))
            if options.ranks != "allocated":
                ranks += fixed_ranks(layer, slot, options)
    if options.ranks == "allocated":
        budget = budget_parameters(layers, options)
        ranks = allocate(items, budget)
    chosen: Ranks = defaultdict(lambda: defaultdict(list))
    for (path, group, slot_name, _), rank in zip(owners, ranks, strict=True):
        chosen[path, group][slot_name].append(rank)
    columns = list(zip(*owners, strict=True))
    table = pa.table(
        {
            "layer": columns[0],
            "slot": columns[2],
            "expert": columns[3],
            "rank": ranks,
            "parameters": [parameters(i, r) for i, r in zip(items, ranks, strict=True)],
            "error": [error(i, r) for i, r in zip(items, ranks, strict=True)],
            "energy": [error(i, 0) for i in items],
            "break_even_rank": [i.dense_parameters // (i.num_rows + i.num_columns) for i in items],
        }
    )
    write_table(job.folder / "allocation.parquet", table)
    return {key: dict(value) for key, value in chosen.items()}


# --- compress ----------------------------------------------------------------------------------------------


def compress_layers(
    job: Job,
    prepared: Prepared,
    place: Workplace,
    ranks: Ranks,
    executor: Executor,
    reporter: Reporter,
) -> tuple[list[Path], list[ShardInfo]]:
    """Writes every shard of the output into the job folder: one a group of a layer, and the untouched rest."""
    skeleton, reader = prepared.skeleton, prepared.reader
    based = prepared.recipe.method.base != "none"
    folder = job.place("shards", place.spectra.name, sorted((p, g, r) for (p, g), r in ranks.items()))
    owned = {s for layer in prepared.layers for name in layer.owned for s in skeleton.targets[name]}
    rest: dict[Path, list[str]] = defaultdict(list)
    for name, entry in reader.entries.items():
        if name not in owned:
            rest[entry.file].append(name)
    total = len(ranks) + len(rest)
    targets = [folder / f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    refs: list[Ref] = []
    for target, names in zip(targets, rest.values(), strict=False):
        refs.append(executor.submit(copy_tensors, reader.folder, names, target))
    left = iter(targets[len(rest) :])
    for layer in prepared.layers:
        for group in GROUPS:
            chosen = ranks[layer.path, group]
            spec = {slot: {"ranks": r, "base": based} for slot, r in chosen.items()}
            parameters_ = [n for slot in slots_of(spec, layer.up_shape[0], *layer.down_shape) for n in slot.shapes()]
            names_ = skeleton.disk_names(layer, parameters_)
            refs.append(executor.submit(factorise_group, place, layer.path, group, chosen, names_, next(left)))
    shards: dict[int, ShardInfo] = {}
    with reporter.stage("compress", len(refs)) as stage:
        for index, shard in executor.results(refs):
            shards[index] = shard
            stage.advance()
    return targets, [shards[index] for index in range(len(refs))]


# --- assemble ----------------------------------------------------------------------------------------------


def assemble(
    job: Job, prepared: Prepared, targets: list[Path], shards: list[ShardInfo], ranks: Ranks, reporter: Reporter
) -> None:
    """Publishes the checkpoint: all of it appears at once, under its own name."""
    recipe, reader = prepared.recipe, prepared.reader
    based = recipe.method.base != "none"
    layers: dict[str, dict[str, Any]] = {
        layer.path: {
            slot: {"ranks": r, "base": based} for group in GROUPS for slot, r in ranks[layer.path, group].items()
        }
        for layer in prepared.layers
    }
    config = dict(reader.config)
    config["quantization_config"] = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "layers": layers}
    original = sum(math.prod(entry.shape) for entry in reader.entries.values())
    experts = sum(layer.num_parameters for layer in prepared.layers)
    kept = _kept_parameters(prepared.layers, layers)
    with reporter.stage("assemble", len(shards)) as stage:
        staging = fresh_staging(recipe.output_path)
        for target, _ in zip(targets, shards, strict=True):
            link_or_copy(target, staging / target.name)
            stage.advance()
        copied = copy_side_files(reader.folder, staging)
        atomic_write(staging / "config.json", json.dumps(config, indent=2) + "\n")
        save_index(staging, shards)
        files = {shard.file_name: FileRecord(bytes=shard.file_bytes, sha256=shard.sha256) for shard in shards}
        files |= _records(staging, [*copied, "config.json", "model.safetensors.index.json"])
        Manifest(
            tool_version=__version__,
            source=Source(name=_source_name(recipe), digest=prepared.source_digest),
            recipe=_provenance(prepared),
            layers=layers,
            parameters={
                "original": original,
                "compressed": original - experts + kept,
                "experts_original": experts,
                "experts_compressed": kept,
            },
            files=files,
        ).save(staging)
        if recipe.output_path.exists() and _same_manifest(staging, recipe.output_path):
            return  # published by the run that was interrupted after this
        publish(staging, recipe.output_path)


def _kept_parameters(layers: list[MoELayer], specs: dict[str, dict[str, Any]]) -> int:
    return sum(
        math.prod(shape)
        for layer in layers
        for slot in slots_of(specs[layer.path], layer.up_shape[0], *layer.down_shape)
        for shape in slot.shapes().values()
    )


def _provenance(prepared: Prepared) -> dict[str, Any]:
    """The part of the recipe that decided the bytes, without a path of this machine."""
    calibration = prepared.recipe.calibration.model_dump(exclude={"text", "activation_memory_gb"})
    calibration["tokens"] = prepared.calibration_tokens.stem
    return {
        "method": prepared.recipe.method.model_dump(exclude={"preset"}),
        "calibration": calibration,
        "threads": prepared.recipe.cluster.threads,
    }


def _source_name(recipe: Recipe) -> str:
    path = Path(recipe.model)
    return path.resolve().name if path.exists() else recipe.model


def _records(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    from .checkpoint.shard import sha256_files

    digests = sha256_files([folder / name for name in names])
    return {path.name: FileRecord(bytes=path.stat().st_size, sha256=digest) for path, digest in digests.items()}


def _same_manifest(one: Path, other: Path) -> bool:
    there = other / MANIFEST_NAME
    return there.exists() and there.read_bytes() == (one / MANIFEST_NAME).read_bytes()


def _check_output(recipe: Recipe) -> None:
    """The output must be free, or hold what an earlier run of this job put there."""
    output = recipe.output_path
    if output.exists() and not (output / MANIFEST_NAME).exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"output: {output} exists and is not ours; choose another folder or remove it")
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    import os

    if not os.access(parent, os.W_OK):
        raise RecipeError(f"output: {parent} cannot be written; choose another folder")


# --- evaluate ----------------------------------------------------------------------------------------------


def evaluate(job: Job, prepared: Prepared, executor: Executor, reporter: Reporter) -> Scores | None:
    """Perplexity of both checkpoints and their agreement, window by window."""
    settings = prepared.recipe.evaluation
    if settings is None or prepared.evaluation_tokens is None:
        return None
    output = prepared.recipe.output_path
    made_from = digest_of((output / MANIFEST_NAME).read_text(), prepared.evaluation_tokens.stem, settings.dtype)
    target = job.folder / f"evaluation-{made_from}.parquet"
    if not target.exists():
        write_table(
            target,
            run_evaluation(
                output,
                prepared.reader.folder,
                prepared.evaluation_tokens,
                settings.batch_size,
                settings.dtype,
                prepared.recipe.cluster.device,
                executor,
                reporter,
            ),
        )
    scores = merge_scores(pq.read_table(target))
    atomic_write(job.folder / "evaluation.json", json.dumps(scores.to_dict(), indent=2) + "\n")
    return scores


def run_evaluation(
    checkpoint: Path,
    against: Path | None,
    tokens: Path,
    batch_size: int,
    dtype: str,
    device: str,
    executor: Executor,
    reporter: Reporter,
) -> pa.Table:
    """One row a window: tokens, NLL, and beside the original its NLL, KL divergence and top-1 agreement."""
    num_batches = math.ceil(len(TokenBatch.load(tokens).input_ids) / batch_size)
    pieces = min(num_batches, executor.num_slots)
    edges = [num_batches * piece // pieces for piece in range(pieces + 1)]
    refs = [
        executor.submit(evaluate_windows, checkpoint, against, tokens, batch_size, dtype, device, start, stop)
        for start, stop in zip(edges, edges[1:], strict=False)
    ]
    parts: dict[int, pa.Table] = {}
    with reporter.stage("evaluate", len(refs)) as stage:
        for index, table in executor.results(refs):
            parts[index] = table
            stage.advance(1, sum(table["tokens"].to_pylist()))
    return pa.concat_tables([parts[index] for index in range(len(refs))])
