"""Whatever is wrong with the input of a training is said in one line, with exit code 2, before anything is written."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli
from moe_compress.checkpoint import Manifest, Source
from tests.conftest import Checkpoint
from tests.jobs.test_bad_input import all_below, assert_one_line, fail
from tests.switch_models import cipher_pairs, random_switch, save_switch, write_pairs
from tests.task_files import ROWS, write_rows

pytest.importorskip("deepspeed")

Recipe = dict[str, Any]
Spoil = Callable[[Path, Recipe], object]

COMPRESSING = {"calibration": {"text": "text.txt", "num_sequences": 4, "sequence_length": 16}}


@pytest.fixture
def root(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student, a teacher and a text, where the command runs."""
    for name in ("student", "teacher"):
        shutil.copytree(tiny("mixtral"), tmp_path / name)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def good_recipe() -> Recipe:
    """A training that would run."""
    return {
        "model": "student",
        "teacher": "teacher",
        "output": "out/trained",
        "distillation": {
            "text": "text.txt",
            "num_sequences": 8,
            "sequence_length": 16,
            "validation_sequences": 2,
            "teacher": "live",
            "batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": 2,
            "dtype": "float32",
        },
        "evaluation": {"text": "text.txt", "sequence_length": 16},
        "cluster": {"local": True},
    }


def put(key: str, value: Any) -> Spoil:
    """Sets a key of the recipe, `distillation.train` for instance; None takes it away."""

    def spoil(root: Path, recipe: Recipe) -> None:
        *parents, leaf = key.split(".")
        for parent in parents:
            recipe = recipe.setdefault(parent, {})
        recipe[leaf] = value
        if value is None:
            del recipe[leaf]

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(root: Path, recipe: Recipe) -> None:
        for each in spoils:
            each(root, recipe)

    return spoil


def file(name: str, content: bytes) -> Spoil:
    return lambda root, recipe: (root / name).write_bytes(content)


def trained_on(task: Any) -> Spoil:
    return both(put("distillation.text", None), put("distillation.task", task))


def smaller_vocabulary(root: Path, recipe: Recipe) -> None:
    config = root / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 64}))


def taken(root: Path, recipe: Recipe) -> None:
    (root / "out" / "trained").mkdir(parents=True)
    (root / "out" / "trained" / "precious.txt").write_text("")


def trained_by_another_job(root: Path, recipe: Recipe) -> None:
    (root / "out" / "trained").mkdir(parents=True)
    about = {"layers": {}, "parameters": {}, "files": {}, "training": {"seed": 0, "student_digest": "0"}}
    Manifest(tool_version="0", source=Source(name="m", digest="0"), recipe={}, **about).save(root / "out" / "trained")


def compressing(root: Path, recipe: Recipe) -> None:
    """The student is to be made first, from the teacher."""
    recipe |= COMPRESSING | {"model": "teacher", "output": "out/small", "method": {"name": "d2moe", "ratio": 0.4}}
    del recipe["teacher"]


def made_by_another_job(root: Path, recipe: Recipe) -> None:
    compressing(root, recipe)
    (root / "out" / "small").mkdir(parents=True)
    about = {"recipe": {"method": {"name": "prune"}}, "layers": {}, "parameters": {}, "files": {}}
    Manifest(tool_version="0", source=Source(name="m", digest="0"), **about).save(root / "out" / "small")


def live_switch_at_stage_3(root: Path, recipe: Recipe) -> None:
    """A teacher whose experts are a module each, which loading stacks."""
    save_switch(random_switch(), root / "switch")
    write_pairs(root / "pairs.jsonl", cipher_pairs(20, seed=0))
    recipe |= {"model": "switch", "teacher": "switch"}
    recipe["distillation"] |= {"text": "pairs.jsonl", "deepspeed": {"zero_stage": 3}}
    del recipe["evaluation"]


