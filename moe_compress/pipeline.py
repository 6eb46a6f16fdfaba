"""The main path of a job: plan -> calibrate -> allocate -> compress -> assemble -> evaluate.

Each stage (package `stages`) asks an executor for units of work and leaves durable artifacts in the job folder; what
is there is not made again. A sequential job goes through the stages twice: the checkpoint of the first time stays in
the job folder and runs the forward half of the second calibration.
"""

from __future__ import annotations

from .checkpoint.manifest import MANIFEST_NAME
from .executor import Executor
from .job import Job
from .progress import Reporter
from .stages.assemble import assemble
from .stages.calibrate import calibrate
from .stages.compress import compress_layers
from .stages.evaluate import evaluate
from .stages.prepare import Prepared, first_pass, second_pass
from .stages.schemes import scheme_of
from .stages.summary import summarise


def compress(job: Job, prepared: Prepared, executor: Executor, reporter: Reporter) -> None:
    """Runs or resumes a job, whose folder the caller has locked; leaves `summary.json` there.

    Args:
        job: the job.
        prepared: its inputs, checked.
        executor: what runs its units.
        reporter: told of its stages.

    Raises:
        RecipeError: another checkpoint of ours appeared at the output meanwhile, or the job is sequential and the
            model's layers cannot run one after the other.
        CalibrationError, CompressionError: stopped half-way; finished work is kept in the job folder.
    """
    if prepared.recipe.method.sequential:
        first = first_pass(job, prepared)
        below = first.recipe.output_path
        if not (below / MANIFEST_NAME).exists():
            _publish(job, first, executor, reporter)
        prepared = second_pass(job, prepared, below)
        _publish(job, prepared, executor, reporter.again())
    else:
        _publish(job, prepared, executor, reporter)
    scores = evaluate(job, prepared, executor, reporter)
    summarise(job, prepared, scores, reporter)


def _publish(job: Job, prepared: Prepared, executor: Executor, reporter: Reporter) -> None:
    """From one calibration to the checkpoint under its name."""
    scheme = scheme_of(job, prepared)
    pending = calibrate(job, prepared, scheme, executor, reporter)
    decision = scheme.decide(pending, executor, reporter)
    shards = compress_layers(job, prepared, decision, executor, reporter)
    assemble(prepared, shards, decision, reporter)
