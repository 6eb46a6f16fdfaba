"""Perplexity by non-overlapping windows, and how far the next-token distribution moved from the original's.

For a window of tokens x_1 .. x_S, p the original's and q the compressed model's distribution:

    NLL = -1/(S-1) sum_t log q(x_{t+1} | x_<=t)        perplexity = exp(mean NLL over windows)
    KL  =  1/(S-1) sum_t KL(p(. | x_<=t) || q(. | x_<=t))        agreement: argmax p = argmax q

Both models are streamed layer by layer. Windows weigh by their tokens, so a short last window counts for what it is.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from ..calibration.activations import ActivationStore
from ..calibration.text import TokenBatch
from ..calibration.worker import pick_device
from ..checkpoint.reader import CheckpointReader
from ..model.skeleton import Skeleton
from ..model.streamer import Inputs, LayerStreamer, model_inputs

_MEMORY_BYTES = 2**30
"""Hidden states of the windows kept in memory by each model."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Quality over all windows.

    Attributes:
        num_windows, num_tokens: predicted tokens, that is.
        perplexity: of the checkpoint.
        original_perplexity, kl, agreement: beside the original, or None; KL in nats a token, agreement a fraction.
        kl_error: standard error of the mean of `kl` over windows.
    """

    num_windows: int
    num_tokens: int
    perplexity: float
    original_perplexity: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def streamed_logits(checkpoint: Path, batches: list[Inputs], dtype: str, device: str) -> Iterator[Tensor]:
    """(B, S, V) logits of each micro-batch in order; one layer of the model is in memory at a time."""
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    skeleton = Skeleton(CheckpointReader(checkpoint), chosen, pick_device(device))
    streamer = LayerStreamer(skeleton, batches[0])
    if not streamer.chained:
        yield from map(streamer.drive_forward, batches)
        return
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        store = ActivationStore(Path(folder), _MEMORY_BYTES)
        for position, name in enumerate(streamer.names):
            skeleton.load(name)
            if position + 1 < len(streamer.names):
                skeleton.prefetch(streamer.names[position + 1])
            for b, inputs in enumerate(batches):
                trace = streamer.trace(inputs)
                hidden = store.pop(b) if position else trace.hidden
                store.put(b, streamer.run(trace.calls[position], hidden))
            skeleton.drop(name)
        for b, inputs in enumerate(batches):
            yield streamer.head(inputs, store.pop(b))


@torch.no_grad()
def evaluate_windows(
    checkpoint: Path,
    against: Path | None,
    tokens: Path,
    batch_size: int,
    dtype: str,
    device: str,
    start: int,
    stop: int,
) -> pa.Table:
    """Scores the micro-batches `start` to `stop` of a tokenised text; one row a window."""
    batches = list(TokenBatch.load(tokens).batches(batch_size))[start:stop]
    inputs = [model_inputs(batch.input_ids, batch.attention_mask) for batch in batches]
    logits = streamed_logits(checkpoint, inputs, dtype, device)
    reference = None if against is None else streamed_logits(against, inputs, dtype, device)
    rows: dict[str, list[float]] = {"tokens": [], "nll": []}
    if reference is not None:
        rows |= {"original_nll": [], "kl": [], "agreement": []}
    for batch, ours in zip(batches, logits, strict=True):
        mask = batch.attention_mask[:, 1:].to(ours.device)
        labels = batch.input_ids[:, 1:].to(ours.device)
        log_q = ours[:, :-1].float().log_softmax(-1)
        sums = {"tokens": mask.sum(1), "nll": _picked(log_q, labels, mask)}
        if reference is not None:
            log_p = next(reference)[:, :-1].float().log_softmax(-1)
            sums["original_nll"] = _picked(log_p, labels, mask)
            sums["kl"] = ((log_p.exp() * (log_p - log_q)).sum(-1).double() * mask).sum(1)
            sums["agreement"] = ((log_p.argmax(-1) == log_q.argmax(-1)) & mask).sum(1)
        for name, values in sums.items():
            rows[name] += values.tolist()
    return pa.table(rows)


def _picked(log_p: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return -(log_p.gather(-1, labels[..., None])[..., 0].double() * mask).sum(1)


def merge_scores(table: pa.Table) -> Scores:
    """Scores over all windows; every token weighs the same."""
    sums = {name: torch.tensor(table[name].to_pylist(), dtype=torch.float64) for name in table.column_names}
    total = float(sums["tokens"].sum())

    def mean(name: str) -> float:
        return float(sums[name].sum()) / total

    scores: dict[str, Any] = {
        "num_windows": table.num_rows,
        "num_tokens": int(total),
        "perplexity": math.exp(mean("nll")),
    }
    if "kl" in sums:
        per_window = sums["kl"] / sums["tokens"]
        scores |= {
            "original_perplexity": math.exp(mean("original_nll")),
            "kl": mean("kl"),
            "kl_error": float(per_window.std() / math.sqrt(len(per_window))) if len(per_window) > 1 else 0.0,
            "agreement": mean("agreement"),
        }
    return Scores(**scores)
