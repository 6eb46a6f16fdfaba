"""`moe-compress evaluate`: files and datasets are the same text, JSON and Parquet the same scores."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from jobs import cli
from tests.conftest import Checkpoint, Compress

SEQUENCE_LENGTH = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is a dataset with the split `train`, and the file in it."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"the quick brown fox jumps over a lazy dog {number}"}) for number in range(9)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moe-compress", *map(str, arguments)])
        cli.main()


def evaluate(checkpoint: Path, text: object, folder: Path, *options: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what --json wrote, what --parquet wrote by column) for a checkpoint on a text."""
    files = ("--json", folder / "scores.json", "--parquet", folder / "scores.parquet")
    run("evaluate", checkpoint, "--text", text, "--sequence-length", SEQUENCE_LENGTH, *files, *options)
    return json.loads((folder / "scores.json").read_text()), pq.read_table(folder / "scores.parquet").to_pydict()


def test_json_and_parquet_agree(compressed: Compress, tiny: Checkpoint, data: Path, tmp_path: Path) -> None:
    small = compressed("mixtral", ratio=0.4)
    scores, windows = evaluate(small, data / "train.jsonl", tmp_path, "--against", tiny("mixtral"))
    num_tokens = sum(windows["tokens"])
    assert scores["num_windows"] == len(windows["nll"]) > 2
    assert scores["num_tokens"] == num_tokens
    assert scores["perplexity"] == pytest.approx(math.exp(sum(windows["nll"]) / num_tokens))
    assert scores["original_perplexity"] == pytest.approx(math.exp(sum(windows["original_nll"]) / num_tokens))
    assert scores["kl"] == pytest.approx(sum(windows["kl"]) / num_tokens)
    assert scores["agreement"] == pytest.approx(sum(windows["agreement"]) / num_tokens)


def test_a_dataset_is_its_documents(tiny: Checkpoint, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from_file = evaluate(tiny("mixtral"), data / "train.jsonl", tmp_path)
    from_dataset = evaluate(tiny("mixtral"), f"{{dataset: {data}, split: train}}", tmp_path)
    assert from_dataset == from_file


def test_a_job_takes_a_dataset_and_leaves_both_files(tiny: Checkpoint, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    recipe = {
        "model": str(tiny("mixtral")),
        "output": str(tmp_path / "small"),
        "calibration": {"text": {"dataset": str(data)}, "num_sequences": 4, "sequence_length": SEQUENCE_LENGTH},
        "method": {"name": "d2moe", "ratio": 0.4},
        "evaluation": {"text": {"dataset": str(data)}, "sequence_length": SEQUENCE_LENGTH},
        "cluster": {"local": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("compress", tmp_path / "recipe.yaml")
    (table,) = (tmp_path / "small.job").glob("evaluation-*.parquet")
    scores, windows = evaluate(tmp_path / "small", data / "train.jsonl", tmp_path, "--against", tiny("mixtral"))
    assert json.loads((tmp_path / "small.job" / "evaluation.json").read_text()) == pytest.approx(scores)
    assert pq.read_table(table).to_pydict()["nll"] == pytest.approx(windows["nll"])


def test_another_vocabulary_is_refused(
    tiny: Checkpoint, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    config = AutoConfig.from_pretrained(tiny("mixtral"), vocab_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    for path in tiny("mixtral").glob("tokenizer*"):
        shutil.copy(path, other)
    with pytest.raises(SystemExit) as stopped:
        evaluate(tiny("mixtral"), data / "train.jsonl", tmp_path, "--against", other)
    assert stopped.value.code == 2
    assert "96 tokens" in capfd.readouterr().err
    assert not (tmp_path / "scores.json").exists()
