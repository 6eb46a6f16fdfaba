"""What the reader accepts is what safetensors wrote; all else is refused in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moe_compress.checkpoint import CheckpointReader, content_digest, read_shard, resolve_checkpoint
from moe_compress.checkpoint.shard import TORCH_DTYPES
from moe_compress.errors import CheckpointError


def shard_bytes(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def tensor_info(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four tensors in two shards."""
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    shards = {
        "model-1.safetensors": {"a": torch.arange(4.0), "c": torch.ones(2, 3).bfloat16()},
        "model-2.safetensors": {"b": torch.tensor(7), "d": torch.zeros(0, 5)},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    write_index(folder, {"a": 1, "c": 1, "b": 2, "d": 2})
    return folder


def write_index(folder: Path, shard_of: dict[str, int]) -> None:
    weight_map = {name: f"model-{number}.safetensors" for name, number in shard_of.items()}
    index = {"metadata": {"total_size": 36}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("code", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5)])
def test_reads_every_dtype_bit_exactly(tmp_path: Path, code: str, shape: tuple[int, ...]) -> None:
    dtype = TORCH_DTYPES[code]
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(2 if code == "BOOL" else 256, (num_bytes,), dtype=torch.uint8)
    tensor = bits.view(dtype).reshape(shape)
    save_file({"pad": torch.ones(1, dtype=torch.uint8), "w": tensor}, tmp_path / "s.safetensors")
    entry = read_shard(tmp_path / "s.safetensors")["w"]
    read = entry.read()
    assert (entry.dtype, read.dtype, read.shape) == (code, dtype, tensor.shape)
    assert torch.equal(read.reshape(-1).view(torch.uint8), bits)


def test_entry_stands_in_for_a_safetensors_slice(folder: Path) -> None:
    entry = CheckpointReader(folder).entries["a"]
    with safe_open(folder / "model-1.safetensors", "pt") as file:
        stock = file.get_slice("a")
        assert (entry.get_shape(), entry.get_dtype()) == (stock.get_shape(), stock.get_dtype())
        for key in (..., slice(1, 3), 2):
            assert torch.equal(entry[key], stock[key])


def test_folder_is_described(folder: Path) -> None:
    reader = CheckpointReader(folder)
    assert reader.config == {"model_type": "mixtral"}
    assert list(reader.entries) == list(reader.weight_map) == ["a", "b", "c", "d"]
    assert [file.name for file in reader.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert reader.total_bytes == 4 * 4 + 8 + 6 * 2
    assert {name: entry.file.name for name, entry in reader.entries.items()} == reader.weight_map


def test_single_file_goes_before_the_index(folder: Path) -> None:
    save_file({"z": torch.ones(3), "y": torch.ones(1)}, folder / "model.safetensors")
    reader = CheckpointReader(folder)
    assert list(reader.entries) == list(reader.weight_map) == ["y", "z"]
    assert (reader.total_bytes, reader.files) == (16, [folder / "model.safetensors"])


def test_opening_and_reading_touch_only_what_is_asked(tmp_path: Path) -> None:
    """A terabyte of holes: whoever reads or maps more than one small range does not come back."""
    hole_bytes = 2**40
    header = {
        "hole": tensor_info(0, hole_bytes),
        "w": tensor_info(hole_bytes, hole_bytes + 8, "I32", [2]),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(shard_bytes(header))
    end = path.stat().st_size + hole_bytes
    os.truncate(path, end)
    with path.open("r+b") as file:
        file.seek(end)
        file.write(torch.tensor([5, 6], dtype=torch.int32).numpy().tobytes())
    (tmp_path / "config.json").write_text("{}")
    assert CheckpointReader(tmp_path).entries["w"].read().tolist() == [5, 6]


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:3]], at))
    entry = CheckpointReader(folder).entries["a"]
    assert entry.read().tolist() == [0, 1, 2, 3]
    assert b"".join(entry.blocks()) == torch.arange(4.0).numpy().tobytes()


def test_shard_that_shrinks_or_goes_is_named(folder: Path) -> None:
    entry = CheckpointReader(folder).entries["b"]
    os.truncate(entry.file, entry.offset + 1)
    with pytest.raises(CheckpointError, match=r"tensor b: .*model-2.safetensors ends 7 bytes"):
        entry.read()
    entry.file.unlink()
    with pytest.raises(CheckpointError, match=r"tensor b: .*model-2.safetensors cannot be read"):
        entry.read()


def test_prefetch_merges_neighbours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, _: advised.append((at, size)))
    save_file({name: torch.ones(4) for name in "abcde"}, folder / "model.safetensors")
    reader = CheckpointReader(folder)
    reader.prefetch(["e", "b", "a"])
    first, last = reader.entries["a"], reader.entries["e"]
    assert advised == [(first.offset, 32), (last.offset, 16)]


