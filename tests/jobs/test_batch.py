"""Batches: one calibration a checkpoint, a failure is its job's alone, done jobs are left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import yaml

from jobs import batch, cli
from moe_compress.checkpoint.manifest import MANIFEST_NAME
from moe_compress.report.status_view import look
from moe_compress.stages.summary import SUMMARY_NAME
from tests.cluster_cases import ROOT
from tests.conftest import Checkpoint


@pytest.fixture
def manifest(tmp_path: Path, tiny: Checkpoint, text_file: Path) -> dict[str, Any]:
    """Defaults, and a job of one checkpoint at two ratios."""
    return {
        "defaults": {
            "calibration": {"text": str(text_file), "num_sequences": 4, "sequence_length": 16},
            "method": {"name": "d2moe"},
            "evaluation": {"text": str(text_file), "sequence_length": 16, "max_windows": 2},
            "cluster": {"local": True},
        },
        "jobs": [{"name": "a", "model": str(tiny("mixtral")), "ratios": [0.4, 0.6]}],
    }


def write(folder: Path, manifest: dict[str, Any]) -> Path:
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`moe-compress batch ARGUMENTS`; its exit code."""
    monkeypatch.setattr(sys, "argv", ["moe-compress", "batch", *arguments])
    try:
        cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def summary(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows by name."""
    return {row["name"]: row for row in json.loads((folder / "summary.json").read_text())["jobs"]}


def calibrations(job_dir: Path) -> int:
    """How often the text went through the model."""
    events = [json.loads(line) for line in (job_dir / "events.jsonl").read_text().splitlines()]
    return sum(event["event"] == "stage_start" and event["stage"] == "calibrate" for event in events)


@pytest.mark.slow
def test_three_checkpoints_at_two_ratios_of_which_one_breaks(
    tmp_path: Path,
    manifest: dict[str, Any],
    tiny: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Five outputs and one failure of 3 x 2: a checkpoint that breaks between its two jobs costs the second alone.

    One whose shard is broken from the start has no output at all: the second run adds such a one.
    """
    broken, damaged = tmp_path / "broken", tmp_path / "damaged"
    shards = {name: shutil.copytree(tiny("olmoe"), name) / "model.safetensors" for name in (broken, damaged)}
    whole = shards[broken].read_bytes()
    shards[damaged].write_bytes(whole[:-100])
    manifest["max_parallel"] = 3
    manifest["jobs"] += [
        {"name": "b", "model": str(tiny("qwen3_moe")), "ratios": [0.4, 0.6]},
        {"name": "c", "model": str(broken), "ratios": [0.4, 0.6]},
    ]
    start = batch._start

    def breaking(recipe: Path, log: IO[str]) -> subprocess.Popen[bytes]:
        if recipe.stem == "c-0.6":
            shards[broken].write_bytes(whole[:-100])
        return start(recipe, log)

    monkeypatch.setattr(batch, "_start", breaking)
    assert call(monkeypatch, str(write(tmp_path, manifest))) == 2
    said = capfd.readouterr()
    folder = tmp_path / "many"
    rows = summary(folder)
    done = {"a-0.4", "a-0.6", "b-0.4", "b-0.6", "c-0.4"}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(done, "done") | {"c-0.6": "failed"}
    assert {path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}")} == done
    assert "broken/model.safetensors" in rows["c-0.6"]["reason"]
    assert rows["c-0.6"]["exit_code"] == 2
    assert len({row["job_dir"] for row in rows.values()}) == 3
    for row in rows.values():
        assert calibrations(Path(row["job_dir"])) == 1
    for name in done:
        before, after = rows[name]["bytes"]
        assert 0 < after < before
        assert min(rows[name]["perplexity"]) > 1
        assert rows[name]["seconds"] > 0
    assert "error: 1 of 6 jobs failed (c-0.6)" in said.err
    assert f"c-0.6: failed: {rows['c-0.6']['reason']}" in said.err
    made = {name: (folder / name / MANIFEST_NAME).stat().st_mtime_ns for name in done}

    shards[broken].write_bytes(whole)
    monkeypatch.setattr(batch, "_start", start)
    manifest["jobs"].append({"name": "d", "model": str(damaged), "method": {"ratio": 0.4}})
    assert call(monkeypatch, str(write(tmp_path, manifest)), "--json") == 2
    again = {row["name"]: row for row in json.loads(capfd.readouterr().out)["jobs"]}
    assert [name for name, row in again.items() if row["status"] != "done"] == ["d"]
    assert "damaged/model.safetensors" in again["d"]["reason"]
    assert calibrations(Path(again["c-0.6"]["job_dir"])) == 1
    assert {name: again[name] for name in done} == {name: rows[name] for name in done}
    assert {name: (folder / name / MANIFEST_NAME).stat().st_mtime_ns for name in done} == made


def test_all_errors_of_all_jobs_and_nothing_starts(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = manifest["jobs"][0]["model"]
    manifest["jobs"] += [
        {"name": "b", "model": model, "method": {"ratio": 1.5}},
        {"name": "c", "model": model, "method": {"ratio": 0.99, "ranks": "uniform"}},
        {"name": "d", "model": model, "calibration": {"text": "/no/such.txt"}, "method": {"ratio": 0.5}},
        {"name": "e", "model": model, "output": f"{model}/small", "method": {"ratio": 0.5}},
    ]
    path = write(tmp_path, manifest)
    assert call(monkeypatch, str(path)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[1:3] for line in lines[:-1]] == [
        [" job b", " method.ratio"],
        [" job c", " method.ratio"],
        [" job d", " calibration.text"],
        [" job e", " output"],
    ]
    assert lines[-1] == "error: batch: 4 errors, and no job has started; mend them"
    assert list(tmp_path.iterdir()) == [path]


def test_one_error_is_one_line(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, manifest)
    assert call(monkeypatch, str(path), "--set", "defaults.method.damping=-1") == 2
    assert len(capfd.readouterr().err.splitlines()) == 3  # a line a ratio, and how many
    assert call(monkeypatch, str(path), "--set", "max_parallel=0") == 2
    assert capfd.readouterr().err.startswith("error: max_parallel: 0 is not valid")
    assert call(monkeypatch, "/no/such.yaml") == 2
    assert "/no/such.yaml" in capfd.readouterr().err


class Stub:
    """What stands in for the processes of jobs: scripts that leave what a job leaves, or do not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> None:
        self.scripts, self.started, self.most = scripts, Counter[str](), 0
        self.running: list[tuple[str, subprocess.Popen[bytes]]] = []
        monkeypatch.setattr(batch, "_start", self.start)

    def start(self, recipe: Path, log: IO[str]) -> subprocess.Popen[bytes]:
        name, data = recipe.stem, yaml.safe_load(recipe.read_text())
        self.started[name] += 1
        self.running = [each for each in self.running if each[1].poll() is None]
        assert data["job_dir"] not in {folder for folder, _ in self.running}
        script = self.scripts.get(name, "")
        if not script:
            Path(data["output"]).mkdir()
            (Path(data["output"]) / MANIFEST_NAME).write_text("{}")
            Path(data["job_dir"]).mkdir(exist_ok=True)
            sizes = {"original": 9, "compressed": 5}
            (Path(data["job_dir"]) / "summary.json").write_text(json.dumps({"bytes": sizes, "scores": None}))
        process = subprocess.Popen(["sh", "-c", f"sleep 0.2; {script}"], stdout=log, stderr=log)
        self.running.append((data["job_dir"], process))
        self.most = max(self.most, len(self.running))
        return process


def test_whatever_becomes_of_one_the_others_go_on(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = manifest["jobs"][0]["model"]
    for name, seed in (("killed", 1), ("mute", 2), ("wrong", 3)):
        calibration = {"seed": seed}
        manifest["jobs"].append({"name": name, "model": model, "calibration": calibration, "method": {"ratio": 0.5}})
    manifest["max_parallel"] = 3
    scripts = {"killed": "kill -9 $$", "mute": "exit 3", "wrong": "echo error: too short; exit 2"}
    stub = Stub(monkeypatch, dict(scripts))
    path = write(tmp_path, manifest)
    assert call(monkeypatch, str(path)) == 1
    rows = summary(tmp_path / "many")
    assert {name: row["status"] for name, row in rows.items()} == {
        "a-0.4": "done",
        "a-0.6": "done",
        **dict.fromkeys(scripts, "failed"),
    }
    assert rows["killed"]["reason"].startswith("killed by signal 9")
    assert rows["mute"]["reason"].startswith("ended with code 3")
    assert rows["wrong"]["reason"] == "too short"
    assert rows["a-0.4"]["bytes"] == [9, 5]
    assert stub.most == 3

    stub.scripts = {"wrong": scripts["wrong"]}
    assert call(monkeypatch, str(path)) == 2
    shutil.rmtree(tmp_path / "many" / "a-0.6")
    stub.scripts = {}
    assert call(monkeypatch, str(path)) == 0
    assert stub.started == {"a-0.4": 1, "a-0.6": 2, "killed": 2, "mute": 2, "wrong": 3}
    assert call(monkeypatch, str(path), "--set", "defaults.evaluation.max_windows=3", "--set", "folder=null") == 1
    assert stub.started["a-0.4"] == 2  # another recipe is another job; the stub's folder is in the way
    capfd.readouterr()


def test_interrupted_it_leaves_nothing_running(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub = Stub(monkeypatch, {"a-0.4": "sleep 60"})

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(batch.time, "sleep", interrupt)
    assert call(monkeypatch, str(write(tmp_path, manifest))) == 1
    assert "interrupted; run the same command again" in capfd.readouterr().err
    assert stub.running[0][1].poll() == -signal.SIGTERM
    assert summary(tmp_path / "many")["a-0.4"]["status"] == "waiting"


def test_a_second_run_is_refused_before_it_touches_anything(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stub, folder, path = Stub(monkeypatch, {}), tmp_path / "many", write(tmp_path, manifest)
    begun = stub.start

    def begin(recipe: Path, log: IO[str]) -> subprocess.Popen[bytes]:
        if stub.started["a-0.4"] and not stub.started["a-0.6"]:  # between two jobs
            before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
            capfd.readouterr()
            assert call(monkeypatch, str(path)) == 1
            said = f"folder: {folder} is in use by process {os.getpid()}; wait for it or give another folder"
            assert capfd.readouterr().err == f"error: {said}\n"
            assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
            assert look(folder)[2]
        return begun(recipe, log)

    monkeypatch.setattr(batch, "_start", begin)
    assert call(monkeypatch, str(path)) == 0
    assert stub.started == {"a-0.4": 1, "a-0.6": 1}
    assert not look(folder)[2]


@pytest.mark.slow
def test_jobs_die_with_the_batch(tmp_path: Path, manifest: dict[str, Any]) -> None:
    manifest["defaults"]["calibration"] |= {"num_sequences": 40, "batch_size": 1}
    path = write(tmp_path, manifest)
    command = [sys.executable, "-m", "jobs.batch", str(path), "--json"]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "many" / SUMMARY_NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.05)  # it is written once the first job has begun
    (child,) = psutil.Process(driver.pid).children()
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()
    assert summary(tmp_path / "many")["a-0.4"]["status"] == "running"  # nobody was left to say more
    _, seen, runs = look(tmp_path / "many")
    assert ([row["status"] for row in seen["jobs"]], runs) == (["stopped", "waiting"], False)
