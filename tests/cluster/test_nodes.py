"""A cluster of four nodes, however the workers lie on it: the bytes of this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cases import Run, cluster_of, left_behind

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def four() -> Iterator[Any]:
    with cluster_of(4) as cluster:
        yield cluster


def test_four_workers_in_two_replicas(four: Any, tmp_path: Path, model: Path, text: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    wanted = Run(here, model, text, local=True, replicas=2).go()
    run = Run(there, model, text, layer_workers=4, replicas=2, resident_layers="auto", placement="pack")
    assert run.go() == wanted
    assert not left_behind(run.job.folder)


def test_placement_counts_what_a_node_has_room_for(four: Any) -> None:
    from cluster.placement import Needs, alive_nodes, room_for, strategy

    needs = Needs(1)
    assert room_for(needs) == 4
    assert room_for(Needs(2)) == 0
    first = strategy("pack", needs, []).node_id
    assert strategy("pack", needs, [first]).node_id != first, "it has room for one"
    assert strategy("pack", needs, alive_nodes()) == "DEFAULT"
    assert strategy("spread", needs, []) == "SPREAD"
