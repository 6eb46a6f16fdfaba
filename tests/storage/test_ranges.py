"""Ranges: the right bytes, no more than are needed, once; and never those of another version."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_compress.checkpoint.reader import CheckpointReader, content_digest, resolve_checkpoint
from moe_compress.errors import CheckpointError, StorageError
from moe_compress.storage import BLOCK_BYTES, node_cache, open_ranges, read_range
from moe_compress.storage.ranges import _source

from .conftest import Store

SMALL_BLOCK_BYTES = 10_000
BYTES = 23 * SMALL_BLOCK_BYTES + 1234


def write_checkpoint(folder: Path, seed: int) -> Path:
    """One shard of 20 MiB: a large tensor between two small ones."""
    torch.manual_seed(seed)
    tensors = {"a": torch.randn(100), "b": torch.randn(5 * 2**20), "c": torch.randn(1000)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range(store: Store, data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_compress.storage.ranges.BLOCK_BYTES", SMALL_BLOCK_BYTES)
    raw = random.Random(0).randbytes(BYTES)
    path = store.path("object")
    if not path.exists():
        (tmp_path / "object").write_bytes(raw)
        store.put(tmp_path / "object", "object")
        assert open_ranges(path) == BYTES
    begin = data.draw(st.integers(0, BYTES))
    length = data.draw(st.sampled_from([0, 1, 1000, SMALL_BLOCK_BYTES, 2 * SMALL_BLOCK_BYTES + 7, BYTES]))
    buffer = bytearray(length)
    assert read_range(path, memoryview(buffer), begin) == min(length, BYTES - begin)
    assert buffer.startswith(raw[begin : begin + length])


def test_only_what_is_needed_and_only_once(store: Store, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", 0)
    store.put(model, "model")
    own = {name: entry.read() for name, entry in CheckpointReader(model).entries.items()}
    store.requests.clear()
    reader = CheckpointReader(resolve_checkpoint(store.address("model")))
    assert store.fetched(".safetensors") < 1000  # the header
    assert torch.equal(reader.entries["a"].read(), own["a"])
    assert store.fetched(".safetensors") < BLOCK_BYTES + 1000  # one block of three
    for name, entry in reader.entries.items():
        assert torch.equal(entry.read(), own[name])
    size = (model / "model.safetensors").stat().st_size
    assert size < store.fetched(".safetensors") < size + 1000
    assert content_digest(reader) == content_digest(CheckpointReader(model))
    again = CheckpointReader(resolve_checkpoint(store.address("model")))
    assert torch.equal(again.entries["b"].read(), own["b"])
    assert store.fetched(".safetensors") < size + 2000  # of the second pass the header alone


def test_works_without_room_to_keep_anything(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint(tmp_path / "model", 0)
    store.put(model, "model")
    monkeypatch.setenv("MOE_COMPRESS_CACHE_GB", "0.000001")
    entries = CheckpointReader(resolve_checkpoint(store.address("model"))).entries
    assert torch.equal(entries["b"].read(), CheckpointReader(model).entries["b"].read())
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert not kept


def test_cache_keeps_its_limit(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint(tmp_path / "model", 0)
    store.put(model, "model")
    limit_bytes = 2 * BLOCK_BYTES + 1000
    monkeypatch.setenv("MOE_COMPRESS_CACHE_GB", str(limit_bytes / 1e9))
    entries = CheckpointReader(resolve_checkpoint(store.address("model"))).entries
    for name in ("b", "c", "b"):
        assert torch.equal(entries[name].read(), CheckpointReader(model).entries[name].read())
        files = [path.stat().st_size for path in (tmp_path / "cache" / "objects").rglob("*") if path.is_file()]
        assert 0 < sum(files) <= limit_bytes


def test_a_shard_that_changes(store: Store, tmp_path: Path) -> None:
    store.put(write_checkpoint(tmp_path / "model", 0), "model")
    folder = resolve_checkpoint(store.address("model"))
    reader = CheckpointReader(folder)
    reader.entries["a"].read()
    later = write_checkpoint(tmp_path / "other", 1) / "model.safetensors"
    store.put(later, "model/model.safetensors")
    with pytest.raises(CheckpointError, match="was replaced after it was opened"):
        reader.entries["c"].read()
    with later.open("ab") as file:
        file.write(b" ")
    store.put(later, "model/model.safetensors")
    with pytest.raises(CheckpointError, match="holds"):  # a header that does not fit, before anything else
        CheckpointReader(folder)


def test_a_checkpoint_that_changed_before_a_process_opened_it(store: Store, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", 0)
    store.put(model, "model")
    folder = resolve_checkpoint(store.address("model"))
    (model / "config.json").write_text('{"changed": true}')
    store.put(model / "config.json", "model/config.json")
    with pytest.raises(CheckpointError, match=r"s3://bucket/model: its objects changed since the job began"):
        CheckpointReader(folder)


def test_a_store_that_fails_for_a_while(store: Store, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", 0)
    store.put(model, "model")
    chance = random.Random(0)
    store.before = lambda method, key, query: 503 if chance.random() < 0.2 else None
    entries = CheckpointReader(resolve_checkpoint(store.address("model"))).entries
    assert torch.equal(entries["b"].read(), CheckpointReader(model).entries["b"].read())


def test_a_store_that_fails_for_good(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(write_checkpoint(tmp_path / "model", 0), "model")
    entry = CheckpointReader(resolve_checkpoint(store.address("model"))).entries["b"]
    monkeypatch.setattr("moe_compress.storage.stores.PATIENCE_S", 0.1)
    store.before = lambda method, key, query: 403
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: cannot be read \(.*\); check the name of the bucket"
    ):
        entry.read()


def test_missing_folder_and_bucket(store: Store) -> None:
    with pytest.raises(CheckpointError, match="model s3://bucket/none: no such folder in the store"):
        resolve_checkpoint(store.address("none"))
    with pytest.raises((CheckpointError, StorageError), match="s3://nowhere/model"):
        resolve_checkpoint(store.address("model").replace("bucket", "nowhere"))
    assert os.environ["AWS_ACCESS_KEY_ID"]


def test_a_full_disk_keeps_nothing_and_ends_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    store.put(tmp_path / "file", "file")

    def full(raw: bytes, file: BinaryIO) -> None:
        file.write(raw[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moe_compress.storage.ranges._write", full)
    path = store.path("file")
    buffer = bytearray(open_ranges(path))
    for _ in range(2):
        assert read_range(path, memoryview(buffer), 0) == 5
        assert buffer == b"bytes"
    assert node_cache().open(node_cache().name(_source(path)._name(0))) is None
    assert not list((node_cache().folder / "new").iterdir())
