"""The tasks on which MC-SMoE reports (arXiv 2310.01334), and local files of questions: rows to prompts and answers.

An encoder-decoder model reads each task as T5 does (arXiv 1910.10683, appendix D), `sst2 sentence: ...` to `positive`;
WikiQA, WinoGrande and HotpotQA, which T5 does not have, in the same style. A decoder reads the same and `Answer:` on a
line of its own, except where the choices complete a sentence: COPA's premise with `because` or `therefore`, and
WinoGrande's sentence up to the blank, filled with each option and scored by what follows (partial evaluation).

What is scored is the published validation split (WikiQA: test), as in the paper. It prompts otherwise, so that single
numbers differ; original and compressed compare. Of its tasks:

* WikiQA is accuracy over pairs of question and sentence. About 95 % of them are wrong answers, so a model that always
  says so has 95 %; the F1 of the right ones is given besides.
* HotpotQA is read with its supporting sentences alone (`hotpotqa`); all ten paragraphs are `hotpotqa_distractor`.
* SQuAD and HotpotQA are scored on generated text, not on teacher-forced tokens.
* MultiRC is F1 over all answers (the authors' code computes no accuracy); accuracy and the exact match by question
  are given besides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from .examples import Example, Prompt

Row = Mapping[str, Any]

CHOICE = ("accuracy",)
GENERATED = ("exact_match", "f1")


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows with certain fields.

    Attributes:
        fields: by these it is known.
        read: (row, whether it is for an encoder-decoder model) -> example. KeyError, TypeError, ValueError and
            IndexError say that a field holds something else than it should.
        metrics: of metrics.py, the first one the task's own.
        yes_no: F1 takes `yes` and `no` whole, as HotpotQA's does.
    """

    fields: tuple[str, ...]
    read: Callable[[Row, bool], Example]
    metrics: tuple[str, ...] = CHOICE
    yes_no: bool = False


@dataclass(frozen=True, slots=True)
class Template:
    """A task of the table: where its rows are published, and how they are read."""

    dataset: str
    config: str | None
    test: str
    layout: Layout
    train: str = "train"


def _asked(text: str, text_to_text: bool) -> str:
    """The text as a question that the answer follows."""
    return text if text_to_text or text.endswith("Answer:") else f"{text}\nAnswer:"


def _labelled(template: str, labels: tuple[str, ...], row: Row, text_to_text: bool) -> Example:
    text = template.format_map(row)
    return Example.choice(Prompt.of(_asked(text, text_to_text)), labels, _index(row["label"], labels))


def _index(label: Any, choices: tuple[str, ...]) -> int:
    index = int(label)
    if not 0 <= index < len(choices):
        raise ValueError(f"{label!r} is none of {len(choices)} choices")
    return index


def _multirc(row: Row, text_to_text: bool) -> Example:
    labels = ("False", "True")
    before = f"multirc question: {row['question']} answer: {row['answer']} paragraph: "
    paragraph = re.sub(r"</?b>", "", re.sub(r"<br>", " ", row["paragraph"]))
    prompt = Prompt.around(before, paragraph, _asked("", text_to_text))
    group = f"{row['idx']['paragraph']}.{row['idx']['question']}"
    return Example.choice(prompt, labels, _index(row["label"], labels), group)


def _copa(row: Row, text_to_text: bool) -> Example:
    choices = (row["choice1"], row["choice2"])
    gold = _index(row["label"], choices)
    if text_to_text:
        text = f"copa choice1: {choices[0]} choice2: {choices[1]} premise: {row['premise']} question: {row['question']}"
        return Example.choice(Prompt.of(text), ("False", "True"), gold)
    link = {"cause": "because", "effect": "therefore"}[row["question"]]
    premise = Prompt.of(f"{row['premise'].rstrip('. ')}, {link}")
    return Example.choice(premise, tuple(choice[0].lower() + choice[1:] for choice in choices), gold)


def _winogrande(row: Row, text_to_text: bool) -> Example:
    options = (row["option1"], row["option2"])
    before, after = row["sentence"].split("_")
    return _blank(before, options, after.strip(), _index(int(row["answer"]) - 1, options), text_to_text)


def _options(row: Row, text_to_text: bool) -> Example:
    contexts = row["context_options"]
    shared = takewhile(lambda words: len(set(words)) == 1, zip(*(each.split(" ") for each in contexts), strict=False))
    before = "".join(f"{words[0]} " for words in shared)
    options = tuple(context[len(before) :] for context in contexts)
    return _blank(before, options, row["continuation"], _index(row["gold"], options), text_to_text)


def _blank(before: str, options: tuple[str, ...], after: str, gold: int, text_to_text: bool) -> Example:
    """A sentence with one blank: the option that fills it, or what follows each option."""
    if not text_to_text:
        return Example(tuple(Prompt.of(before + option) for option in options), (after,) * len(options), gold)
    numbered = " ".join(f"option{number}: {option}" for number, option in enumerate(options, start=1))
    return Example.choice(Prompt.of(f"winogrande sentence: {before}_ {after} {numbered}"), options, gold)


