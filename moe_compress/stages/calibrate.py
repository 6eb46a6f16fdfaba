"""Calibrate: one forward and backward of the text through the layers, every statistic on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from math import inf

import torch

from ..calibration.text import TokenBatch
from ..calibration.worker import CalibrationSetup, Description
from ..checkpoint.writer import atomic_write
from ..errors import CalibrationError, RecipeError
from ..executor import Executor
from ..job import Job
from ..progress import Reporter
from ..recipe import JobRecipe, Recipe
from .prepare import Prepared, sampled_seed, sums_full_grams
from .routing import report_routing
from .scheme import Pending, Scheme
from .sweep import Sweep
from .units import statistics_seen


def calibrate(job: Job, prepared: Prepared, scheme: Scheme, executor: Executor, reporter: Reporter) -> Pending:
    """Gathers the statistics of every MoE layer; the scheme's analyses start as soon as a layer's are there.

    Raises:
        CalibrationError: activations are not finite, or workers were lost for good; finished work is kept.
        RecipeError: the job is sequential and the model's layers cannot run one after the other.
    """
    recipe, text, statistics = prepared.recipe, prepared.recipe.calibration, prepared.statistics
    resident = recipe.cluster.resident_layers
    num_batches = -(-len(TokenBatch.load(prepared.calibration_tokens).input_ids) // text.batch_size)
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
        chunk_layers=None if isinstance(resident, str) else resident,
        num_workers=executor.num_workers,
        num_groups=min(recipe.cluster.replicas, num_batches),
        memory_bytes=executor.memory_bytes() if resident == "auto" else 0,
        below=prepared.below,
    )
    pending: Pending = []

    def analyse(paths: Iterable[str]) -> None:
        works = (work for path in paths for work in scheme.analyses(path))
        pending.extend(executor.submit(work.unit, *work.args) for work in works)

    done = statistics / "done.json"
    if done.exists():
        reporter.say("calibrate: statistics are there already")
        analyse(layer.path for layer in statistics_seen(prepared.layers, statistics))
    else:
        check = partial(_check_sequential, job.recipe)
        limit_gb = recipe.cluster.in_flight_gb
        sweep = Sweep(job, setup, inf if limit_gb is None else limit_gb * 2**30, check, analyse)
        atomic_write(done, json.dumps(sorted(sweep.run(executor, reporter))))
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


def _check_sequential(recipe: JobRecipe, model: Description) -> None:
    if isinstance(recipe, Recipe) and recipe.method.sequential and not model.chained:
        raise RecipeError(
            "method.sequential: true cannot be: the layers of this model hand on more than hidden states, so those of"
            " two checkpoints cannot be mixed; leave sequential out"
        )
