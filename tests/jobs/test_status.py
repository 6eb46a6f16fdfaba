"""What `moe-compress status` says of jobs that run, are done, failed, were killed or are trained, and of batches."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from jobs import cli
from moe_compress import progress
from moe_compress.errors import RecipeError
from moe_compress.job import Job, in_use
from moe_compress.memory import PeakMemory
from moe_compress.progress import Reporter
from moe_compress.recipe import JobRecipe, parse_recipe
from moe_compress.report import status_view
from moe_compress.report.status import read_status
from moe_compress.report.status_view import look
from moe_compress.storage import locked
from tests.cluster_cases import ROOT, start, write_model, write_recipe


def make_recipe(folder: Path, command: str, **more: Any) -> JobRecipe:
    recipe = parse_recipe(
        {
            "model": "org/model",
            "output": str(folder / "out"),
            "calibration": {"text": "a.txt"},
            "method": {"name": "d2moe", "ratio": 0.4},
            "evaluation": {"text": "a.txt"},
            "distillation": {"text": "a.txt"},
        }
        | more
    )
    return recipe if command == "compress" else recipe.training()


@contextmanager
def running(folder: Path, command: str = "compress", **more: Any) -> Iterator[Reporter]:
    """A run of a job, whose lock is held."""
    with Job(make_recipe(folder, command, **more)).locked() as job, PeakMemory() as memory:
        reporter = Reporter(job, Console(file=io.StringIO()), memory)
        with reporter.run(command):
            yield reporter


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`moe-compress ARGUMENTS`; its exit code."""
    monkeypatch.setattr(sys, "argv", ["moe-compress", *arguments])
    try:
        cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def shown(folder: Path) -> str:
    """What a person reads."""
    out = io.StringIO()
    Console(file=out, width=120).print(look(folder)[0])
    return out.getvalue()


def test_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"s": 0.0}
    monkeypatch.setattr(progress, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock["s"])}))
    with running(tmp_path) as reporter:
        with reporter.stage("calibrate", 3) as stage:
            stage.advance(3, tokens=300)
        with reporter.stage("allocate", 10) as stage:
            for _ in range(4):
                clock["s"] += 30
                stage.advance(tokens=50, note="rank 7")
            status = read_status(tmp_path / "out.job")
            text = shown(tmp_path / "out.job")
    assert (status.state, status.command, status.num_runs) == ("running", "compress", 1)
    assert status.current is not None
    assert (status.current.name, status.current.done, status.current.total) == ("allocate", 4, 10)
    assert status.current.tokens_per_s == pytest.approx(50 / 30)
    assert status.current.left_s == pytest.approx(6 * 30, abs=60)  # less what has passed since it was said
    assert status.remaining == ["compress", "assemble", "evaluate"]
    assert status.peak_bytes is not None
    assert [stage.name for stage in status.stages] == ["calibrate", "allocate"]
    assert "allocate 4/10" in text
    assert "rank 7" in text
    assert "2 tokens/s" in text


def test_progress_is_not_told_at_every_step(tmp_path: Path) -> None:
    with running(tmp_path) as reporter, reporter.stage("calibrate", 500) as stage:
        for _ in range(500):
            stage.advance()
    events = (tmp_path / "out.job" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events] == ["run_start", "stage_start", "stage_end", "run_end"]


def test_a_failure_gives_its_reason_and_what_remains(tmp_path: Path) -> None:
    def fail() -> None:
        with running(tmp_path) as reporter, reporter.stage("calibrate", 3):
            raise RecipeError("method.ratio: 0.9\nis too much; lower it")

    with pytest.raises(RecipeError):
        fail()
    status = read_status(tmp_path / "out.job")
    assert (status.state, status.reason) == ("failed", "method.ratio: 0.9 is too much; lower it")
    assert status.remaining == ["allocate", "compress", "assemble", "evaluate"]
    with running(tmp_path):
        pass
    status = read_status(tmp_path / "out.job")
    assert (status.state, status.reason, status.num_runs, status.remaining) == ("done", None, 2, [])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_is_interrupted_has_not_failed(stop: type[BaseException], tmp_path: Path) -> None:
    def interrupt() -> None:
        with running(tmp_path) as reporter, reporter.stage("calibrate", 3):
            raise stop

    with pytest.raises(stop):
        interrupt()
    status = read_status(tmp_path / "out.job")
    assert (status.state, status.reason) == ("stopped", None)
    assert "stopped; run the same command again" in shown(tmp_path / "out.job")


