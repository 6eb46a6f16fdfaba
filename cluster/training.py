"""Trains on Ray Train: one process a GPU, or a share of CPUs; when one of them dies all start again.

Each process finds the latest snapshot in the job folder, which all nodes must see, and goes on from there. What is
wrong for good (a loss that is not finite, a recipe that cannot be) ends the training at once. Ray Train is
given nothing to keep: its own folder is a temporary one of this process.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from moe_compress.checkpoint.writer import append_event
from moe_compress.distillation.fit import Run, train
from moe_compress.distillation.snapshots import read_progress
from moe_compress.errors import DistillationError, MoECompressError, RecipeError
from moe_compress.process import settle

_POLL_S = "0.5"
"""How often Ray Train asks its processes whether they live and are done."""


def train_on_ray(run: Run) -> None:
    """Runs a training on the cluster that this process is connected to.

    Raises:
        RecipeError: there is no room for so many processes.
        MoECompressError: it cannot go on; snapshots are kept.
    """
    how = run.task.settings.deepspeed
    processes, needs = find_room(how.processes, run.threads, run.device)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    with tempfile.TemporaryDirectory() as own, _interruptible():
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"run": run},
            torch_config=TorchConfig(backend="nccl" if "GPU" in needs else "gloo"),
            scaling_config=ScalingConfig(num_workers=processes, use_gpu="GPU" in needs, resources_per_worker=needs),
            run_config=RunConfig(
                name="training",
                storage_path=own,
                failure_config=FailureConfig(max_failures=how.max_failures),
                callbacks=[_Failures(run)],
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            if isinstance(cause, MoECompressError):
                raise cause from None
            reason = _reason(cause.worker_failures) if isinstance(cause, WorkerGroupError) else _one_line(cause)
            raise DistillationError(
                f"training processes failed {how.max_failures + 1} times, at last {reason}; snapshots are kept; run the"
                " job again to go on"
            ) from error


def find_room(processes: int | None, threads: int, device: str) -> tuple[int, dict[str, int]]:
    """(how many training processes, the resources of each) on the cluster that this process is connected to.

    Args:
        processes, threads, device: of the recipe.

    Raises:
        RecipeError: its nodes have no room for so many.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    needs = {"CPU": threads} | ({"GPU": 1} if num_gpus else {})
    processes = processes or num_gpus or 1
    room = sum(min(int(node.get(kind, 0)) // count for kind, count in needs.items()) for node in nodes)
    if processes > room:
        wanted = " and ".join(f"{count} {kind}" for kind, count in needs.items())
        raise RecipeError(
            f"distillation.deepspeed.processes: {processes} need {wanted} each, and the cluster has room for {room};"
            " lower it, or cluster.threads"
        )
    return processes, needs


def _train_loop(config: dict[str, Any]) -> None:
    """In each of the processes, torch.distributed is up."""
    run: Run = config["run"]
    settle(run.threads)
    train(run)


class _Failures(UserCallback):
    """In Ray Train's controller: ends a training that would fail again, and writes down that another starts again.

    Args:
        run: the training.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._left = run, run.task.settings.deepspeed.max_failures
        self._last = ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Hears of each failure, of some more than once.

        Raises:
            MoECompressError: of a process, which ends the training.
        """
        for error in worker_exceptions.values():
            if isinstance(error, MoECompressError):
                raise error
        reason = _reason(worker_exceptions)
        if self._left and reason != self._last:
            self._left, self._last = self._left - 1, reason
            step = read_progress(self._run.task.folder)[1].step
            append_event(self._run.events, "restart", step=step, reason=reason)


def _reason(failures: dict[int, Exception]) -> str:
    """One line on a process that died, or else raised an error; what others say of it comes after."""
    rank, error = min(failures.items(), key=lambda item: (isinstance(item[1], RuntimeError), item[0]))
    return f"process {rank}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train takes Ctrl-C for the end of this process, and keeps it for itself."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
