"""Kill anything at any moment, run the same command again: the same bytes come out.

MOE_COMPRESS_KILLS says how often each victim is killed (default 1, to be quick; 12 for a thorough run).
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from tests.cluster_cases import find_process, finish, hashes, start, write_model, write_recipe

KILLS = int(os.environ.get("MOE_COMPRESS_KILLS", "1"))
TITLES = {"layer worker": "ray::LayerWorkerActor", "task worker": "ray::_run_unit"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, text_file: Path) -> tuple[dict[str, str], float]:
    """(hashes of the output, seconds) of a job that nobody disturbs, run in-process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder / "recipe.yaml", model, text_file, folder / "out", {"local": True})
    began = time.monotonic()
    code, errors = finish(start(recipe))
    assert code == 0, errors
    return hashes(folder / "out"), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_gives_the_bytes_of_the_library(
    workers: int, tmp_path: Path, model: Path, text_file: Path, undisturbed: tuple[dict[str, str], float]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {"layer_workers": workers})
    code, errors = finish(start(recipe))
    assert code == 0, errors
    assert hashes(tmp_path / "out") == undisturbed[0]


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(KILLS))
@pytest.mark.parametrize("victim", ["driver", "layer worker", "task worker"])
def test_killed_job_ends_with_the_same_bytes(
    victim: str, moment: int, tmp_path: Path, model: Path, text_file: Path, undisturbed: tuple[dict[str, str], float]
) -> None:
    wanted, seconds = undisturbed
    recipe = write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "out", {"layer_workers": 2})
    delay = random.Random(f"{victim} {moment}").random()
    job = start(recipe)
    if victim == "driver":
        time.sleep(2 + delay * 2 * seconds)
        job.kill()
    else:
        process = find_process(job, TITLES[victim], timeout_s=120)
        assert process is not None, finish(job)[1]
        time.sleep(delay * (3 if victim == "layer worker" else 1))
        with contextlib.suppress(psutil.NoSuchProcess):  # it was done: the job must not care
            process.kill()
    finish(job)
    assert not any(path.name.endswith(".safetensors") for path in tmp_path.iterdir())
    code, errors = finish(start(recipe))
    assert code == 0, errors
    assert hashes(tmp_path / "out") == wanted
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(KILLS))
@pytest.mark.parametrize("method", ["msmoe", "mcsmoe"])
def test_every_method_ends_with_the_same_bytes(
    method: str, moment: int, tmp_path: Path, model: Path, text_file: Path
) -> None:
    local = write_recipe(tmp_path / "a.yaml", model, text_file, tmp_path / "wanted", {"local": True}, method)
    began = time.monotonic()
    code, errors = finish(start(local))
    assert code == 0, errors
    seconds = time.monotonic() - began
    recipe = write_recipe(tmp_path / "b.yaml", model, text_file, tmp_path / "out", {"layer_workers": 2}, method)
    job = start(recipe)
    time.sleep(2 + random.Random(f"{method} {moment}").random() * 2 * seconds)
    job.kill()
    finish(job)
    code, errors = finish(start(recipe))
    assert code == 0, errors
    assert hashes(tmp_path / "out") == hashes(tmp_path / "wanted")
    assert not list(tmp_path.glob(".*partial"))
