"""What Ray is told before it is imported."""

from __future__ import annotations

import os
import sys

import pytest

from cluster.environment import prepare_private_cluster, running_cluster


def test_a_private_cluster_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    tokens = set()
    for _ in range(2):
        monkeypatch.setattr(os, "environ", {})
        prepare_private_cluster()
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2
    assert min(map(len, tokens)) >= 32


def test_what_the_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    monkeypatch.setattr(os, "environ", dict(settings))
    prepare_private_cluster()
    assert settings.items() <= os.environ.items()
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("address", "found"), [("10.0.0.1:6379", "10.0.0.1:6379"), ("http://10.0.0.1:8265", None), ("", None)]
)
def test_the_cluster_that_a_process_was_started_for(
    address: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert running_cluster() == found
