"""One question of a task and its possible answers, as texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads before it answers.

    Attributes:
        text: all of it.
        start, stop: characters of the context, which goes first, from its front, where the text is too long.
    """

    text: str
    start: int
    stop: int

    @classmethod
    def around(cls, before: str, context: str, after: str) -> Prompt:
        """A context between what always stays."""
        return cls(before + context + after, len(before), len(before) + len(context))

    @classmethod
    def of(cls, text: str) -> Prompt:
        """A text whose front may go."""
        return cls(text, 0, len(text))


@dataclass(frozen=True, slots=True)
class Example:
    """A row of a task.

    Attributes:
        prompts, targets: for each choice what is read and what follows it; the one pair to train on, if the answer is
            generated.
        gold: the right choice.
        group: question that the row belongs to, where several rows share one.
        answers: what a generated answer may be; none where there are choices.
    """

    prompts: tuple[Prompt, ...]
    targets: tuple[str, ...]
    gold: int = 0
    group: str | None = None
    answers: tuple[str, ...] = ()

    @classmethod
    def choice(cls, prompt: Prompt, targets: tuple[str, ...], gold: int, group: str | None = None) -> Example:
        """Choices after one prompt."""
        return cls((prompt,) * len(targets), targets, gold, group)

    @classmethod
    def generated(cls, prompt: Prompt, answers: tuple[str, ...]) -> Example:
        """An answer in the model's own words, compared with several."""
        return cls((prompt,), answers[:1], answers=answers)