def test_losses_count_and_a_sweep_begins_again(tmp_path: Path) -> None:
    with running(tmp_path) as reporter:
        for stop in (False, True):
            try:
                with reporter.stage("calibrate", 3) as stage:
                    stage.advance(3 if stop else 1)
                    if not stop:
                        raise KeyError
            except KeyError:
                reporter.event("worker_lost", reason="gone", losses=1)
                reporter.event("task_lost", reason="gone")
        status = read_status(tmp_path / "out.job")
    assert status.worker_losses == status.task_losses == 1
    assert [(stage.name, stage.done) for stage in status.stages] == [("calibrate", 3)]
    assert "1 layer workers and 1 tasks lost" in shown(tmp_path / "out.job")


@pytest.mark.parametrize(
    ("more", "stages", "remaining"),
    [
        ({}, [], ["calibrate", "allocate", "compress", "assemble", "evaluate"]),
        ({"evaluation": None}, ["similarity"], ["compress", "assemble"]),
        ({}, ["evaluate"], []),
        ({}, ["evaluate", "copa of the original"], []),
        (
            {"method": {"name": "d2moe", "ratio": 0.4, "sequential": True}},
            ["compress"],
            ["assemble", *(f"{name} again" for name in ("calibrate", "allocate", "compress", "assemble")), "evaluate"],
        ),
        (
            {"method": {"name": "d2moe", "ratio": 0.4, "sequential": True}},
            ["assemble", "calibrate again"],
            ["allocate again", "compress again", "assemble again", "evaluate"],
        ),
    ],
)
def test_what_remains(more: dict[str, Any], stages: list[str], remaining: list[str], tmp_path: Path) -> None:
    with running(tmp_path, **more) as reporter:
        for name in stages:
            with reporter.stage(name, 1) as stage:
                stage.advance()
        assert read_status(tmp_path / "out.job").remaining == remaining


def test_a_training_says_where_it_is(tmp_path: Path) -> None:
    with running(tmp_path, "distill") as reporter, reporter.stage("train", 40) as stage:
        for step in (1, 2):
            figures = {"loss": 3.0 / step, "ce": 0.5, "kl": 1.0 / step, "tokens": 64, "seconds": 0.1}
            reporter.event("step", step=step, learning_rate=0.1, **figures)
        reporter.event("restart", step=1, reason="process 0 died")
        reporter.event("validation", step=2, validation_loss=2.5, validation_ce=0.1, validation_kl=0.2)
        status = read_status(tmp_path / "out.job")
        assert stage.done == 0  # as long as the driver has not looked
    assert status.current is not None
    assert (status.current.name, status.current.done, status.restarts) == ("train", 2, 1)
    wanted = {"step": 2, "loss": 1.5, "kl": 0.5, "validation_loss": 2.5}
    assert {key: status.training[key] for key in wanted} == wanted
    assert status.remaining == ["assemble", "evaluate"]
    assert "step 2, loss 1.5, kl 0.5, validation_loss 2.5" in shown(tmp_path / "out.job")


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    with running(tmp_path):
        pass
    with open(tmp_path / "out.job" / "events.jsonl", "a") as events:
        events.write('{"time_s": 1, "eve')
    assert read_status(tmp_path / "out.job").state == "done"


