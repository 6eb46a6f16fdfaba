"""Which part of the packed tensors is whose; what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_compress.errors import CheckpointError
from moe_compress.model.slots import DENSE, FactorisedSlot


@st.composite
def shared_ranks(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Ranks, and whom each expert follows."""
    ranks = draw(st.lists(st.integers(DENSE, 9), min_size=1, max_size=8))
    is_leader = [draw(st.booleans()) for _ in ranks]
    share = []
    for expert, rank in enumerate(ranks):
        leaders = [e for e, other in enumerate(ranks) if is_leader[e] and other >= max(rank, 0)]
        share.append(draw(st.sampled_from(leaders)) if leaders and not is_leader[expert] else expert)
    return ranks, share


@given(shared_ranks())
def test_left_factors_are_apart_and_right_factors_are_the_leaders(drawn: tuple[list[int], list[int]]) -> None:
    ranks, share = drawn
    slot = FactorisedSlot("up", 11, 10, ranks, share=share)
    experts = range(len(ranks))
    left = [row for e in experts for row in range(*slot.factor_rows(e).indices(10**6))]
    assert left == list(range(slot.shapes()["up_u"][0]))
    right = [row for e in experts if share[e] == e for row in range(*slot.right_rows(e).indices(10**6))]
    assert right == list(range(slot.shapes()["up_v"][0]))
    for e in experts:
        rows, of_leader = slot.right_rows(e), slot.right_rows(share[e])
        assert rows.stop - rows.start == max(ranks[e], 0)
        assert rows.start == of_leader.start
        assert rows.stop <= of_leader.stop


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bases": [0]}, r"up\.bases: 1 entries for 3 experts"),
        ({"bases": [0, -2, 0]}, r"up\.bases: -2 of expert 1 is not -1 or the number of a base"),
        ({"share": [0, 0, 0]}, r"up\.share: 0 of expert 1 is not an expert that leads itself"),  # of rank 2 < 3
        ({"share": [1, 2, 2]}, r"up\.share: 1 of expert 0"),  # which follows itself
        ({"num_sparse": [0, 11, 0]}, r"up\.num_sparse: 11 of expert 1"),
        ({"num_sparse": [0, 0, 1]}, r"up\.num_sparse: 1 of expert 2 .* 0 of a whole matrix"),
        ({"bases": [0, 0, 0], "base_columns": 11}, r"up\.base_columns: 11 of 10 columns"),
        ({"bases": [0, 0, 0], "skip": 1.0}, r"up\.skip: 1\.0 is not in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        FactorisedSlot("up", 12, 10, [2, 3, DENSE], **fields)
