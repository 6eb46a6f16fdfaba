"""The recipes that come with the package parse as they are, and run on a tiny model with nothing but overrides."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from jobs import cli
from moe_compress.recipe import load_recipe
from tests.conftest import Checkpoint

RECIPES = sorted((Path(cli.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_small(path: Path, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the quick brown fox jumps over a lazy dog. " * 99}))
    overrides = {
        "model": tiny("mixtral"),
        "output": tmp_path / "small",
        "job_dir": "null",
        "calibration.text": tmp_path / "text.jsonl",
        "calibration.num_sequences": 4,
        "calibration.sequence_length": 16,
        "evaluation.text": tmp_path / "text.jsonl",
        "evaluation.sequence_length": 16,
        "evaluation.max_windows": 4,
        "cluster": "{local: true}",
    }
    changes = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["moe-compress", "compress", str(path), *changes])
    cli.main()
    summary = json.loads((tmp_path / "small.job" / "summary.json").read_text())
    removed = 1 - summary["parameters"]["experts_compressed"] / summary["parameters"]["experts_original"]
    assert load_recipe(path).method.ratio <= removed < 0.75
    assert summary["scores"]["num_windows"] == 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_command_in_a_recipe_is_its_own(path: Path) -> None:
    (line,) = (line for line in path.read_text().splitlines() if "moe-compress" in line)
    program, command, file, *options = shlex.split(line.removeprefix("#"))
    assert (program, command, file) == ("moe-compress", "compress", f"jobs/recipes/{path.name}")
    assert options[::2] == ["--set"] * (len(options) // 2)
    load_recipe(path, options[1::2])


def test_the_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} == {"laptop", "cluster", "paper"}
