"""Whole objects: up, down, from store to store; what was begun and not finished; a store in trouble."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from moe_compress.checkpoint.writer import atomic_write
from moe_compress.errors import CompressionError, StorageError
from moe_compress.storage import (
    abort_unfinished,
    as_path,
    check_writable,
    copy,
    files_in,
    local,
    local_folder,
    node_cache,
    remove_folder,
    unfinished_uploads,
    upload,
)
from moe_compress.storage.unfinished import _Bucket

from .conftest import Store


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """40 MB: uploaded in parts."""
    file = tmp_path / "large"
    file.write_bytes(random.Random(0).randbytes(40 * 10**6))
    return file


def test_there_and_back(store: Store, large: Path) -> None:
    path = store.path("folder/large")
    upload(large, path)
    assert any("partNumber" in request.query for request in store.requests)
    with local(path) as here:
        assert here.read_bytes() == large.read_bytes()
    store.requests.clear()
    with local(path) as here:
        assert here.stat().st_size == 40 * 10**6
    assert store.fetched() == 0
    copy(path, store.path("copy"))
    assert store.fetched() == 0  # the store copies by itself
    with local(store.path("copy")) as here:
        assert here.read_bytes() == large.read_bytes()


def test_a_store_that_copies_in_silence(store: Store, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own timeout is 3 s; what it ended would be asked for again, and ended again."""
    monkeypatch.setattr("moe_compress.storage.stores.PATIENCE_S", 0.1)
    begun: list[tuple[str, str]] = []

    def think(method: str, key: str, query: str) -> int | None:
        copies, completes = method == "PUT" and key.endswith("/copy"), method == "POST" and "uploadId" in query
        if copies or completes:
            begun.append((method, key))
            time.sleep(4)
        return None

    store.before = think
    upload(large, store.path("large"))
    copy(store.path("large"), store.path("copy"))
    assert begun == [("POST", "bucket/large"), ("PUT", "bucket/copy")]
    assert store.path("copy").stat().st_size == large.stat().st_size


def test_what_fsspec_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_COMPRESS_CACHE", str(tmp_path / "cache"))
    path = as_path("memory://bucket/folder/name")
    atomic_write(path, "text")
    assert files_in(path.parent) == {"name"}
    with local(path) as here:
        assert here.read_text() == path.read_text() == "text"
    remove_folder(path.parent)
    assert not path.exists()


def test_small_objects_are_written_whole(store: Store) -> None:
    path = store.path("folder/pointer.json")
    for text in ("first", "second"):
        atomic_write(path, text)
        assert path.read_text() == text
    store.requests.clear()
    with local(path) as here:
        assert here.read_text() == "second"
    assert store.fetched() == 0  # what was written here is here
    assert {request.method for request in store.requests} == {"HEAD"}


def test_a_folder_by_name(store: Store, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
        store.put(tmp_path / name, f"model/{name}")
    with local_folder(store.path("model")) as folder:
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            name: name for name in ("config.json", "tokenizer.json")
        }
    assert not folder.exists()
    assert files_in(store.path("model")) == {"config.json", "tokenizer.json", "model.safetensors"}
    remove_folder(store.path("model"))
    assert not files_in(store.path("model"))


def test_a_store_that_refuses_for_a_while(store: Store, large: Path) -> None:
    chance = random.Random(1)
    store.before = lambda method, key, query: 503 if method in ("PUT", "POST") and chance.random() < 0.3 else None
    upload(large, store.path("large"))
    with local(store.path("large")) as here:
        assert here.read_bytes() == large.read_bytes()


def test_a_store_that_refuses(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_compress.storage.stores.PATIENCE_S", 0.1)
    store.before = lambda method, key, query: 403 if method == "PUT" else None
    with pytest.raises(CompressionError, match=r"^s3://bucket/a: cannot be written \(.*credentials$"):
        atomic_write(store.path("a"), "text")
    with pytest.raises(StorageError, match="s3://bucket/folder: cannot be written"):
        check_writable(store.path("folder"))
    store.before = lambda method, key, query: None
    check_writable(store.path("folder"))
    assert not store.path("folder").exists()
    with pytest.raises(StorageError, match=r"s3://nowhere/folder: cannot be written \(.*NO_SUCH_BUCKET"):
        check_writable(as_path(store.address("folder").replace("bucket", "nowhere")))  # type: ignore[arg-type]
    assert not list((node_cache().folder / "new").iterdir())


@pytest.mark.parametrize("token", [None, "session"])
def test_requests_are_signed_as_botocore_signs(
    token: str | None, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    now = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    ours = _Bucket(store.path("")).request("GET", "a folder/käse+.bin", {"uploads": "", "prefix": "a b/ü~"}, now)
    theirs = AWSRequest("GET", ours.full_url, headers={"x-amz-content-sha256": ours.headers["X-amz-content-sha256"]})
    theirs.context["timestamp"] = "20260504T030201Z"
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda **_: now.replace(tzinfo=None), raising=False)
    monkeypatch.setattr(
        "botocore.auth.datetime", SimpleNamespace(datetime=SimpleNamespace(utcnow=lambda: now)), raising=False
    )
    S3SigV4Auth(Credentials("key", "secret", token), "s3", "us-east-1").add_auth(theirs)
    assert ours.headers["Authorization"] == theirs.headers["Authorization"]


def test_what_was_not_finished_goes(store: Store) -> None:
    for key in ("job/a", "job/deeper/b", "other/c"):
        served, name = store.path(key).store
        stream = served.open_output_stream(name)
        stream.write(bytes(12 * 2**20))
        stream.flush()
        KEPT.append(stream)  # closing it would finish the upload
    folder = store.path("job")
    assert {key for key, _ in unfinished_uploads(folder)} == {"job/a", "job/deeper/b"}
    abort_unfinished(folder)
    assert unfinished_uploads(folder) == []
    assert len(unfinished_uploads(store.path("other"))) == 1


KEPT: list[object] = []
