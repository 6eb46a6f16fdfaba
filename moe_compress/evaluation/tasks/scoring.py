"""The score of a checkpoint on a task: by the likelihood of each choice, or by generated answers.

The likeliest choice is the model's answer. Generated answers are greedy and come from the whole model in memory
(generation.py); everything else is streamed. Which rows share a micro-batch depends on the task and the batch size
alone, so the numbers are the same however many workers share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from operator import truediv
from pathlib import Path
from typing import Any

from ...recipe_fields import TaskSource
from ..generation import generate_answers
from .asking import Asked, Units, here
from .choices import choice_likelihoods
from .examples import Example
from .metrics import Estimate, binary_f1, by_group, exact_match, mean, proportion, token_f1
from .reading import read_task
from .templates import Layout


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A checkpoint's scores on a task.

    Attributes:
        task: its name.
        num_examples: that were scored.
        num_cut: of them, those whose context did not fit whole.
        metrics: by name (metrics.py), the task's own first.
    """

    task: str
    num_examples: int
    num_cut: int
    metrics: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the name."""
        return {name: value for name, value in asdict(self).items() if name != "task"}


def score_task(
    checkpoint: Path,
    task: TaskSource,
    max_examples: int | None = None,
    sequence_length: int = 2048,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str = "auto",
    level: str | None = None,
    units: Units = here,
) -> TaskScore:
    """Scores a checkpoint, compressed or not, on the test rows of a task.

    Args:
        checkpoint: folder.
        task: which.
        max_examples: the first so many; None for all.
        sequence_length, batch_size, dtype, device, level, units: as of Asked.

    Raises:
        RecipeError: the task or its files cannot be used.
        CheckpointError: the tokenizer does not belong to the model.
    """
    asked = Asked(checkpoint, sequence_length, batch_size, dtype, device, level, units)
    rows = read_task(task, "test", asked.is_encoder_decoder)
    examples = list(islice(rows.examples, max_examples))
    score = _score_answers if examples[0].answers else _score_choices
    metrics, num_cut = score(examples, rows.layout, asked)
    return TaskScore(task.name, len(examples), num_cut, metrics)


def _score_choices(examples: list[Example], layout: Layout, asked: Asked) -> tuple[dict[str, Estimate], int]:
    likelihoods, num_cut = choice_likelihoods(examples, asked)
    chosen = [_largest(values) for values in likelihoods]
    gold = [each.gold for each in examples]
    groups = [number if each.group is None else each.group for number, each in enumerate(examples)]
    right = [ours == theirs for ours, theirs in zip(chosen, gold, strict=True)]
    measures: dict[str, Callable[[], Estimate]] = {
        "accuracy": lambda: proportion(right),
        "f1": lambda: binary_f1(gold, chosen, groups),
        "question_exact_match": lambda: proportion(by_group(right, groups)),
    }
    metrics = {name: measures[name]() for name in layout.metrics}
    sizes = [[len(target.encode()) for target in each.targets] for each in examples]
    same_labels = len({each.targets for each in examples}) == 1
    if not same_labels and any(len(set(of_choices)) > 1 for of_choices in sizes):
        a_byte = [list(map(truediv, *each)) for each in zip(likelihoods, sizes, strict=True)]
        likeliest = zip(map(_largest, a_byte), gold, strict=True)
        metrics["accuracy_by_bytes"] = proportion([ours == theirs for ours, theirs in likeliest])
    return metrics, num_cut


def _largest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _score_answers(examples: list[Example], layout: Layout, asked: Asked) -> tuple[dict[str, Estimate], int]:
    encoded = asked.encode([(each.prompts[0], each.targets[0]) for each in examples])
    answers = [answer for each in examples for answer in each.answers]
    longest = 1 + max(map(len, asked.tokenizer(answers)["input_ids"]))
    texts = asked.run(generate_answers, [one.source for one in encoded], len, longest)
    spoken = list(zip(texts, examples, strict=True))
    measures: dict[str, Callable[[], Estimate]] = {
        "exact_match": lambda: proportion([exact_match(text, each.answers) for text, each in spoken]),
        "f1": lambda: mean([token_f1(text, each.answers, layout.yes_no) for text, each in spoken]),
    }
    return {name: measures[name]() for name in layout.metrics}, sum(one.num_cut > 0 for one in encoded)
