"""The manifest says the same bytes for the same job, and notices every changed file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_compress.checkpoint import FileRecord, Manifest, Source, file_records, verify, write_shard
from moe_compress.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    shard = write_shard(tmp_path / "model.safetensors", {"w": torch.ones(3)})
    make_manifest(file_records(tmp_path, [shard])).save(tmp_path)
    return tmp_path


def make_manifest(files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
        tool_version="0.1.0",
        source=Source(name="owner/name", digest="00"),
        recipe={"method": {"ratio": 0.4, "name": "d2moe"}},
        layers={"model.layers.1.mlp": {"kept": [0, 3]}, "model.layers.0.mlp": {"rank": 7}},
        parameters={"original": 100, "compressed": 60},
        files=files,
    )


def test_round_trip_and_same_bytes(folder: Path) -> None:
    raw = (folder / "moe_compress.json").read_bytes()
    manifest = Manifest.load(folder)
    assert manifest.layers["model.layers.1.mlp"] == {"kept": [0, 3]}
    assert list(manifest.files) == ["config.json", "model.safetensors"]
    assert json.loads(raw)["format_version"] == 1
    # Known shards or not, the manifest there already or not, keys in any order: the same bytes.
    make_manifest(dict(reversed(file_records(folder).items()))).save(folder)
    assert (folder / "moe_compress.json").read_bytes() == raw


def test_verify_names_every_problem(folder: Path) -> None:
    assert verify(folder) == []
    shard = folder / "model.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + b"\x01")
    assert [p.split(" ")[:3] for p in verify(folder)] == [["model.safetensors:", "has", "sha256"]]
    shard.write_bytes(raw[:-1])
    (folder / "config.json").unlink()
    assert verify(folder) == [
        "config.json: is missing",
        f"model.safetensors: has {len(raw) - 1} bytes, not {len(raw)}",
    ]


@pytest.mark.parametrize("name", ["../secret", "/secret", "a/b", "a\\b", ".."])
def test_verify_stays_in_the_folder(folder: Path, name: str) -> None:
    make_manifest({name: FileRecord(bytes=1, sha256="0")}).save(folder)
    assert verify(folder) == [f"{name}: is not a plain file name"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version: Input should be 1"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"files": {"a": {"bytes": "many", "sha256": "0"}}}, r"files\.a\.bytes"),
    ],
)
def test_manifest_of_another_kind_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "moe_compress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_unreadable_manifest_is_refused(folder: Path) -> None:
    (folder / "moe_compress.json").write_text("{")
    with pytest.raises(CheckpointError, match="the file: Invalid JSON"):
        Manifest.load(folder)
    (folder / "moe_compress.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Manifest.load(folder)
