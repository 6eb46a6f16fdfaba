"""The training loop: the same curve at any ZeRO stage and number of processes, resumed or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_compress.distillation.loop import RESULT_NAME, Task
from moe_compress.distillation.snapshots import BEST_NAME, read_progress
from tests.conftest import Checkpoint, Compress
from tests.distillation.training_cases import at_stage, curves, make_task

pytest.importorskip("deepspeed")

CLOSE = 1e-4


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint, compressed: Compress) -> Task:
    folder = tmp_path_factory.mktemp("training")
    return make_task(folder / "first", compressed("mixtral", ratio=0.5), tiny("mixtral"))


@pytest.fixture(scope="module")
def undisturbed(task: Task) -> list[dict[str, Any]]:
    (curve,) = curves([task], world=1)
    return curve


def losses(curve: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(figures["step"], figures.get("loss", figures.get("validation_loss"))) for figures in curve]


def assert_same(curve: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float = CLOSE) -> None:
    assert [step for step, _ in losses(curve)] == [step for step, _ in losses(other)]
    assert [loss for _, loss in losses(curve)] == pytest.approx([loss for _, loss in losses(other)], rel=tolerance)


def test_learns(undisturbed: list[dict[str, Any]], task: Task) -> None:
    held_out = [figures["validation_loss"] for figures in undisturbed if "validation_loss" in figures]
    assert held_out[-1] < held_out[0]
    outcome = json.loads((task.folder / RESULT_NAME).read_text())
    assert outcome["steps"] == 8 == undisturbed[-2]["step"]  # 22 sequences, 6 a step, twice
    assert not list(task.folder.glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_same_at_any_stage(world: int, task: Task, undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    stages = [at_stage(task, stage, tmp_path / str(stage)) for stage in ((1, 2, 3) if world == 1 else (0, 1, 2, 3))]
    for curve, stage in zip(curves(stages, world), stages, strict=True):
        assert_same(curve, undisturbed)
        for name, weight in load_file(stage.folder / BEST_NAME).items():
            torch.testing.assert_close(weight, load_file(task.folder / BEST_NAME)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world", "then"), [(0, 1, 1), (3, 2, 2), (2, 2, 1), (3, 1, 2)])
def test_goes_on_where_it_stopped(
    stage: int, world: int, then: int, task: Task, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    broken = at_stage(task, stage, tmp_path / "broken")
    (before,) = curves([broken], world, stop=5)
    assert read_progress(broken.folder)[1].step == 4
    (after,) = curves([broken], then)
    steps = [figures for figures in before if figures["step"] <= 4] + after
    assert_same(steps, undisturbed)
    if (stage, world, then) == (0, 1, 1):
        assert losses(steps) == losses(undisturbed)
        assert (broken.folder / BEST_NAME).read_bytes() == (task.folder / BEST_NAME).read_bytes()


def test_micro_batches_and_padding_weigh_nothing(task: Task, undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = replace(task, settings=task.settings.model_copy(update={"micro_batch_size": 6}), folder=tmp_path / "whole")
    (curve,) = curves([whole], world=1)
    assert_same(curve, undisturbed)


def test_keeps_the_best_or_the_last(task: Task, tmp_path: Path) -> None:
    """At a rate at which every step makes it worse."""
    optimizer = task.settings.optimizer.model_copy(update={"learning_rate": 0.3, "warmup": 0.0})
    trainings = []
    for keep in ("best", "last"):
        (tmp_path / keep).mkdir()
        settings = task.settings.model_copy(update={"optimizer": optimizer, "max_steps": 3, "keep": keep})
        trainings.append(replace(task, settings=settings, folder=tmp_path / keep))
    curves(trainings, world=1)
    kept = [json.loads((each.folder / RESULT_NAME).read_text())["best_step"] for each in trainings]
    assert kept == [0, 3]
    best, last = (load_file(each.folder / BEST_NAME) for each in trainings)
    assert not all(torch.equal(best[name], last[name]) for name in best)
