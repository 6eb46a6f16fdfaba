"""Scores of streamed models against whole models, one unpadded window and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from moe_compress.calibration.text import TokenBatch
from moe_compress.evaluation.agreement import evaluate_windows, merge_scores, streamed_logits
from moe_compress.model.streamer import model_inputs
from tests.tiny_models import auto_class, build_tiny, token_ids

MODEL_TYPES = ["mixtral", "gpt_oss", "zaya"]  # chained; chained with sliding windows; driven
LENGTH, PADDING, BATCH_SIZE = 12, 5, 2

Pair = tuple[str, Path, Path]
"""Model type, and the checkpoints of a random model of it and of the same one, a little disturbed."""


@pytest.fixture(scope="module", params=MODEL_TYPES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    model = build_tiny(request.param)
    model.save_pretrained(folder / "original")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "disturbed")
    return request.param, folder / "disturbed", folder / "original"


@pytest.fixture(params=[5, 4], ids=["last window alone", "last window in company"])
def windows(request: pytest.FixtureRequest) -> TokenBatch:
    """Windows of which the last one is shorter, and padded with an ordinary token."""
    ids = token_ids(request.param, LENGTH)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, -PADDING:] = False
    return TokenBatch(ids, mask)


@pytest.fixture
def evaluate(tmp_path: Path, windows: TokenBatch) -> Callable[..., pa.Table]:
    """`evaluate(checkpoint, against, start, stop)`: a table of some of the micro-batches."""
    windows.save(tmp_path / "tokens")

    def call(checkpoint: Path, against: Path | None, start: int = 0, stop: int = 99) -> pa.Table:
        return evaluate_windows(checkpoint, against, tmp_path / "tokens", BATCH_SIZE, "float32", "cpu", start, stop)

    return call


@torch.no_grad()
def log_probabilities(model_type: str, checkpoint: Path, windows: TokenBatch) -> list[Tensor]:
    """(T, V) fp64 of each window, padding cut off, by the whole model."""
    model: Any = auto_class(model_type).from_pretrained(checkpoint, dtype=torch.float32).eval()
    texts = [ids[mask] for ids, mask in zip(windows.input_ids, windows.attention_mask, strict=True)]
    return [model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1) for ids in texts]


def test_streamed_scores_are_those_of_the_whole_models(
    models: Pair, windows: TokenBatch, evaluate: Callable[..., pa.Table]
) -> None:
    model_type, ours, original = models
    rows = []
    for ids, mask, log_q, log_p in zip(
        windows.input_ids,
        windows.attention_mask,
        log_probabilities(model_type, ours, windows),
        log_probabilities(model_type, original, windows),
        strict=True,
    ):
        row = dict.fromkeys(("tokens", "nll", "original_nll", "kl", "agreement"), 0.0)
        for t in range(int(mask.sum()) - 1):
            row["tokens"] += 1
            row["nll"] -= float(log_q[t, ids[t + 1]])
            row["original_nll"] -= float(log_p[t, ids[t + 1]])
            row["kl"] += sum(p.exp().item() * (p - q).item() for p, q in zip(log_p[t], log_q[t], strict=True))
            row["agreement"] += bool(log_p[t].argmax() == log_q[t].argmax())
        rows.append(row)
    table = evaluate(ours, original)
    for found, expected in zip(table.to_pylist(), rows, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    scores = merge_scores(table)
    assert (scores.num_windows, scores.num_tokens) == (len(rows), total["tokens"])
    assert scores.perplexity == pytest.approx(math.exp(total["nll"] / total["tokens"]), rel=1e-5)
    assert scores.original_perplexity == pytest.approx(math.exp(total["original_nll"] / total["tokens"]), rel=1e-5)
    assert scores.kl == pytest.approx(total["kl"] / total["tokens"], rel=1e-5, abs=1e-6)
    assert scores.agreement == pytest.approx(total["agreement"] / total["tokens"])
    assert 0 < scores.agreement < 1


def test_identical_models_agree(models: Pair, evaluate: Callable[..., pa.Table]) -> None:
    scores = merge_scores(evaluate(models[1], models[1]))
    assert (scores.kl, scores.kl_error, scores.agreement) == (0, 0, 1)
    assert scores.perplexity == scores.original_perplexity


def test_without_an_original_there_is_perplexity_alone(models: Pair, evaluate: Callable[..., pa.Table]) -> None:
    alone, beside = evaluate(models[1], None), evaluate(models[1], models[2])
    assert alone.equals(beside.select(["tokens", "nll"]))
    scores = merge_scores(alone)
    assert (scores.original_perplexity, scores.kl, scores.kl_error, scores.agreement) == (None, None, None, None)


def test_pieces_put_together_are_the_whole(models: Pair, evaluate: Callable[..., pa.Table]) -> None:
    pieces = [evaluate(*models[1:], 0, 1), evaluate(*models[1:], 1)]
    assert pa.concat_tables(pieces).equals(evaluate(*models[1:]))


def test_logits_come_window_by_window_and_leave_gradients_on(models: Pair, windows: TokenBatch) -> None:
    batches = [model_inputs(b.input_ids, b.attention_mask) for b in windows.batches(BATCH_SIZE)]
    streamed = streamed_logits(models[1], batches, "float32", "cpu")
    for logits, expected in zip(streamed, log_probabilities(*models[:2], windows), strict=True):
        assert torch.is_grad_enabled()
        assert not logits.requires_grad
        found = logits[: len(expected)].double().log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_every_token_weighs_the_same() -> None:
    columns = {
        "tokens": [3, 1, 2],
        "nll": [6.0, 1.0, 5.0],
        "original_nll": [3.0, 1.0, 2.0],
        "kl": [0.6, 0.5, 0.1],
        "agreement": [3, 0, 1],
    }
    scores = merge_scores(pa.table(columns))
    assert (scores.num_windows, scores.num_tokens) == (3, 6)
    assert scores.perplexity == pytest.approx(math.exp(2))
    assert scores.original_perplexity == pytest.approx(math.e)
    assert scores.kl == pytest.approx(0.2)
    assert scores.agreement == pytest.approx(4 / 6)
    # at 0.2 a token the windows would have 0.6, 0.2 and 0.4; they are off by 0, 0.3 and -0.3
    assert scores.kl_error == pytest.approx((3 / 2 * (0.3**2 + 0.3**2)) ** 0.5 / 6)
    assert merge_scores(pa.table(columns).slice(0, 1)).kl_error == 0


def test_the_error_of_equal_windows_is_that_of_their_mean() -> None:
    kl = [0.1, 0.5, 0.3, 0.9]
    sums = {"tokens": [10] * 4, "nll": kl, "original_nll": kl, "kl": [10 * k for k in kl], "agreement": [0] * 4}
    expected = float(torch.tensor(kl).std() / 4**0.5)
    assert merge_scores(pa.table(sums)).kl_error == pytest.approx(expected)
