from __future__ import annotations

import pytest

from tests.benchmarks.bench_factorisation import PROJECTIONS, run


def test_all_routes_reach_the_same_error_at_small_size() -> None:
    errors = run(num_experts=2, hidden_size=32, intermediate_size=80)["errors"]
    for p in PROJECTIONS:
        assert 0 < errors[f"ours {p}"] < 1
        assert errors[f"ours {p}"] == pytest.approx(errors[f"published {p}"], rel=1e-4)
        assert errors[f"ours {p}"] == pytest.approx(errors[f"lean {p}"], rel=1e-4)
