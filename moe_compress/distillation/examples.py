"""What a model is trained on: sequences, and at each of their positions the token to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.text import IGNORED, TokenBatch
from ..checkpoint.shard import load_tensors
from ..checkpoint.writer import write_shard


@dataclass(frozen=True)
class Examples:
    """Sequences of equal length.

    Attributes:
        input_ids: (N, S) int64.
        attention_mask: (N, S) bool, False on padding.
        targets: (N, L) int64, the token that the logits of a position are to predict: already shifted by one for a
            decoder, where L = S; the target text of an encoder-decoder model. IGNORED where none counts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor

    @classmethod
    def of_text(cls, batch: TokenBatch) -> Examples:
        """Text that predicts itself, or pairs."""
        if batch.labels is not None:
            return cls(batch.input_ids, batch.attention_mask, batch.labels)
        targets = torch.full_like(batch.input_ids, IGNORED)
        is_next = batch.attention_mask[:, 1:]
        targets[:, :-1][is_next] = batch.input_ids[:, 1:][is_next]
        return cls(batch.input_ids, batch.attention_mask, targets)

    @property
    def num_counted(self) -> Tensor:
        """(N,) int64 positions of each sequence that count."""
        return (self.targets != IGNORED).sum(1)

    def rows(self, index: Tensor) -> Examples:
        """Some of the sequences."""
        return Examples(self.input_ids[index], self.attention_mask[index], self.targets[index])

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        write_shard(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Reads what `save` wrote."""
        return cls(**load_tensors(path))
