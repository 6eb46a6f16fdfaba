"""Evaluate: the published checkpoint beside the original, in pieces that run side by side."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..calibration.text import TokenBatch
from ..checkpoint.manifest import Manifest
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.writer import atomic_write
from ..evaluation.agreement import GENERATED, Scores, evaluate_windows, merge_scores
from ..evaluation.generation import score_generated
from ..executor import Executor
from ..job import Job, digest_of
from ..model.levels import level_names
from ..progress import Reporter
from ..recipe import Evaluation
from .prepare import Prepared
from .tasks import TaskScores, beside, scored_tasks
from .units import read_table, write_table


def evaluate(job: Job, prepared: Prepared, executor: Executor, reporter: Reporter) -> dict[str, Any] | None:
    """What `evaluation.json` holds: the scores of the whole checkpoint, by name those of its levels, and of tasks."""
    settings = prepared.recipe.evaluation
    if settings is None:
        return None
    found: dict[str, Any] = {}
    if prepared.evaluation_tokens is not None:
        found |= _on_text(job, prepared, settings, prepared.evaluation_tokens, executor, reporter)
    if settings.tasks:
        found["tasks"] = _on_tasks(job, prepared, settings, executor, reporter)
    atomic_write(job.folder / "evaluation.json", json.dumps(found, indent=2) + "\n")
    return found


def _on_tasks(job: Job, prepared: Prepared, settings: Evaluation, executor: Executor, reporter: Reporter) -> TaskScores:
    """Scores of both checkpoints on each task, the compressed one at its largest level."""
    output, how = prepared.recipe.output_path, (settings, executor, reporter)
    scores = scored_tasks(job, output, Manifest.load(output).unmeasured().text(), *how)
    original = scored_tasks(job, prepared.reader.folder, prepared.source_digest, *how, whose=" of the original")
    return beside(scores, original)


def _on_text(
    job: Job, prepared: Prepared, settings: Evaluation, tokens: Path, executor: Executor, reporter: Reporter
) -> dict[str, Any]:
    """Perplexity of both checkpoints and their agreement, window by window; at each level, if there are several."""
    output = prepared.recipe.output_path
    manifest = Manifest.load(output)
    names = level_names(CheckpointReader(output).config)
    levels: list[str | None] = [*names] if names else [None]
    identity, original = [manifest.unmeasured().text(), prepared.source_digest], prepared.reader.folder
    scores = {
        level: scored(job, output, identity, original, settings, tokens, executor, reporter, level) for level in levels
    }
    found = scores[levels[0]].to_dict()
    if names:
        found["levels"] = {name: scores[name].to_dict() for name in names}
        manifest.measured({name: scores[name].perplexity for name in names}).save(output)
    return found


def scored(
    job: Job,
    checkpoint: Path,
    identity: Sequence[str | None],
    against: Path | None,
    settings: Evaluation,
    tokens: Path,
    executor: Executor,
    reporter: Reporter,
    level: str | None = None,
) -> Scores:
    """Scores of a checkpoint, its windows kept in the job folder.

    Args:
        identity: what stands for the content of the checkpoint, and of what it is compared with.
        job, checkpoint, against, settings, tokens, executor, reporter, level: as of `run_evaluation`.
    """
    what = (tokens.stem, settings.dtype, settings.generate, level)
    target = job.folder / f"evaluation-{digest_of(identity, *what)}.parquet"
    if not target.exists():
        how = (tokens, settings.batch_size, settings.dtype, job.recipe.cluster.device, executor, reporter)
        table = run_evaluation(checkpoint, against, *how, settings.generate, level)
        write_table(target, table)
    return merge_scores(read_table(target))


def run_evaluation(
    checkpoint: Path,
    against: Path | None,
    tokens: Path,
    batch_size: int,
    dtype: str,
    device: str,
    executor: Executor,
    reporter: Reporter,
    generate: int = 0,
    level: str | None = None,
) -> pa.Table:
    """One row a window: tokens, NLL, and beside the original its NLL, KL divergence and top-1 agreement.

    The checkpoint is read at a level, if it has several. The first `generate` rows tell besides how the generated
    targets compare with the given ones.
    """
    num_batches = math.ceil(len(TokenBatch.load(tokens).input_ids) / batch_size)
    pieces = min(num_batches, executor.num_slots)
    edges = [num_batches * piece // pieces for piece in range(pieces + 1)]
    refs = [
        executor.submit(evaluate_windows, checkpoint, against, tokens, batch_size, dtype, device, start, stop, level)
        for start, stop in itertools.pairwise(edges)
    ]
    parts: dict[int, pa.Table] = {}
    with reporter.stage("evaluate", len(refs)) as stage:
        for index, table in executor.results(refs):
            parts[index] = table
            stage.advance(1, sum(table["tokens"].to_pylist()))
    table = pa.concat_tables([parts[index] for index in range(len(refs))])
    if generate:
        models = {"": (checkpoint, level)} | ({} if against is None else {"original_": (against, None)})
        how = (tokens, batch_size, dtype, device, generate)
        refs = [executor.submit(score_generated, model, *how, at) for model, at in models.values()]
        with reporter.stage("generate", len(refs)) as stage:
            for index, rows in executor.results(refs):
                for name, values in zip(GENERATED, zip(*rows, strict=True), strict=True):
                    column = pa.array([*values, *[None] * (table.num_rows - len(values))], pa.float64())
                    table = table.append_column([*models][index] + name, column)
                stage.advance()
    return table
