"""Calibrate: one forward and backward of the text through the layers, every statistic on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch

from ..calibration.text import TokenBatch
from ..calibration.worker import CalibrationSetup
from ..checkpoint.writer import atomic_write
from ..errors import CalibrationError, RecipeError
from ..executor import Executor, Ref, WorkerLost
from ..job import Job
from ..progress import Reporter
from ..recipe import Recipe
from .prepare import Prepared, sampled_seed, sums_full_grams
from .routing import report_routing
from .scheme import Pending, Scheme
from .units import statistics_seen

MAX_WORKER_LOSSES = 3
"""How often lost layer workers are replaced before the job gives up."""


def calibrate(job: Job, prepared: Prepared, scheme: Scheme, executor: Executor, reporter: Reporter) -> Pending:
    """Gathers the statistics of every MoE layer; the scheme's analyses start as soon as a layer's are there.

    Raises:
        CalibrationError: activations are not finite, or workers were lost for good; finished work is kept.
        RecipeError: the job is sequential and the model's layers cannot run one after the other.
    """
    recipe, text, statistics = prepared.recipe, prepared.recipe.calibration, prepared.statistics
    setup = CalibrationSetup(
        checkpoint=prepared.reader.folder,
        tokens=prepared.calibration_tokens,
        statistics=statistics,
        scratch=job.scratch(),
        batch_size=text.batch_size,
        dtype=None if text.dtype == "auto" else getattr(torch, text.dtype),
        device=recipe.cluster.device,
        activation_bytes=int(text.activation_memory_gb * 2**30),
        full_grams=sums_full_grams(recipe),
        sampled_seed=sampled_seed(recipe),
        chunk_layers=recipe.cluster.resident_layers,
        num_workers=executor.num_workers,
        below=prepared.below,
    )
    pending: Pending = []
    done = statistics / "done.json"
    if done.exists():
        reporter.say("calibrate: statistics are there already")
        _analyse([layer.path for layer in statistics_seen(prepared.layers, statistics)], scheme, executor, pending)
    else:
        for losses in range(MAX_WORKER_LOSSES + 1):
            try:
                seen = _sweep(job, setup, scheme, executor, reporter, pending)
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
    layers = statistics_seen(prepared.layers, statistics)
    if not layers:
        raise CalibrationError("no MoE layer saw a token of the calibration text; nothing can be compressed")
    unseen = [layer.path for layer in prepared.layers if layer not in layers]
    if unseen:
        job.event("layers_not_reached", layers=unseen)
        reporter.say(f"left as they are, for the text never reaches them: {', '.join(unseen)}")
    prepared.layers = layers
    report_routing(job, prepared, reporter)
    return pending


def _analyse(paths: Iterable[str], scheme: Scheme, executor: Executor, pending: Pending) -> None:
    """Starts the analyses of layers whose statistics are there."""
    works = (work for path in paths for work in scheme.analyses(path))
    pending += [executor.submit(work.unit, *work.args) for work in works]


def _sweep(
    job: Job, setup: CalibrationSetup, scheme: Scheme, executor: Executor, reporter: Reporter, pending: Pending
) -> list[str]:
    """One forward and backward of the whole calibration text; the paths of the MoE layers it reached."""
    executor.start_workers(setup)
    ((_, (num_chunks, chained)),) = executor.results([executor.call(0, "describe")])
    if isinstance(job.recipe, Recipe) and job.recipe.method.sequential and not chained:
        raise RecipeError(
            "method.sequential: true cannot be: the layers of this model hand on more than hidden states, so those of"
            " two checkpoints cannot be mixed; leave sequential out"
        )
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
                _analyse(result, scheme, executor, pending)
    executor.stop_workers()
    return seen