CASES: dict[str, tuple[Spoil, str]] = {
    # the recipe
    "unknown section": (put("distil", {}), "distil: unknown key; known here: cluster, distillation, evaluation"),
    "unknown key": (put("distillation.lr", 1), "distillation.lr: unknown key"),
    "unknown key of the optimizer": (put("distillation.optimizer.lr", 1), "distillation.optimizer.lr: unknown key"),
    "unknown key of the task": (trained_on({"name": "copa", "file": "a"}), "distillation.task.file: unknown key"),
    "no distillation": (put("distillation", None), "distillation: missing"),
    "no distillation after compression": (both(compressing, put("distillation", None)), "distillation: missing"),
    "nothing to train on": (put("distillation.text", None), "distillation.text: missing"),
    "text and task": (put("distillation.task", "copa"), "distillation.task: stands beside text"),
    "batch that is no multiple": (put("distillation.batch_size", 5), "distillation.batch_size: 5 is no multiple"),
    "layers of a cached teacher": (
        both(put("distillation.teacher", "cached"), put("distillation.loss.hidden", 1.0)),
        "distillation.loss.hidden: needs",
    ),
    "negative rate": (put("distillation.optimizer.learning_rate", -1), "optimizer.learning_rate: -1"),
    "a teacher of no use": (put("distillation.teacher", "none"), "teacher: 'teacher' and distillation.teacher: none"),
    "no teacher": (put("teacher", None), "teacher: missing"),
    "unknown device": (put("cluster.device", "banana"), "cluster.device: 'banana'"),
    "processes of one process": (put("distillation.deepspeed.processes", 2), "deepspeed.processes: 2 need Ray"),
    # the checkpoints
    "missing student": (put("model", "nowhere"), "model 'nowhere': no such folder"),
    "missing teacher": (put("teacher", "nowhere"), "teacher: model 'nowhere': no such folder"),
    "teacher of another vocabulary": (smaller_vocabulary, "teacher: its vocabulary has 64 tokens and that of student"),
    "no tokenizer": (
        lambda root, recipe: [path.unlink() for path in (root / "student").glob("tokenizer*")],
        "the tokenizer does not load",
    ),
    "stage 3 of single experts": (live_switch_at_stage_3, "zero_stage: 3 cannot spread 'switch_transformers'"),
    "parameters that are not there": (put("distillation.train", ["*.wi"]), "distillation.train: '*.wi' matches no"),
    "factors of an original": (put("distillation.train", "factors"), "distillation.train: 'factors' is none of"),
    "sparsity without columns": (put("distillation.sparsity.ratio", 0.9), "distillation.sparsity: prunes sparse"),
    # where to
    "output in the student": (put("output", "student/trained"), "output: "),
    "output in the teacher": (put("output", "teacher/trained"), "output: "),
    "job folder in the output": (put("job_dir", "out/trained/job"), "job_dir: "),
    "output that is taken": (taken, "exists and is not ours"),
    "output of another training": (trained_by_another_job, "holds a checkpoint of another job"),
    "student of another job": (made_by_another_job, "output: "),
    # the texts
    "missing text": (put("distillation.text", "no.txt"), "distillation.text: "),
    "missing text after compression": (both(compressing, put("distillation.text", "no.txt")), "distillation.text: "),
    "unknown kind of text": (
        both(file("a.pdf", b"x"), put("distillation.text", "a.pdf")),
        "distillation.text: a.pdf: unknown kind of text",
    ),
    "empty text": (
        both(file("empty.txt", b""), put("distillation.text", "empty.txt")),
        "distillation.text: empty.txt: is empty",
    ),
    "blank text": (both(file("a.txt", b"\n \n"), put("distillation.text", "a.txt")), "distillation.text: a.txt"),
    "missing evaluation text": (put("evaluation.text", "no.txt"), "evaluation.text: "),
    "nothing to evaluate on": (put("evaluation", {}), "evaluation.text: missing"),
    "all is held out": (
        put("distillation.validation_sequences", 999),
        "distillation.validation_sequences: 999 of",
    ),
    "unknown task": (trained_on("banana"), "distillation.task: 'banana' is no task"),
    "task without its file": (trained_on({"name": "a", "train": "no.jsonl"}), "distillation.task: "),
    "task of other rows": (
        both(file("a.jsonl", b'{"text": "a fox"}'), trained_on({"name": "a", "train": "a.jsonl"})),
        "distillation.task: a.jsonl:1: no row of the task 'a'",
    ),
    "task of other rows further on": (
        both(
            lambda root, recipe: write_rows(root / "a.jsonl", [ROWS["winogrande"], {"sentence": "a _"}]),
            trained_on({"name": "a", "train": "a.jsonl"}),
        ),
        "distillation.task: a.jsonl:2: the field 'option1' holds nothing",
    ),
    "task without rows": (
        both(file("a.jsonl", b"\n"), trained_on({"name": "a", "train": "a.jsonl"})),
        "distillation.task: a: its train files hold no row",
    ),
    "task that does not fit": (
        both(
            lambda root, recipe: write_rows(root / "a.jsonl", [ROWS["winogrande"]] * 9),
            put("distillation.sequence_length", 4),
            trained_on({"name": "a", "train": "a.jsonl"}),
        ),
        "distillation.task: sequence_length: 4 tokens",
    ),
    "unknown task to score": (put("evaluation.tasks", ["banana"]), "evaluation.tasks: 'banana' is no task"),
}


def command(root: Path, recipe: Recipe) -> list[str]:
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["distill", "recipe.yaml"]


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line_with_nothing_written(
    case: str, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = CASES[case]
    recipe = good_recipe()
    spoil(root, recipe)
    arguments = command(root, recipe)
    before = all_below(root)
    assert_one_line(fail(arguments, monkeypatch, capfd), expected)
    assert all_below(root) == before


def test_the_job_folder_of_another_process(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is wrong with the input: the same command will do, later."""
    (root / "out" / "trained.job").mkdir(parents=True)
    arguments = command(root, good_recipe())
    with open(root / "out" / "trained.job" / "lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = all_below(root)
        monkeypatch.setattr(sys, "argv", ["moe-compress", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 1
        assert_one_line(capfd.readouterr().err, "is in use by process")
        assert all_below(root) == before