TOO_DEEP = b'{"a":' + b"[" * 200_000
BROKEN_SHARDS = {
    "empty": (b"", "header claims 0 bytes in a file of 0"),
    "header past the end": ((99).to_bytes(8, "little") + b"{}", "claims 99 bytes in a file of 10"),
    "absurd header": (b"\xff" * 16, "header claims 18446744073709551615 bytes"),
    "not JSON": (shard_bytes(b"{nope}"), "header is not valid JSON"),
    "not text": (shard_bytes(b"\xff\xfe"), "header is not valid JSON"),
    "too deep": (shard_bytes(TOO_DEEP), "header is not valid JSON"),
    "not an object": (shard_bytes([]), "header is a JSON list"),
    "duplicate key": (
        shard_bytes(
            b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "duplicate key 'w'",
    ),
    "no shape": (shard_bytes({"w": {"dtype": "U8", "data_offsets": [0, 0]}}), "w is described by"),
    "negative shape": (shard_bytes({"w": tensor_info(0, 1, shape=[-1, -1])}), "w is described by"),
    "text shape": (shard_bytes({"w": tensor_info(0, 1, shape=["1"])}), "w is described by"),
    "one offset": (
        shard_bytes({"w": {"dtype": "U8", "shape": [1], "data_offsets": [1]}}),
        "w is described by",
    ),
    "unknown dtype": (shard_bytes({"w": tensor_info(0, 1, "Q7")}, b"x"), "w has the dtype 'Q7'"),
    "wrong size": (
        shard_bytes({"w": tensor_info(0, 6, "F32", [2])}, b"x" * 6),
        r"w spans 6 bytes and F32 \[2\] needs 8",
    ),
    "outside the data": (shard_bytes({"w": tensor_info(0, 9)}, b"x"), "truncated"),
    "truncated": (shard_bytes({"w": tensor_info(0, 4)}, b"x" * 3), "truncated"),
    "padded": (shard_bytes({"w": tensor_info(0, 4)}, b"x" * 5), "truncated"),
    "overlap": (
        shard_bytes({"v": tensor_info(0, 4), "w": tensor_info(2, 6)}, b"x" * 6),
        "w begins at byte .* not overlap",
    ),
    "hole": (
        shard_bytes({"v": tensor_info(0, 4), "w": tensor_info(6, 8)}, b"x" * 8),
        "w begins at byte .* leave holes",
    ),
    "before the data": (shard_bytes({"w": tensor_info(-2, 2)}, b"x" * 4), "w begins at byte"),
}


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_broken_shard_is_refused(tmp_path: Path, name: str) -> None:
    raw, message = BROKEN_SHARDS[name]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(raw)
    refuse(tmp_path, message)


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(folder)
    assert "\n" not in str(caught.value)


def set_index(value: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def only(*names: str) -> Callable[[Path], None]:
    def keep(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        for name in names:
            (folder / name).write_text("{}")

    return keep


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "is a JSON list"),
    "no weights": (only("config.json"), "neither model.safetensors nor"),
    "pickled": (
        only("config.json", "pytorch_model.bin"),
        "pytorch_model.bin is pickled and pickled weights are refused.*convert them to safetensors",
    ),
    "index not JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("nope"),
        "index.json: is not JSON",
    ),
    "no weight_map": (set_index({}), "no weight_map"),
    "weight_map a list": (set_index({"weight_map": ["a"]}), "no weight_map"),
    "shard a number": (set_index({"weight_map": {"a": 1}}), "a is in 1; a shard is"),
    "shard above": (set_index({"weight_map": {"a": "../x.safetensors"}}), "without path sep"),
    "shard absolute": (set_index({"weight_map": {"a": "/x.safetensors"}}), "without path sep"),
    "shard below": (set_index({"weight_map": {"a": "x\\y.safetensors"}}), "without path sep"),
    "shard pickled": (set_index({"weight_map": {"a": "x.bin"}}), r"a is in 'x.bin'"),
    "shard missing": (
        lambda folder: (folder / "model-2.safetensors").unlink(),
        "1 of 2 shards .* the first is model-2.safetensors",
    ),
    "tensor in no shard": (
        lambda folder: write_index(folder, {"a": 1, "c": 1, "b": 2, "d": 2, "e": 2}),
        "tensor e: .* puts it in .*model-2.safetensors, which lacks it",
    ),
    "tensor elsewhere": (
        lambda folder: write_index(folder, {"a": 2, "c": 1, "b": 2, "d": 2}),
        "tensor a: .* puts it in .*model-2.safetensors, which lacks it",
    ),
    "tensor unlisted": (
        lambda folder: write_index(folder, {"a": 1, "c": 1, "b": 2}),
        "tensor d: is in .*model-2.safetensors but not in",
    ),
    "tensor twice": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model-2.safetensors"),
        "tensor a: is in both model-1.safetensors and model-2.safetensors",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FOLDERS)
