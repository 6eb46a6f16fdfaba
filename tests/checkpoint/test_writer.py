"""What the writer writes, safetensors reads; what fails or is killed leaves no file behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_compress.checkpoint import (
    CheckpointReader,
    atomic_write,
    copy_side_files,
    describe_shard,
    fresh_staging,
    link_or_copy,
    publish,
    read_shard,
    save_index,
    write_shard,
)
from moe_compress.checkpoint.shard import BLOCK_BYTES, TORCH_DTYPES
from moe_compress.checkpoint.writer import ShardInfo
from moe_compress.errors import CheckpointError, CompressionError
from moe_compress.stages.compress import make_shard

NOT_FINITE = [
    (dtype, value)
    for dtype in TORCH_DTYPES.values()
    for value in (float("nan"), float("inf"), float("-inf"))
    if dtype.is_floating_point and not torch.tensor(value).to(dtype).float().isfinite()
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(bits(left), bits(right))


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable()),
        st.tuples(
            st.sampled_from(sorted(TORCH_DTYPES)),
            st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from(["plain", "transposed", "strided"]),
        ),
        max_size=6,
    )
)
def test_round_trip(specs: dict[str, tuple[str, list[int], str]]) -> None:
    tensors = {}
    for name, (code, shape, layout) in specs.items():
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(TORCH_DTYPES[code])
        if layout == "transposed" and tensor.dim() >= 2:
            tensor = tensor.mT
        elif layout == "strided" and tensor.dim() >= 1:
            tensor = tensor[..., ::2]
        tensors[name] = tensor
    with TemporaryDirectory() as folder:
        path = Path(folder) / "s.safetensors"
        info = write_shard(path, tensors)
        raw = path.read_bytes()
        stock, ours = load_file(path), read_shard(path)
        assert stock.keys() == ours.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert same(stock[name], tensor)
            assert same(ours[name].read(), tensor)
        assert int.from_bytes(raw[:8], "little") % 8 == 0
        assert (info.file_name, info.file_bytes) == ("s.safetensors", len(raw))
        assert info.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert info.sha256 == hashlib.sha256(raw).hexdigest()
        assert info.tensor_names == tuple(ours)
        assert describe_shard(path) == info
        write_shard(path, dict(reversed(tensors.items())))
        assert path.read_bytes() == raw


def test_wide_dtypes_come_first_and_the_file_says_pt(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(1, dtype=torch.bfloat16),
        "c": torch.ones(1, dtype=torch.float64),
        "d": torch.nn.Parameter(torch.ones(1)),
    }
    info = write_shard(tmp_path / "s.safetensors", tensors)
    assert info.tensor_names == ("c", "d", "b", "a")
    for entry in read_shard(tmp_path / "s.safetensors").values():
        assert entry.offset % entry.torch_dtype.itemsize == 0
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_entries_are_copied_through_unread(tmp_path: Path) -> None:
    """Larger than a block, and full of NaN payloads that a trip through arithmetic would change."""
    raw = torch.randint(256, (2 * BLOCK_BYTES + 6,), dtype=torch.uint8)
    original = {"w": raw.view(torch.bfloat16), "scale": torch.tensor(float("nan"))}
    save_file(original, tmp_path / "in.safetensors")
    entries = read_shard(tmp_path / "in.safetensors")
    write_shard(tmp_path / "out.safetensors", {**entries, "new": torch.ones(2)})
    copied = load_file(tmp_path / "out.safetensors")
    assert all(same(copied[name], original[name]) for name in original)
    assert copied["new"].tolist() == [1, 1]


def assert_untouched(path: Path) -> None:
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "s.safetensors"
    path.write_bytes(b"old")
    return path


@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE)
def test_only_finite_weights_are_written(old: Path, dtype: torch.dtype, value: float) -> None:
    weight = torch.ones(BLOCK_BYTES // dtype.itemsize + 2, dtype=dtype)
    weight[-1] = value
    with pytest.raises(CompressionError, match="tensor bad: holds NaN or infinity"):
        write_shard(old, {"bad": weight, "good": torch.ones(1)})
    assert_untouched(old)


def test_unknown_dtype_is_refused(old: Path) -> None:
    with pytest.raises(CompressionError, match=r"tensor w: dtype torch\.complex128"):
        write_shard(old, {"w": torch.ones(1, dtype=torch.complex128)})
    assert_untouched(old)


def test_full_disk_leaves_the_old_file(old: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * BLOCK_BYTES, hard))
    try:
        with pytest.raises(CompressionError, match=r"s.safetensors: .* needs \d{8} bytes and \d+"):
            write_shard(old, {"w": torch.ones(5 * BLOCK_BYTES, dtype=torch.uint8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_untouched(old)


def test_source_that_fails_halfway_leaves_the_old_file(old: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"w": torch.ones(BLOCK_BYTES)}, source)
    entries = read_shard(source)
    os.truncate(source, source.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="tensor w"):
        write_shard(old, entries)
    assert_untouched(old)


def test_killed_writer_leaves_the_old_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if child == 0:
        try:
            write_shard(old, {"w": torch.ones(4, dtype=torch.int64)})
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    monkeypatch.undo()
    assert old.read_bytes() == b"old"
    assert len(list(old.parent.iterdir())) == 2  # the partial file it was writing
    publish(old.parent, old.parent.with_name("published"))
    assert_untouched(old.parent.with_name("published") / old.name)


def test_index_joins_the_shards(tmp_path: Path) -> None:
    shards = [
        write_shard(tmp_path / "model-2.safetensors", {"c": torch.ones(3), "a": torch.ones(1)}),
        write_shard(tmp_path / "model-1.safetensors", {"b": torch.ones(2).bfloat16()}),
    ]
    save_index(tmp_path, shards)
    text = (tmp_path / "model.safetensors.index.json").read_text()
    two = "model-2.safetensors"
    weight_map = {"a": two, "b": "model-1.safetensors", "c": two}
    assert json.loads(text) == {"metadata": {"total_size": 20}, "weight_map": weight_map}
    assert list(json.loads(text)["weight_map"]) == ["a", "b", "c"]
    (tmp_path / "config.json").write_text("{}")
    assert CheckpointReader(tmp_path).total_bytes == 20


def test_atomic_write_replaces_or_leaves(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CompressionError, match=r"No space left on device.* needs 3 bytes and \d+"):
        atomic_write(old, "new")
    assert_untouched(old)
    monkeypatch.undo()
    atomic_write(old, "n\u00e9w")
    assert old.read_bytes() == "n\u00e9w".encode()
    atomic_write(old, b"\x00")
    assert old.read_bytes() == b"\x00"
    with pytest.raises(CompressionError, match="No such file"):
        atomic_write(old.parent / "no" / "file", "x")


@pytest.mark.parametrize("empty_output", [False, True])
def test_publish_moves_the_whole_folder(tmp_path: Path, empty_output: bool) -> None:
    output = tmp_path / "models" / "small"
    staging = fresh_staging(output)
    assert (staging.parent, staging.name) == (output.parent, ".small.partial")
    (staging / "config.json").write_text("{}")
    if empty_output:
        output.mkdir()
    publish(staging, output)
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert list(output.parent.iterdir()) == [output]


def test_publish_overwrites_nothing(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for output in (taken, file):
        staging = fresh_staging(output)
        with pytest.raises(CompressionError, match=f"output .*{output.name}: cannot be published"):
            publish(staging, output)
        assert staging.is_dir()
    assert (taken / "config.json").read_text() == file.read_text() == "mine"


def test_staging_starts_empty(tmp_path: Path) -> None:
    (fresh_staging(tmp_path / "out") / "left.safetensors").write_text("half")
    assert list(fresh_staging(tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("linkable", [True, False])
def test_link_or_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linkable: bool) -> None:
    source, symlink, target = (tmp_path / name for name in ("source", "symlink", "target"))
    source.write_bytes(b"weights")
    symlink.symlink_to(source.name)
    target.write_bytes(b"old")
    if not linkable:

        def cross_device(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", cross_device)
    link_or_copy(symlink, target)
    assert target.read_bytes() == b"weights"
    assert not target.is_symlink()
    assert target.samefile(source) == linkable


def test_side_files_are_what_a_tokenizer_needs(tmp_path: Path) -> None:
    wanted = {
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("qwen.tiktoken", "chat_template.jinja", "chat_template.json", "LICENSE", "NOTICE.txt"),
        *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    }
    unwanted = {
        *("config.json", "README.md", "model.safetensors", "pytorch_model.bin", "modeling_moe.py"),
        *("tokenizer.py", "vocab.bin", "tokenizer.pkl", "model.safetensors.index.json", "notes"),
    }
    source, staging = tmp_path / "source", tmp_path / "staging"
    source.mkdir()
    staging.mkdir()
    (source / "tokenizer_folder").mkdir()
    for name in wanted | unwanted:
        (source / name).write_text(name)
    assert copy_side_files(source, staging) == sorted(wanted)
    assert {path.name: path.read_text() for path in staging.iterdir()} == {n: n for n in wanted}


def test_a_shard_is_known_by_its_record(tmp_path: Path) -> None:
    target = tmp_path / "s.safetensors"

    def unit(made: Path) -> ShardInfo:
        return write_shard(made, {"a": torch.ones(3)})

    written = make_shard(unit, target)
    raw = target.read_bytes()
    target.write_bytes(raw[:-1] + b"?")  # rotten, which a digest of what is there now would hide
    assert make_shard(lambda made: pytest.fail("made again"), target) == describe_shard(target) == written
    target.unlink()
    assert make_shard(unit, target) == written
    assert target.read_bytes() == raw
