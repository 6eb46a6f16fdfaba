"""Sparse columns pruned by several processes, and where ZeRO keeps the parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing

from tests.model.handmade import load, logits_of

from .sparsity_cases import NUM_STEPS, Training, loss_of, save_compact, without_filters


def start(work: Callable[..., None], num_processes: int, *arguments: Any) -> None:
    """Runs `work(rank, *arguments)` in processes of their own."""
    multiprocessing.spawn(work, arguments, nprocs=num_processes)


def train_one_of_two(rank: int, folder: Path, out: Path) -> None:
    """Half of the micro-batches of each step; gradients are averaged by hand."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    training = Training(folder)
    for step in range(NUM_STEPS):
        loss_of(training.model, 2 * step + rank).backward()
        for parameter in training.model.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.pruner.step(step + 1)
    save_file(training.pruner.state_dict(), out / f"{rank}.safetensors")
    distributed.destroy_process_group()


def test_two_processes_decide_as_one(student: Path, tmp_path: Path) -> None:
    start(train_one_of_two, 2, student, tmp_path)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    one = Training(student, micro_batches=2)
    one.run(0, NUM_STEPS)
    expected = one.pruner.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first["score"], expected["score"], rtol=1e-2, atol=1e-8)
    assert torch.equal(first["is_kept"], expected["is_kept"])


ZERO = [(3, torch.float32), (3, torch.bfloat16), (1, torch.bfloat16)]


def train_with_zero(rank: int, folder: Path, out: Path) -> None:
    """Two micro-batches a step, activations recomputed; what comes of it lies in a folder a case."""
    os.environ.update(DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error", LOCAL_RANK="0")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    meet = f"file://{out}/meet"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meet, rank=0, world_size=1)
    for number, (stage, dtype) in enumerate(ZERO):
        training = Training(folder, micro_batches=2, dtype=dtype)
        model, pruner = training.model, training.pruner
        model.activation_checkpointing_enable()
        model.train()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=training.optimizer, config=config)
        for micro in range(2 * NUM_STEPS):
            engine.backward(loss_of(engine, micro))
            engine.step()
            if micro % 2:
                pruner.step(micro // 2 + 1)
        assert stage < 3 or not any(parameter.numel() for parameter in model.parameters())
        engine.eval()
        logits = logits_of(engine)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            save_compact(training, model.state_dict(), out / str(number))
        without_filters(model)
        save_file(
            {"logits": logits, "unmasked": logits_of(engine), **pruner.state_dict()}, out / f"{number}.safetensors"
        )
        engine.destroy()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_masks_hold_wherever_zero_keeps_the_parameters(student: Path, tmp_path: Path) -> None:
    start(train_with_zero, 1, student, tmp_path)
    plain = Training(student, micro_batches=2)
    plain.run(0, NUM_STEPS)
    expected = plain.pruner.state_dict()
    for number, (_, dtype) in enumerate(ZERO):
        found = load_file(tmp_path / f"{number}.safetensors")
        compact = logits_of(load("mixtral", tmp_path / str(number), dtype=dtype))
        tolerance = 1e-6 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(compact, found["logits"], atol=tolerance, rtol=0)
        assert float((found["unmasked"] - found["logits"]).abs().max()) > 0.2  # pruned columns would tell
        if dtype == torch.float32:
            torch.testing.assert_close(found["score"], expected["score"], rtol=1e-4, atol=1e-9)
            assert torch.equal(found["is_kept"], expected["is_kept"])
