"""`moe-compress distill`: fine-tune on a task, compress, distill on the task; and a training that goes astray."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli
from moe_compress.checkpoint import CheckpointReader, Manifest
from tests.conftest import Checkpoint

pytest.importorskip("deepspeed")

Run = Any


@pytest.fixture
def run(tmp_path: Path, tiny: Checkpoint, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in a folder with a task's rows; a recipe is written first."""
    monkeypatch.chdir(tmp_path)
    words = ["fox", "dog", "quick", "lazy", "brown", "over"]
    rows = [
        {"query": f"{words[n % 6]} {words[n % 5]}", "choices": ["the quick", "a lazy dog"], "gold": n % 6 % 2}
        for n in range(40)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(*arguments: str, recipe: dict[str, Any] | None = None) -> None:
        if recipe is not None:
            Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        monkeypatch.setattr(sys, "argv", ["moe-compress", *arguments])
        cli.main()

    return command


def recipe(model: Path | str, output: str, **settings: Any) -> dict[str, Any]:
    task = {"name": "pick", "train": "rows.jsonl", "test": "rows.jsonl"}
    training = {"task": task, "num_sequences": 24, "validation_sequences": 8, "sequence_length": 16, "seed": 1}
    training |= {"batch_size": 8, "micro_batch_size": 4, "epochs": 4, "evaluate_every": 3, "dtype": "float32"}
    return {
        "model": str(model),
        "output": output,
        "distillation": training | {"optimizer": {"learning_rate": 3e-3}} | settings,
        "evaluation": {"tasks": [task], "sequence_length": 16},
        "cluster": {"local": True},
    }


def test_fine_tune_compress_distill(
    run: Run, tiny: Checkpoint, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("distill", "recipe.yaml", recipe=recipe(tiny("mixtral"), "fine", teacher="none"))
    tuned = json.loads(Path("fine.job/training.json").read_text())
    assert tuned["tasks"].keys() == {"before", "after"}
    assert tuned["validation"][-1]["validation_loss"] < tuned["validation"][0]["validation_loss"]
    assert "quantization_config" not in CheckpointReader("fine").config
    before, after = (tuned["tasks"][name]["pick"] for name in ("before", "after"))
    assert before["num_examples"] == after["num_examples"] == 40
    assert before["metrics"]["accuracy"]["value"] < 0.75 < after["metrics"]["accuracy"]["value"]

    how = {"name": "d2moe", "ratio": 0.5}
    calibration = {"text": str(text_file), "num_sequences": 4, "sequence_length": 16}
    last = recipe("fine", "small") | {"method": how, "calibration": calibration}
    capsys.readouterr()
    run("distill", "recipe.yaml", recipe=last)
    shown, said = capsys.readouterr()
    assert said.count("task pick") == 3  # of the compressed and of the original, and then of what was trained
    found = json.loads(Path("small.job/training.json").read_text())
    assert found["tasks"]["teacher"] == tuned["tasks"]["after"]
    assert found["tasks"].keys() == {"teacher", "before", "after"}
    for scores in found["tasks"].values():
        accuracy = scores["pick"]["metrics"]["accuracy"]
        low, high = (f"{100 * accuracy[name]:.1f}" for name in ("low", "high"))
        assert f"{100 * accuracy['value']:.1f}" in shown
        assert f"[{low}, {high}]" in shown
    assert found["returned"] is None
    manifest = Manifest.load(Path("small-distilled"))
    assert manifest.source.name == "fine"
    assert manifest.training is not None
    assert manifest.training["task"] == {"name": "pick"}
    assert "rows.jsonl" not in manifest.text()

    for folder, told in (("fine.job", "fine"), ("small.job", "small-distilled")):
        run("report", folder)
        assert told in capsys.readouterr().out
    run("inspect", "fine")
    assert "made from mixtral" in capsys.readouterr().out
    run("evaluate", "fine", "--text", str(text_file), "--sequence-length", "16")
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_what_was_cut_is_said(run: Run, tiny: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    long = [row | {"query": "the quick brown fox " * (1 + n % 2) + row["query"]} for n, row in enumerate(rows)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    settings = {"teacher": "none", "num_sequences": 99, "sequence_length": 8, "max_steps": 1}
    run("distill", "recipe.yaml", recipe=recipe(tiny("mixtral"), "fine", **settings) | {"evaluation": None})
    said = " ".join(capsys.readouterr().err.split())
    assert "of 40 examples lost the front of their context to fit into 8 tokens" in said
    assert "there are 40 of the 107 sequences asked for, 8 of them held out" in said


def test_a_loss_that_is_not_finite(run: Run, tiny: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"teacher": "none", "checkpoint_every": 1, "optimizer": {"learning_rate": 1e30, "warmup": 0.5}}
    astray = recipe(tiny("mixtral"), "fine", **settings)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run("distill", "recipe.yaml", recipe=astray)
    assert stopped.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "step 2 is nan, on sequences [" in line
    assert "lower distillation.optimizer.learning_rate" in line
    assert not Path("fine").exists()
    (kept,) = Path("fine.job").glob("training-*/step-*")
    assert kept.name == "step-000001"
    astray["distillation"]["optimizer"] = {"learning_rate": 1e-3}
    run("distill", "recipe.yaml", recipe=astray)
    assert json.loads(Path("fine.job/training.json").read_text())["steps"] == 12
