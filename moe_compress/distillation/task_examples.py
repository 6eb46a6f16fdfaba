"""A task as what a model is trained on: one example a sequence, the answer alone counts."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from ..calibration.sources import shuffled
from ..calibration.text import IGNORED, padded
from ..evaluation.tasks.encoding import encode
from ..evaluation.tasks.reading import read_task
from ..recipe_fields import TaskSource
from .examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def task_examples(
    task: TaskSource,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_examples: int,
    seed: int,
    is_encoder_decoder: bool,
) -> tuple[Examples, int]:
    """At most `num_examples` training rows of a task, shuffled by `seed`, and how many of them were cut.

    A decoder reads prompt, answer and end-of-sequence token, and is to predict the last two; an encoder-decoder model
    reads the prompt, and its targets are the answer as its tokenizer frames it. The texts are those by which the task
    is scored (evaluation/tasks). A prompt that is too long loses the front of its context.

    Args:
        task: its training rows are taken.
        tokenizer: of the model.
        sequence_length: most tokens of a sequence, and of the targets of an encoder-decoder model.
        num_examples, seed: how many, and which.
        is_encoder_decoder: the kind of model.

    Returns:
        The examples, padded at their ends to the longest, and the number of those whose context was cut.

    Raises:
        RecipeError: the task's rows cannot be used, or an answer fills a sequence.
    """
    rows = shuffled(read_task(task, "train", is_encoder_decoder).examples, seed)
    pairs = [(row.prompts[row.gold], row.targets[row.gold]) for row in islice(rows, num_examples)]
    encoded = encode(pairs, tokenizer, sequence_length, is_encoder_decoder)
    num_cut = sum(one.num_cut > 0 for one in encoded)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if is_encoder_decoder:
        inputs, targets = [one.source for one in encoded], [one.target for one in encoded]
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        inputs = [(one.source + one.target + end)[:-1] for one in encoded]
        targets = [[IGNORED] * (len(one.source) - 1) + one.target + end for one in encoded]
    return Examples(*padded(inputs, pad), padded(targets, IGNORED)[0]), num_cut
