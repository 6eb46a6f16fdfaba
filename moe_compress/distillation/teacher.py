"""The teacher's answers, computed once and kept on disk: a student learns from them with no teacher in memory.

For every token to be predicted the K largest logits are kept, and of all others the log of their mass at the
temperature T; losses.py says what that means for the divergence. Logits are relative to the row's largest, which
changes no distribution and lets float16 hold them: its error, 2^-11 of the distance from the top, is at most 2e-4 of
a probability and far less of a divergence, where errors of both signs are summed.

A cache is a folder of Parquet shards, each of some sequences in their order, one a row:

    sequence  int32                          number of the example
    ids       list<fixed_size_binary[2 K]>   one entry a token that counts: K uint16 (int32 from 65,537 tokens on)
    logits    list<fixed_size_binary[2 K]>   K float16
    log_tail  list<float>

A token's ids are one binary value, because Parquet spends time on every value of a list: like this gigabytes a second
are read, twenty times as much as of lists of numbers. Nothing is compressed, as it gains little and costs more. A
sequence, or some short ones, is a row group, which is what is read for it.

Bytes: about (2 + 2) K a token, 4 GB for 4 million tokens and K = 256.
Shape suffixes: L positions of a sequence, C positions that count, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..calibration.text import IGNORED, TokenBatch
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.writer import atomic_write
from ..errors import CalibrationError, RecipeError
from ..evaluation.agreement import streamed_logits
from ..model.architecture import load_config
from ..model.streamer import Inputs, model_inputs
from .examples import Examples
from .losses import CachedTargets

_GROUP_BYTES = 2**20
"""A row group holds as many sequences as fit, one at least."""

_METADATA_KEY = b"teacher"

Range = tuple[int, int]
"""First sequence of a shard, and the first beyond it."""


@dataclass(frozen=True, slots=True)
class TeacherSetup:
    """All that a cache is made from; plain data, so that it travels.

    Attributes:
        checkpoint: folder of the teacher.
        examples: what it is to answer, as `Examples.save` wrote it.
        folder: of the cache; must exist.
        top_k: K; all tokens of a smaller vocabulary.
        temperature: T.
        batch_size: sequences a micro-batch; changes the result by rounding.
        dtype: to compute in, or `auto` for the checkpoint's.
        device: torch device, or `auto`.
    """

    checkpoint: Path
    examples: Path
    folder: Path
    top_k: int
    temperature: float
    batch_size: int
    dtype: str
    device: str

    def shard(self, sequences: Range) -> Path:
        """File of some sequences."""
        return self.folder / "teacher-{:08}-{:08}.parquet".format(*sequences)


def write_teacher_shards(setup: TeacherSetup, shards: list[Range]) -> int:
    """Streams the teacher once over the sequences of some shards and writes those of them that are not there.

    A shard's bytes do not depend on which others are written with it: micro-batches begin anew with each.

    Returns:
        The tokens answered.

    Raises:
        CalibrationError: the teacher's logits are not finite.
    """
    shards = [shard for shard in shards if not setup.shard(shard).exists()]
    if not shards:
        return 0
    examples = Examples.load(setup.examples)
    logits = streamed_logits(setup.checkpoint, list(_inputs(setup, examples, shards)), setup.dtype, setup.device)
    num_tokens = 0
    for start, stop in shards:
        targets = examples.targets[start:stop]
        answers = [
            _answer(logits_LV, targets_L, setup)
            for logits_LV, targets_L in zip(islice(logits, len(targets)), targets, strict=True)
        ]
        _write(setup, (start, stop), answers)
        num_tokens += sum(len(answer.ids) for answer in answers)
    return num_tokens


def _inputs(setup: TeacherSetup, examples: Examples, shards: list[Range]) -> Iterator[Inputs]:
    """The micro-batches of some shards."""
    is_pairs = load_config(CheckpointReader(setup.checkpoint)).is_encoder_decoder
    for start, stop in shards:
        part = examples.rows(torch.arange(start, stop))
        tokens = TokenBatch(part.input_ids, part.attention_mask, part.targets if is_pairs else None)
        for batch in tokens.batches(setup.batch_size):
            yield model_inputs(batch.input_ids, batch.attention_mask, batch.labels)


def _answer(logits_LV: Tensor, targets_L: Tensor, setup: TeacherSetup) -> CachedTargets:
    """What is kept of one sequence, on the CPU; logits may end where nothing more counts."""
    rows_C = (targets_L != IGNORED).nonzero()[:, 0].to(logits_LV.device)
    z_CV = logits_LV[rows_C].float()
    top_CK, ids_CK = z_CV.topk(min(setup.top_k, z_CV.shape[1]), -1)
    highest_C1 = top_CK[:, :1]
    log_tail_C = (z_CV - highest_C1).scatter_(1, ids_CK, -torch.inf).div_(setup.temperature).logsumexp(-1)
    if not bool(highest_C1.isfinite().all()) or bool(log_tail_C.isnan().any()):
        raise CalibrationError(
            f"teacher {setup.checkpoint}: logits hold NaN or infinity: its activations overflow or its weights hold"
            " NaN; try dtype: float32"
        )
    small = torch.uint16 if z_CV.shape[1] <= 2**16 else torch.int32
    relative_CK = (top_CK - highest_C1).clamp_min(torch.finfo(torch.float16).min)
    return CachedTargets(ids_CK.to(small), relative_CK.half(), log_tail_C).to("cpu")


def _write(setup: TeacherSetup, shard: Range, answers: list[CachedTargets]) -> None:
    """Writes a shard, whole or not at all."""
    offsets = np.cumsum([0, *(len(answer.ids) for answer in answers)], dtype=np.int32)
    columns = {"sequence": pa.array(range(*shard), pa.int32())}
    for name in CachedTargets.__dataclass_fields__:
        values = torch.cat([getattr(answer, name) for answer in answers]).numpy()
        flat = pa.array(values) if values.ndim == 1 else _rows(values)
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets), flat)
    about = {"temperature": setup.temperature, "top_k": setup.top_k, "sequences": shard, "num_tokens": int(offsets[-1])}
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(about)})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, _GROUP_BYTES * len(answers) // max(table.nbytes, 1)),
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    atomic_write(setup.shard(shard), sink.getvalue().to_pybytes())


def _rows(values_CK: NDArray[Any]) -> pa.FixedSizeBinaryArray:
    """One binary value a row."""
    num_rows, width = len(values_CK), values_CK.shape[1] * values_CK.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), num_rows, [None, pa.py_buffer(values_CK.tobytes())])


class _Shard:
    """One file, open."""

    def __init__(self, path: Path) -> None:
        self.file = pq.ParquetFile(path, memory_map=True)
        self.about: dict[str, Any] = json.loads(self.file.schema_arrow.metadata[_METADATA_KEY])
        self.start, self.stop = self.about["sequences"]
        self._group_rows = self.file.metadata.row_group(0).num_rows

    def read(self, sequence: int) -> tuple[NDArray[Any], ...]:
        """ids (C, K), logits (C, K), log_tail (C,) of one sequence; without a copy beyond what Parquet makes."""
        group, row = divmod(sequence - self.start, self._group_rows)
        table = self.file.read_row_group(group, use_threads=False)
        ids, logits, log_tail = (table[name].chunk(0)[row].values for name in ("ids", "logits", "log_tail"))
        top_k = logits.type.byte_width // 2
        return (
            _matrix(ids, np.uint16 if ids.type.byte_width == 2 * top_k else np.int32),
            _matrix(logits, np.float16),
            log_tail.to_numpy(),
        )


def _matrix(rows: pa.FixedSizeBinaryArray, dtype: type[np.generic]) -> NDArray[Any]:
    """(C, K), undoing `_rows`."""
    width = rows.type.byte_width
    raw = memoryview(rows.buffers()[1])[rows.offset * width : (rows.offset + len(rows)) * width]
    return np.frombuffer(raw, dtype).reshape(len(rows), width // np.dtype(dtype).itemsize)


class TeacherCache:
    """The answers in a folder, read sequence by sequence in any order.

    Args:
        folder: where `write_teacher_shards` left them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = [_Shard(path) for path in sorted(folder.glob("teacher-*.parquet"))]
        self._starts = [shard.start for shard in self._shards]

    def check(self, temperature: float, top_k: int, num_counted: Tensor) -> None:
        """Refuses a cache that was made for something else.

        Args:
            temperature, top_k: what is asked for.
            num_counted: (N,) tokens that count of each example.

        Raises:
            RecipeError: says what differs.
        """
        edges = [0, *(shard.stop for shard in self._shards)]
        if [*self._starts, len(num_counted)] != edges:
            self._refuse("sequences", f"{self._starts} to {edges[1:]}", f"0 to {len(num_counted)} without a gap")
        for shard in self._shards:
            num_tokens = int(num_counted[shard.start : shard.stop].sum())
            for name, value in (("temperature", temperature), ("top_k", top_k), ("num_tokens", num_tokens)):
                if shard.about[name] != value:
                    self._refuse(name, shard.about[name], value)

    def _refuse(self, name: str, found: object, expected: object) -> None:
        raise RecipeError(f"{self.folder}: {name} {found}, must be {expected}; remove the folder to make it anew")

    def targets(self, sequences: Tensor) -> CachedTargets:
        """The answers to some examples, on the CPU, one after the other; (C, K) rows of C tokens that count.

        Args:
            sequences: (B,) int64 numbers of examples.
        """
        read = [self._shards[bisect_right(self._starts, n) - 1].read(n) for n in sequences.tolist()]
        return CachedTargets(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*read, strict=True)))


def shard_ranges(num_counted: Tensor, top_k: int, shard_bytes: int) -> Iterator[Range]:
    """Cuts examples into shards of about that many bytes.

    Args:
        num_counted: (N,) tokens that count of each.
        top_k: K.
        shard_bytes: as much as a shard holds before the sequence that makes it full, ids taken as int32.
    """
    ends = (num_counted * (6 * top_k + 4)).cumsum(0) // shard_bytes
    edges = [0, *((ends[1:] > ends[:-1]).nonzero()[:, 0] + 1).tolist(), len(num_counted)]
    yield from pairwise(edges)
