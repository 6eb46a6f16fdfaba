"""Training steps: with a cached beside a live teacher, and our loop beside a bare one in plain torch.

    python -m tests.benchmarks.bench_distillation [--steps 8] [--dtype float32|bfloat16]

A Mixtral of random weights learns from a larger one's answers: all of its parameters but the routers', AdamW, clipped
gradients. The bare loop does the same without DeepSpeed, snapshots, figures or a share for other processes: model,
cross-entropy, backward, clip, step. Times are CPU time of one thread, medians over steps taken in turn.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import distributed
from transformers import MixtralConfig, MixtralForCausalLM

from moe_compress.distillation.examples import Examples
from moe_compress.distillation.loop import Task, Trainer
from moe_compress.distillation.parameters import choose_trained
from moe_compress.distillation.student import load_model
from moe_compress.distillation.teacher import TeacherSetup
from moe_compress.distillation_options import Distillation
from moe_compress.executor import InProcess
from moe_compress.progress import Reporter
from moe_compress.stages.teach import teach

SEQUENCES, LENGTH, BATCH, MICRO, HELD_OUT = 40, 256, 8, 4, 4
VOCABULARY = 8192


def make(folder: Path) -> Path:
    """A checkpoint of random weights; returns its folder."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def tasks(folder: Path, checkpoint: Path, dtype: torch.dtype) -> dict[str, Task]:
    """The same training with each kind of teacher."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    file = folder / "examples.safetensors"
    Examples(ids, torch.ones_like(ids, dtype=torch.bool), targets).save(file)
    cache = folder / "cache"
    cache.mkdir()
    name = str(dtype).removeprefix("torch.")
    setup = TeacherSetup(checkpoint, file, cache, 256, 1.0, MICRO, name, "cpu")
    teach(setup, InProcess(1), Reporter(None, Console(quiet=True)))
    found = {}
    for teacher in ("none", "cached", "live"):
        settings = Distillation.model_validate(
            {
                "text": ["none"],
                "teacher": teacher,
                "batch_size": BATCH,
                "micro_batch_size": MICRO,
                "validation_sequences": HELD_OUT,
                "epochs": 10**6,
                "dtype": name,
            }
        )
        (folder / teacher).mkdir()
        task = Task(settings, checkpoint, None, None, file, folder / teacher, dtype, 1)
        found[teacher] = replace(
            task, teacher=checkpoint if teacher == "live" else None, cache=cache if teacher == "cached" else None
        )
    return found


def bare_step(task: Task) -> Callable[[], None]:
    """The same step in plain torch."""
    examples = Examples.load(task.examples)
    model: Any = load_model(task.student, task.dtype)
    choose_trained(model, task.settings.train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [p.detach().float().requires_grad_() for p in trained] if task.dtype != torch.float32 else trained
    optimizer = torch.optim.AdamW(masters, lr=1e-5)
    place = 0

    def step() -> None:
        nonlocal place
        for _ in range(BATCH // MICRO):
            rows = torch.arange(place, place + MICRO) % SEQUENCES
            place += MICRO
            logits = model(input_ids=examples.input_ids[rows], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), examples.targets[rows].flatten())
            (loss / (BATCH // MICRO)).backward()
        if masters is not trained:
            for master, parameter in zip(masters, trained, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not trained:
            with torch.no_grad():
                for master, parameter in zip(masters, trained, strict=True):
                    parameter.copy_(master)

    return step


def bench(dtype: torch.dtype, steps: int) -> dict[str, float]:
    """Median CPU seconds of a step: bare, and ours with each kind of teacher."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        all_tasks = tasks(folder, make(folder / "model"), dtype)
        trainers = {teacher: Trainer(task, lambda figures: None) for teacher, task in all_tasks.items()}
        run = {"bare": bare_step(all_tasks["none"])} | {name: trainer._step for name, trainer in trainers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in run}
        for _ in range(steps + 1):
            for which, step in run.items():
                began = time.thread_time()
                step()
                seconds[which].append(time.thread_time() - began)
        return {which: median(times[1:]) for which, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("LOCAL_RANK", "0")
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        for dtype in [args.dtype] if args.dtype else ["float32", "bfloat16"]:
            found = bench(getattr(torch, dtype), args.steps)
            tokens = BATCH * LENGTH
            print(f"{dtype}: {tokens} tokens a step, vocabulary {VOCABULARY}, one thread")
            for which, seconds in found.items():
                speed, ratio = tokens / seconds, seconds / found["bare"]
                print(f"  {which:7}{seconds:7.3f} s   {speed:7.0f} tokens/s   {ratio:.2f}x bare")
            print(f"  a live teacher costs {found['live'] / found['cached']:.2f}x a cached one")
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
