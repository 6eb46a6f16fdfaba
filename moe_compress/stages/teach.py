"""Teach: the teacher's answers to the examples that a student is to learn from, in pieces that run side by side."""

from __future__ import annotations

import itertools

from ..distillation.examples import Examples
from ..distillation.teacher import TeacherCache, TeacherSetup, shard_ranges, write_teacher_shards
from ..executor import Executor
from ..progress import Reporter

SHARD_BYTES = 64 * 2**20

_SWEEP_TOKENS = 2**18
"""A unit of work reads the whole teacher: it is to answer enough to be worth that, and not too much to be lost."""


def teach(setup: TeacherSetup, executor: Executor, reporter: Reporter, shard_bytes: int = SHARD_BYTES) -> TeacherCache:
    """Writes the shards of a cache that are not there, and opens it.

    The shards and their bytes are the same for any number of workers.
    """
    examples = Examples.load(setup.examples)
    shards = list(shard_ranges(examples.num_counted, setup.top_k, shard_bytes))
    pending = [shard for shard in shards if not setup.shard(shard).exists()]
    num_tokens = sum(stop - start for start, stop in pending) * examples.input_ids.shape[1]
    num_units = min(len(pending), max(executor.num_slots, -(-num_tokens // _SWEEP_TOKENS)))
    edges = [len(pending) * unit // num_units for unit in range(num_units + 1)] if pending else []
    units = [pending[first:last] for first, last in itertools.pairwise(edges)]
    refs = [executor.submit(write_teacher_shards, setup, unit) for unit in units]
    with reporter.stage("teach", len(pending)) as stage:
        for index, tokens in executor.results(refs):
            stage.advance(len(units[index]), tokens)
    cache = TeacherCache(setup.folder)
    cache.check(setup.temperature, setup.top_k, examples.num_counted)
    return cache