def _wikiqa(row: Row, text_to_text: bool) -> Example:
    return _labelled("wikiqa question: {question} answer: {answer}", ("False", "True"), row, text_to_text)


def _squad(row: Row, text_to_text: bool) -> Example:
    return _answered(row["question"], row["context"], tuple(row["answers"]["text"]), text_to_text)


def _hotpotqa(only_facts: bool, row: Row, text_to_text: bool) -> Example:
    facts = set(zip(row["supporting_facts"]["title"], row["supporting_facts"]["sent_id"], strict=True))
    paragraphs = []
    for title, sentences in zip(row["context"]["title"], row["context"]["sentences"], strict=True):
        kept = [text for number, text in enumerate(sentences) if not only_facts or (title, number) in facts]
        if kept:
            paragraphs.append(f"{title}: {' '.join(' '.join(kept).split())}")
    return _answered(row["question"], " ".join(paragraphs), (row["answer"],), text_to_text)


def _answered(question: str, context: str, answers: tuple[str, ...], text_to_text: bool) -> Example:
    before = f"question: {question.strip()} context: "
    return Example.generated(Prompt.around(before, context, _asked("", text_to_text)), _some(answers))


def _some(answers: tuple[str, ...]) -> tuple[str, ...]:
    if not any(answer.strip() for answer in answers):
        raise ValueError("no answer is given")
    return answers


def _query(row: Row) -> Prompt:
    """A query as it stands; a question, with or without its last line in the file, ends with `Answer:`."""
    query = row["query"].rstrip()
    return Prompt.of(_asked(query, not re.search(r"^Question:", query, re.MULTILINE)))


def _choices(row: Row, text_to_text: bool) -> Example:
    choices = tuple(map(str, row["choices"]))
    return Example.choice(_query(row), choices, _index(row["gold"], choices))


def _answers(row: Row, text_to_text: bool) -> Example:
    return Example.generated(_query(row), _some(tuple(row["answers_text"])))


def _goal(row: Row, text_to_text: bool) -> Example:
    asked = {"query": f"Question: {row['goal']}", "choices": (row["sol1"], row["sol2"]), "gold": row["label"]}
    return _choices(asked, text_to_text)


_BLANK = Layout(("sentence", "option1", "option2", "answer"), _winogrande)

LOCAL = (
    Layout(("query", "choices", "gold"), _choices),
    Layout(("context_options", "continuation", "gold"), _options),
    Layout(("query", "answers_text"), _answers, GENERATED),
    Layout(("goal", "sol1", "sol2", "label"), _goal),
    _BLANK,
)
"""What the rows of files may be, whatever the task is called."""


def _hotpot_layout(only_facts: bool) -> Layout:
    fields = ("question", "answer", "context", "supporting_facts")
    return Layout(fields, partial(_hotpotqa, only_facts), GENERATED, yes_no=True)


TASKS: dict[str, Template] = {
    "sst2": Template(
        "nyu-mll/glue",
        "sst2",
        "validation",
        Layout(("sentence", "label"), partial(_labelled, "sst2 sentence: {sentence}", ("negative", "positive"))),
    ),
    "mrpc": Template(
        "nyu-mll/glue",
        "mrpc",
        "validation",
        Layout(
            ("sentence1", "sentence2", "label"),
            partial(_labelled, "mrpc sentence1: {sentence1} sentence2: {sentence2}", ("not_equivalent", "equivalent")),
            ("accuracy", "f1"),
        ),
    ),
    "multirc": Template(
        "aps/super_glue",
        "multirc",
        "validation",
        Layout(
            ("paragraph", "question", "answer", "idx", "label"), _multirc, ("f1", "accuracy", "question_exact_match")
        ),
    ),
    "copa": Template(
        "aps/super_glue",
        "copa",
        "validation",
        Layout(("premise", "choice1", "choice2", "question", "label"), _copa),
    ),
    "winogrande": Template("allenai/winogrande", "winogrande_l", "validation", _BLANK),
    "squad": Template(
        "rajpurkar/squad", None, "validation", Layout(("question", "context", "answers"), _squad, GENERATED)
    ),
    "wikiqa": Template(
        "microsoft/wiki_qa", None, "test", Layout(("question", "answer", "label"), _wikiqa, ("accuracy", "f1"))
    ),
    "hotpotqa": Template("hotpotqa/hotpot_qa", "distractor", "validation", _hotpot_layout(only_facts=True)),
    "hotpotqa_distractor": Template("hotpotqa/hotpot_qa", "distractor", "validation", _hotpot_layout(only_facts=False)),
}
"""By name: `datasets` name, config, split to score and layout."""