def test_looking_leaves_the_lock_alone(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    with running(tmp_path):
        assert in_use(tmp_path / "out.job")
    assert not in_use(tmp_path / "out.job")
    with running(tmp_path):
        pass


def test_no_job_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "status", str(tmp_path)) == 2
    assert capfd.readouterr().err.startswith(f"error: job_dir: {tmp_path} is no job folder")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path) as reporter, reporter.stage("calibrate", 1) as stage:
        stage.advance()
    folder = str(tmp_path / "out.job")
    assert call(monkeypatch, "status", folder) == 0
    assert "state" in capfd.readouterr().out
    assert call(monkeypatch, "status", folder, "--json") == 0
    assert json.loads(capfd.readouterr().out)["state"] == "done"
    assert call(monkeypatch, "status", folder, "--json", "--watch") == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["stages"][0]["name"] == "calibrate"
    assert call(monkeypatch, "status", folder, "--watch") == 0
    assert "done" in capfd.readouterr().out


def test_a_batch_with_the_stage_of_what_runs(tmp_path: Path) -> None:
    known = {"ratio": 0.4, "bytes": None, "perplexity": None, "seconds": None, "reason": None}
    rows = [
        {"name": "a-0.4", "status": "running", "job_dir": str(tmp_path / "out.job"), **known},
        {"name": "b-0.4", "status": "failed", "job_dir": str(tmp_path), **known, "reason": "too short; give more"},
        {"name": "c-0.4", "status": "waiting", "job_dir": str(tmp_path), **known},
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"jobs": rows}))
    with locked(tmp_path):
        with running(tmp_path) as reporter, reporter.stage("calibrate", 3):
            _, data, runs = look(tmp_path)
            text = shown(tmp_path)
        assert runs
        assert data["jobs"][0]["stage"]["name"] == "calibrate"
        assert "a-0.4: calibrate 0/3" in text
        assert "b-0.4: too short; give more" in text
        assert "stopped" not in text
        _, data, runs = look(tmp_path)  # between two jobs
        assert (data["jobs"][0]["status"], runs) == ("running", True)


def test_a_batch_that_was_killed(tmp_path: Path) -> None:
    known = {"ratio": 0.4, "bytes": None, "perplexity": None, "seconds": None, "reason": None, "job_dir": "x.job"}
    statuses = ("done", "running", "waiting")
    rows = [{"name": status, "status": status, **known} for status in statuses]
    (tmp_path / "summary.json").write_text(json.dumps({"jobs": rows}))
    _, data, runs = look(tmp_path)
    assert ([row["status"] for row in data["jobs"]], runs) == (["done", "stopped", "waiting"], False)
    assert "stopped; run the same command again" in shown(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"jobs": rows[:1]}))
    assert "stopped" not in shown(tmp_path)


def test_a_batch_that_ends_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"name": "a", "ratio": 0.4, "bytes": None, "perplexity": None, "seconds": 1.0, "reason": None}
    (tmp_path / "summary.json").write_text(json.dumps({"jobs": [row | {"status": "running"}]}))

    def ends(folder: Path) -> bool:
        (folder / "summary.json").write_text(json.dumps({"jobs": [row | {"status": "done"}]}))
        return False

    monkeypatch.setattr(status_view, "in_use", ends)
    _, data, runs = look(tmp_path)
    assert (data["jobs"][0]["status"], runs) == ("done", False)


@pytest.mark.slow
def test_a_job_that_was_killed(tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = write_model(tmp_path / "model", tokenizer)
    recipe = write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {"local": True})
    job = start(recipe)
    folder = tmp_path / "out.job"
    while job.poll() is None and not (folder.exists() and read_status(folder).stages):
        time.sleep(0.02)
    assert read_status(folder).state == "running"
    job.send_signal(signal.SIGKILL)
    job.communicate()
    status = read_status(folder)
    assert status.state == "stopped"
    assert status.current is not None
    assert "evaluate" in status.remaining
    command = [sys.executable, "-m", "jobs.cli", "compress", str(recipe)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    status = read_status(folder)
    assert (status.state, status.num_runs) == ("done", 2)
    assert [stage.name for stage in status.stages][-3:] == ["compress", "assemble", "evaluate"]
