"""Switch Transformers end to end: models that have learned a small task, calibrated on pairs, merged, evaluated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from moe_compress.calibration.pairs import evaluation_pairs, read_pairs
from moe_compress.checkpoint.manifest import Manifest
from moe_compress.errors import CheckpointError, RecipeError
from moe_compress.model.streamer import model_inputs
from moe_compress.recipe import Recipe, parse_recipe
from moe_compress.stages.prepare import check
from tests.conftest import Checkpoint
from tests.switch_models import (
    LETTERS,
    cipher_pairs,
    compress_switch,
    letter_tokenizer,
    random_switch,
    save_switch,
    trained_switch,
    write_pairs,
)

NUM_STEPS, SEEDS = 350, (0, 1, 2)

ALIGNED: dict[str, Any] = {"name": "msmoe", "ratio": 0.5, "counts": "uniform"}
RANDOM = ALIGNED | {"similarity": "random", "align": "none", "weights": "uniform"}

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    """`run(seed, name, method)`: scores of a compressed trained model, in nats a token and fractions."""

    def trained(seed: int) -> Path:
        folder = root / str(seed)
        if not folder.exists():
            folder.mkdir()
            write_pairs(folder / "calibration.jsonl", cipher_pairs(256, 100 + seed))
            write_pairs(folder / "held-out.jsonl", cipher_pairs(256, 200 + seed))
            save_switch(trained_switch(seed, NUM_STEPS), folder / "original")
        return folder

    def make(seed: int, name: str, method: dict[str, Any]) -> dict[str, Any]:
        folder = trained(seed)
        job = compress_switch(
            folder / "original",
            folder / name,
            folder / "calibration.jsonl",
            method=method,
            calibration={"text": str(folder / "calibration.jsonl"), "num_sequences": 256, "sequence_length": 16},
            evaluation={
                "text": str(folder / "held-out.jsonl"),
                "sequence_length": 16,
                "batch_size": 64,
                "generate": 32,
            },
        )
        scores: dict[str, Any] = json.loads((job / "evaluation.json").read_text())
        return scores

    return make


@pytest.mark.slow
def test_aligned_weighted_merging_beats_random_groups(run: Run) -> None:
    losses = {"original": 0.0, "aligned": 0.0, "random": 0.0}
    f1 = []
    for seed in SEEDS:
        aligned, random = run(seed, "aligned", ALIGNED), run(seed, "random", RANDOM | {"seed": seed})
        assert aligned["original_perplexity"] == random["original_perplexity"]
        losses["original"] += math.log(aligned["original_perplexity"]) / len(SEEDS)
        losses["aligned"] += math.log(aligned["perplexity"]) / len(SEEDS)
        losses["random"] += math.log(random["perplexity"]) / len(SEEDS)
        f1.append(aligned["original_token_f1"])
    assert losses["original"] < 0.5 * math.log(len(LETTERS)), losses  # a guess costs log 16
    assert sum(f1) / len(f1) > 0.8, f1
    assert losses["aligned"] - losses["original"] < 0.7 * (losses["random"] - losses["original"]), losses


@pytest.mark.slow
def test_merged_low_rank_and_sparse_keeps_the_task(run: Run, root: Path) -> None:
    scores = run(0, "sparse", {"name": "mcsmoe", "ratio": 0.6, "merge_ratio": 0.25})
    assert scores["perplexity"] < 1.2 * scores["original_perplexity"]
    assert scores["exact_match"] > 0.8
    parameters = Manifest.load(root / "0" / "sparse").parameters
    assert parameters["experts_compressed"] <= 0.4 * parameters["experts_original"]
    size = {
        name: sum(f.stat().st_size for f in (root / "0" / name).glob("*.safetensors"))
        for name in ("original", "sparse")
    }
    assert size["original"] - size["sparse"] > 0.9 * 4 * (
        parameters["experts_original"] - parameters["experts_compressed"]
    )


def recipe_for(model: Path, pairs: Path, **evaluation: Any) -> Recipe:
    return parse_recipe(
        {
            "model": str(model),
            "output": str(model.parent / "out"),
            "calibration": {"text": str(pairs)},
            "method": ALIGNED,
            "evaluation": {"text": str(pairs)} | evaluation,
        }
    )


def test_what_cannot_work_is_refused_in_one_line(tmp_path: Path, tiny: Checkpoint, text_file: Path) -> None:
    model = save_switch(random_switch(), tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs.jsonl", cipher_pairs(4, seed=0))
    check(recipe_for(model, pairs, generate=3))
    with pytest.raises(RecipeError, match=r"^calibration\.text: .*unknown kind of text; use one of \.jsonl"):
        check(recipe_for(model, text_file))
    with pytest.raises(RecipeError, match=r"^evaluation\.generate: 3 .* 'mixtral'"):
        check(recipe_for(tiny("mixtral"), text_file, generate=3))
    headless = save_switch(random_switch(decoder_start_token_id=None), tmp_path / "headless")
    with pytest.raises(CheckpointError, match="decoder_start_token_id"):
        check(recipe_for(headless, pairs))


@torch.no_grad()
def test_scores_are_those_of_the_whole_models(tmp_path: Path) -> None:
    """Cross-entropy, KL, agreement and generated text of loaded models are what the streamed evaluation says."""
    original = save_switch(random_switch(initializer_factor=1.0), tmp_path / "original")
    fields = {"source_field": "question", "target_field": "answer"}
    pairs = write_pairs(tmp_path / "pairs.jsonl", cipher_pairs(13, seed=7, shortest=2), ("question", "answer"))
    job = compress_switch(
        original,
        tmp_path / "merged",
        pairs,
        method=ALIGNED,
        calibration={"text": str(pairs), "num_sequences": 13, "sequence_length": 16, "batch_size": 4, **fields},
        evaluation={"text": str(pairs), "sequence_length": 16, "batch_size": 5, "generate": 7, **fields},
    )
    found = json.loads((job / "evaluation.json").read_text())
    tokenizer = letter_tokenizer()
    tokens = evaluation_pairs(read_pairs([pairs], ("question", "answer")), tokenizer, 16)
    inputs = model_inputs(tokens.input_ids, tokens.attention_mask, tokens.labels)
    models = [AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).eval() for name in ("merged", "original")]
    mine, theirs = (model(**inputs).logits.log_softmax(-1)[tokens.labels != -100] for model in models)
    for model, key in zip(models, ("perplexity", "original_perplexity"), strict=True):
        assert math.exp(model(**inputs).loss) == pytest.approx(found[key], rel=1e-4)
    assert (theirs.exp() * (theirs - mine)).sum(-1).mean().item() == pytest.approx(found["kl"], rel=1e-3)
    assert (theirs.argmax(-1) == mine.argmax(-1)).float().mean().item() == pytest.approx(found["agreement"])
    assert found["num_tokens"] == int((tokens.labels != -100).sum())

    length = max(len(ids) for ids in tokens.predicted[:7])
    for model, prefix in zip(models, ("", "original_"), strict=True):
        ids = model.generate(tokens.input_ids[:7], attention_mask=tokens.attention_mask[:7], max_new_tokens=length)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        given = tokenizer.batch_decode(tokens.predicted[:7], skip_special_tokens=True)
        exact = sum(ours == theirs for ours, theirs in zip(texts, given, strict=True)) / 7
        assert found[f"{prefix}exact_match"] == pytest.approx(exact)
    (table,) = (pq.read_table(path) for path in job.glob("evaluation-*.parquet"))
    assert table.num_rows == 13
    assert table["token_f1"].null_count == table["original_exact_match"].null_count == 6
