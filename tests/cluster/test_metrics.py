"""What Prometheus would read of a cluster while a job runs on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cluster.metrics import COUNTERS, GAUGES, OF_A_PROCESS, exported_names
from tests.cluster_cases import ROOT, write_model, write_recipe
from tests.loopback import Loopback, ask, loopback_cluster

TIMEOUT_S = 240
OF_GPUS = "ray_moe_compress_gpu_memory_bytes"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Loopback]:
    with loopback_cluster() as found:
        yield found


Series = dict[tuple[str, str], float]


def read(cluster: Loopback) -> Series:
    """(name, what it is of: `output stage` or `process`) -> the largest value that is served."""
    found: Series = {}
    for line in ask(cluster.metrics, cluster.token).splitlines():
        match = re.fullmatch(r"(ray_moe_compress\w+)\{(.*)\} (\S+)", line)
        if match:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            of = " ".join(labels[tag] for tag in ("output", "stage", "process") if tag in labels)
            found[match[1], of] = max(float(match[3]), found.get((match[1], of), 0.0))
    return found


@pytest.mark.slow
def test_a_job_tells_of_its_stages_and_all_its_processes(
    cluster: Loopback, tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = write_model(tmp_path / "model", tokenizer)
    recipe = write_recipe(tmp_path / "recipe.yaml", model, text_file, tmp_path / "small", {"layer_workers": 1})
    command = [sys.executable, "-m", "jobs.cli", "compress", str(recipe)]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address}  # no address in the recipe: that one is used
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert job.returncode == 0, job.stderr
    expected = {
        ("ray_moe_compress_tokens_total", "small calibrate"),
        ("ray_moe_compress_flops_total", "small calibrate"),
    }
    for stage in ("calibrate", "allocate", "compress", "assemble", "evaluate"):
        expected.add(("ray_moe_compress_stage_progress", f"small {stage}"))
    for process in ("driver", "worker", "task"):
        for name in ("read_bytes_total", "written_bytes_total", "memory_bytes"):
            expected.add((f"ray_moe_compress_{name}", process))
    deadline = time.monotonic() + 60
    while not expected <= (found := read(cluster)).keys() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert expected <= found.keys(), expected - found.keys()
    assert {name for name, _ in found} | {OF_GPUS} == exported_names()
    assert {found[series] for series in expected if "progress" in series[0]} == {1.0}
    assert found["ray_moe_compress_tokens_total", "small calibrate"] == pytest.approx(tokens_of(tmp_path / "small.job"))
    model_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert found["ray_moe_compress_read_bytes_total", "worker"] > 0.5 * model_bytes
    assert found["ray_moe_compress_memory_bytes", "driver"] > 100e6


def tokens_of(job_dir: Path) -> int:
    """Tokens of the text that was calibrated on, by its summary."""
    return int(json.loads((job_dir / "summary.json").read_text())["stages"]["calibrate"]["tokens"])


def test_names_say_their_unit_and_tags_are_not_prometheus_own() -> None:
    for name, (what, tags) in (COUNTERS | GAUGES).items():
        assert name.startswith("moe_compress_")
        assert what.endswith(".")
        assert not {"job", "instance"} & set(tags)
        assert not name.endswith("_total")  # which Ray puts after a counter
        assert ("bytes" not in name) or tags == OF_A_PROCESS
