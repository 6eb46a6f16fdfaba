"""Whole jobs from bucket to bucket: the bytes of a job on a disk, whatever is killed, and nothing half to be seen."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from jobs.cli import app
from jobs.run import run
from moe_compress.errors import CheckpointError, RecipeError
from moe_compress.recipe import load_recipe
from moe_compress.stages.prepare_training import check_training
from moe_compress.storage import files_in, unfinished_uploads
from tests.cluster_cases import finish, hashes, start, write_model, write_recipe

from .conftest import Store

OUTPUT = "run/out"
QUIET = Console(quiet=True)
HEADERS = 100_000
"""More bytes than all readings of headers, fewer than any weight."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two layers whose experts make shards that are uploaded in parts."""
    sizes = {"hidden_size": 64, "intermediate_size": 12288, "num_hidden_layers": 2, "num_attention_heads": 2}
    return write_model(tmp_path_factory.mktemp("models") / "model", tokenizer, **sizes, num_local_experts=4)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, model: Path, text_file: Path) -> dict[str, str]:
    """Hashes of the output of the same job on a disk."""
    folder = tmp_path_factory.mktemp("disk")
    recipe = write_recipe(
        folder / "recipe.yaml", model, text_file, folder / "out", {"local": True}, "prune", ratio=0.25
    )
    run(load_recipe(recipe), QUIET)
    return hashes(folder / "out")


@pytest.fixture
def recipe(store: Store, tmp_path: Path, model: Path, text_file: Path) -> Path:
    """The job from bucket to bucket."""
    return in_store(store, tmp_path, model, text_file, {"local": True})


def in_store(store: Store, folder: Path, model: Path, text: Path, cluster: dict[str, object]) -> Path:
    where = (store.put(model, "models/model"), store.put(text, "text.txt"), store.address(OUTPUT))
    return write_recipe(folder / "recipe.yaml", *where, cluster, "prune", ratio=0.25)  # type: ignore[arg-type]


def stored_hashes(store: Store, key: str = OUTPUT) -> dict[str, str]:
    folder = store.path(key)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(files_in(folder))}


def states(store: Store, key: str = OUTPUT) -> Iterator[set[str]]:
    """What lay in the output after each request."""
    there: set[str] = set()
    for request in store.requests:
        folder, _, name = request.key.rpartition("/")
        if folder != f"bucket/{key}" or request.status >= 300:
            continue
        put = request.method == "PUT" and "partNumber" not in request.query
        if put or (request.method == "POST" and "uploadId" in request.query):
            there = there | {name}
        elif request.method == "DELETE":
            there = there - {name}
        yield there


def check_no_half_was_seen(store: Store, wanted: dict[str, str]) -> None:
    shards = {name for name in wanted if name.endswith(".safetensors")}
    seen = list(states(store))
    for there in seen:
        if there & {"config.json", "model.safetensors.index.json"}:
            assert shards <= there
        if "moe_compress.json" in there:
            assert wanted.keys() <= there
    assert any("moe_compress.json" in there for there in seen)


