"""The likelihood of each choice.

    log p(choice | prompt) = sum_t log p(target_t | prompt, target_<t)

The model is streamed, one layer in memory (agreement.py). Choices whose inputs are the same, such as answers of one
token after one prompt, are one row of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...calibration.text import IGNORED, padded
from ...model.streamer import Inputs, model_inputs
from ..agreement import streamed_logits
from .asking import Asked
from .encoding import Encoded
from .examples import Example

Ids = tuple[int, ...]


@dataclass(slots=True)
class Row:
    """One sequence of the model and what is read off its logits.

    Attributes:
        input_ids: of the decoder, or of the encoder.
        labels: of an encoder-decoder model; none of a decoder.
        wanted: (position of the first logits, the ids that they are to predict) of each choice.
    """

    input_ids: Ids
    labels: Ids = ()
    wanted: list[tuple[int, Ids]] = field(default_factory=list)

    @property
    def length(self) -> tuple[int, int]:
        """By which rows are sorted into micro-batches."""
        return len(self.input_ids), len(self.labels)


def choice_likelihoods(examples: list[Example], asked: Asked) -> tuple[list[list[float]], int]:
    """(log-likelihood of each choice of each example, in nats; number of examples that were cut)."""
    encoded = asked.encode([pair for each in examples for pair in zip(each.prompts, each.targets, strict=True)])
    rows: dict[tuple[Ids, Ids], Row] = {}
    asked_of = []
    for one in encoded:
        found, start = _row(one, asked.is_encoder_decoder)
        row = rows.setdefault((found.input_ids, found.labels), found)
        row.wanted.append((start, tuple(one.target)))
        asked_of.append(row)
    answers = asked.run(log_likelihoods, [*rows.values()], lambda row: row.length)
    by_row = {id(row): iter(values) for row, values in zip(rows.values(), answers, strict=True)}
    values = (next(by_row[id(row)]) for row in asked_of)  # a row answers in the order in which it was asked
    cut = (one.num_cut > 0 for one in encoded)
    likelihoods = [[next(values) for _ in each.targets] for each in examples]
    return likelihoods, sum(sum(next(cut) for _ in each.targets) > 0 for each in examples)


def _row(one: Encoded, is_encoder_decoder: bool) -> tuple[Row, int]:
    """The row that tells the likelihood of a choice, and where in it the choice begins."""
    if is_encoder_decoder:
        return Row(tuple(one.source), tuple(one.target)), 0
    return Row(tuple(one.source + one.target[:-1])), len(one.source) - 1


@torch.no_grad()
def log_likelihoods(
    batches: list[list[Row]], checkpoint: Path, dtype: str, device: str, level: str | None
) -> list[list[list[float]]]:
    """log p of what is wanted of each row of each micro-batch, in nats."""
    logits = streamed_logits(checkpoint, [_inputs(batch) for batch in batches], dtype, device, level)
    return [[_read_off(next(logits), row) for row in batch] for batch in batches]


def _inputs(batch: list[Row]) -> Inputs:
    ids, mask = padded([row.input_ids for row in batch], 0)
    labels = padded([row.labels for row in batch], IGNORED)[0] if batch[0].labels else None
    return model_inputs(ids, mask, labels)


def _read_off(logits_SV: Tensor, row: Row) -> list[float]:
    found = []
    for start, target in row.wanted:
        log_p_NV = logits_SV[start : start + len(target)].float().log_softmax(-1)
        ids_N1 = torch.tensor(target, device=log_p_NV.device)[:, None]
        found.append(float(log_p_NV.gather(1, ids_N1).double().sum()))
    return found
