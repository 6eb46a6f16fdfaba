"""What stops a job half-way is said in one line, with exit code 1; what is finished stays, and a rerun goes on."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from jobs import cli
from moe_compress import __version__
from moe_compress.checkpoint import writer
from moe_compress.job import Job
from moe_compress.recipe import load_recipe
from tests.conftest import Checkpoint


def call(*arguments: str) -> int:
    """`moe-compress ARGUMENTS`; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moe-compress", *arguments])
        try:
            cli.main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


def error_line(stderr: str) -> str:
    """The last of the lines, the only error among them."""
    lines = stderr.splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], stderr
    assert "Traceback" not in stderr
    return lines[-1]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def recipe(tiny: Checkpoint, text_file: Path, tmp_path: Path) -> Path:
    data: dict[str, Any] = {
        "model": str(tiny("qwen3_moe")),
        "output": str(tmp_path / "small"),
        "calibration": {"text": str(text_file), "num_sequences": 4, "sequence_length": 16},
        "method": {"name": "d2moe", "ratio": 0.4},
        "evaluation": {"text": str(text_file), "sequence_length": 16, "max_windows": 2},
        "cluster": {"local": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Room for the hashes of the output of a job that nothing stopped."""
    return {}


STAGES = ["tokens/", "source.json", "statistics-", "spectra-", "shards-", "config.json", "evaluation-", "summary.json"]


@pytest.mark.parametrize("full_at", STAGES)
def test_a_full_disk(
    full_at: str,
    recipe: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if not undisturbed:
        assert call("compress", str(recipe), "--set", f"output={tmp_path / 'undisturbed'}") == 0
        undisturbed["output"] = hashes(tmp_path / "undisturbed")
    replace = os.replace

    def fill(source: Path, target: Path) -> None:
        if full_at in str(target.relative_to(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "replace", fill)
        assert call("compress", str(recipe)) == 1
    line = error_line(capfd.readouterr().err)
    assert "No space left on device" in line
    assert "are free in" in line
    job = tmp_path / "small.job"
    finished = {path: path.stat().st_mtime_ns for path in job.rglob("*.safetensors")}
    assert bool(finished) == (full_at != "tokens/")
    assert call("compress", str(recipe)) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert hashes(tmp_path / "small") == undisturbed["output"]
    assert not list(tmp_path.rglob("*.partial"))


def test_activations_overflow(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(yaml.safe_load(recipe.read_text())["model"], model)
    tensors = load_file(model / "model.safetensors")
    large = {name: tensor * (1e30 if ".experts." in name else 1) for name, tensor in tensors.items()}
    save_file(large, model / "model.safetensors", {"format": "pt"})
    assert call("compress", str(recipe), "--set", f"model={model}") == 1
    assert "overflow" in error_line(capfd.readouterr().err)
    assert list((tmp_path / "small.job" / "tokens").iterdir())
    assert not (tmp_path / "small").exists()


def test_a_second_job_on_the_folder(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Job(load_recipe(recipe)).locked():
        assert call("compress", str(recipe)) == 1
    line = error_line(capfd.readouterr().err)
    assert f"in use by process {os.getpid()}" in line
    assert call("compress", str(recipe)) == 0


def test_another_text_for_the_same_output(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("compress", str(recipe)) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "small.job").glob("statistics-*/*")}
    capfd.readouterr()
    assert call("compress", str(recipe), "--set", "calibration.seed=1") == 2
    assert "holds a compressed checkpoint of another job" in error_line(capfd.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "small.job").glob("statistics-*/*")} == before


def test_a_text_of_fewer_sequences_is_told(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("compress", str(recipe), "--set", "calibration.num_sequences=9999", "--set", "evaluation=null") == 0
    assert "of the 9999 sequences asked for" in capfd.readouterr().err


def test_a_broken_summary(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text("{")
    assert call("report", str(tmp_path)) == 2
    assert "is not JSON" in error_line(capfd.readouterr().err)


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback_and_the_line(place: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "/no/such"]
    code = call(*(["--debug", *arguments] if place == "before" else [*arguments, "--debug"]))
    lines = capfd.readouterr().err.splitlines()
    assert code == 2
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: job_dir: /no/such")


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capfd.readouterr().out == f"{__version__}\n"


def test_what_killed_workers_left_is_removed(recipe: Path) -> None:
    job = Job(load_recipe(recipe))
    left = job.place("statistics") / f".x{writer.PARTIAL_SUFFIX}"
    left.touch()
    with job.locked():
        assert not left.exists()
        left.touch()
    assert not left.exists()
