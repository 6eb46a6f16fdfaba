"""Tasks to train on: the answer alone counts, of the very texts by which the task is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_compress.calibration.text import IGNORED
from moe_compress.distillation.examples import Examples
from moe_compress.distillation.task_examples import task_examples
from moe_compress.errors import RecipeError
from moe_compress.evaluation.tasks.encoding import encode
from moe_compress.evaluation.tasks.reading import read_task
from moe_compress.recipe_fields import TaskSource
from tests.switch_models import letter_tokenizer
from tests.task_files import word_tokenizer, write_rows

WORDS = word_tokenizer(64)


@pytest.fixture
def task(tmp_path: Path) -> TaskSource:
    rows = [
        {"query": f"w{n + 3} w{n + 4} w{n + 5}", "choices": ["w40", "w41 w42", f"w{n + 43}"], "gold": n % 3}
        for n in range(6)
    ]
    return TaskSource(name="mine", train=[str(write_rows(tmp_path / "train.jsonl", rows))])


def texts(found: Examples) -> list[tuple[str, str]]:
    """(what is read, what is to be predicted) of each row."""
    return [
        (WORDS.decode(ids[mask]), WORDS.decode(targets[targets != IGNORED]))
        for ids, mask, targets in zip(found.input_ids, found.attention_mask, found.targets, strict=True)
    ]


def test_a_decoder_learns_answer_and_end(task: TaskSource) -> None:
    found, num_cut = task_examples(task, WORDS, 32, 99, 0, is_encoder_decoder=False)
    assert num_cut == 0
    by_query = dict(sorted(texts(found)))
    assert by_query["w3 w4 w5 w40"] == "w40 <eos>"
    assert by_query["w4 w5 w6 w41 w42"] == "w41 w42 <eos>"
    assert by_query["w5 w6 w7 w45"] == "w45 <eos>"
    assert len(by_query) == 6
    assert found.input_ids.shape == found.targets.shape == (6, 5)
    assert sorted(found.num_counted.tolist()) == [2, 2, 2, 2, 3, 3]
    # what a position is to predict stands at the next one
    counted = found.targets[:, :-1] != IGNORED
    inside = counted & found.attention_mask[:, 1:]
    assert torch.equal(found.targets[:, :-1][inside], found.input_ids[:, 1:][inside])
    assert inside.sum() == counted.sum() - 4  # the last of a shorter row is an end of sequence, which nobody reads


def test_without_an_end_of_sequence_the_answer_is_all(task: TaskSource) -> None:
    endless = word_tokenizer(64)
    endless.eos_token = None
    found, _ = task_examples(task, endless, 32, 99, 0, is_encoder_decoder=False)
    assert ("w3 w4 w5", "w40") in texts(found)
    assert found.input_ids.shape == found.targets.shape == (6, 4)


def test_an_encoder_decoder_model_learns_the_answer_as_framed(tmp_path: Path) -> None:
    rows = [{"query": "0 a b c", "answers_text": ["d e", "f"]}, {"query": "1 a", "answers_text": ["g"]}]
    task = TaskSource(name="squad", train=[str(write_rows(tmp_path / "train.jsonl", rows))])
    tokenizer = letter_tokenizer()
    found, num_cut = task_examples(task, tokenizer, 4, 2, 0, is_encoder_decoder=True)
    read = {
        (tokenizer.decode(ids[mask]), tokenizer.decode(targets[targets != IGNORED]))
        for ids, mask, targets in zip(found.input_ids, found.attention_mask, found.targets, strict=True)
    }
    assert read == {("a b c </s>", "d e </s>"), ("1 a </s>", "g </s>")}
    assert num_cut == 1


def test_training_and_scoring_read_the_same(task: TaskSource) -> None:
    same = TaskSource(name="mine", test=task.train)
    examples = list(read_task(same, "test", False).examples)
    scored = encode([(each.prompts[each.gold], each.targets[each.gold]) for each in examples], WORDS, 5, False)
    found, num_cut = task_examples(task, WORDS, 5, 6, 0, is_encoder_decoder=False)
    assert num_cut == sum(one.num_cut > 0 for one in scored) == 2
    read = {(tuple(ids[mask].tolist())) for ids, mask in zip(found.input_ids, found.attention_mask, strict=True)}
    assert read == {tuple(one.source + one.target) for one in scored}


def test_a_seed_chooses_and_orders(task: TaskSource) -> None:
    def chosen(seed: int, count: int) -> list[tuple[str, str]]:
        return texts(task_examples(task, WORDS, 32, count, seed, is_encoder_decoder=False)[0])

    assert chosen(0, 3) == chosen(0, 99)[:3]
    assert len({tuple(chosen(seed, 3)) for seed in range(5)}) > 1


def test_an_answer_that_fills_a_sequence_is_refused(task: TaskSource) -> None:
    with pytest.raises(RecipeError, match="sequence_length: 3 tokens"):
        task_examples(task, WORDS, 3, 6, 0, is_encoder_decoder=False)
