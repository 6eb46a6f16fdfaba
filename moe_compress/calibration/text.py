"""Text to token batches: what calibration and perplexity read.

Calibration packs shuffled documents, an EOS between two of them, into full sequences. Evaluation
tokenises a text as one string, byte for byte, and cuts it into windows that do not overlap, so a
perplexity here means what it means in every other tool.

Shape suffixes: T tokens of the stream, N sequences, S tokens a sequence.
"""

from __future__ import annotations

import gzip
import itertools
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch.nn.utils.rnn import pad_sequence

from ..checkpoint.shard import load_tensors
from ..checkpoint.writer import write_shard
from ..errors import RecipeError
from .sources import checked_files, dataset_rows, json_records, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Documents are shuffled in pools of this many characters: an ordinary file is one pool, and a
# dataset of terabytes is read no further than the first.
_POOL_CHARS = 1 << 27
# The tokenizer returns Python integers: this much text at a time, before they become int32 arrays.
_CHUNK_CHARS = 1 << 19
# What a token sees of its neighbourhood, with a wide margin.
_CONTEXT_CHARS = 1 << 12

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")


IGNORED = -100
"""Label of padding, as everywhere in transformers."""


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of equal length, padded at their ends; of packed text only the last one.

    input_ids: int64 (N, S). attention_mask: bool (N, S), False on padding. labels: int64 (N, L), IGNORED on padding,
    the targets of an encoder-decoder model; None where the text predicts itself.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding, those of targets among them."""
        return int(self.attention_mask.sum()) + (0 if self.labels is None else int(self.target_mask.sum()))

    @property
    def target_mask(self) -> torch.Tensor:
        """Bool, False on padding of what a decoder reads: (N, L) where there are labels."""
        return self.attention_mask if self.labels is None else self.labels != IGNORED

    @property
    def predicted(self) -> list[torch.Tensor]:
        """(T,) ids of each sequence that the model is to predict, in order."""
        if self.labels is None:
            return [ids[mask][1:] for ids, mask in zip(self.input_ids, self.attention_mask, strict=True)]
        return [ids[ids != IGNORED] for ids in self.labels]

    def batches(self, batch_size: int) -> Iterator[TokenBatch]:
        """Micro-batches of `batch_size` sequences, in order; the last may hold fewer.

        Pairs lose the columns that are padding in all rows of a micro-batch.
        """
        for start in range(0, len(self.input_ids), batch_size):
            rows = slice(start, start + batch_size)
            ids, mask = self.input_ids[rows], self.attention_mask[rows]
            if self.labels is None:
                yield TokenBatch(ids, mask)
                continue
            labels = self.labels[rows]
            sources, targets = int(mask.any(0).sum()), int((labels != IGNORED).any(0).sum())
            yield TokenBatch(ids[:, :sources], mask[:, :sources], labels[:, :targets])

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all.

        Raises CompressionError if it cannot be written.
        """
        write_shard(path, {name: tensor for name, tensor in vars(self).items() if tensor is not None})

    @classmethod
    def load(cls, path: Path) -> TokenBatch:
        """Reads what `save` wrote."""
        return cls(**load_tensors(path))


