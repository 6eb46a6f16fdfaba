"""Scores of tasks: likelihoods are those of whole models, one unpadded choice at a time; answers their own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from moe_compress.errors import CheckpointError, RecipeError
from moe_compress.evaluation.generation import generate_answers
from moe_compress.evaluation.tasks.asking import Asked, here
from moe_compress.evaluation.tasks.choices import choice_likelihoods
from moe_compress.evaluation.tasks.encoding import encode
from moe_compress.evaluation.tasks.examples import Example, Prompt
from moe_compress.evaluation.tasks.reading import read_task
from moe_compress.evaluation.tasks.scoring import TaskScore, score_task
from moe_compress.recipe_fields import TaskSource
from tests.switch_models import letter_tokenizer, random_switch, save_switch
from tests.task_files import word_tokenizer, write_rows
from tests.tiny_models import build_tiny

VOCAB = 128

Case = tuple[Path, TaskSource]
"""A checkpoint, and a task in words that it knows."""


def decoder_rows() -> list[dict[str, Any]]:
    """Questions and choices of several lengths, choices of one word among them."""
    draw = torch.Generator().manual_seed(3)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (count,), generator=draw).tolist())

    return [{"query": words(4 + 3 * n), "choices": [words(1), words(1), words(1 + n)], "gold": n % 3} for n in range(7)]


def switch_rows() -> list[dict[str, Any]]:
    letters = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"]
    return [
        {
            "query": " ".join([str(n % 4), *letters[n : 2 * n + 2]]),
            "choices": ["b", "c d", " ".join(letters[n : n + 4])],
            "gold": n % 3,
        }
        for n in range(7)
    ]


@pytest.fixture(scope="module", params=["mixtral", "switch"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mixtral":
        build_tiny("mixtral").save_pretrained(folder / "model")
        word_tokenizer(VOCAB).save_pretrained(folder / "model")
        rows = decoder_rows()
    else:
        save_switch(random_switch(initializer_factor=1.0, expert_capacity=2), folder / "model")
        rows = switch_rows()
    return folder / "model", TaskSource(name="mine", test=[str(write_rows(folder / "rows.jsonl", rows))])


def asked_of(checkpoint: Path, batch_size: int = 4, units: Callable[..., list[Any]] = here) -> Asked:
    return Asked(checkpoint, 64, batch_size, "float32", "cpu", None, units)


def examples_of(task: TaskSource) -> list[Example]:
    return list(read_task(task, "test", text_to_text=True).examples)


@torch.no_grad()
def by_whole_model(checkpoint: Path, examples: list[Example]) -> list[list[float]]:
    """log p of each choice, by `from_pretrained` and one unpadded forward each."""
    if "switch" in str(checkpoint):
        model: Any = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        tokenizer = letter_tokenizer()

        def log_p(text: str, choice: str) -> float:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            labels = tokenizer(choice, return_tensors="pt")["input_ids"]
            log_q_NV = model(input_ids=ids, labels=labels).logits[0].double().log_softmax(-1)
            return sum(float(row[token]) for row, token in zip(log_q_NV, labels[0], strict=True))

    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        tokenizer = word_tokenizer(VOCAB)

        def log_p(text: str, choice: str) -> float:
            ids = tokenizer(f"{text} {choice}", return_tensors="pt")["input_ids"]
            log_q_NV = model(input_ids=ids).logits[0].double().log_softmax(-1)
            return sum(float(log_q_NV[t - 1, ids[0, t]]) for t in range(len(text.split()), ids.shape[1]))

    return [[log_p(each.prompts[0].text, choice) for choice in each.targets] for each in examples]


def test_likelihoods_are_those_of_the_whole_model(case: Case) -> None:
    checkpoint, task = case
    examples = examples_of(task)
    expected = by_whole_model(checkpoint, examples)
    assert len({round(value, 3) for of_choices in expected for value in of_choices}) > len(examples)
    for batch_size in (1, 4, 99):  # and so whatever the padding
        found, num_cut = choice_likelihoods(examples, asked_of(checkpoint, batch_size))
        assert num_cut == 0
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def largest(values: list[float]) -> int:
    return values.index(max(values))


def test_choices_score_as_their_likelihoods_say(case: Case, tmp_path: Path) -> None:
    """All are right by their sums but for the first."""
    checkpoint, task = case
    examples = examples_of(task)
    expected = by_whole_model(checkpoint, examples)
    gold = [largest(values) for values in expected]
    gold[0] = (gold[0] + 1) % 3
    a_byte = [
        [value / len(text) for value, text in zip(values, each.targets, strict=True)]
        for values, each in zip(expected, examples, strict=True)
    ]
    num_by_bytes = sum(largest(values) == right for values, right in zip(a_byte, gold, strict=True))
    assert num_by_bytes < 6
    rows = [
        {"query": each.prompts[0].text, "choices": each.targets, "gold": right}
        for each, right in zip(examples, gold, strict=True)
    ]
    mine = TaskSource(name="mine", test=[str(write_rows(tmp_path / "rows.jsonl", rows))])
    score = score_task(checkpoint, mine, batch_size=3, device="cpu")
    assert (score.task, score.num_examples, score.num_cut) == ("mine", 7, 0)
    assert [*score.metrics] == ["accuracy", "accuracy_by_bytes"]
    assert score.metrics["accuracy"].value == 6 / 7
    assert score.metrics["accuracy_by_bytes"].value == num_by_bytes / 7


def dealt_out(function: Callable[..., list[Any]], batches: list[Any], *args: Any) -> list[Any]:
    """Two units that take every second micro-batch, the later one first."""
    found: list[Any] = [None] * len(batches)
    for piece in (1, 0):
        found[piece::2] = function(batches[piece::2], *args)
    return found


def test_numbers_do_not_depend_on_who_shares_the_work(case: Case) -> None:
    checkpoint, task = case
    examples = examples_of(task)
    alone, shared = (choice_likelihoods(examples, asked_of(checkpoint, 3, units)) for units in (here, dealt_out))
    assert alone == shared


def test_the_first_examples_and_a_label_of_every_row(case: Case, tmp_path: Path) -> None:
    checkpoint, _ = case
    rows = [{"query": "a b w5", "choices": ["b", "c d"], "gold": n % 2} for n in range(4)]
    task = TaskSource(name="labels", test=[str(write_rows(tmp_path / "rows.jsonl", rows))])
    score = score_task(checkpoint, task, max_examples=3, device="cpu")
    assert score.num_examples == 3
    assert [*score.metrics] == ["accuracy"]  # one of two labels is longer in every row
    assert score.to_dict().keys() == {"num_examples", "num_cut", "metrics"}


def test_one_token_after_one_prompt_is_one_row(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_tiny("mixtral").save_pretrained(folder)
    word_tokenizer(VOCAB).save_pretrained(folder)
    seen: list[int] = []

    def counting(function: Callable[..., list[Any]], batches: list[Any], *args: Any) -> list[Any]:
        seen.append(sum(map(len, batches)))
        return function(batches, *args)

    prompt = Prompt.of("w3 w4")
    examples = [Example.choice(prompt, ("w5", "w6", "w5"), 0), Example.choice(prompt, ("w7", "w8 w9"), 0)]
    found, _ = choice_likelihoods(examples, asked_of(folder, units=counting))
    assert seen == [2]
    assert found[0][0] == found[0][2] != found[0][1]
    for ours, theirs in zip(found, by_whole_model(folder, examples), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_long_context_goes_from_its_front() -> None:
    tokenizer = word_tokenizer(VOCAB)

    def texts(prompt: Prompt, length: int, is_encoder_decoder: bool = False) -> tuple[str, str, int]:
        (one,) = encode([(prompt, "w9 w10")], tokenizer, length, is_encoder_decoder)
        return tokenizer.decode(one.source), tokenizer.decode(one.target), one.num_cut

    asked = Prompt.around("w3 w4 ", "w5 w6 w7", "\nw8")
    assert texts(asked, 9) == ("w3 w4 w5 w6 w7 w8", "w9 w10", 0)  # and an end of sequence
    assert texts(asked, 8) == ("w3 w4 w6 w7 w8", "w9 w10", 1)
    assert texts(asked, 6) == ("w3 w4 w8", "w9 w10", 3)
    assert texts(asked, 5) == ("w4 w8", "w9 w10", 4)
    assert texts(asked, 5, is_encoder_decoder=True) == ("w3 w4 w6 w7 w8", "w9 w10", 1)
    assert texts(Prompt.of("w3 w4 w5"), 5) == ("w4 w5", "w9 w10", 1)
    with pytest.raises(RecipeError, match=r"sequence_length: 3 tokens leave no room"):
        texts(asked, 3)
    with pytest.raises(RecipeError, match=r"sequence_length: 1 tokens"):
        texts(asked, 1, is_encoder_decoder=True)


def test_special_tokens_stay_where_the_tokenizer_puts_them(tokenizer: PreTrainedTokenizerFast) -> None:
    (one,) = encode([(Prompt.of("0 a b c"), "d e")], letter_tokenizer(), 3, True)
    assert letter_tokenizer().decode(one.source) == "b c </s>"
    assert letter_tokenizer().decode(one.target) == "d e </s>"
    framed = word_tokenizer(VOCAB)
    framed.bos_token = "<bos>"
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    (one,) = encode([(Prompt.of("w3 w4 w5"), "w6")], framed, 5, False)
    assert (one.source, one.target, one.num_cut) == ([1, 4, 5], [6], 1)
    (one,) = encode([(Prompt.of("w3 w4 w5"), "w6")], framed, 3, True)
    assert (one.source, one.target, one.num_cut) == ([1, 4, 5], [1, 6], 1)
    # the space before an answer belongs to it
    (one,) = encode([(Prompt.of("the fox "), "jumps")], tokenizer, 99, False)
    assert tokenizer.convert_ids_to_tokens(one.target)[0].startswith("Ġ")
    assert tokenizer.decode(one.source).endswith("fox")


def decoded(ids: Tensor, tokenizer: PreTrainedTokenizerFast, ends: set[int]) -> str:
    """A generated text up to a token that ends it."""
    kept = []
    for token in ids.tolist():
        if token in ends:
            break
        kept.append(token)
    return str(tokenizer.decode(kept))


@torch.no_grad()
def test_a_decoder_says_one_line(tmp_path: Path) -> None:
    model = build_tiny("mixtral", seed=5)
    prompts = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3], [17], [20, 30, 40, 50], [60, 61]]
    plain = [
        model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)[0]
        for ids in prompts
    ]
    said = [ids[len(prompt) :] for ids, prompt in zip(plain, prompts, strict=True)]
    newline, end = int(said[0][3]), int(said[1][1])
    tokenizer = word_tokenizer(VOCAB, {newline: "last\nline"})
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = [decoded(ids, tokenizer, {end}).partition("\n")[0] for ids in said]
    assert expected[0].endswith("last")
    assert len({len(text.split()) for text in expected}) > 1
    batches = [prompts[:3], prompts[3:]]
    found = generate_answers(batches, tmp_path, "float32", "cpu", None, 6)
    assert [text.strip() for texts in found for text in texts] == [text.strip() for text in expected]


@torch.no_grad()
def test_generated_answers_are_scored(tmp_path: Path) -> None:
    model, tokenizer = random_switch(seed=4, initializer_factor=1.0), letter_tokenizer()
    folder = save_switch(model, tmp_path / "model")
    rows = []
    for query in ("0 a b c", "1 b", "2 c d e f g", "3 h i"):
        ids = model.generate(tokenizer(query, return_tensors="pt")["input_ids"], do_sample=False, max_new_tokens=4)
        rows.append({"query": query, "answers_text": [tokenizer.decode(ids[0], skip_special_tokens=True), "z"]})
    assert all(row["answers_text"][0].strip() for row in rows)
    length = max(len(row["answers_text"][0].split()) for row in rows)
    rows[1]["answers_text"] = ["y " * (length - 2) + "z"]  # 2 + end of sequence: nothing is generated beyond 4

    def score(some: list[dict[str, Any]], **how: Any) -> TaskScore:
        task = TaskSource(name="squad", test=[str(write_rows(tmp_path / "rows.jsonl", some))])
        return score_task(folder, task, batch_size=3, device="cpu", **how)

    found = score(rows)
    assert [*found.metrics] == ["exact_match", "f1"]
    assert found.metrics["exact_match"].value <= 0.75
    assert found.metrics["f1"].value > 0.4
    assert score(rows, units=dealt_out) == found


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    build_tiny("mixtral").save_pretrained(tmp_path / "model")
    word_tokenizer(VOCAB + 9).save_pretrained(tmp_path / "model")
    row = {"query": f"w{VOCAB + 3}", "choices": ["w4", "w5"], "gold": 0}
    task = TaskSource(name="mine", test=[str(write_rows(tmp_path / "rows.jsonl", [row]))])
    with pytest.raises(CheckpointError, match=f"gives id {VOCAB + 3}"):
        score_task(tmp_path / "model", task, device="cpu")
