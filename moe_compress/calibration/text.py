"""Text to token batches: what calibration and perplexity read.

Calibration packs shuffled documents, an EOS between two of them, into full sequences. Evaluation
tokenises a text as one string, byte for byte, and cuts it into windows that do not overlap, so a
perplexity here means what it means in every other tool.

Shape suffixes: T tokens of the stream, N sequences, S tokens a sequence.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

from moe_compress.errors import RecipeError

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


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of equal length; only the last one may be padded, at its end.

    input_ids: int64 (N, S). attention_mask: bool (N, S), False on padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    def batches(self, batch_size: int) -> Iterator[TokenBatch]:
        """Micro-batches of `batch_size` sequences, in order; the last may hold fewer."""
        for start in range(0, len(self.input_ids), batch_size):
            rows = slice(start, start + batch_size)
            yield TokenBatch(self.input_ids[rows], self.attention_mask[rows])

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        save_file({"input_ids": self.input_ids, "attention_mask": self.attention_mask}, path)

    @classmethod
    def load(cls, path: Path) -> TokenBatch:
        """Reads what `save` wrote."""
        return cls(**load_file(path))


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

    Raises RecipeError for a text of fewer than two tokens.
    """
    pieces = _encode(_shuffled(documents, seed), tokenizer)
    if tokenizer.eos_token_id is not None:
        pieces = _separated(pieces, tokenizer.eos_token_id)
    return _cut(pieces, tokenizer, num_sequences, sequence_length)


def evaluation_windows(
    text_sources: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_windows: int | None = None,
) -> TokenBatch:
    """Cuts the text of the sources into windows of `sequence_length` tokens that do not overlap.

    A .txt file is one string, byte for byte; the records of other formats, and several sources, are
    joined by an empty line. No special token is added. A last partial window of two tokens or more
    is kept, padded and masked, unless `max_windows` are full already.

    Raises RecipeError as `read_documents` does, and for a text of fewer than two tokens.
    """
    text = "\n\n".join(_whole_text(path) for path in _checked(text_sources))
    return _cut(_encode_text(text, tokenizer), tokenizer, max_windows, sequence_length)


def read_documents(sources: Sequence[str | Path]) -> Iterator[str]:
    """Documents of local files, in order, blank ones left out.

    .txt, .txt.gz: blocks between blank lines; the lines of a file that has no blank line.
    .jsonl, .jsonl.gz: the field "text" of each line, else its first string field.
    .parquet: the column "text".

    Raises RecipeError for a missing file, an unknown suffix (both at the call), and while reading
    for a bad line, undecodable bytes, a file without text.
    """
    return _non_blank(_checked(sources))


def dataset_documents(name: str, config: str | None, split: str) -> Iterator[str]:
    """Documents of a Hugging Face dataset, streamed: the field "text", else the first string field.

    Raises RecipeError if the `datasets` package or the dataset cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RecipeError(f"dataset {name!r}: needs the package datasets; pip install moe-compress[eval]") from error
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"dataset {name!r}, config {config!r}, split {split!r}: {reason}") from error
    texts = (_text_field(row, f"dataset {name!r}") for row in rows)
    return (text for text in texts if text.strip())


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
    if len(tokens_T) < 2:
        raise RecipeError(f"the text holds {len(tokens_T)} tokens: at least 2 needed; give more text")
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


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Token ids of one long string, int32 (T,) a piece, as if it were encoded at once.

    A tokenizer needs over a hundred bytes a character, and what it makes of a character depends on
    the text near it. So pieces overlap, and one hands over to the next where, deep in the overlap,
    a token starts in both.
    """
    ids_T = starts_T = np.array([], dtype=np.int32)
    for seam in range(0, len(text), _CHUNK_CHARS):
        first = max(seam - _CONTEXT_CHARS, 0)
        encoding = tokenizer(
            text[first : seam + _CHUNK_CHARS + _CONTEXT_CHARS],
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


def _checked(sources: Sequence[str | Path]) -> list[Path]:
    paths = [Path(source) for source in sources]
    for path in paths:
        if not path.is_file():
            raise RecipeError(f"{path}: no such text file; check the path")
        if not path.name.endswith(tuple(_READERS)):
            raise RecipeError(f"{path}: unknown kind of text; use one of {', '.join(_READERS)}")
    return paths


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
        text = "".join(_read(path, _text))
    else:
        text = "\n\n".join(_records(path))
    if not text.strip():
        raise RecipeError(f"{path}: holds no text; give another file")
    return text


def _records(path: Path) -> Iterator[str]:
    reader = next(_READERS[suffix] for suffix in _READERS if path.name.endswith(suffix))
    return _read(path, reader)


def _read(path: Path, reader: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text, gzip or Parquet ({error}); convert it") from error


def _text(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    yield (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def _text_blocks(path: Path) -> Iterator[str]:
    (text,) = _text(path)
    blocks = _BLANK_LINES.split(text.strip("\n"))
    return iter(blocks if len(blocks) > 1 else text.split("\n"))


def _json_lines(path: Path) -> Iterator[str]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise RecipeError(f"{where}: not a line of JSON ({error}); correct it") from error
            yield _text_field(record, where)


def _parquet_column(path: Path) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as file:
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
