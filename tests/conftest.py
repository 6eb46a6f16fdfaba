"""What many tests share: tiny checkpoints with a tokenizer, jobs over them, and the breadth table."""

from __future__ import annotations

import os
import secrets
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe_compress.executor import InProcess
from moe_compress.job import Job
from moe_compress.pipeline import compress
from moe_compress.progress import Reporter
from moe_compress.recipe import parse_recipe
from moe_compress.stages.prepare import check, prepare
from tests.tiny_models import save_tiny

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it once in the life of a process: one for all tests in it
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

BREADTH = pytest.StashKey[dict[str, str]]()
"""Model type -> one line of the breadth table."""

Checkpoint = Callable[[str], Path]
Compress = Callable[..., Path]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"the quick brown fox jumps over a lazy dog {i}" for i in range(40)))
    return file


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Letters and a few merges, within the vocabulary of the tiny models."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100, special_tokens=["<eos>"], initial_alphabet=list(string.ascii_lowercase), show_progress=False
    )
    model.train_from_iterator(["the quick brown fox jumps over a lazy dog"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    """`tiny(model_type)`: the folder of a tiny checkpoint, saved once a session. Raises Unbuildable."""
    root = tmp_path_factory.mktemp("tiny")

    def make(model_type: str) -> Path:
        folder = root / model_type
        if not folder.exists():
            save_tiny(model_type, folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint, text_file: Path) -> Compress:
    """`compressed(model_type, **method)`: the folder of the compressed tiny checkpoint, made once a session."""
    root = tmp_path_factory.mktemp("compressed")

    def make(model_type: str, **method: Any) -> Path:
        output = root / f"{model_type}-{'-'.join(map(str, method.values()))}"
        recipe = parse_recipe(
            {
                "model": str(tiny(model_type)),
                "output": str(output),
                "job_dir": str(root / f"{model_type}.job"),
                "calibration": {"text": str(text_file), "num_sequences": 4, "sequence_length": 16, "batch_size": 2},
                "method": {"name": "d2moe", **method},
                "evaluation": None,
                "cluster": {"local": True},
            }
        )
        if not output.exists():
            job = Job(recipe)
            with job.locked():
                compress(job, prepare(job, *check(recipe)), InProcess(1), Reporter(job))
        return output

    return make


@pytest.fixture(scope="session")
def breadth(request: pytest.FixtureRequest) -> dict[str, str]:
    """The rows of the breadth table, printed when the session ends."""
    return request.config.stash.setdefault(BREADTH, {})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: one of them must not be what all other processes wait for at the end."""
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its rows to whoever prints the table."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["breadth"] = session.config.stash.get(BREADTH, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes the rows of a worker."""
    node.config.stash.setdefault(BREADTH, {}).update(getattr(node, "workeroutput", {}).get("breadth", {}))


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    rows = config.stash.get(BREADTH, {})
    if rows:
        terminalreporter.section("model types")
        for model_type, row in sorted(rows.items()):
            terminalreporter.write_line(f"{model_type:24} {row}")
    return (yield)
