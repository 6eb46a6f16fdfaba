"""Trains on Ray Train: one process a GPU, or a share of CPUs; when one of them dies all start again.

Each process finds the latest snapshot in the job folder, which all nodes must see, and goes on from there. What is
wrong for good (a loss that is not finite, a recipe that cannot be) ends the training at once. Ray Train is
given nothing to keep: what it writes goes to a temporary folder of this process.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from moe_compress.distillation.fit import Run, train
from moe_compress.errors import DistillationError, MoECompressError, RecipeError
from moe_compress.process import settle

from .failures import Failures, one_line, reason_of
from .placement import Needs, alive_nodes, room_for

_POLL_S = "0.5"
"""How often Ray Train asks its processes whether they live and are done."""

ROOM_S = 900.0
"""How long a cluster that others started may take to have room: nodes are replaced, or started for who asks."""

_ASK_S = 2.0

Say = Callable[[str], None]


def train_on_ray(run: Run, say: Say | None = None) -> None:
    """Runs a training on the cluster that this process is connected to.

    Args:
        run: the training.
        say: as of `find_room`.

    Raises:
        RecipeError: there is no room for so many processes.
        MoECompressError: it cannot go on; snapshots are kept.
    """
    how = run.task.settings.deepspeed
    processes, needs = find_room(how.processes, run.threads, run.device, say)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    with tempfile.TemporaryDirectory() as own, _interruptible():
        trainer = TorchTrainer(
            partial(_train_loop, run),
            torch_config=TorchConfig(backend="nccl" if "GPU" in needs else "gloo"),
            scaling_config=ScalingConfig(num_workers=processes, use_gpu="GPU" in needs, resources_per_worker=needs),
            run_config=RunConfig(
                name="training",
                storage_path=own,
                failure_config=FailureConfig(max_failures=how.max_failures),
                callbacks=[Failures(run.task.folder, run.events, how.max_failures)],
            ),
        )
        try:
            trainer.fit()
        except (TrainingFailedError, RayError) as error:
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            if isinstance(cause, MoECompressError):
                raise cause from None
            what = f"Ray Train gave up ({one_line(cause)})"
            if isinstance(cause, WorkerGroupError):
                what = f"processes failed {how.max_failures + 1} times, at last {reason_of(cause.worker_failures)}"
            raise DistillationError(f"training: {what}; snapshots are kept; run the job again to go on") from error


def find_room(processes: int | None, threads: int, device: str, say: Say | None = None) -> tuple[int, dict[str, int]]:
    """(how many training processes, the resources of each) on the cluster that this process is connected to.

    Args:
        processes, threads, device: of the recipe.
        say: tells a person what is waited for; None where the cluster is our own, and will not grow.

    Raises:
        RecipeError: its nodes have no room for so many.
    """
    began, told = time.monotonic(), False
    while True:
        nodes = alive_nodes().values()
        num_gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        needs = Needs(threads, num_gpus > 0 or device.startswith("cuda"))
        bundle = {"CPU": threads} | ({"GPU": 1} if needs.num_gpus else {})
        wanted, room = processes or num_gpus or 1, room_for(needs)
        if wanted <= room:
            if told:
                request_resources(bundles=[])
            return wanted, bundle
        what = f"distillation.deepspeed.processes: {wanted} need {needs} each, and the cluster has room for {room}"
        if say is None or time.monotonic() - began > ROOM_S:
            raise RecipeError(f"{what}; lower it, or cluster.threads")
        if not told:
            request_resources(bundles=[bundle] * wanted)  # a cluster that can grow does
            say(f"{what} so far; waiting for nodes")
            told = True
        time.sleep(_ASK_S)


def _train_loop(run: Run) -> None:
    """In each of the processes, torch.distributed is up."""
    settle(run.threads)
    train(run)


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
