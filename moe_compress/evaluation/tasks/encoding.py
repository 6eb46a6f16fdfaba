"""Prompts and answers to token ids, the same for training and for scoring.

A decoder reads prompt, space and answer as one text, and the tokens that reach beyond the prompt are the answer; before
it stands the beginning-of-sequence token where the tokenizer gives one. An encoder-decoder model reads prompt and
answer each as its tokenizer frames them. A prompt that is too long loses the front of its context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import RecipeError
from .examples import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 1 << 10
"""Texts that go to the tokenizer together: it returns Python integers."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and what is to follow it.

    Attributes:
        source, target: token ids.
        num_cut: tokens of the context that were left out.
    """

    source: list[int]
    target: list[int]
    num_cut: int


def encode(
    pairs: Sequence[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase, length: int, is_encoder_decoder: bool
) -> list[Encoded]:
    """Token ids of prompts and answers.

    Args:
        pairs: (prompt, answer).
        tokenizer: a fast one.
        length: most tokens of a prompt, and of an answer, of an encoder-decoder model; of both, and an
            end-of-sequence token, of a decoder.
        is_encoder_decoder: which of both the ids are for.

    Raises:
        RecipeError: an answer alone is longer.
    """
    encode_some = _encode_apart if is_encoder_decoder else _encode_joined
    starts = range(0, len(pairs), _AT_ONCE)
    return [found for start in starts for found in encode_some(pairs[start : start + _AT_ONCE], tokenizer, length)]


def _encode_joined(
    pairs: Sequence[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[Encoded]:
    begin = _beginning(tokenizer)
    prompts = [prompt.text.rstrip() for prompt, _ in pairs]
    texts = [f"{prompt} {target}" for prompt, (_, target) in zip(prompts, pairs, strict=True)]
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = []
    for (prompt, _), text, ids, offsets in zip(
        pairs, prompts, encoding["input_ids"], encoding["offset_mapping"], strict=True
    ):
        boundary = next((i for i, (_, end) in enumerate(offsets) if end > len(text)), len(ids))
        target = ids[boundary:]
        source = _cut(ids[:boundary], offsets, prompt, length - len(begin) - len(target) - 1, length)
        found.append(Encoded(begin + source, target, boundary - len(source)))
    return found


def _encode_apart(
    pairs: Sequence[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[Encoded]:
    encoding = tokenizer([prompt.text for prompt, _ in pairs], return_offsets_mapping=True, verbose=False)
    targets = tokenizer(text_target=[target for _, target in pairs], verbose=False)["input_ids"]
    found = []
    for (prompt, _), ids, offsets, target in zip(
        pairs, encoding["input_ids"], encoding["offset_mapping"], targets, strict=True
    ):
        source = _cut(ids, offsets, prompt, length if len(target) <= length else 0, length)
        found.append(Encoded(source, target, len(ids) - len(source)))
    return found


def _cut(ids: list[int], offsets: list[tuple[int, int]], prompt: Prompt, room: int, length: int) -> list[int]:
    """The last `room` tokens of a prompt, those beside its context kept as long as any of the context is left."""
    if room < 1:
        raise RecipeError(f"sequence_length: {length} tokens leave no room for a question beside its answer; raise it")
    excess = len(ids) - room
    if excess <= 0:
        return ids
    # an empty span is a special token's
    in_context = [
        i for i, (start, end) in enumerate(offsets[: len(ids)]) if start < end and prompt.start <= start < prompt.stop
    ]
    gone = {*in_context[:excess]}
    return [token for i, token in enumerate(ids) if i not in gone][-room:]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text."""
    framed: list[int] = tokenizer("")["input_ids"]
    return framed[:1] if framed and framed[0] == tokenizer.bos_token_id else []
