"""What tasks are scored by, with 95 % confidence intervals.

    accuracy               share of rows whose likeliest choice is the right one
    accuracy_by_bytes      the same, log-likelihoods divided by the bytes of the choice's text (UTF-8); where choices
                           are texts of several lengths, not the same labels in every row
    f1                     of the choice 1 (MRPC: equivalent; MultiRC: F1a, over all answers; WikiQA: right answer)
    question_exact_match   share of questions all of whose rows are right (MultiRC)
    exact_match            share of generated answers equal to one of the given ones, both normalised
    f1 (generated)         mean over rows of 2 |common tokens| / (|generated| + |given|), best over the given answers

Normalised as SQuAD and HotpotQA do: lower case, without punctuation, without the words a, an, the, white space single.
Proportions have Wilson's interval, F1 that of a percentile bootstrap with a fixed seed, over questions where several
rows share one.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Z = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above."""

_NUM_RESAMPLES = 1000

_CLOSED = {"yes", "no", "noanswer"}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value in [0, 1] and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def proportion(right: Sequence[bool]) -> Estimate:
    """The share of what is right, with Wilson's interval; at least one must be given."""
    n, p = len(right), sum(right) / len(right)
    centre, spread = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    # rounding must not leave the value outside
    return Estimate(p, max(0.0, min(p, (centre - spread) / scale)), min(1.0, max(p, (centre + spread) / scale)))


def bootstrap(sums_NK: ArrayLike, statistic: Callable[[NDArray[np.float64]], float]) -> Estimate:
    """A statistic of summed rows, and the percentiles of it over rows drawn with replacement.

    Args:
        sums_NK: what each of N independent units adds to K sums.
        statistic: (K,) sums -> value.
    """
    values = np.asarray(sums_NK, dtype=np.float64)
    generator = np.random.default_rng(0)
    drawn = [statistic(values[generator.integers(len(values), size=len(values))].sum(0)) for _ in range(_NUM_RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(statistic(values.sum(0)), float(low), float(high))


def mean(values: Sequence[float]) -> Estimate:
    """Mean of a value a row."""
    return bootstrap([(value, 1.0) for value in values], lambda sums: float(sums[0] / sums[1]))


def binary_f1(gold: Sequence[int], chosen: Sequence[int], groups: Sequence[object]) -> Estimate:
    """F1 of choice 1: 2 true positives / (2 true positives + false positives + false negatives); 0 without any.

    Args:
        gold, chosen: a row each.
        groups: rows of the same group are drawn together.
    """
    counts: dict[object, NDArray[np.float64]] = {}
    for right, found, group in zip(gold, chosen, groups, strict=True):
        one = np.array([right == found == 1, found == 1, right == 1], dtype=np.float64)
        counts[group] = counts.get(group, 0.0) + one

    def f1(sums: NDArray[np.float64]) -> float:
        return float(2 * sums[0] / max(sums[1] + sums[2], 1.0))

    return bootstrap(list(counts.values()), f1)


def by_group(right: Sequence[bool], groups: Sequence[object]) -> list[bool]:
    """Whether all rows of each group are right."""
    found: dict[object, bool] = {}
    for each, group in zip(right, groups, strict=True):
        found[group] = found.get(group, True) and each
    return list(found.values())


def normalised(answer: str) -> str:
    """An answer without what SQuAD does not compare."""
    bare = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(generated: str, answers: Sequence[str]) -> bool:
    """Whether it is one of the answers."""
    return normalised(generated) in map(normalised, answers)


def token_f1(generated: str, answers: Sequence[str], yes_no: bool = False) -> float:
    """Token F1 with the best of the answers.

    Args:
        generated: the model's words.
        answers: any of them is right.
        yes_no: an answer `yes` or `no`, given or generated, is right as a whole or not at all (HotpotQA).
    """
    return max(_f1(normalised(generated), normalised(answer), yes_no) for answer in answers)


def _f1(generated: str, answer: str, yes_no: bool) -> float:
    if yes_no and generated != answer and _CLOSED & {generated, answer}:
        return 0.0
    ours, theirs = generated.split(), answer.split()
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0
