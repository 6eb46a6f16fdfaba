"""What several tests of training begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Compress

from .sparsity_cases import STUDENT


@pytest.fixture(scope="session")
def student(compressed: Compress) -> Path:
    """A Mixtral with more sparse columns than training is to leave it."""
    return compressed("mixtral", **STUDENT)
