"""What is done about units and workers that are lost, without a cluster: Ray's answers are made up here."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import exceptions as rex
from rich.console import Console

from cluster import pool, units
from cluster.executor import RayExecutor
from cluster.placement import Needs, pause_s
from cluster.pool import MAX_BAD_STARTS, RayPool
from cluster.units import MAX_DEATHS, MAX_NODE_DEATHS, Units
from moe_compress.errors import CalibrationError, CompressionError, RecipeError, StorageError
from moe_compress.executor import Alone, Joined
from moe_compress.progress import Reporter
from moe_compress.recipe import Cluster

REFUSED = StorageError(errno.EIO, "s3://bucket/x: no such host")
Answers = list[Any]


class FakeRay:
    """Each call is over at once; its outcome is the next answer, raised where it is an error."""

    def __init__(self, answers: Answers) -> None:
        self.answers, self.num_calls, self.time_s = answers, 0, 0.0

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        call = SimpleNamespace(remote=self._call)
        actor = SimpleNamespace(remote=lambda *args: SimpleNamespace(open=call))
        return lambda made_of: actor if isinstance(made_of, type) else call

    def _call(self, *args: Any) -> int:
        self.num_calls += 1
        return self.num_calls

    def wait(self, refs: list[int], **options: Any) -> tuple[list[int], list[int]]:
        return refs[:1], refs[1:]

    def get(self, ref: int) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, actor: Any) -> None:
        pass

    def monotonic(self) -> float:
        return self.time_s

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answers], FakeRay]:
    def fake(answers: Answers) -> FakeRay:
        made = FakeRay(answers)
        for module in (units, pool):
            for name in ("remote", "wait", "get"):
                monkeypatch.setattr(module.ray, name, getattr(made, name))
            for name in ("monotonic", "sleep"):
                monkeypatch.setattr(module.time, name, getattr(made, name))
        monkeypatch.setattr(ray, "kill", made.kill)
        return made

    return fake


def task_error(cause: Exception) -> rex.RayTaskError:
    return rex.RayTaskError("f", "traceback", cause)


def died() -> Exception:
    return rex.WorkerCrashedError()


def node_died() -> Exception:
    return rex.NodeDiedError("gone")


@pytest.mark.parametrize("error", [died(), node_died(), task_error(REFUSED), rex.OutOfMemoryError("full")])
def test_what_was_lost_is_done_again(error: Exception, answering: Callable[[Answers], FakeRay]) -> None:
    fake = answering([error, error, "made"])
    console = Console(record=True, quiet=True)
    work = Units(Needs(1), 1, Reporter(None, console))
    assert list(work.results([work.submit(len, "x")])) == [(0, "made")]
    assert fake.num_calls == 3
    assert fake.time_s >= pause_s(1) + pause_s(2)


@pytest.mark.parametrize(
    ("error", "most", "raised"),
    [
        (died(), MAX_DEATHS, CompressionError),
        (node_died(), MAX_NODE_DEATHS, CompressionError),
        (task_error(REFUSED), MAX_DEATHS, StorageError),
    ],
)
def test_what_dies_again_and_again_ends_the_job(
    error: Exception, most: int, raised: type[Exception], answering: Callable[[Answers], FakeRay]
) -> None:
    fake = answering([error] * (most + 1))
    work = Units(Needs(1), 1, Reporter(None, Console(quiet=True)))
    with pytest.raises(raised, match="no such host" if raised is StorageError else rf"died {most + 1} times"):
        list(work.results([work.submit(len, "x")]))
    assert fake.num_calls == most + 1


def test_an_error_of_the_unit_itself_is_raised_at_once(answering: Callable[[Answers], FakeRay]) -> None:
    fake = answering([task_error(CalibrationError("nan"))])
    work = Units(Needs(1), 1, Reporter(None, Console(quiet=True)))
    with pytest.raises(CalibrationError, match="nan"):
        list(work.results([work.submit(len, "x")]))
    assert fake.num_calls == 1


def test_a_node_on_which_nothing_starts_is_done_without(
    answering: Callable[[Answers], FakeRay], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [rex.ActorDiedError() if at % 2 else task_error(REFUSED) for at in range(MAX_BAD_STARTS + 1)]
    fake = answering([("model", "node"), *bad])
    monkeypatch.setattr(pool, "alive_nodes", lambda: {"node": {}})
    monkeypatch.setattr(pool, "PATIENCE_S", 1e9)
    said: list[str] = []
    setup: Any = SimpleNamespace(num_workers=2)
    workers = RayPool(setup, 1, Needs(1), "spread", said.append, tend=lambda: None)
    assert workers.wait() == [Joined(0, "model")]  # type: ignore[arg-type]
    assert workers.wait() == [Alone()]
    assert said == [f"{MAX_BAD_STARTS + 1} layer workers in a row died as they started ({REFUSED}); going on without"]
    assert fake.time_s >= sum(map(pause_s, range(1, MAX_BAD_STARTS + 1))) - 1


def test_nothing_starts_anywhere(answering: Callable[[Answers], FakeRay], monkeypatch: pytest.MonkeyPatch) -> None:
    answering([rex.ActorDiedError()] * (MAX_BAD_STARTS + 1))
    monkeypatch.setattr(pool, "alive_nodes", dict)
    monkeypatch.setattr(pool, "PATIENCE_S", 1e9)
    setup: Any = SimpleNamespace(num_workers=1)
    workers = RayPool(setup, 1, Needs(1), "spread", lambda text: None, tend=lambda: None)
    with pytest.raises(CalibrationError, match=f"{MAX_BAD_STARTS + 1} layer workers in a row died as they started"):
        workers.wait()


@pytest.mark.parametrize(
    ("device", "address", "gpus", "needed"),
    [("cuda", "head:6379", 0, 1), ("auto", "head:6379", 0, 0), ("auto", None, 2, 1), ("cpu", None, 2, 0)],
)
def test_gpus_are_asked_for(
    device: str, address: str | None, gpus: int, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = executor_of(Cluster(device=device, address=address), gpus, monkeypatch)
    assert executor._needs.num_gpus == needed


def test_a_gpu_that_this_machine_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"^cluster.device: cuda, and Ray finds no GPU here; .* set cpu$"):
        executor_of(Cluster(device="cuda"), 0, monkeypatch)


def executor_of(settings: Cluster, gpus: int, monkeypatch: pytest.MonkeyPatch) -> RayExecutor:
    """Where Ray knows of so many GPUs."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    return RayExecutor(settings, Reporter(None, Console(quiet=True)))
