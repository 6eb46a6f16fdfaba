"""Evaluate: the published checkpoint beside the original, in pieces that run side by side."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..calibration.text import TokenBatch
from ..checkpoint.manifest import MANIFEST_NAME
from ..checkpoint.writer import atomic_write
from ..evaluation.agreement import Scores, evaluate_windows, merge_scores
from ..executor import Executor
from ..job import Job, digest_of
from ..progress import Reporter
from .prepare import Prepared
from .units import write_table


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
        for start, stop in itertools.pairwise(edges)
    ]
    parts: dict[int, pa.Table] = {}
    with reporter.stage("evaluate", len(refs)) as stage:
        for index, table in executor.results(refs):
            parts[index] = table
            stage.advance(1, sum(table["tokens"].to_pylist()))
    return pa.concat_tables([parts[index] for index in range(len(refs))])
