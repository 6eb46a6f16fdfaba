"""Calibrate: one forward and backward of the text through the layers, every statistic on the way."""

from __future__ import annotations

import itertools
import json

import torch

from ..calibration.text import TokenBatch
from ..calibration.worker import CalibrationSetup
from ..checkpoint.writer import atomic_write
from ..errors import CalibrationError
from ..executor import Executor, Ref, WorkerLost
from ..job import Job
from ..model.expert_bank import GROUPS, Group
from ..progress import Reporter
from .prepare import Prepared
from .units import Workplace, decompose_group, statistics_seen

MAX_WORKER_LOSSES = 3
"""How often lost layer workers are replaced before the job gives up."""

Decomposing = dict[tuple[str, Group], Ref]
"""(experts path, group) -> its decomposition, under way since the statistics were written."""


def calibrate(job: Job, prepared: Prepared, executor: Executor, reporter: Reporter) -> tuple[Workplace, Decomposing]:
    """Gathers the statistics of every MoE layer; each is decomposed as soon as its statistics are written.

    Raises:
        CalibrationError: activations are not finite, or workers were lost for good; finished work is kept.
    """
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
        scratch=job.scratch(),
        batch_size=text.batch_size,
        dtype=None if text.dtype == "auto" else getattr(torch, text.dtype),
        device=recipe.cluster.device,
        activation_bytes=int(text.activation_memory_gb * 2**30),
        full_grams=full,
        sampled_seed=sampled,
        chunk_layers=recipe.cluster.resident_layers,
        num_workers=executor.num_workers,
    )
    decomposing: Decomposing = {}
    done = statistics / "done.json"
    if not done.exists():
        for losses in range(MAX_WORKER_LOSSES + 1):
            try:
                seen = _sweep(setup, place, executor, reporter, decomposing)
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
    return place, decomposing


def _sweep(
    setup: CalibrationSetup, place: Workplace, executor: Executor, reporter: Reporter, decomposing: Decomposing
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
                for path, group in itertools.product(result, GROUPS):
                    decomposing[path, group] = executor.submit(decompose_group, place, path, group)
    executor.stop_workers()
    return seen
