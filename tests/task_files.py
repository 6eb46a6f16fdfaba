"""Rows of tasks in their published layouts, files of them, and a tokenizer of whole words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"idx": 3, "sentence": "a gorgeous film", "label": 1},
    "mrpc": {"idx": 0, "sentence1": "He said so .", "sentence2": "So he said .", "label": 1},
    "multirc": {
        "paragraph": "<b>Sent 1: </b>Ann slept.<br><b>Sent 2: </b>Bob ran.<br>",
        "question": "Who ran?",
        "answer": "Ann",
        "idx": {"paragraph": 7, "question": 2, "answer": 0},
        "label": 0,
    },
    "copa": {
        "premise": "The man turned on the faucet.",
        "choice1": "The toilet filled with water.",
        "choice2": "Water flowed from the spout.",
        "question": "effect",
        "idx": 0,
        "label": 1,
    },
    "winogrande": {
        "sentence": "Ann beat the tired Bob because _ trained more.",
        "option1": "Ann",
        "option2": "Bob",
        "answer": "1",
    },
    "squad": {
        "id": "x",
        "title": "Ann",
        "context": "Ann ran for 23 years.",
        "question": " How long did Ann run?",
        "answers": {"text": ["23 years", "23"], "answer_start": [12, 12]},
    },
    "wikiqa": {"question_id": "Q0", "question": "who ran", "document_title": "Ann", "answer": "Ann ran .", "label": 1},
    "hotpotqa": {
        "id": "x",
        "question": "Who ran?",
        "answer": "Ann",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": {"title": ["Ann", "Bob"], "sent_id": [1, 0]},
        "context": {
            "title": ["Cat", "Ann", "Bob"],
            "sentences": [["Cats sleep."], ["Ann was born.", " Ann ran."], ["Bob sat.", " Bob slept."]],
        },
    },
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def word_tokenizer(num_words: int, names: dict[int, str] | None = None) -> PreTrainedTokenizerFast:
    """A token a word, `w3`, `w4` ...; the last one is unknown, and `names` are other words."""
    special = {0: "<pad>", 1: "<bos>", 2: "<eos>"}
    words = [(special | (names or {})).get(i, f"w{i}") for i in range(num_words)]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=words[2], pad_token=words[0])
