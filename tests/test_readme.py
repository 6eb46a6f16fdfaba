"""What the README tells a reader to run, run: its recipe, commands and Python on a tiny model, from top to bottom."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel

from jobs import cli
from moe_compress.batch_recipe import expand, parse_batch
from tests.conftest import Checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
INDENTED = re.findall(r"^ {4}(\w[^#\n]*)", README, re.MULTILINE)
TABLE = re.findall(r"^\| `(moe-compress [^`]+)`", README, re.MULTILINE)

PLACEHOLDERS = {
    "RECIPE": "recipe.yaml",
    "CHECKPOINT": "mixtral-40",
    "FILE": "held-out.txt",
    "NAME=QUESTIONS": "quiz=questions.jsonl",
    "--max-examples N": "--max-examples 2",
    "ORIGINAL": "model",
    "--json OUT": "--json scores.json",
    "--parquet OUT": "--parquet scores.parquet",
    "OUT": "dense",
    "JOB_DIR": "mixtral-40.job",
    "key=value": "method.ratio=0.4",
    "[": "",
    "]": "",
}
"""What the table of commands leaves open -> what it is here, once the recipe has run."""


ELSEWHERE = ("submit", "batch")
"""Commands that need a cluster, or make processes of their own; tests/jobs runs them."""


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return str(found)


def run(line: str, folder: Path) -> None:
    """A command of the README in the folder where the reader is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", shlex.split(line))
        cli.main()


@pytest.fixture(scope="module")
def folder(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader is, once the recipe of the README, shortened, and the commands below it have run."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "model").symlink_to(tiny("mixtral"))
    document = "the quick brown fox jumps over a lazy dog. "
    (folder / "calibration.jsonl").write_text(json.dumps({"text": document * 50}) + "\n")
    (folder / "held-out.txt").write_text(document * 300)  # `evaluate` takes windows of 2048 tokens
    question = {"query": "the quick brown", "choices": ["fox", "lazy dog"], "gold": 0}
    (folder / "questions.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    recipe = block("yaml")
    for given, here in {"mistralai/Mixtral-8x7B-v0.1": "model", ": 128": ": 4", ": 2048": ": 16"}.items():
        assert recipe.count(given) == 1
        recipe = recipe.replace(given, here)
    recipe += "  sequence_length: 16\n  max_windows: 4\ncluster: {local: true}\n"
    (folder / "recipe.yaml").write_text(recipe)
    (training,) = re.findall(r"^```\n(distillation:\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    for given, here in {": 4096": ": 8", ": 1024": ": 16", "{processes: 8, zero_stage: 3}": "{}"}.items():
        assert training.count(given) == 1
        training = training.replace(given, here)
    training += "  validation_sequences: 2\n"
    (folder / "distill.yaml").write_text(recipe + training)
    for line in INDENTED:
        if line.startswith("moe-compress") and line.split()[1] not in ELSEWHERE:
            run(line, folder)
    return folder


def test_the_commands_below_the_recipe(folder: Path) -> None:
    made = {"mixtral-40", "mixtral-60", "mixtral-40.job", "mixtral-40-distilled"}
    assert {path.name for path in folder.glob("mixtral-*")} == made
    assert len(list(folder.glob("mixtral-40.job/statistics-*"))) == 1  # one calibration serves both


def test_the_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, PreTrainedModel] = {}
    exec(block("python"), names)
    assert names["model"].config.model_type == "mixtral"


def test_the_batch(folder: Path) -> None:
    (manifest,) = re.findall(r"^```\n(defaults:\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    for given, here in {"mistralai/Mixtral-8x7B-v0.1": "model", "Qwen/Qwen3-30B-A3B": "model", "2048": "16"}.items():
        assert manifest.count(given) == 1
        manifest = manifest.replace(given, here)
    entries, problems = expand(parse_batch(yaml.safe_load(manifest)), folder)
    assert problems == []
    assert [entry.name for entry in entries] == ["mixtral-0.4", "mixtral-0.6", "qwen"]


@pytest.mark.parametrize("line", [line for line in TABLE if line.split()[1] not in ELSEWHERE])
def test_the_table_of_commands(line: str, folder: Path) -> None:
    if "distill" in line:
        pytest.importorskip("deepspeed")
        line = line.replace("RECIPE", "distill.yaml")
    for given, here in PLACEHOLDERS.items():
        line = line.replace(given, here)
    run(line, folder)
    for made in ("dense", "scores.json", "scores.parquet"):
        assert made not in line or (folder / made).exists()


def test_the_table_is_complete() -> None:
    described = {line.split()[1] for line in TABLE}
    assert described == {str(command.name or command.callback.__name__) for command in cli.app.registered_commands}


def test_make_has_what_is_named() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^ {4}|`)make (\w+)", README, re.MULTILINE)
    assert {"quickstart", "test", "benchmarks"} <= set(named) <= set(targets)


def test_files_that_are_named_are_there() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    paths = re.findall(r"`((?:\w+/)+\w*(?:\.py)?|\w+\.py)`", README)
    assert len(links) > 1
    assert len(paths) > 5
    for link in (*links, *paths):
        path, _, heading = link.partition("#")
        assert (ROOT / path).exists() or (ROOT / "moe_compress" / path).exists(), link
        titles = re.findall(r"^#+ (.+)", (ROOT / path).read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], link
