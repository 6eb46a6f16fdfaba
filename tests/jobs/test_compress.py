"""What a cluster is given to run does what `moe-compress compress` and `distill` do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from jobs import cli
from tests.conftest import Checkpoint


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, module: str = "jobs.compress") -> int:
    """`python -m MODULE ARGUMENTS`; its exit code."""
    monkeypatch.setattr(sys, "argv", ["compress.py", *arguments])
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.fixture
def recipe(tiny: Checkpoint, text_file: Path, tmp_path: Path) -> Path:
    data = {
        "model": str(tiny("mixtral")),
        "output": str(tmp_path / "small"),
        "calibration": {"text": str(text_file), "num_sequences": 4, "sequence_length": 16},
        "method": {"name": "d2moe", "ratio": 0.4},
        "cluster": {"local": True},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_it_compresses(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, str(recipe), "--set", "method.ratio=0.5") == 0
    assert (recipe.parent / "small" / "config.json").exists()


def test_it_distills(recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed")
    assert run(monkeypatch, str(recipe), module="jobs.distill") == 2
    assert capfd.readouterr().err.startswith("error: distillation: missing")


def test_errors_are_those_of_the_command(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = [str(recipe), "--set", "method.ratio=1.5"]
    assert run(monkeypatch, *wrong) == 2
    said = capfd.readouterr().err
    monkeypatch.setattr(sys, "argv", ["moe-compress", "compress", *wrong])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert said == capfd.readouterr().err != ""


def test_a_traceback_is_asked_for(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(recipe.parent / "none.yaml"), "--debug") == 2
    assert "Traceback" in capfd.readouterr().err
