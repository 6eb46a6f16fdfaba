"""Perplexity by non-overlapping windows, and how far the next-token distribution moved from the original's.

For a window of tokens x_1 .. x_S, p the original's and q the compressed model's distribution:

    NLL = -1/(S-1) sum_t log q(x_{t+1} | x_<=t)        perplexity = exp(mean NLL over windows)
    KL  =  1/(S-1) sum_t KL(p(. | x_<=t) || q(. | x_<=t))        agreement: argmax p = argmax q

Both models are streamed layer by layer. Windows weigh by their tokens, so a short last window counts for what it is.
For an encoder-decoder model a window is a pair, and the predicted tokens are those of the target.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import repeat
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

GENERATED = ("exact_match", "token_f1")
"""Columns of the windows whose target was generated; the original's begin with `original_`."""

_MEMORY_BYTES = 2**30
"""Hidden states of the windows kept in memory by each model."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Quality over all windows.

    Attributes:
        num_windows, num_tokens: predicted tokens, that is.
        perplexity: of the checkpoint.
        original_perplexity, kl, agreement: beside the original, or None; KL in nats a token, agreement a fraction.
        kl_error: standard error of `kl`, windows taken as independent; 0 where there is only one.
        exact_match, token_f1: of generated targets (generation.py), where they were asked for; fractions.
        original_exact_match, original_token_f1: the original's.
    """

    num_windows: int
    num_tokens: int
    perplexity: float
    original_perplexity: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    agreement: float | None = None
    exact_match: float | None = None
    token_f1: float | None = None
    original_exact_match: float | None = None
    original_token_f1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def streamed_logits(
    checkpoint: Path, batches: list[Inputs], dtype: str, device: str, level: str | None = None
) -> Iterator[Tensor]:
    """(S, V) logits of each window of the micro-batches in order; one layer of the model is in memory at a time."""
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    skeleton = Skeleton(CheckpointReader(checkpoint), chosen, pick_device(device), level)
    streamer = LayerStreamer(skeleton, batches[0])
    if not streamer.chained:
        for inputs in batches:
            yield from streamer.drive_forward(inputs)
        return
    with tempfile.TemporaryDirectory() as folder:
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
            for row, hidden_SD in enumerate(store.pop(b)):  # logits are large: never those of a whole micro-batch
                window = {name: values[row : row + 1] for name, values in inputs.items()}
                yield streamer.head(window, hidden_SD[None])[0]


def evaluate_windows(
    checkpoint: Path,
    against: Path | None,
    tokens: Path,
    batch_size: int,
    dtype: str,
    device: str,
    start: int,
    stop: int,
    level: str | None = None,
) -> pa.Table:
    """Scores the micro-batches `start` to `stop` of a tokenised text, the checkpoint at a level; one row a window."""
    batches = list(TokenBatch.load(tokens).batches(batch_size))[start:stop]
    inputs = [model_inputs(batch.input_ids, batch.attention_mask, batch.labels) for batch in batches]
    windows = [ids for batch in batches for ids in batch.predicted]
    logits = streamed_logits(checkpoint, inputs, dtype, device, level)
    original = repeat(None, len(windows)) if against is None else streamed_logits(against, inputs, dtype, device)
    return pa.Table.from_pylist([_score(*window) for window in zip(windows, logits, original, strict=True)])


def _score(ids_N: Tensor, logits_SV: Tensor, original_SV: Tensor | None) -> dict[str, float]:
    """Sums over the N predictions of one window; the logits may go on over padding."""
    labels_N1 = ids_N[:, None].to(logits_SV.device)
    num_predicted = len(labels_N1)
    log_q_NV = logits_SV[:num_predicted].float().log_softmax(-1)
    sums: dict[str, float] = {"tokens": num_predicted, "nll": float(-log_q_NV.gather(1, labels_N1).double().sum())}
    if original_SV is not None:
        log_p_NV = original_SV[:num_predicted].float().log_softmax(-1)
        sums["original_nll"] = float(-log_p_NV.gather(1, labels_N1).double().sum())
        sums["kl"] = float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).double().sum())
        sums["agreement"] = int((log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).sum())
    return sums


def merge_scores(table: pa.Table) -> Scores:
    """Scores over all windows; every token weighs the same."""
    generated = [name for name in table.column_names if name.endswith(GENERATED)]
    columns = {name: table[name].drop_null().to_pylist() for name in table.column_names}
    sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    total = float(sums["tokens"].sum())

    def mean(name: str) -> float:
        return float(sums[name].sum()) / total

    scores: dict[str, Any] = {
        "num_windows": table.num_rows,
        "num_tokens": int(total),
        "perplexity": math.exp(mean("nll")),
    }
    if "kl" in sums:
        excess = sums["kl"] - mean("kl") * sums["tokens"]
        variance = float(excess.square().sum()) * table.num_rows / max(table.num_rows - 1, 1)
        scores |= {
            "original_perplexity": math.exp(mean("original_nll")),
            "kl": mean("kl"),
            "kl_error": math.sqrt(variance) / total,
            "agreement": mean("agreement"),
        }
    scores |= {name: float(sums[name].mean()) for name in generated}
    return Scores(**scores)
