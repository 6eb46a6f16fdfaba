from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_compress.calibration import text as text_module
from moe_compress.calibration.text import (
    TokenBatch,
    calibration_sequences,
    dataset_documents,
    evaluation_windows,
    read_documents,
    read_texts,
)
from moe_compress.errors import RecipeError

SHARED = Path(os.environ.get("MOE_COMPRESS_SHARED", Path(__file__).resolve().parents[3] / "shared"))
DOCUMENTS = ["The first document,\nof two lines.", "Ünïcödé “quotes”", "    indented: yes"]
WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=6)
TEXTS = st.lists(WORDS, min_size=1, max_size=60).map(" ".join)


def byte_level_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


TOKENIZER = byte_level_tokenizer(eos_token="<eos>")


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def real_tokens(batch: TokenBatch) -> list[int]:
    return batch.input_ids[batch.attention_mask].tolist()


def write(path: Path, documents: list[str]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": [0, 1, 2], "text": documents}), path)
        return path
    if ".jsonl" in path.name:
        content = "\n\n".join(json.dumps({"id": "a", "text": text}) for text in documents)
    else:
        content = "\n\n \t\n".join(documents)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_format_yields_the_same_documents(tmp_path: Path, name: str) -> None:
    assert list(read_documents([write(tmp_path / name, DOCUMENTS)])) == DOCUMENTS


def test_a_text_without_blank_lines_is_read_by_lines_and_sources_in_order(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    (tmp_path / "records.jsonl").write_text('{"n": 1, "body": "three"}\n{"text": " "}\n')
    sources = [tmp_path / "lines.txt", str(tmp_path / "records.jsonl")]
    assert list(read_documents(sources)) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.txt", None, "no such text file"),
        ("notes.md", b"text", r"unknown kind of text; use one of \.txt"),
        ("blank.txt", b" \n\n ", "holds no text"),
        ("blank.jsonl", b'{"text": ""}', "holds no text"),
        ("latin.txt", b"caf\xe9", "decode byte 0xe9 in position 3"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"latin\.jsonl:2: .*0xe9"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": ', r"bad\.jsonl:3: not a line of JSON"),
        ("list.jsonl", b'["a"]', r"list\.jsonl:1: no field holds a string"),
        ("numbers.jsonl", b'{"a": 1}', r"numbers\.jsonl:1: no field holds a string"),
        ("broken.txt.gz", gzip.compress(b"some text", mtime=0)[:-9], "cannot be read"),
        ("broken.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_unusable_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=says) as caught:
        list(read_documents([tmp_path / name]))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_without_a_column_of_text_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match="columns body; a column text must hold strings"):
        list(read_documents([tmp_path / "a.parquet"]))


@settings(deadline=None, max_examples=50)
@given(documents=st.lists(TEXTS, min_size=2, max_size=8), seed=st.integers(0, 3))
def test_packing_keeps_every_document_once_and_an_eos_between(documents: list[str], seed: int) -> None:
    expected = sorted(encode(document) for document in documents)
    num_tokens = sum(map(len, expected)) + len(expected) - 1
    batch = calibration_sequences(documents, TOKENIZER, 1, num_tokens, seed)
    groups = itertools.groupby(real_tokens(batch), lambda i: i == TOKENIZER.eos_token_id)
    assert sorted(list(group) for is_eos, group in groups if not is_eos) == expected
    assert batch.num_tokens == num_tokens


def test_the_seed_alone_orders_the_documents() -> None:
    documents = [f"document {number}" for number in range(50)]
    first, again, other = (calibration_sequences(documents, TOKENIZER, 8, 16, seed).input_ids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_short_text_gives_fewer_sequences_the_last_one_masked() -> None:
    tokenizer = byte_level_tokenizer(eos_token="<eos>", pad_token="<pad>")
    ids = encode("some words that are split into a few tokens")
    length = len(ids) - 2
    batch = calibration_sequences(["some words that are split into a few tokens"], tokenizer, 9, length, seed=0)
    assert batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool
    assert batch.input_ids.tolist() == [
        ids[:length],
        [*ids[length:], *[tokenizer.pad_token_id] * (length - 2)],
    ]
    assert batch.attention_mask.sum(dim=1).tolist() == [length, 2]


def test_one_token_predicts_nothing() -> None:
    ids = encode("one two three four")
    batch = calibration_sequences(["one two three four"], TOKENIZER, 9, len(ids) - 1, seed=0)
    assert real_tokens(batch) == ids[:-1]


@pytest.mark.parametrize("documents", [[], ["a"], ["a b c"]], ids=len)
def test_a_text_that_fills_no_sequence_is_refused(documents: list[str]) -> None:
    says = f"holds {len(encode(''.join(documents)))} tokens and fills no sequence of 8; give more text"
    with pytest.raises(RecipeError, match=says):
        calibration_sequences(documents, TOKENIZER, 1, 8, seed=0)
    with pytest.raises(RecipeError, match=says):
        evaluation_windows(documents, TOKENIZER, 8)


def test_without_eos_documents_are_adjacent() -> None:
    ids = 2 * encode("ab")
    batch = calibration_sequences(["ab", "ab"], byte_level_tokenizer(), 9, len(ids), seed=0)
    assert real_tokens(batch) == ids


def test_reading_stops_when_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_POOL_CHARS", 1000)
    monkeypatch.setattr(text_module, "_CHUNK_CHARS", 100)
    num_read = 0

    def endless() -> Iterator[str]:
        nonlocal num_read
        while True:
            num_read += 1
            yield "ten chars."

    assert calibration_sequences(endless(), TOKENIZER, 2, 8, seed=0).input_ids.shape == (2, 8)
    assert num_read == 100


def test_evaluation_reads_a_text_byte_for_byte(tmp_path: Path) -> None:
    content = " = Title = \r\n \r\n\r\nA  text with “quotes”\tand trailing blanks  \n\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    batch = evaluation_windows(read_texts([tmp_path / "a.txt"]), TOKENIZER, sequence_length=7)
    assert real_tokens(batch) == encode(content)
    assert TOKENIZER.decode(real_tokens(batch)) == content


def test_evaluation_joins_records_and_sources_with_an_empty_line(tmp_path: Path) -> None:
    records = write(tmp_path / "a.parquet", ["one", "", "two"])
    (tmp_path / "b.txt").write_text("three\n")
    batch = evaluation_windows(read_texts([records, tmp_path / "b.txt"]), TOKENIZER, sequence_length=8)
    assert real_tokens(batch) == encode("one\n\n\n\ntwo\n\nthree\n")


def test_evaluation_stops_at_max_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    every = evaluation_windows(read_texts([tmp_path / "a.txt"]), TOKENIZER, 16)
    three = evaluation_windows(read_texts([tmp_path / "a.txt"]), TOKENIZER, 16, max_windows=3)
    assert len(every.input_ids) > 3
    assert torch.equal(three.input_ids, every.input_ids[:3])
    assert three.num_tokens == 48


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(TEXTS, max_size=6))
def test_long_texts_are_encoded_as_if_at_once(texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "_CHUNK_CHARS", 40)
        patch.setattr(text_module, "_CONTEXT_CHARS", 30)
        joined = text_module._joined(iter(texts))
        pieces = [ids.tolist() for ids in text_module._encode_text(joined, TOKENIZER)]
    whole = "\n\n".join(texts)
    assert list(itertools.chain(*pieces)) == encode(whole)
    assert len(pieces) == -(-len(whole) // 40) + 1


def test_windows_are_had_from_a_text_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_CHUNK_CHARS", 100)
    monkeypatch.setattr(text_module, "_CONTEXT_CHARS", 30)
    records = (f"record {number}" for number in itertools.count())
    windows = evaluation_windows(records, TOKENIZER, 16, max_windows=3).input_ids
    assert windows.shape == (3, 16)
    assert next(records) < "record 50"


def test_token_batch_slices_saves_and_loads(tmp_path: Path) -> None:
    batch = calibration_sequences(["word " * 100], TOKENIZER, 99, 16, seed=0)
    parts = list(batch.batches(3))
    assert [len(part.input_ids) for part in parts[:-1]] == [3] * (len(parts) - 1)
    assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)
    assert sum(part.num_tokens for part in parts) == batch.num_tokens
    batch.save(tmp_path / "tokens.safetensors")
    loaded = TokenBatch.load(tmp_path / "tokens.safetensors")
    assert torch.equal(loaded.input_ids, batch.input_ids)
    assert torch.equal(loaded.attention_mask, batch.attention_mask)


def test_dataset_is_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    assert list(dataset_documents(str(tmp_path), None, "train")) == ["one", "two"]
    with pytest.raises(RecipeError, match="split 'absent'"):
        dataset_documents(str(tmp_path), None, "absent")


def test_dataset_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install moe-compress\[eval\]"):
        dataset_documents("wikitext", None, "test")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared models and texts")
def test_published_protocol() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "mixtral-wiki")
    path = SHARED / "data" / "wikitext2" / "wiki.test.raw.joined.txt"
    whole = tokenizer(path.read_bytes().decode(), add_special_tokens=False)["input_ids"]
    evaluation = evaluation_windows(read_texts([path]), tokenizer, 256, max_windows=160)
    assert evaluation.input_ids.shape == (160, 256)
    assert real_tokens(evaluation) == whole[: 160 * 256]
    documents = read_documents([SHARED / "data" / "text" / "wiki_passages.txt.gz"])
    calibration = calibration_sequences(documents, tokenizer, 128, 256, seed=0)
    assert calibration.num_tokens == 128 * 256