@pytest.mark.slow
def test_from_bucket_to_bucket(
    store: Store, recipe: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_file: Path
) -> None:
    run(load_recipe(recipe), QUIET)
    assert stored_hashes(store) == wanted
    check_no_half_was_seen(store, wanted)
    assert unfinished_uploads(store.path("run")) == []
    assert not store.path("run/out.job/lock").exists()
    assert not list((tmp_path / "cache" / "new").iterdir())
    size = sum(path.stat().st_size for path in store.path("models/model").glob("*.safetensors"))
    assert store.fetched("models/model/model.safetensors") < size + HEADERS  # one pass, whatever was read again
    events = [json.loads(line) for line in store.path("run/out.job/events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "run_end"

    store.requests.clear()
    run(load_recipe(recipe), QUIET)  # all of it is there
    assert store.fetched("models/model/model.safetensors") < HEADERS
    assert not any(r.method == "PUT" and r.key.endswith(".safetensors") for r in store.requests)

    address, output = store.address(OUTPUT), store.address("run/dense")
    commands = [
        ["inspect", address],
        ["report", store.address("run/out.job")],
        ["evaluate", address, "--text", str(text_file), "--sequence-length", "32", "--max-windows", "2"],
    ]
    for command in commands:
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    with pytest.raises(CheckpointError, match="a stock checkpoint already"):
        CliRunner().invoke(app, ["materialize", store.address("models/model"), output], catch_exceptions=False)


@pytest.mark.slow
def test_killed_in_the_upload_of_the_last_shard(store: Store, recipe: Path, wanted: dict[str, str]) -> None:
    reached, killed = threading.Event(), threading.Event()
    last = max(name for name in wanted if name.endswith(".safetensors"))

    def stall(method: str, key: str, query: str) -> int | None:
        if method == "PUT" and key.endswith(f"/{last}") and "partNumber=2" in query:
            reached.set()
            killed.wait(60)
            return 503
        return None

    store.before = stall
    job = start(recipe)
    assert reached.wait(120), finish(job)[1]
    job.kill()
    job.wait()
    store.before = lambda method, key, query: None
    killed.set()
    assert unfinished_uploads(store.path("run"))
    assert not store.path(OUTPUT).exists()
    run(load_recipe(recipe), QUIET)
    assert stored_hashes(store) == wanted
    check_no_half_was_seen(store, wanted)
    assert unfinished_uploads(store.path("run")) == []


@pytest.mark.slow
def test_publication_that_breaks_off(
    store: Store, recipe: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_compress.storage.stores.PATIENCE_S", 0.1)
    store.before = lambda method, key, query: (
        403 if method == "PUT" and key.endswith(f"{OUTPUT}/moe_compress.json") else None
    )
    with pytest.raises(Exception, match=f"s3://bucket/{OUTPUT}/moe_compress.json: cannot be written"):
        run(load_recipe(recipe), QUIET)
    assert not store.path(f"{OUTPUT}/moe_compress.json").exists()
    store.before = lambda method, key, query: None
    run(load_recipe(recipe), QUIET)
    assert stored_hashes(store) == wanted
    check_no_half_was_seen(store, wanted)


@pytest.mark.slow
def test_a_disk_and_a_bucket(
    store: Store, tmp_path: Path, model: Path, text_file: Path, wanted: dict[str, str]
) -> None:
    """The job folder on a disk and the output in a bucket, and the other way round."""
    for output, job_dir in ((store.address(OUTPUT), tmp_path / "job"), (tmp_path / "out", store.address("run/job"))):
        written = write_recipe(
            tmp_path / "recipe.yaml",
            model,
            text_file,
            output,
            {"local": True},
            "prune",
            ratio=0.25,  # type: ignore[arg-type]
        )
        run(load_recipe(written, [f"job_dir={job_dir}"]), QUIET)
    assert stored_hashes(store) == wanted
    assert hashes(tmp_path / "out") == wanted


def test_refused_before_work(store: Store, recipe: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        f"output={store.address(OUTPUT)}".replace(
            "bucket", "nowhere"
        ): r"output: s3://nowhere/run/out: cannot be written",
        f"output={store.address('')}": "output: .* names a bucket; give a folder in it",
        f"model={store.address('none')}": "model s3://bucket/none: no such folder in the store",
        f"calibration.text={store.address('none.txt')}": r"calibration.text: s3://bucket/none.txt: no such text file",
        f"output={store.address('models/model/out')}": "lies in the model's own folder",
        f"output={store.address('models')}": "output: s3://bucket/models exists and is not ours",
    }
    store.requests.clear()
    for change, reason in cases.items():
        with pytest.raises((RecipeError, CheckpointError), match=reason):
            run(load_recipe(recipe, [change]), QUIET)
    assert store.fetched(".safetensors") < HEADERS
    assert not store.path("run").exists()
    store.before = lambda method, key, query: 403
    with pytest.raises(CheckpointError, match="check the name of the bucket and the credentials"):
        run(load_recipe(recipe), QUIET)


def test_a_training_keeps_its_snapshots_on_a_disk(store: Store, recipe: Path) -> None:
    changes = ["distillation.text=text.txt", f"distillation.output={store.address('run/trained')}"]
    with pytest.raises(RecipeError, match=r"job_dir: s3://bucket/run/out\.job is in an object store"):
        check_training(load_recipe(recipe, changes).training(), None)


class Refusals:
    """For three seconds from the first, nothing is written under folders whose names begin so, one after the other."""

    def __init__(self, *prefixes: str) -> None:
        self.counts, self._until = dict.fromkeys(prefixes, 0), dict[str, float]()

    def __call__(self, method: str, key: str, query: str) -> int | None:
        if method in ("PUT", "POST"):
            for prefix in self.counts:
                if f"/{prefix}" in key and time.monotonic() < self._until.setdefault(prefix, time.monotonic() + 3):
                    self.counts[prefix] += 1
                    return 503
        return None


@pytest.mark.slow
def test_nodes_that_share_no_disk(
    store: Store, tmp_path: Path, model: Path, text_file: Path, wanted: dict[str, str]
) -> None:
    """Two nodes, each with a cache of its own, none of them the driver's; twice the store refuses what they write."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for node in ("one", "two"):
            cluster.add_node(num_cpus=1, env_vars={"MOE_COMPRESS_CACHE": str(tmp_path / node)})
        store.before = Refusals("statistics-", "shards-")
        written = in_store(store, tmp_path, model, text_file, {"address": cluster.address, "layer_workers": 2})
        run(load_recipe(written), QUIET)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert all(count > 1 for count in store.before.counts.values())
    assert stored_hashes(store) == wanted
    for node in ("one", "two"):
        assert any(path.is_file() for path in (tmp_path / node / "objects").rglob("*"))
