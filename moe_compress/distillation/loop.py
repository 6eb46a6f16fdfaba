"""The training loop of one process: the same on one process and on many, at any ZeRO stage, resumed or not.

Each optimizer step goes through `batch_size` sequences, shared out over the processes in micro-batches. The loss of a
micro-batch is its sum over tokens divided by the tokens of the whole step, so neither the number of processes nor the
size of a micro-batch nor padding changes what is minimised. Everything a step depends on is a function of its number:
sequences, learning rate, random numbers; or lies in the snapshot. So a run that was killed ends where it would have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..calibration.text import IGNORED
from ..checkpoint.writer import atomic_write
from ..distillation_options import Distillation
from ..errors import DistillationError
from .engine import Engine, deepspeed_config, join_processes, learning_rate, partitioned, require_deepspeed
from .examples import Examples
from .losses import CachedTargets, FullTargets, hidden_loss, router_loss, token_loss
from .order import NOTHING, Order, micro_batches, num_micro_batches
from .parameters import choose_trained
from .routers import RouterLogits
from .snapshots import Progress, all_sum, load_snapshot, read_progress, remove_snapshots, save_best, save_snapshot
from .sparsity import ColumnPruner
from .student import checkpoint_activations, dropout_seed, forward, load_model
from .teacher import TeacherCache

RESULT_NAME = "result.json"
"""Written last: the training is over."""

Tell = Callable[[dict[str, Any]], None]
"""Takes the figures of a step; called in the first process alone."""


@dataclass(frozen=True)
class Task:
    """What every process of a training is given.

    Attributes:
        settings: the recipe's part.
        student: the checkpoint to train.
        teacher: the checkpoint to learn from while training; None where there is none, or a cache.
        cache: folder of the teacher's answers on the examples, those held out first; None without.
        examples: file of all sequences; the first `settings.validation_sequences` are held out.
        folder: where snapshots and the outcome go.
        dtype: to compute in.
        original_parameters: of all routed experts before compression.
    """

    settings: Distillation
    student: Path
    teacher: Path | None
    cache: Path | None
    examples: Path
    folder: Path
    dtype: torch.dtype
    original_parameters: int


class Trainer:
    """One process's part of a training; torch.distributed must be up.

    Args:
        task: what to do.
        tell: hears of every step.
    """

    def __init__(self, task: Task, tell: Tell) -> None:
        require_deepspeed()
        join_processes()
        self.task, self.settings, self.tell = task, task.settings, tell
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.examples = Examples.load(task.examples)
        self.order = Order.of(self.settings, len(self.examples.input_ids))
        self.cache = None if task.cache is None else TeacherCache(task.cache)
        self.accumulation = num_micro_batches(self.settings.batch_size, self.world, self.settings.micro_batch_size)
        config = deepspeed_config(self.settings, task.dtype, self.accumulation, self.world)
        with partitioned(config, self.settings.deepspeed.zero_stage == 3):
            student = load_model(task.student, task.dtype)
            teacher = None if task.teacher is None else load_model(task.teacher, task.dtype)
        choose_trained(student, self.settings.train)
        if self.settings.deepspeed.gradient_checkpointing:
            checkpoint_activations(student)
        self.pruner = None
        if self.settings.sparsity is not None:
            self.pruner = ColumnPruner(student, self.settings.sparsity, self.order.num_steps, task.original_parameters)
        self.engine = Engine(student, self.settings, config)
        self.teacher = None if teacher is None else self.engine.beside(teacher)
        self.routers = [
            RouterLogits(model) for model in (student, teacher) if model is not None and self._wants_routers
        ]
        self.progress = Progress()

    @property
    def _wants_routers(self) -> bool:
        return self.settings.loss.router > 0

    def run(self) -> None:
        """Trains, from the latest snapshot if there is one, and leaves the best weights and the outcome."""
        snapshot, self.progress = read_progress(self.task.folder)
        if snapshot is not None:
            extra = load_snapshot(snapshot, self.engine, self.progress)
            if self.pruner is not None:
                self.pruner.load_state_dict(extra)
        else:
            self._validate()
        began = time.monotonic() - self.progress.seconds
        every = self.settings.evaluate_every, self.settings.checkpoint_every
        while self.progress.step < self.order.num_steps:
            self._step()
            step = self.progress.step
            self.progress.seconds = time.monotonic() - began
            is_last = step == self.order.num_steps
            if is_last or (every[0] and step % every[0] == 0):
                self._validate()
            if not is_last and every[1] and step % every[1] == 0:
                extra = {} if self.pruner is None else self.pruner.state_dict()
                save_snapshot(self.task.folder, self.engine, self.progress, extra)
        self._finish()

    def _step(self) -> None:
        """One optimizer step."""
        began, step = time.monotonic(), self.progress.step
        batch_B = self.order.batch(step) + self.settings.validation_sequences
        num_tokens = int(self.examples.rows(batch_B).num_counted.sum())
        scale = self.world * self.accumulation / max(num_tokens, 1)
        rate = learning_rate(self.settings, step, self.order.num_steps)
        sums = torch.zeros(3, dtype=torch.float64)
        self.engine.module.train()
        shares = micro_batches(batch_B, self.rank, self.world, self.settings.micro_batch_size, self.accumulation)
        for micro, index_B in enumerate(shares):
            torch.manual_seed(dropout_seed(self.settings.seed, step, micro, self.rank))
            total, parts = self._loss(index_B)
            sums += parts
            self.engine.backward(total * scale)
            if micro + 1 == len(shares):
                found = all_sum(sums.tolist(), self.engine.device)
                self._check(found, batch_B)
            self.engine.step(rate)
        norm = self.engine.gradient_norm
        if norm is not None and not isfinite(norm):
            self._give_up(f"the gradient of step {step + 1} is {norm}", batch_B)
        self.progress.step += 1
        figures = {} if norm is None else {"gradient_norm": norm}
        if self.pruner is not None:
            self.pruner.step(self.progress.step)
            figures |= self.pruner.progress
        self._tell(found, num_tokens, rate, time.monotonic() - began, figures)

    def _loss(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """(the sum over a micro-batch's tokens, with a gradient; that sum, CE and KL as numbers)."""
        loss, device = self.settings.loss, self.engine.device
        rows = self.examples.rows(index_B.clamp_min(0))
        targets_BL = rows.targets.masked_fill((index_B == NOTHING)[:, None], IGNORED)
        ids_BS, mask_BS, targets_BL = (t.to(device) for t in (rows.input_ids, rows.attention_mask, targets_BL))
        with_hidden, config = loss.hidden > 0, self.engine.module.config
        theirs: Any = None
        if self.teacher is not None:
            with torch.no_grad():
                theirs = forward(self.teacher, config, ids_BS, mask_BS, targets_BL, with_hidden)
        out = forward(self.engine, config, ids_BS, mask_BS, targets_BL, with_hidden)
        answer: FullTargets | CachedTargets | None = None
        if theirs is not None:
            answer = FullTargets(theirs.logits.flatten(0, 1))
        elif self.cache is not None and len(there := index_B[index_B != NOTHING]):
            answer = self.cache.targets(there).to(device)
        found = token_loss(
            out.logits.flatten(0, 1), targets_BL.flatten(), answer, self.settings.ce, loss.kd, loss.temperature
        )
        total, counts_BL = found.total, targets_BL != IGNORED
        if loss.hidden:
            total = total + loss.hidden * hidden_loss(_layers(out), _layers(theirs), counts_BL)
        if self._wants_routers:
            student, teacher = (routers.take() for routers in self.routers)
            total = total + loss.router * router_loss(student, teacher, counts_BL.flatten())
        return total, torch.stack([total.detach(), found.ce, found.kl]).double().cpu()

    def _check(self, sums: list[float], batch_B: Tensor) -> None:
        if not all(map(isfinite, sums)):
            self._give_up(f"the loss of step {self.progress.step + 1} is {sums[0]}", batch_B)

    def _give_up(self, what: str, sequences: Tensor) -> NoReturn:
        raise DistillationError(
            f"{what}, on sequences {sorted(sequences.tolist())}; nothing from that step on is kept; lower"
            " distillation.optimizer.learning_rate, or look at that text"
        )

    def _tell(self, sums: list[float], tokens: int, rate: float, seconds: float, more: dict[str, float]) -> None:
        if self.rank:
            return
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        loss, ce, kl = (value / max(tokens, 1) for value in sums)
        figures = {"step": self.progress.step, "loss": loss, "ce": ce, "kl": kl, "learning_rate": rate}
        figures |= {"tokens": tokens, "seconds": seconds, **more}
        if memory:
            figures["memory_bytes"] = memory
        self.tell(figures)

    @torch.no_grad()
    def _validate(self) -> None:
        """The loss on the sequences held out; the weights are kept if it is the lowest, or if the last are wanted."""
        self.engine.module.eval()
        held_out, size = torch.arange(self.settings.validation_sequences), self.settings.micro_batch_size
        sums = torch.zeros(3, dtype=torch.float64)
        for index_B in micro_batches(
            held_out, self.rank, self.world, size, num_micro_batches(len(held_out), self.world, size)
        ):
            sums += self._loss(index_B)[1]
        tokens = int(self.examples.rows(held_out).num_counted.sum())
        loss, ce, kl = (value / max(tokens, 1) for value in all_sum(sums.tolist(), self.engine.device))
        if not isfinite(loss):
            self._give_up(f"the held-out loss after step {self.progress.step} is {loss}", held_out)
        figures = {"step": self.progress.step, "validation_loss": loss, "validation_ce": ce, "validation_kl": kl}
        self.progress.validation.append(figures)
        if self.rank == 0:
            self.tell(figures)
        is_final = self.pruner is None or self.pruner.is_done
        wants_last = self.settings.keep == "last"
        if is_final and (wants_last or self.progress.best is None or loss < self.progress.best):
            self.progress.best, self.progress.best_step = loss, self.progress.step
            save_best(self.task.folder, self.engine, self.pruner)

    def _finish(self) -> None:
        if self.rank == 0:
            outcome = {
                "steps": self.progress.step,
                "best_step": self.progress.best_step,
                "seconds": round(self.progress.seconds, 3),
                "validation": self.progress.validation,
            }
            atomic_write(self.task.folder / RESULT_NAME, json.dumps(outcome, indent=2) + "\n")
            remove_snapshots(self.task.folder)
        torch.distributed.barrier()


def _layers(out: Any) -> tuple[Tensor, ...]:
    """Outputs of the layers that the targets' logits come from."""
    hidden: tuple[Tensor, ...] | None = getattr(out, "decoder_hidden_states", None) or out.hidden_states
    assert hidden is not None
    return hidden[1:]
