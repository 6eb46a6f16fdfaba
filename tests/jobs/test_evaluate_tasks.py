"""Tasks from the command line and in a job: scores of both checkpoints, kept, shown, or refused in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli
from moe_compress.evaluation.tasks.scoring import score_task
from moe_compress.recipe_fields import TaskSource
from tests.conftest import Checkpoint, Compress
from tests.task_files import ROWS, write_rows


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moe-compress", *map(str, arguments)])
        cli.main()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks and a text, in words of the tiny models."""
    folder = tmp_path_factory.mktemp("data")
    choices = ["a lazy dog", "fox", "the brown dog jumps"]
    rows = [{"query": f"the quick {'brown ' * n}fox", "choices": choices[n % 2 :], "gold": n % 2} for n in range(8)]
    write_rows(folder / "mine.jsonl", rows)
    write_rows(folder / "winogrande.jsonl", [ROWS["winogrande"]] * 3)
    (folder / "text.txt").write_text("the quick brown fox jumps over a lazy dog " * 40)
    return folder


def test_tasks_alone_beside_text_and_beside_the_original(
    compressed: Compress, tiny: Checkpoint, data: Path, tmp_path: Path
) -> None:
    small, original = compressed("mixtral", ratio=0.4), tiny("mixtral")
    mine = ("--task", f"mine={data / 'mine.jsonl'}", "--task", f"winogrande={data / 'winogrande.jsonl'}")
    run("evaluate", small, *mine, "--max-examples", 5, "--json", tmp_path / "scores.json")
    alone = json.loads((tmp_path / "scores.json").read_text())
    assert alone.keys() == {"tasks"}
    task = TaskSource(name="mine", test=[str(data / "mine.jsonl")])
    assert alone["tasks"]["mine"] == score_task(small, task, 5, device="cpu").to_dict()
    assert alone["tasks"]["winogrande"]["num_examples"] == 3

    text = ("--text", data / "text.txt", "--sequence-length", 64, "--against", original)
    run("evaluate", small, *mine, *text, "--json", tmp_path / "scores.json")
    both = json.loads((tmp_path / "scores.json").read_text())
    assert both["kl"] > 0
    found = both["tasks"]["mine"]
    assert found.keys() == {"num_examples", "num_cut", "metrics", "original_metrics"}
    given = score_task(original, task, sequence_length=64, device="cpu")
    assert found["original_metrics"] == given.to_dict()["metrics"]
    assert found["num_examples"] == 8


def test_a_job_scores_both_once_and_reports(
    tiny: Checkpoint, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe: dict[str, Any] = {
        "model": str(tiny("mixtral")),
        "output": str(tmp_path / "small"),
        "calibration": {"text": str(data / "text.txt"), "num_sequences": 4, "sequence_length": 16},
        "method": {"name": "d2moe", "ratio": 0.4},
        "evaluation": {
            "tasks": [{"name": "mine", "test": str(data / "mine.jsonl")}],
            "max_examples": 6,
            "sequence_length": 64,
        },
        "cluster": {"local": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("compress", tmp_path / "recipe.yaml")
    folder = tmp_path / "small.job"
    found = json.loads((folder / "evaluation.json").read_text())
    assert found.keys() == {"tasks"}
    task = TaskSource(name="mine", test=[str(data / "mine.jsonl")])
    how = {"max_examples": 6, "device": "cpu"}
    assert found["tasks"]["mine"]["metrics"] == score_task(tmp_path / "small", task, **how).to_dict()["metrics"]
    assert found["tasks"]["mine"]["original_metrics"] == score_task(tiny("mixtral"), task, **how).to_dict()["metrics"]
    assert json.loads((folder / "summary.json").read_text())["scores"] == found
    kept = {path.name for path in folder.glob("task-*.json")}
    assert len(kept) == 2
    stages = (folder / "events.jsonl").read_text().count("task mine")
    run("compress", folder / "recipe.yaml", "--set", "evaluation.text=" + str(data / "text.txt"))
    assert {path.name for path in folder.glob("task-*.json")} == kept
    assert (folder / "events.jsonl").read_text().count("task mine") == stages > 0
    assert json.loads((folder / "evaluation.json").read_text())["tasks"] == found["tasks"]
    capfd.readouterr()
    run("report", folder)
    shown = capfd.readouterr().out
    assert "mine" in shown
    given = found["tasks"]["mine"]["original_metrics"]["accuracy_by_bytes"]
    assert f"{100 * given['value']:.1f} [{100 * given['low']:.1f}, {100 * given['high']:.1f}]" in shown
    assert "perplexity" in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "neither --text nor --task"),
        (["--task", "nope"], "'nope' is no task; give files"),
        (["--task", "mine={data}/none.jsonl"], "none.jsonl: no such text file"),
        (["--task", "mine={data}/empty.jsonl"], "mine: its test files hold no row"),
        (["--task", "mine={data}/text.txt"], "unknown kind of text"),
        (["--task", "sst2={data}/fields.jsonl"], "no row of the task 'sst2'"),
        (["--task", "mine={data}/later.jsonl"], "later.jsonl:2"),
        (["--task", "={data}/mine.jsonl"], "tasks.0.name"),
        (["--task", "mine={data}/mine.jsonl", "--task", "mine={data}/mine.jsonl"], "tasks: 'mine' is named twice"),
        (["--task", "mine={data}/mine.jsonl", "--parquet", "{data}/scores.parquet"], "--parquet"),
        (["--task", "mine={data}/mine.jsonl", "--sequence-length", "2"], "sequence_length: 2 tokens leave no room"),
    ],
)
def test_bad_tasks_are_refused_in_one_line(
    options: list[str], expected: str, tiny: Checkpoint, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (data / "empty.jsonl").write_text("\n")
    write_rows(data / "fields.jsonl", [{"text": "x"}])
    good = json.loads((data / "mine.jsonl").read_text().splitlines()[0])
    write_rows(data / "later.jsonl", [good, {"query": "fox"}])
    with pytest.raises(SystemExit) as stopped:
        run("evaluate", tiny("mixtral"), *(option.format(data=data) for option in options))
    assert stopped.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]
    assert expected in line
    assert ";" in line
