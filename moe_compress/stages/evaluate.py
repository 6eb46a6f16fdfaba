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
from ..evaluation.agreement import GENERATED, Scores, evaluate_windows, merge_scores
from ..evaluation.generation import score_generated
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
    what = (prepared.evaluation_tokens.stem, settings.dtype, settings.generate)
    made_from = digest_of((output / MANIFEST_NAME).read_text(), *what)
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
                settings.generate,
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
    generate: int = 0,
) -> pa.Table:
    """One row a window: tokens, NLL, and beside the original its NLL, KL divergence and top-1 agreement.

    The first `generate` rows tell besides how the generated targets compare with the given ones.
    """
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
    table = pa.concat_tables([parts[index] for index in range(len(refs))])
    if generate:
        models = {"": checkpoint} if against is None else {"": checkpoint, "original_": against}
        how = (tokens, batch_size, dtype, device, generate)
        refs = [executor.submit(score_generated, model, *how) for model in models.values()]
        with reporter.stage("generate", len(refs)) as stage:
            for index, rows in executor.results(refs):
                for name, values in zip(GENERATED, zip(*rows, strict=True), strict=True):
                    column = pa.array([*values, *[None] * (table.num_rows - len(values))], pa.float64())
                    table = table.append_column([*models][index] + name, column)
                stage.advance()
    return table