def padded(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 (N, longest row) with `value` at the ends, its bool mask of what is no padding)."""
    lengths = torch.tensor([len(ids) for ids in rows])
    ids = pad_sequence([torch.tensor(ids, dtype=torch.int64) for ids in rows], True, value)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def calibration_sequences(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_sequences: int,
    sequence_length: int,
    seed: int,
) -> TokenBatch:
    """Packs documents, shuffled by `seed`, into at most (num_sequences, sequence_length) tokens.

    An EOS stands between two documents where the tokenizer has one; no other special token is
    added. Reading stops at the end of the pool that holds enough text, tokenising as soon as there
    are enough tokens. Too short a text gives fewer sequences, the last one padded and masked.

    Raises RecipeError for a text that does not fill one sequence.
    """
    pieces = _encode(_shuffled(documents, seed), tokenizer)
    if tokenizer.eos_token_id is not None:
        pieces = _separated(pieces, tokenizer.eos_token_id)
    return _cut(pieces, tokenizer, num_sequences, sequence_length)


def evaluation_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_windows: int | None = None,
) -> TokenBatch:
    """Cuts texts, joined by an empty line, into windows of `sequence_length` tokens that do not overlap.

    No special token is added. A last partial window of two tokens or more is kept, padded and
    masked, unless `max_windows` are full already; texts beyond them are not asked for.

    Raises RecipeError for a text that does not fill one window.
    """
    return _cut(_encode_text(_joined(texts), tokenizer), tokenizer, max_windows, sequence_length)


def read_documents(sources: Sequence[str | Path]) -> Iterator[str]:
    """Documents of local files, in order, blank ones left out.

    .txt, .txt.gz: blocks between blank lines; the lines of a file that has no blank line.
    .jsonl, .jsonl.gz: the field "text" of each line, else its first string field.
    .parquet: the column "text".

    Raises RecipeError for a missing file, an unknown suffix (both at the call), and while reading
    for a bad line, undecodable bytes, a file without text.
    """
    return _non_blank(checked_files(sources, _READERS))


def read_texts(sources: Sequence[str | Path]) -> Iterator[str]:
    """The text of each local file as one string, in order.

    A .txt file is read byte for byte; the records of other formats are joined by an empty line.

    Raises RecipeError as `read_documents`.
    """
    return map(_whole_text, checked_files(sources, _READERS))


def dataset_documents(name: str, config: str | None, split: str) -> Iterator[str]:
    """Documents of a Hugging Face dataset, streamed: the field "text", else the first string field.

    Raises RecipeError if the `datasets` package or the dataset cannot be had.
    """
    return (text for where, row in dataset_rows(name, config, split) if (text := _text_field(row, where)).strip())


def _cut(
    pieces: Iterator[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    max_sequences: int | None,
    sequence_length: int,
) -> TokenBatch:
    """Cuts a stream of pieces, int32 (T,), into sequences; asks for no piece it does not need."""
    max_tokens = sys.maxsize if max_sequences is None else max_sequences * sequence_length
    taken, num_tokens = [np.array([], dtype=np.int32)], 0
    while num_tokens < max_tokens and (ids := next(pieces, None)) is not None:
        taken.append(ids)
        num_tokens += len(ids)
    tokens_T = np.concatenate(taken)[:max_tokens]
    if len(tokens_T) < sequence_length:
        raise RecipeError(
            f"the text holds {len(tokens_T)} tokens and fills no sequence of {sequence_length}; give more text or"
            " lower sequence_length"
        )
    if len(tokens_T) % sequence_length == 1:
        tokens_T = tokens_T[:-1]  # a window of one token predicts nothing
    num_sequences = -(-len(tokens_T) // sequence_length)
    special_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_token_id = next(token_id for token_id in special_ids if token_id is not None)
    ids_T = np.full(num_sequences * sequence_length, pad_token_id, dtype=np.int64)
    ids_T[: len(tokens_T)] = tokens_T
    mask_T = np.arange(len(ids_T)) < len(tokens_T)
    shape = (num_sequences, sequence_length)
    return TokenBatch(torch.from_numpy(ids_T.reshape(shape)), torch.from_numpy(mask_T.reshape(shape)))


def _encode(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Token ids of each document, int32 (T,)."""
    while chunk := _take(documents, _CHUNK_CHARS):
        # verbose=False: a text longer than the model's context is what packing is for.
        encoding = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoding["input_ids"]:
            yield np.array(ids, dtype=np.int32)


def _separated(pieces: Iterator[np.ndarray], token_id: int) -> Iterator[np.ndarray]:
    for number, ids in enumerate(pieces):
        if number:
            yield np.array([token_id], dtype=np.int32)
        yield ids


