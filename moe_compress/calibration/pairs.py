"""Pairs of texts to token batches: what encoder-decoder models are calibrated and evaluated on.

A pair is one sequence of the encoder and one of the decoder. Both are framed by the tokenizer as it frames them for
the model (special tokens included), cut to a length, and padded at their ends to the longest of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError
from .sources import dataset_rows, file_rows, shuffled
from .text import IGNORED, TokenBatch, padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[str, str]


def read_pairs(sources: Sequence[str | Path], fields: tuple[str, str]) -> Iterator[Pair]:
    """(source, target) of each row of local files, in order.

    Args:
        sources: .jsonl, .jsonl.gz or .parquet files.
        fields: names of the two fields.

    Raises RecipeError for a missing file, an unknown suffix (both at the call), and while reading for a row without
    one of the fields.
    """
    return (_pair(record, where, fields) for where, record in file_rows(sources))


def dataset_pairs(name: str, config: str | None, split: str, fields: tuple[str, str]) -> Iterator[Pair]:
    """(source, target) of each row of a Hugging Face dataset, streamed.

    Raises RecipeError if the `datasets` package or the dataset cannot be had, or a row lacks one of the fields.
    """
    return (_pair(row, where, fields) for where, row in dataset_rows(name, config, split))


def calibration_pairs(
    pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, num_sequences: int, sequence_length: int, seed: int
) -> TokenBatch:
    """At most `num_sequences` pairs, shuffled by `seed`, each side cut to `sequence_length` tokens.

    Raises RecipeError where there is no pair.
    """
    return _tokenise(islice(shuffled(pairs, seed), num_sequences), tokenizer, sequence_length)


def evaluation_pairs(
    pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, sequence_length: int, max_windows: int | None = None
) -> TokenBatch:
    """The first `max_windows` pairs in order, or all; each side cut to `sequence_length` tokens.

    Raises RecipeError where there is no pair.
    """
    return _tokenise(islice(pairs, max_windows), tokenizer, sequence_length)


def _tokenise(pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, length: int) -> TokenBatch:
    found = list(pairs)
    if not found:
        raise RecipeError("the text holds no pair; give another file")
    cut = {"truncation": True, "max_length": length, "return_attention_mask": False}
    sources = tokenizer([source for source, _ in found], **cut)["input_ids"]
    targets = tokenizer(text_target=[target for _, target in found], **cut)["input_ids"]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TokenBatch(*padded(sources, pad), padded(targets, IGNORED)[0])


def _pair(record: object, where: str, fields: tuple[str, str]) -> Pair:
    row = record if isinstance(record, Mapping) else {}
    for field in fields:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise RecipeError(
                f"{where}: the field {field!r} holds no text, which an encoder-decoder model needs of every row; name"
                " the fields by source_field and target_field"
            )
    return row[fields[0]], row[fields[1]]
