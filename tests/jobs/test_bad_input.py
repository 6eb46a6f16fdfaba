"""Whatever is wrong with the input is said in one line, with exit code 2, before anything is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jobs import cli
from tests.jobs.bad_input import CASES, World, nan_weight
from tests.tiny_models import build_tiny


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    build_tiny("mixtral").save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def world(sharded: Path, tmp_path: Path) -> World:
    model, text, output = tmp_path / "model", tmp_path / "text.txt", tmp_path / "out" / "small"
    shutil.copytree(sharded, model)
    text.write_text("the quick brown fox jumps over the lazy dog\n\n" * 20)
    recipe = {
        "model": str(model),
        "output": str(output),
        "calibration": {"text": str(text), "num_sequences": 4, "sequence_length": 16},
        "method": {"name": "d2moe", "ratio": 0.4},
        "evaluation": {"text": str(text), "sequence_length": 16},
        "cluster": {"local": True},
    }
    return World(tmp_path, model, text, output, recipe)


def all_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def assert_one_line(stderr: str, expected: str) -> None:
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: ")
    assert expected in stderr
    assert "Traceback" not in stderr
    assert ";" in stderr  # what is wrong; what to do


def fail(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Runs the command, which must give exit code 2; its standard error."""
    monkeypatch.setattr(sys, "argv", ["moe-compress", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line_with_nothing_written(
    case: str, world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = CASES[case]
    spoil(world)
    command = world.command()
    before = all_below(world.root)
    assert_one_line(fail(command, monkeypatch, capfd), expected)
    assert all_below(world.root) == before


def test_the_command_itself_refuses_before_it_starts_ray(world: World) -> None:
    nan_weight(world)
    del world.recipe["cluster"]
    command = [sys.executable, "-m", "jobs.cli", *world.command()]
    before = all_below(world.root)
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])
    assert done.returncode == 2
    assert_one_line(done.stderr, "holds NaN or infinity")
    assert done.stdout == ""
    assert all_below(world.root) == before


def test_a_finished_job_folder_survives_a_refusal(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = world.root / "out" / "small.job" / "statistics" / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("hours of work")
    nan_weight(world)
    assert_one_line(fail(world.command(), monkeypatch, capfd), "holds NaN")
    assert kept.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compress", "/no/such.yaml"], "/no/such.yaml"),
        (["plan", "/no/such.yaml"], "/no/such.yaml"),
        (["inspect", "/no/such"], "/no/such"),
        (["report", "/no/such"], "/no/such"),
        (["materialize", "/no/such", "/no/out"], "/no/such"),
        (["evaluate", "/no/such", "--text", "/no/such.txt"], "/no/such"),
        (["evaluate", "{model}", "--text", "/no/such.txt"], "/no/such.txt"),
        (["evaluate", "{model}", "--text", "{text}", "--against", "/no/original"], "/no/original"),
        (["evaluate", "{model}", "--text", "{text}", "--dtype", "int4"], "int4"),
        (["evaluate", "{model}", "--text", "{text}", "--json", "/no/folder/scores.json"], "/no/folder"),
        (["evaluate", "{model}", "--text", "{text}", "--sequence-length", "1"], "--sequence-length"),
        (["inspect", "{root}"], "config.json"),
        (["report", "{model}"], "no finished job"),
        (["materialize", "{model}", "{root}/dense"], "{model}"),
        (["compress"], "RECIPE"),
        (["explode"], "explode"),
        (["inspect", "{model}", "--colour"], "--colour"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    expected: str,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = {"model": world.model, "text": world.text, "root": world.root}
    before = all_below(world.root)
    stderr = fail([word.format(**places) for word in arguments], monkeypatch, capfd)
    assert_one_line(stderr, expected.format(**places))
    assert all_below(world.root) == before
