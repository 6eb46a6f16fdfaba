"""Runs a training in this very process; `cluster/training.py` runs it in many."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ..distillation_options import Distillation
from ..errors import RecipeError
from ..process import settle
from .loop import Task, Trainer
from .records import StepRecords
from .snapshots import Claim


@dataclass(frozen=True)
class Run:
    """A training and where its figures go.

    Attributes:
        task: the training.
        events, board: file and folder of the figures of its steps (records.py).
        threads: numerical threads of a process.
        device: torch device; `auto` is CUDA where there is one.
    """

    task: Task
    events: Path
    board: Path
    threads: int
    device: str

    @property
    def on_gpu(self) -> bool:
        """Whether processes of this machine train on GPUs."""
        return self.device.startswith("cuda") or (self.device == "auto" and torch.cuda.is_available())


def check_processes(settings: Distillation) -> None:
    """Refuses more processes than this one.

    Raises:
        RecipeError: they are asked for.
    """
    processes = settings.deepspeed.processes
    if processes not in (None, 1):
        raise RecipeError(
            f"distillation.deepspeed.processes: {processes} need Ray; set cluster.local: false, or leave processes out"
        )


def train_here(run: Run) -> None:
    """One process, without Ray.

    Raises:
        RecipeError: more processes are asked for.
        DistillationError: the loss is not finite.
    """
    check_processes(run.task.settings)
    settle(run.threads)
    if not distributed.is_initialized():  # DeepSpeed knows one group in the life of a process
        os.environ.setdefault("LOCAL_RANK", "0")  # it asks for it
        backend = "nccl" if run.on_gpu else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        atexit.register(distributed.destroy_process_group)
    train(run)


def train(run: Run) -> None:
    """This process's part, once torch.distributed is up."""
    if distributed.get_rank():
        Trainer(run.task, _nothing).run()
        return
    claim, records = Claim(run.task.folder), StepRecords(run.events, run.board)

    def tell(figures: dict[str, Any]) -> None:
        claim.check()
        records(figures)

    Trainer(run.task, tell).run()


def _nothing(figures: dict[str, Any]) -> None:
    pass
