"""Pairs of texts: what is read, how it is tokenised, and that padding is never mistaken for text."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moe_compress.calibration.pairs import calibration_pairs, evaluation_pairs, read_pairs
from moe_compress.calibration.text import IGNORED, TokenBatch
from moe_compress.errors import RecipeError
from tests.switch_models import EOS, PAD, cipher_pairs, letter_tokenizer, write_pairs

FIELDS = ("source", "target")
PAIRS = [("0 a b c", "d e"), ("1 a", "b c d e f"), ("2 c c c c", "a")]


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"pairs.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.table(dict(zip(FIELDS, zip(*PAIRS, strict=True), strict=True)) | {"id": [1, 2, 3]}), path)
        return path
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    if request.param == "jsonl.gz":
        path.write_bytes(gzip.compress((tmp_path / "pairs.jsonl").read_bytes()))
    return path


def test_every_format_gives_the_pairs_in_order(file: Path) -> None:
    assert list(read_pairs([file, file], FIELDS)) == PAIRS * 2
    assert list(read_pairs([file], FIELDS[::-1])) == [pair[::-1] for pair in PAIRS]


def test_rows_without_a_field_and_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pairs\..*the field 'question' holds no text.*source_field"):
        list(read_pairs([file], ("question", "target")))
    with pytest.raises(RecipeError, match="the field 'target' holds no text"):
        list(read_pairs([write_pairs(tmp_path / "blank.jsonl", [("a", " ")])], FIELDS))
    (tmp_path / "text.txt").write_text("a b c")
    with pytest.raises(RecipeError, match="unknown kind of text"):
        read_pairs([tmp_path / "text.txt"], FIELDS)
    with pytest.raises(RecipeError, match="no such text file"):
        read_pairs([tmp_path / "none.jsonl"], FIELDS)
    with pytest.raises(RecipeError, match="no pair"):
        evaluation_pairs([], letter_tokenizer(), 8)


def test_both_sides_are_framed_cut_and_padded_at_their_ends() -> None:
    tokenizer = letter_tokenizer()
    batch = evaluation_pairs(PAIRS, tokenizer, 5)
    assert batch.labels is not None
    for (source, target), ids, mask, labels in zip(
        PAIRS, batch.input_ids, batch.attention_mask, batch.labels, strict=True
    ):
        real = [*tokenizer(source, add_special_tokens=False)["input_ids"][:4], EOS]
        predicted = [*tokenizer(target, add_special_tokens=False)["input_ids"][:4], EOS]
        assert ids.tolist() == real + [PAD] * (5 - len(real))
        assert mask.tolist() == [True] * len(real) + [False] * (5 - len(real))
        assert labels.tolist() == predicted + [IGNORED] * (5 - len(predicted))
    assert [ids.tolist() for ids in batch.predicted] == [row[row != IGNORED].tolist() for row in batch.labels]
    assert batch.num_tokens == 5 + 3 + 5 + 3 + 5 + 2


def test_micro_batches_lose_only_padding(tmp_path: Path) -> None:
    batch = evaluation_pairs(PAIRS, letter_tokenizer(), 16)
    batch.save(tmp_path / "tokens.safetensors")
    loaded = TokenBatch.load(tmp_path / "tokens.safetensors")
    shapes = []
    for start, part in zip((0, 2), loaded.batches(2), strict=True):
        assert part.labels is not None
        assert batch.labels is not None
        rows = slice(start, start + 2)
        assert part.attention_mask.any(0).all()
        assert part.target_mask.any(0).all()
        assert torch.equal(part.input_ids[part.attention_mask], batch.input_ids[rows][batch.attention_mask[rows]])
        assert torch.equal(part.labels[part.target_mask], batch.labels[rows][batch.target_mask[rows]])
        shapes.append((tuple(part.input_ids.shape), tuple(part.labels.shape)))
    assert shapes == [((2, 5), (2, 6)), ((1, 6), (1, 2))]


def test_calibration_takes_a_shuffled_number_of_pairs() -> None:
    pairs, tokenizer = cipher_pairs(40, seed=0), letter_tokenizer()
    whole = evaluation_pairs(pairs, tokenizer, 16)
    some = calibration_pairs(pairs, tokenizer, 25, 16, seed=1)
    again, other = (calibration_pairs(pairs, tokenizer, 25, 16, seed=seed) for seed in (1, 2))
    assert torch.equal(some.input_ids, again.input_ids)
    assert not torch.equal(some.input_ids, other.input_ids)
    assert some.labels is not None
    assert whole.labels is not None
    everything = torch.cat([whole.input_ids, whole.labels], 1).tolist()
    assert all(row in everything for row in torch.cat([some.input_ids, some.labels], 1).tolist())
    assert len(some.input_ids) == 25
    assert len(calibration_pairs(pairs, tokenizer, 99, 16, seed=1).input_ids) == 40
