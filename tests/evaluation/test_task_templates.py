"""Tasks as text: each published layout for both kinds of model, local files, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_compress.errors import RecipeError
from moe_compress.evaluation.tasks.examples import Example
from moe_compress.evaluation.tasks.reading import check_task, read_task, rows_of
from moe_compress.evaluation.tasks.templates import TASKS
from moe_compress.recipe_fields import DatasetText, TaskSource
from tests.task_files import ROWS, write_rows

SENTENCE = "Ann beat the tired Bob because"

T5: dict[str, tuple[str, tuple[str, ...], int]] = {
    "sst2": ("sst2 sentence: a gorgeous film", ("negative", "positive"), 1),
    "mrpc": ("mrpc sentence1: He said so . sentence2: So he said .", ("not_equivalent", "equivalent"), 1),
    "multirc": (
        "multirc question: Who ran? answer: Ann paragraph: Sent 1: Ann slept. Sent 2: Bob ran. ",
        ("False", "True"),
        0,
    ),
    "copa": (
        "copa choice1: The toilet filled with water. choice2: Water flowed from the spout. premise: The man turned on"
        " the faucet. question: effect",
        ("False", "True"),
        1,
    ),
    "winogrande": (
        f"winogrande sentence: {SENTENCE} _ trained more. option1: Ann option2: Bob",
        ("Ann", "Bob"),
        0,
    ),
    "squad": ("question: How long did Ann run? context: Ann ran for 23 years.", ("23 years",), 0),
    "wikiqa": ("wikiqa question: who ran answer: Ann ran .", ("False", "True"), 1),
    "hotpotqa": ("question: Who ran? context: Ann: Ann ran. Bob: Bob sat.", ("Ann",), 0),
}
"""TaskSource -> what an encoder-decoder model reads, the answers, and which is right."""


def one(tmp_path: Path, name: str, row: dict[str, Any], text_to_text: bool) -> Example:
    file = write_rows(tmp_path / "rows.jsonl", [row])
    (found,) = read_task(TaskSource(name=name, test=[str(file)]), "test", text_to_text).examples
    return found


@pytest.mark.parametrize("name", T5)
def test_an_encoder_decoder_model_reads_what_t5_reads(name: str, tmp_path: Path) -> None:
    text, targets, gold = T5[name]
    found = one(tmp_path, name, ROWS[name], text_to_text=True)
    assert [prompt.text for prompt in found.prompts] == [text] * len(targets)
    assert (found.targets, found.gold) == (targets, gold)


@pytest.mark.parametrize("name", sorted(set(T5) - {"copa", "winogrande"}))
def test_a_decoder_is_asked_for_an_answer(name: str, tmp_path: Path) -> None:
    text, targets, gold = T5[name]
    found = one(tmp_path, name, ROWS[name], text_to_text=False)
    assert [prompt.text for prompt in found.prompts] == [f"{text}\nAnswer:"] * len(targets)
    assert (found.targets, found.gold) == (targets, gold)


def test_a_decoder_completes_sentences(tmp_path: Path) -> None:
    copa = one(tmp_path, "copa", ROWS["copa"], text_to_text=False)
    assert {prompt.text for prompt in copa.prompts} == {"The man turned on the faucet, therefore"}
    assert (copa.targets, copa.gold) == (("the toilet filled with water.", "water flowed from the spout."), 1)
    cause = one(tmp_path, "copa", ROWS["copa"] | {"question": "cause"}, text_to_text=False)
    assert cause.prompts[0].text.endswith("the faucet, because")
    wino = one(tmp_path, "winogrande", ROWS["winogrande"], text_to_text=False)
    assert [prompt.text for prompt in wino.prompts] == [f"{SENTENCE} Ann", f"{SENTENCE} Bob"]
    assert (wino.targets, wino.gold) == (("trained more.", "trained more."), 0)


def test_questions_and_answers_know_more_than_their_text(tmp_path: Path) -> None:
    assert one(tmp_path, "multirc", ROWS["multirc"], False).group == "7.2"
    assert one(tmp_path, "squad", ROWS["squad"], False).answers == ("23 years", "23")
    whole = one(tmp_path, "hotpotqa_distractor", ROWS["hotpotqa"], True)
    assert whole.prompts[0].text.endswith(
        "context: Cat: Cats sleep. Ann: Ann was born. Ann ran. Bob: Bob sat. Bob slept."
    )
    for name, context in (("squad", "Ann ran for 23 years."), ("hotpotqa", "Ann: Ann ran. Bob: Bob sat.")):
        prompt = one(tmp_path, name, ROWS[name], False).prompts[0]
        assert prompt.text[prompt.start : prompt.stop] == context


@pytest.mark.parametrize("text_to_text", [True, False])
def test_both_layouts_of_a_blank_are_the_same_task(tmp_path: Path, text_to_text: bool) -> None:
    options = {"context_options": [f"{SENTENCE} {name}" for name in ("Ann", "Bob")], "continuation": "trained more."}
    found = one(tmp_path, "any name", options | {"gold": 0}, text_to_text)
    assert found == one(tmp_path, "winogrande", ROWS["winogrande"], text_to_text)


@pytest.mark.parametrize(
    ("query", "read"),
    [
        ("Passage: Ann ran.\nQuestion: did Ann run?", "Passage: Ann ran.\nQuestion: did Ann run?\nAnswer:"),
        ("Ann ran.\nQuestion: did Ann run?\nAnswer:", "Ann ran.\nQuestion: did Ann run?\nAnswer:"),
        ("Question: who?\n", "Question: who?\nAnswer:"),
        ("The man ran, because", "The man ran, because"),
    ],
)
def test_a_question_ends_alike_in_every_file(tmp_path: Path, query: str, read: str) -> None:
    found = one(tmp_path, "boolq", {"query": query, "choices": ["no", "yes"], "gold": "1"}, False)
    assert [prompt.text for prompt in found.prompts] == [read] * 2
    assert (found.targets, found.gold) == (("no", "yes"), 1)


def test_other_local_layouts(tmp_path: Path) -> None:
    piqa = one(tmp_path, "piqa", {"goal": "To boil", "sol1": "heat", "sol2": "cool", "label": 0}, False)
    assert (piqa.prompts[0].text, piqa.targets) == ("Question: To boil\nAnswer:", ("heat", "cool"))
    asked = one(tmp_path, "squad", {"query": "Question: who?", "answers_text": ["Ann", "Bob"]}, False)
    assert (asked.targets, asked.answers) == (("Ann",), ("Ann", "Bob"))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_files_of_every_kind_in_order(tmp_path: Path, suffix: str) -> None:
    rows = [ROWS["sst2"] | {"label": label} for label in (1, 0, 0)]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        text = write_rows(tmp_path / "rows", rows).read_bytes()
        file.write_bytes(gzip.compress(text) if suffix == "jsonl.gz" else text)
    task = TaskSource(name="sst2", train=[str(file)], test=[str(file), str(file)])
    assert [each.gold for each in read_task(task, "train", False).examples] == [1, 0, 0]
    assert [each.gold for each in read_task(task, "test", False).examples] == [1, 0, 0] * 2


def test_a_name_of_the_table_is_its_published_splits() -> None:
    assert rows_of(TaskSource(name="wikiqa"), "test") == DatasetText(dataset="microsoft/wiki_qa", split="test")
    assert rows_of(TaskSource(name="copa"), "train") == DatasetText(dataset="aps/super_glue", config="copa")
    assert {name for name in TASKS if TASKS[name].test != "validation"} == {"wikiqa"}


def test_a_dataset_is_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_rows(tmp_path / "train.jsonl", [ROWS["squad"]])
    task = TaskSource.model_validate({"name": "squad", "test": {"dataset": str(tmp_path)}})
    (found,) = read_task(task, "test", True).examples
    assert found == one(tmp_path, "squad", ROWS["squad"], True)


GOOD = {"query": "who?", "choices": ["Ann", "Bob"], "gold": 0}

REFUSED: dict[str, tuple[str, list[object], str]] = {
    "unknown fields": ("mine", [{"text": "x"}], "no row of the task 'mine'; a row has the fields query, choices"),
    "unknown fields of a task": ("sst2", [{"text": "x"}], "no row of the task 'sst2'; a row has the fields sentence"),
    "not a mapping": ("mine", [[1]], "rows.jsonl:1: no row"),
    "no row": ("mine", [], "mine: its test files hold no row"),
    "gold out of range": ("mine", [GOOD | {"gold": 2}], "2 is none of 2 choices"),
    "label of a hidden test split": ("sst2", [ROWS["sst2"] | {"label": -1}], "-1 is none of 2 choices"),
    "one choice": ("mine", [GOOD | {"choices": ["Ann"]}], "1 choices to choose from"),
    "blank choice": ("mine", [GOOD | {"choices": ["Ann", " "]}], "is blank"),
    "null field": ("mine", [GOOD | {"gold": None}], "the field 'gold' holds nothing"),
    "two blanks": ("winogrande", [ROWS["winogrande"] | {"sentence": "_ beat _"}], "rows.jsonl:1: not a row of"),
    "number for text": ("squad", [ROWS["squad"] | {"question": 3}], "not a row of question, context, answers"),
    "no answer": ("squad", [ROWS["squad"] | {"answers": {"text": []}}], "no answer is given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_task_is_refused(case: str, tmp_path: Path) -> None:
    name, rows, expected = REFUSED[case]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RecipeError) as refused:
        check_task(TaskSource(name=name, test=[str(file)]), "test")
    assert expected in str(refused.value)
    assert ";" in str(refused.value)


def test_every_row_is_looked_at_and_names_are_known(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [GOOD, GOOD, {"query": "who?"}])
    task = TaskSource(name="mine", test=[str(file)])
    check_task(task, "test")
    with pytest.raises(RecipeError, match=r"rows\.jsonl:3: the field 'choices' holds nothing"):
        list(read_task(task, "test", False).examples)
    with pytest.raises(RecipeError, match=r"'mine' is no task; give files, mine=FILE, or one of sst2, mrpc"):
        check_task(task, "train")
