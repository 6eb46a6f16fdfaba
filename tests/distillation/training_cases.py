"""Trainings of tiny models in processes of their own."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import distributed, multiprocessing

from moe_compress.distillation.examples import Examples
from moe_compress.distillation.loop import Task
from moe_compress.distillation_options import DeepSpeed, Distillation

ORIGINAL_PARAMETERS = 10**9


def make_task(folder: Path, student: Path, teacher: Path | None, **settings: Any) -> Task:
    """A training to count, on sequences the last of which are padded at their ends."""
    generator = torch.Generator().manual_seed(0)
    ids = 1 + (torch.randint(50, (26, 1), generator=generator) + torch.arange(12)) % 50
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-6:, 7:] = False
    targets = ids.roll(-1, 1).masked_fill(~mask.roll(-1, 1), -100)
    targets[:, -1] = -100
    folder.mkdir(parents=True, exist_ok=True)
    Examples(ids, mask, targets).save(folder / "examples.safetensors")
    options = {"text": ["x"], "teacher": "live" if teacher else "none", "validation_sequences": 4, "batch_size": 6}
    options |= {"micro_batch_size": 2, "epochs": 2, "evaluate_every": 3, "checkpoint_every": 2, "dtype": "float32"}
    options |= {"optimizer": {"learning_rate": 3e-3}}
    return Task(
        settings=Distillation.model_validate(options | settings),
        student=student,
        teacher=teacher,
        cache=None,
        examples=folder / "examples.safetensors",
        folder=folder,
        dtype=torch.float32,
        original_parameters=ORIGINAL_PARAMETERS,
    )


def at_stage(task: Task, stage: int, folder: Path) -> Task:
    """The same training at another ZeRO stage, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    deepspeed = DeepSpeed(zero_stage=stage)  # type: ignore[arg-type]
    return replace(task, settings=task.settings.model_copy(update={"deepspeed": deepspeed}), folder=folder)


def curves(tasks: list[Task], world: int, stop: int | None = None) -> list[list[dict[str, Any]]]:
    """What each training says of its steps, all of them one after the other in the same `world` processes.

    Args:
        tasks: the trainings.
        world: processes.
        stop: the step after which a training is broken off; None to go on to its end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_run, args=(rank, world, port, tasks, stop, queue)) for rank in range(world)]
    for process in processes:
        process.start()
    found: list[list[dict[str, Any]]] = []
    while not found and any(process.is_alive() for process in processes):
        with contextlib.suppress(Empty):
            found = queue.get(timeout=0.2)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return found


class _Enough(Exception):
    pass


def _run(rank: int, world: int, port: int, tasks: list[Task], stop: int | None, queue: Any) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    from moe_compress.distillation.loop import Trainer

    distributed.init_process_group("gloo")
    said: list[list[dict[str, Any]]] = []
    for task in tasks:
        mine: list[dict[str, Any]] = []
        trainer = Trainer(task, mine.append)
        if stop is not None:
            step = trainer._step

            def until(trainer: Any = trainer, step: Any = step) -> None:
                if trainer.progress.step == stop:
                    raise _Enough
                step()

            trainer._step = until  # type: ignore[method-assign]
        with contextlib.suppress(_Enough):
            trainer.run()
        said.append(mine)
    if rank == 0:
        queue.put(said)
    distributed.barrier()
    distributed.destroy_process_group()