def _encode_text(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Token ids of strings in a row, int32 (T,) a piece, as if they were one string encoded at once.

    A tokenizer needs over a hundred bytes a character, and what it makes of a character depends on
    the text near it. So pieces overlap, and one hands over to the next where, deep in the overlap,
    a token starts in both.
    """
    ids_T = starts_T = np.array([], dtype=np.int32)
    text, first = "", 0  # a part of the text, and the place of its first character in the whole
    for seam in itertools.count(0, _CHUNK_CHARS):
        begin, end = max(seam - _CONTEXT_CHARS, 0), seam + _CHUNK_CHARS + _CONTEXT_CHARS
        text, first = text[begin - first :], begin
        if first + len(text) < end:
            text += "".join(_take(texts, end - first - len(text)))
        if first + len(text) <= seam:
            break
        encoding = tokenizer(
            text[: end - first],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        next_ids_T = np.array(encoding["input_ids"], dtype=np.int32)
        next_starts_T = first + np.array(encoding["offset_mapping"]).reshape(-1, 2)[:, 0]
        shared = np.intersect1d(starts_T, next_starts_T)
        handover = next(iter(shared[shared >= seam]), seam)
        yield ids_T[starts_T < handover]
        ids_T = next_ids_T[next_starts_T >= handover]
        starts_T = next_starts_T[next_starts_T >= handover]
    yield ids_T


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """The texts, an empty line between two of them, in strings of bounded length."""
    for number, text in enumerate(texts):
        if number:
            yield "\n\n"
        for start in range(0, len(text), _CHUNK_CHARS):
            yield text[start : start + _CHUNK_CHARS]


def _shuffled(documents: Iterable[str], seed: int) -> Iterator[str]:
    generator, rest = random.Random(seed), iter(documents)
    while pool := _take(rest, _POOL_CHARS):
        generator.shuffle(pool)
        yield from pool


def _take(documents: Iterator[str], num_chars: int) -> list[str]:
    """The next documents, up to the one that reaches `num_chars` characters."""
    taken: list[str] = []
    for document in documents:
        taken.append(document)
        num_chars -= len(document)
        if num_chars <= 0:
            break
    return taken


def _non_blank(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        num_documents = 0
        for document in _records(path):
            if document.strip():
                num_documents += 1
                yield document
        if not num_documents:
            raise RecipeError(f"{path}: holds no text; give another file")


def _whole_text(path: Path) -> str:
    if path.name.endswith((".txt", ".txt.gz")):
        text = "".join(reading(path, _text))
    else:
        text = "\n\n".join(_records(path))
    if not text.strip():
        raise RecipeError(f"{path}: holds no text; give another file")
    return text


def _records(path: Path) -> Iterator[str]:
    reader = next(_READERS[suffix] for suffix in _READERS if path.name.endswith(suffix))
    return reading(path, reader)


def _text(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    yield (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def _text_blocks(path: Path) -> Iterator[str]:
    (text,) = _text(path)
    blocks = _BLANK_LINES.split(text.strip("\n"))
    return iter(blocks if len(blocks) > 1 else text.split("\n"))


def _json_lines(path: Path) -> Iterator[str]:
    return (_text_field(record, where) for where, record in json_records(path))


def _parquet_column(path: Path) -> Iterator[str]:
    with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
        types = {field.name: field.type for field in file.schema_arrow}
        if types.get("text") not in (pyarrow.string(), pyarrow.large_string()):
            raise RecipeError(f"{path}: columns {', '.join(types)}; a column text must hold strings")
        for batch in file.iter_batches(columns=["text"]):
            yield from batch.column("text").drop_null().to_pylist()


def _text_field(record: object, where: str) -> str:
    fields = record if isinstance(record, Mapping) else {}
    for value in (fields.get("text"), *fields.values()):
        if isinstance(value, str):
            return value
    raise RecipeError(f"{where}: no field holds a string; name the text's field 'text'")


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _text_blocks,
    ".txt.gz": _text_blocks,
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".parquet": _parquet_column,
}
