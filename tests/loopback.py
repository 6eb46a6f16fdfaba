"""A Ray cluster on loopback that asks for a token, with a job server and metrics; for tests that submit to it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
START_S = 120


@dataclass(frozen=True, slots=True)
class Loopback:
    """A cluster that runs.

    Attributes:
        dashboard: URL of the job server.
        address: for drivers.
        metrics: URL where Prometheus would ask.
        token: without which nobody is answered.
        environment: of processes that are to talk to it.
    """

    dashboard: str
    address: str
    metrics: str
    token: str
    environment: dict[str, str]


@contextmanager
def loopback_cluster(num_cpus: int = 2) -> Iterator[Loopback]:
    """Starts a cluster and ends it, and no other on this machine."""
    ports = _free_ports(5)
    token = secrets.token_hex(32)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    folder = tempfile.mkdtemp(prefix="rl", dir="/tmp")  # sockets lie below it: their paths must be short
    options = {
        "node-ip-address": "127.0.0.1",
        "port": ports[0],
        "dashboard-host": "127.0.0.1",
        "dashboard-port": ports[1],
        "metrics-export-port": ports[2],
        "dashboard-agent-listen-port": ports[3],
        "ray-client-server-port": ports[4],
        "num-cpus": num_cpus,
        "temp-dir": folder,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        log = stack.enter_context(open(Path(folder) / "start.log", "w+"))
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        stack.callback(_end, head)
        dashboard = f"http://127.0.0.1:{ports[1]}"
        _wait_for(f"{dashboard}/api/jobs/", token, head, Path(log.name))
        yield Loopback(
            dashboard=dashboard,
            address=f"127.0.0.1:{ports[0]}",
            metrics=f"http://127.0.0.1:{ports[2]}/metrics",
            token=token,
            environment=environment,
        )


def ask(url: str, token: str) -> str:
    """What a server answers to a holder of the token."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _wait_for(url: str, token: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            ask(url, token)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)


def _end(head: subprocess.Popen[bytes]) -> None:
    try:
        processes = psutil.Process(head.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        processes = []
    head.terminate()
    try:
        head.wait(timeout=20)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        process.kill()
