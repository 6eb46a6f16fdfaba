"""What Ray is told and tells by the environment. It is set before Ray is imported, which reads it then."""

from __future__ import annotations

import os
import secrets
import sys


def prepare_private_cluster() -> None:
    """A local cluster answers on loopback only, to holders of a token nobody else knows, and reports to nobody.

    Without this Ray would write a token into the home folder. What the user has set is left alone.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # what training processes tell each other
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def running_cluster() -> str | None:
    """The address of the cluster that this process was started for: Ray sets it for what is submitted to it.

    The address of a dashboard is none that a driver connects to, but what `ray job submit` reads.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    return address if address and "://" not in address else None


def show_token() -> None:
    """Who has a token shows it to the cluster, without being told that it is asked for."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
