"""Training on Ray Train: the curve of one process, whatever is killed; and errors that end it at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from jobs import cli
from jobs.run import executor_for
from moe_compress.distillation.fit import Run, train_here
from moe_compress.distillation.loop import RESULT_NAME, Task
from moe_compress.distillation.snapshots import BEST_NAME, LAYERS_NAME, Claim, read_progress
from moe_compress.distillation_options import DeepSpeed, Optimizer
from moe_compress.errors import DistillationError, RecipeError
from moe_compress.progress import Reporter
from moe_compress.recipe import Cluster
from tests.cluster_cases import ROOT, finish, hashes
from tests.conftest import Checkpoint, Compress
from tests.distillation.training_cases import make_task

pytest.importorskip("deepspeed")

CLOSE = 1e-4


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster on this machine."""
    before = dict(os.environ)
    with executor_for(Cluster(), Reporter(None)):
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint, compressed: Compress) -> Task:
    """A training long enough to be killed in the middle."""
    folder = tmp_path_factory.mktemp("training") / "undisturbed"
    return make_task(folder, compressed("mixtral", ratio=0.5), tiny("mixtral"), epochs=12, evaluate_every=16)


def on_ray(task: Task, folder: Path, processes: int, **settings: Any) -> Run:
    """The same training in a folder of its own."""
    folder.mkdir()
    deepspeed = DeepSpeed(processes=processes, zero_stage=3, max_failures=1)
    settings = {"deepspeed": deepspeed, **settings}
    task = replace(task, settings=task.settings.model_copy(update=settings), folder=folder)
    return Run(task, folder / "events.jsonl", folder / "tensorboard", threads=1, device="cpu")


def events(path: Path) -> list[dict[str, Any]]:
    """What is written so far, whole lines only."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def steps(path: Path) -> dict[int, float]:
    """The loss of each step; of those done twice the last."""
    return {each["step"]: each["loss"] for each in events(path) if each["event"] == "step"}


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while max(steps(path), default=0) < step:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks(driver: int) -> list[psutil.Process]:
    """The training processes below a driver."""
    below = psutil.Process(driver).children(recursive=True)
    return [process for process in below if process.cmdline()[:1] == ["ray::RayTrainWorker"]]


@pytest.mark.slow
def test_goes_on_by_itself_when_a_process_is_killed(cluster: None, task: Task, tmp_path: Path) -> None:
    from cluster.training import train_on_ray

    here = Run(task, tmp_path / "here.jsonl", tmp_path / "tensorboard", threads=1, device="cpu")
    train_here(here)
    run = on_ray(task, tmp_path / "killed", processes=2)
    with ThreadPoolExecutor() as beside:
        killed = beside.submit(lambda: (wait_for_step(run.events, 12), ranks(os.getpid())[-1].kill()))
        train_on_ray(run)
        killed.result()
    (restart,) = (each for each in events(run.events) if each["event"] == "restart")
    assert " died (" in restart["reason"]
    assert 10 <= restart["step"] < 48 == max(steps(run.events))
    assert steps(run.events) == pytest.approx(steps(here.events), rel=CLOSE)
    for name, weight in load_file(run.task.folder / BEST_NAME).items():
        torch.testing.assert_close(weight, load_file(task.folder / BEST_NAME)[name], rtol=1e-3, atol=1e-5)
    left = {path.name for path in run.task.folder.iterdir()}
    assert left == {BEST_NAME, LAYERS_NAME, RESULT_NAME, "events.jsonl", "tensorboard"}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_it_at_once(cluster: None, task: Task, tmp_path: Path) -> None:
    from cluster.training import train_on_ray

    run = on_ray(task, tmp_path / "wild", processes=1, optimizer=Optimizer(learning_rate=1e30, clip=0))
    with pytest.raises(DistillationError, match=r"step \d+ is \S*nan.* lower distillation.optimizer.learning_rate"):
        train_on_ray(run)
    assert {each["event"] for each in events(run.events)} <= {"validation", "step"}  # it was not tried again


@pytest.mark.slow
def test_more_processes_than_there_is_room_for(cluster: None) -> None:
    from cluster.training import find_room

    assert find_room(None, 1, "cpu") == (1, {"CPU": 1})
    with pytest.raises(RecipeError, match=r"^distillation.deepspeed.processes: 1000 need 1 CPU each, .* lower it"):
        find_room(1000, 1, "cpu")


@pytest.mark.slow
def test_a_cluster_that_may_grow_is_waited_for(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster import training

    asked: list[list[dict[str, int]]] = []
    monkeypatch.setattr(training, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(training, "_ASK_S", 0.1)
    has_room, said = training.room_for, list[str]()
    monkeypatch.setattr(training, "room_for", lambda needs: has_room(needs) if said else 0)
    assert training.find_room(1, 1, "cpu", said.append) == (1, {"CPU": 1})
    assert asked == [[{"CPU": 1}], []]
    assert said == [
        "distillation.deepspeed.processes: 1 need 1 CPU each, and the cluster has room for 0 so far; waiting for nodes"
    ]
    monkeypatch.setattr(training, "ROOM_S", 0.2)
    with pytest.raises(RecipeError, match=r"processes: 1 need 1 CPU, 1 GPU each, .* lower it"):
        training.find_room(1, 1, "cuda", said.append)


@pytest.mark.slow
def test_a_killed_job_ends_with_the_same_bytes(
    compressed: Compress, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(name: str, cluster: dict[str, Any]) -> list[str]:
        training = {"text": str(text_file), "num_sequences": 24, "sequence_length": 16, "validation_sequences": 4}
        training |= {"epochs": 12, "batch_size": 4, "micro_batch_size": 2, "evaluate_every": 16, "checkpoint_every": 3}
        recipe = {
            "model": str(compressed("mixtral", ratio=0.5)),
            "output": str(tmp_path / name),
            "distillation": training | {"teacher": "none", "dtype": "float32"},
            "cluster": cluster,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        return ["distill", str(tmp_path / f"{name}.yaml")]

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.cli", *arguments("ray", {})]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    told = tmp_path / "ray.job" / "events.jsonl"
    job = start()
    try:
        wait_for_step(told, 12)
    finally:
        job.kill()
    finish(job)
    (folder,) = (tmp_path / "ray.job").glob("training-*")
    assert not (tmp_path / "ray").exists()
    assert read_progress(folder)[1].step >= 9
    code, said = finish(start())
    assert code == 0, said
    assert "ray" not in said.replace(str(tmp_path), "").lower()
    assert [each["step"] for each in events(told) if each["event"] == "step"].count(1) == 1  # it went on
    monkeypatch.setattr(sys, "argv", ["moe-compress", *arguments("here", {"local": True})])
    cli.main()
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "here")


def test_processes_that_others_have_followed_write_nothing(tmp_path: Path) -> None:
    first = Claim(tmp_path)
    first.check()
    second = Claim(tmp_path)
    with pytest.raises(DistillationError, match="another run goes on with this training"):
        first.check()
    second.check()
