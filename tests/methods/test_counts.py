"""How many experts each layer keeps, on tiny models whose MoE layers have 4 experts of top 2, or 8 in 2 groups."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from moe_compress.errors import RecipeError
from moe_compress.method_options import Fewer, Method
from moe_compress.methods.counts import check_counts, fewest, kept_counts
from moe_compress.model.discovery import find_moe_layers
from tests.tiny_models import build_tiny

model_of = cache(build_tiny)
SCORES = [np.array([0.7, 0.2, 0.1, 0.0]), np.array([0.25] * 4), np.array([0.4, 0.3, 0.2, 0.1])]


def options(name: str = "msmoe", **fields: Any) -> Fewer:
    found = TypeAdapter(Method).validate_python({"name": name, "ratio": 0.5, **fields})
    assert isinstance(found, Fewer)
    return found


def counts_of(model: PreTrainedModel, method: Fewer, scores: Any = None) -> list[int]:
    return kept_counts(model, find_moe_layers(model), method, scores)


@pytest.mark.parametrize(("ratio", "expected"), [(0.25, [2, 4, 3]), (0.5, [1, 3, 2]), (0.75, [1, 1, 1])])
def test_adaptive_counts_follow_the_scores_of_all_layers(ratio: float, expected: list[int]) -> None:
    assert counts_of(model_of("mixtral"), options(ratio=ratio), SCORES) == expected


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.34, 0.5, 0.6])
@pytest.mark.parametrize("counts", ["adaptive", "uniform"])
@pytest.mark.parametrize("excluded", [[], [1]])
def test_at_least_the_asked_fraction_goes_and_excluded_layers_stay(
    ratio: float, counts: str, excluded: list[int]
) -> None:
    method = options(ratio=ratio, counts=counts, exclude_layers=excluded)
    if ratio > 0.5 and excluded:
        with pytest.raises(RecipeError, match=r"method\.ratio: 0\.6 .* the highest possible is 0\.5; lower it"):
            counts_of(model_of("mixtral"), method, SCORES)
        return
    found = counts_of(model_of("mixtral"), method, SCORES)
    assert sum(found) <= (1 - ratio) * 12
    assert all(found[index] == 4 for index in excluded)
    assert counts == "uniform" or sum(found) == np.floor((1 - ratio) * 12 + 1e-9)


def test_no_rounding_takes_an_expert_too_many() -> None:
    assert sum(counts_of(model_of("mixtral"), options(ratio=5 / 12), SCORES)) == 7  # 6.999... in floating point
    assert counts_of(model_of("deepseek_v3"), options(ratio=0.25, counts="uniform", router="shrink")) == [6, 6]


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("mixtral", {}, [1, 1, 1]),
        ("mixtral", {"router": "slice"}, [2, 2, 2]),  # top 2
        ("mixtral", {"max_group": 3}, [2, 2, 2]),
        ("mixtral", {"max_group": 1}, [4, 4, 4]),
        ("mixtral", {"exclude_layers": [2]}, [1, 1, 4]),
        ("deepseek_v3", {"max_group": 3}, [3, 3]),
        ("deepseek_v3", {"max_group": 3, "router": "slice"}, [4, 4]),  # the best 2 of one of 2 groups; 3 is uneven
    ],
)
def test_the_fewest_a_layer_may_keep(model_type: str, fields: dict[str, Any], expected: list[int]) -> None:
    model = model_of(model_type)
    assert fewest(model, find_moe_layers(model), options(**fields)) == expected


@pytest.mark.parametrize(
    ("model_type", "kept", "expected"),
    [
        ("mixtral", [3, 1, 0], 3),
        ("mixtral", [3, 3], 2),
        ("deepseek_v3", [0, 1, 3], 6),  # three in one of two groups
        ("deepseek_v3", [0, 7, 5], 4),
        ("deepseek_v3", [], 4),
    ],
)
def test_experts_that_must_stay_have_room(model_type: str, kept: list[int], expected: int) -> None:
    model = model_of(model_type)
    assert fewest(model, find_moe_layers(model), options("prune", keep={1: kept}))[1] == expected


def test_given_counts_are_taken() -> None:
    assert counts_of(model_of("mixtral"), options(counts=[4, 1, 3])) == [4, 1, 3]


@pytest.mark.parametrize(
    ("model_type", "method", "message"),
    [
        ("mixtral", options(ratio=0.8), r"method\.ratio: 0\.8 leaves 2 experts where 3 must stay; .* 0\.75"),
        ("mixtral", options(ratio=0.8, counts="uniform"), r"leaves 0 experts in a layer that must keep 1; .* 0\.75"),
        ("mixtral", options("prune", ratio=0.6), r"leaves 1 experts in a layer that must keep 2; .* 0\.5;"),
        ("mixtral", options("mcsmoe", ratio=0.9, merge_ratio=0.8), r"method\.merge_ratio: 0\.8 leaves"),
        ("mixtral", options(counts=[2, 2]), "2 numbers for 3 MoE layers"),
        ("mixtral", options(counts=[2, 2, 5]), "5 for MoE layer 2; it can keep 1 to 4"),
        ("mixtral", options(counts=[2, 2, 1], router="slice"), "1 for MoE layer 2; it can keep 2 to 4"),
        ("deepseek_v3", options(counts=[8, 5], router="slice"), "it can keep 4 to 8 experts, a multiple of 2"),
        ("mixtral", options(exclude_layers=[3]), "exclude_layers: 3 is not a MoE layer; there are 3, from 0"),
        ("mixtral", options(exclude_layers=[-1]), "exclude_layers: -1 is not"),
        ("mixtral", options(exclude_layers=[2, 1, 0]), "excludes all 3 MoE layers"),
        ("mixtral", options("prune", keep={3: [0]}), r"method\.keep: 3 is not a MoE layer"),
        ("mixtral", options("prune", keep={0: [4]}), "MoE layer 0 has no expert 4; it has 4, from 0"),
        ("deepseek_v3", options(router="slice"), "adaptive counts do not keep the router's 2 groups"),
        ("mixtral", options(counts=[2, 2, 3], router="shrink"), r"shrink writes a stock checkpoint.*\[2, 3\]"),
        ("deepseek_v4", options("prune"), "is a table of expert ids"),
    ],
)
def test_counts_that_cannot_be_are_refused_in_one_line(model_type: str, method: Fewer, message: str) -> None:
    model = model_of(model_type)
    with pytest.raises(RecipeError, match=message) as refusal:
        check_counts(model, find_moe_layers(model), method)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("router", ["keep", "slice"])
def test_counts_that_can_be_pass(router: str) -> None:
    model = model_of("mixtral")
    check_counts(model, find_moe_layers(model), options(ratio=0.3, router=router))


def test_the_highest_possible_ratio_is_possible() -> None:
    model = model_of("deepseek_v3")
    fields = {"counts": "uniform", "router": "slice", "exclude_layers": [0]}
    with pytest.raises(RecipeError, match=r"the highest possible is 0\.25;"):
        counts_of(model, options(ratio=0.26, **fields))
    assert counts_of(model, options(ratio=0.25, **fields)) == [8, 4]
