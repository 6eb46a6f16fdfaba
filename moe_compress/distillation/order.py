"""Which sequences each optimizer step sees: the same on one process and on many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distillation_options import Distillation

NOTHING = -1
"""A place of a micro-batch that no sequence fills: its tokens do not count."""


@dataclass(frozen=True)
class Order:
    """Every epoch is a permutation of all sequences; the last batch of an epoch may be smaller.

    Attributes:
        num_sequences, batch_size: sequences there are, and of a step over all processes.
        epochs, max_steps: the first to be reached ends the training.
        seed: of the permutations.
    """

    num_sequences: int
    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int

    @classmethod
    def of(cls, settings: Distillation, found: int) -> Order:
        """That of a training with so many sequences, of which those held out are none of its own."""
        return cls(
            num_sequences=found - settings.validation_sequences,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            seed=settings.seed,
        )

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.num_sequences // self.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        steps = self.epochs * self.steps_an_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def batch(self, step: int) -> Tensor:
        """(b,) int64 sequences of a step, the first being 0."""
        epoch, place = divmod(step, self.steps_an_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.num_sequences, generator=generator)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


def micro_batches(batch_B: Tensor, rank: int, world: int, size: int, count: int) -> list[Tensor]:
    """One process's share of a batch: `count` micro-batches of `size`, filled up with NOTHING."""
    filled = torch.full((world * count * size,), NOTHING)
    filled[: len(batch_B)] = batch_B
    return list(filled.view(count, world, size)[:, rank])


def num_micro_batches(batch_size: int, world: int, size: int) -> int:
    """Forward passes of each process a step."""
    return -(-batch_size // (world * size))
