"""Trains on Ray: one process a GPU, or a share of CPUs; a process that dies starts all of them again.

Each process finds the latest snapshot in the job folder, which all nodes must see, and goes on from there. What is
wrong for good (a loss that is not finite, a recipe that cannot be) ends the training at the first failure.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from moe_compress.distillation.fit import Run, train
from moe_compress.errors import CheckpointError, CompressionError, DistillationError, MoECompressError, RecipeError
from moe_compress.process import settle

_FINAL = (RecipeError, CheckpointError, CompressionError, DistillationError)
_FAILURE_NAME = "failure.txt"


def _train_loop(config: dict[str, Any]) -> None:
    """In each of the processes, torch.distributed is up."""
    run: Run = config["run"]
    settle(run.threads)
    try:
        train(run)
    except _FINAL as error:  # it would fail again
        (run.task.folder / _FAILURE_NAME).write_text(f"{type(error).__name__}\n{error}")


def train_on_ray(run: Run) -> None:
    """Runs a training on the cluster that this process is connected to.

    Raises:
        MoECompressError: it cannot go on; snapshots are kept.
    """
    how = run.task.settings.deepspeed
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if run.device in ("auto", "cuda") else 0
    processes = how.processes or gpus or 1
    needed, there = processes * (1 if gpus else run.threads), gpus or int(resources.get("CPU", 1))
    if needed > there:
        raise RecipeError(
            f"distillation.deepspeed.processes: {processes} need {needed} {'GPUs' if gpus else 'CPUs'} and the cluster"
            f" has {there}; lower it"
        )
    failure = run.task.folder / _FAILURE_NAME
    failure.unlink(missing_ok=True)
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=processes,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": run.threads} | ({"GPU": 1} if gpus else {}),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(run.task.folder),
            failure_config=FailureConfig(max_failures=how.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DistillationError(
            f"training processes failed {how.max_failures + 1} times, last: {reason}; snapshots are kept; run the job"
            " again to go on"
        ) from error
    if failure.exists():
        kind, _, message = failure.read_text().partition("\n")
        kinds: dict[str, type[MoECompressError]] = {error.__name__: error for error in _FINAL}
        raise kinds[kind](message)