def test_broken_folder_is_refused(folder: Path, name: str) -> None:
    damage, message = BROKEN_FOLDERS[name]
    CheckpointReader(folder)
    damage(folder)
    refuse(folder, message)


def test_layout_opens_without_shards(folder: Path) -> None:
    weight_map = CheckpointReader(folder).weight_map
    (folder / "model-2.safetensors").unlink()
    reader = CheckpointReader(folder, allow_missing_shards=True)
    assert (list(reader.entries), reader.total_bytes) == (["a", "c"], 36)
    (folder / "model-1.safetensors").unlink()
    reader = CheckpointReader(folder, allow_missing_shards=True)
    assert (reader.entries, reader.files, reader.weight_map) == ({}, [], weight_map)
    set_index({"weight_map": weight_map})(folder)
    with pytest.raises(CheckpointError, match=r"no metadata\.total_size"):
        CheckpointReader(folder, allow_missing_shards=True)


def flip_last_byte(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


@pytest.mark.parametrize("name", ["config.json", "model-2.safetensors"])
def test_digest_sees_every_byte(folder: Path, tmp_path: Path, name: str) -> None:
    reader = CheckpointReader(folder)
    before = content_digest(reader)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert content_digest(CheckpointReader(copy)) == before
    flip_last_byte(folder / name)
    assert content_digest(reader) != before


def test_digest_cache_saves_the_second_read(folder: Path, tmp_path: Path) -> None:
    reader, cache = CheckpointReader(folder), tmp_path / "digests.json"
    before = content_digest(reader, cache)
    assert before == content_digest(reader)
    shard = folder / "model-2.safetensors"
    size, mtime_ns = shard.stat().st_size, shard.stat().st_mtime_ns
    assert json.loads(cache.read_text())[shard.name][:2] == [size, mtime_ns]
    flip_last_byte(shard)
    os.utime(shard, ns=(mtime_ns, mtime_ns))
    assert content_digest(reader, cache) == before  # not read: size and time are the same
    os.utime(shard, ns=(mtime_ns, mtime_ns + 1))
    assert content_digest(reader, cache) == content_digest(reader) != before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_digest_is_refused_to_what_is_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    weight = torch.ones(5, 3, dtype=dtype)
    weight[-1, -1] = value
    save_file({"a": torch.ones(2), "weight": weight, "z": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    cache = tmp_path / "digests.json"
    with pytest.raises(CheckpointError, match="tensor weight: holds NaN or infinity"):
        content_digest(CheckpointReader(tmp_path), cache)
    assert not cache.exists()


@pytest.fixture
def hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hugging Face cache after a download of `owner/name`, with no network."""
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    blobs = repo / "blobs"
    for made in (snapshot, blobs, repo / "refs"):
        made.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_hub_id_comes_from_the_cache(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: pytest.fail("asked"))
    assert resolve_checkpoint("owner/name") == hub_cache
    assert CheckpointReader(hub_cache).entries["a"].read().tolist() == [0, 1, 2, 3]


def test_half_downloaded_snapshot_serves_the_layout_only(hub_cache: Path) -> None:
    (hub_cache / "model-2.safetensors").unlink()
    assert resolve_checkpoint("owner/name", layout_only=True) == hub_cache
    with pytest.raises(CheckpointError, match=r"owner/name.*model-2\.safetensors"):
        resolve_checkpoint("owner/name")


def test_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_unknown_model_is_refused(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="'/no/such/model': no such folder, and not a hub id"):
        resolve_checkpoint("/no/such/model")
    with pytest.raises(CheckpointError, match="'owner/other': neither a local folder nor") as error:
        resolve_checkpoint("owner/other")
    assert "\n" not in str(error.value)


def test_a_disk_that_fails_for_a_while_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "s.safetensors")
    entry = read_shard(tmp_path / "s.safetensors")["a"]
    monkeypatch.setattr("moe_compress.retry.time.sleep", lambda seconds: None)
    preadv, failures = os.preadv, [errno.EIO, errno.ESTALE]

    def unsteady(*args: Any) -> int:
        if failures:
            raise OSError(failures.pop(), "trouble")
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", unsteady)
    assert entry.read().tolist() == [0, 1, 2]
    assert not failures
