"""A model that is asked: its tokens, and its micro-batches as units of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from ...checkpoint.reader import CheckpointReader
from ...errors import CheckpointError
from ...model.architecture import load_config, tokenizer_of
from .encoding import Encoded, encode
from .examples import Prompt

Item = TypeVar("Item")

Units = Callable[..., list[Any]]
"""`units(function, batches, *args)`: what `function(batches, *args)` gives, a result a batch, wherever it runs."""


def here(function: Callable[..., list[Any]], batches: list[Any], *args: Any) -> list[Any]:
    """Units that run in this process, all batches at once."""
    return function(batches, *args)


@dataclass(frozen=True)
class Asked:
    """A checkpoint and how it is asked.

    Attributes:
        checkpoint: folder.
        length: most tokens of an example, as in encoding.py.
        batch_size: rows a micro-batch.
        dtype: to compute in; `auto` is the checkpoint's.
        device: torch device, or `auto`.
        level: of the checkpoint, if it has several; None for the largest.
        units: what runs the micro-batches.
    """

    checkpoint: Path
    length: int
    batch_size: int
    dtype: str
    device: str
    level: str | None
    units: Units

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's."""
        return tokenizer_of(self.checkpoint)

    @cached_property
    def is_encoder_decoder(self) -> bool:
        """Whether it reads prompts and answers apart."""
        return bool(self._config.is_encoder_decoder)

    @cached_property
    def _config(self) -> Any:
        return load_config(CheckpointReader(self.checkpoint))

    def encode(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Encoded]:
        """Token ids of prompts and answers.

        Raises:
            RecipeError: an answer fills the length.
            CheckpointError: the tokenizer does not belong to the model.
        """
        encoded = encode(pairs, self.tokenizer, self.length, self.is_encoder_decoder)
        highest = max(max(one.source + one.target) for one in encoded)
        size = self._config.get_text_config().vocab_size
        if highest >= size:
            raise CheckpointError(
                f"{self.checkpoint}: the tokenizer gives id {highest} and the embedding ends at {size - 1}; copy the"
                " original's tokenizer files there"
            )
        return encoded

    def run(
        self, function: Callable[..., list[Any]], items: Sequence[Item], size: Callable[[Item], Any], *args: Any
    ) -> list[Any]:
        """What a unit, `function(batches, checkpoint, dtype, device, level, *args)`, gives for each item.

        Items of like size share a micro-batch; which ones depends on nothing but the items and the batch size.
        """
        order = sorted(range(len(items)), key=lambda i: size(items[i]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        how = (self.checkpoint, self.dtype, self.device, self.level, *args)
        results = self.units(function, [[items[i] for i in batch] for batch in batches], *how)
        found = {
            i: one for batch, result in zip(batches, results, strict=True) for i, one in zip(batch, result, strict=True)
        }
        return [found[i] for i in range(len(items))]
