"""The recipes that come with the package parse as they are, and run on a tiny model with nothing but overrides."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from jobs import cli
from moe_compress.checkpoint import CheckpointReader
from moe_compress.recipe import load_recipe
from tests.conftest import Checkpoint

RECIPES = sorted((Path(cli.__file__).parent / "recipes").glob("*.yaml"))


SMALL_TRAINING = {
    "distillation.num_sequences": 8,
    "distillation.sequence_length": 16,
    "distillation.validation_sequences": 2,
    "distillation.batch_size": 4,
    "distillation.micro_batch_size": 2,
    "distillation.deepspeed": "{}",
}


def command(path: Path) -> list[str]:
    """The one command that a recipe's comment names, in words."""
    (line,) = (line for line in path.read_text().splitlines() if "moe-compress" in line)
    return shlex.split(line.removeprefix("#"))


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
    recipe = load_recipe(path)
    if recipe.distillation is not None:
        pytest.importorskip("deepspeed")
        overrides |= SMALL_TRAINING | {"distillation.text": tmp_path / "text.jsonl"}
    changes = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["moe-compress", command(path)[1], str(path), *changes])
    cli.main()
    summary = json.loads((tmp_path / "small.job" / "summary.json").read_text())
    removed = 1 - summary["parameters"]["experts_compressed"] / summary["parameters"]["experts_original"]
    assert recipe.method.ratio <= removed < 0.75
    assert summary["scores"]["num_windows"] == 4
    if recipe.distillation is not None:
        training = json.loads((tmp_path / "small.job" / "training.json").read_text())
        assert training["scores"]["after"]["num_windows"] == 4
        assert (
            CheckpointReader(tmp_path / "small-distilled").total_bytes
            == CheckpointReader(tmp_path / "small").total_bytes
        )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_command_in_a_recipe_is_its_own(path: Path) -> None:
    program, name, file, *options = command(path)
    assert (program, file) == ("moe-compress", f"jobs/recipes/{path.name}")
    assert name == ("compress" if load_recipe(path).distillation is None else "distill")
    assert options[::2] == ["--set"] * (len(options) // 2)
    load_recipe(path, options[1::2])


def test_the_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} == {"laptop", "cluster", "paper", "distill"}
