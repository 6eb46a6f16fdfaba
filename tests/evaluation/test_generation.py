"""Generated targets: streamed decoding is the model's own, and the scores of texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig

from moe_compress.calibration.pairs import evaluation_pairs
from moe_compress.checkpoint.reader import CheckpointReader
from moe_compress.evaluation.generation import compare, score_generated
from moe_compress.model.skeleton import Skeleton
from moe_compress.model.streamer import LayerStreamer, model_inputs
from tests.switch_models import cipher_pairs, letter_tokenizer, random_switch, save_switch


@pytest.mark.parametrize(
    ("generated", "given", "expected"),
    [
        ("the cat sat", "the cat sat", (1, 1)),
        (" The  cat sat\n", "the cat sat", (1, 1)),
        ("cat the sat", "the cat sat", (0, 1)),
        ("the the the", "the cat sat", (0, 1 / 3)),
        ("a b", "a b c d", (0, 2 / 3)),
        ("", "a", (0, 0)),
        ("", "", (1, 1)),
    ],
)
def test_scores_of_texts(generated: str, given: str, expected: tuple[float, float]) -> None:
    assert compare(generated, given) == pytest.approx(expected)


def test_streamed_decoding_is_the_models_own(tmp_path: Path) -> None:
    model = random_switch(seed=4, initializer_factor=1.0, expert_capacity=1)
    folder = save_switch(model, tmp_path / "model")
    tokens = evaluation_pairs(cipher_pairs(6, seed=2, shortest=2), letter_tokenizer(), 16)
    inputs = model_inputs(tokens.input_ids, tokens.attention_mask)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    skeleton = Skeleton(CheckpointReader(folder))
    streamer = LayerStreamer(skeleton, model_inputs(tokens.input_ids, tokens.attention_mask, tokens.labels))
    assert streamer.generate(inputs, do_sample=False, max_new_tokens=6).tolist() == expected.tolist()
    assert len({tuple(row) for row in expected.tolist()}) > 1
    assert all(p.is_meta for layer in skeleton.layers.values() for p in layer.parameters())


def test_the_first_pairs_are_scored_by_the_checkpoints_generation_config(tmp_path: Path) -> None:
    model, tokenizer = random_switch(seed=4, initializer_factor=1.0), letter_tokenizer()
    folder = save_switch(model, tmp_path / "model")
    sources = [source for source, _ in cipher_pairs(6, seed=2, shortest=2)]
    texts = tokenizer(sources, padding=True, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**texts, do_sample=False, max_new_tokens=4)
    own = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert all(own)
    evaluation_pairs(zip(sources, own, strict=True), tokenizer, 16).save(tmp_path / "tokens.safetensors")
    how = (tmp_path / "tokens.safetensors", 4, "auto", "cpu")
    given_lengths = [len(text.split()) for text in own]
    scores = score_generated(folder, *how, count=5)
    assert len(scores) == 5
    # a model that never says "end" goes on to the length of the longest target
    assert all(f1 >= 2 * n / (2 * max(given_lengths) + 2) for (_, f1), n in zip(scores, given_lengths, strict=False))
    GenerationConfig.from_pretrained(folder, suppress_tokens=ids.unique().tolist()).save_pretrained(folder)
    suppressed = score_generated(folder, *how, count=9)
    assert suppressed == [(0, 0)] * 6
