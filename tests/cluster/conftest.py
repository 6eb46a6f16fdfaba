"""A model, a text, and what a job in this process makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.cluster.cases import Hashes, Run, cluster_of
from tests.cluster_cases import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"the quick brown fox jumps over a lazy dog {i}" for i in range(200)))
    return file


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Hashes:
    """The output of a job in this process."""
    return Run(tmp_path_factory.mktemp("wanted"), model, text, local=True).go()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a CPU each, and little room for objects."""
    with cluster_of(2, object_store_memory=80 * 2**20) as two:
        yield two
