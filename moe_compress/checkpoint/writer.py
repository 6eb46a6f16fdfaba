"""Safetensors checkpoints, written one tensor at a time and published all at once.

Every file is written under a temporary name, flushed to disk and renamed, so a name that exists
holds a whole file. A checkpoint is assembled in a staging folder beside the output and appears
under its own name with one rename: whoever looks sees all of it or nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch

from ..errors import CompressionError
from ..retry import patiently
from ..storage import StoredPath, copy, files_in, local, node_staging, upload, writing
from .shard import BLOCK_BYTES, TORCH_DTYPES, TensorEntry, read_shard, sha256_files

INDEX_NAME = "model.safetensors.index.json"
PARTIAL_SUFFIX = ".partial"
UNFINISHED_NAME = ".unfinished"
"""Object that marks an output of a store as ours until its manifest is there."""
PYTORCH_METADATA = {"format": "pt"}  # transformers refuses a shard that does not say so

_LOADABLE = (INDEX_NAME, "config.json", "moe_compress.json")
"""What makes a folder of shards a checkpoint, in the order it appears in an object store."""
_UPLOADS_AT_ONCE = 4
_DTYPE_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "LICEN[CS]E*",
    "NOTICE*",
)
_NEVER_COPIED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.safetensors", "*.py")


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One written shard, as the index and the manifest need it."""

    file_name: str
    file_bytes: int
    tensor_bytes: int
    sha256: str  # of the whole file
    tensor_names: tuple[str, ...]  # in file order


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replaces `path` by `data` (text as UTF-8): afterwards it is on disk, before it is untouched.

    Raises CompressionError if it cannot be written, also after a while.
    """
    raw = data.encode() if isinstance(data, str) else data

    def write() -> None:
        with _replacing(path, len(raw)) as file:
            file.write(raw)

    patiently(write)


def append_event(events: Path, name: str, **fields: Any) -> None:
    """Appends one line to a file of events."""
    with open(events, "a") as file:
        file.write(json.dumps({"time_s": round(time.time(), 3), "event": name, **fields}) + "\n")


def parse_events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The events that lines hold.

    Passed over is what is none: half a line of a run that was killed, and lines of several hosts that a network mount,
    which appends for none of them in one go, has mixed up.
    """
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def write_shard(
    path: Path,
    tensors: Mapping[str, torch.Tensor | TensorEntry],
    metadata: Mapping[str, str] = PYTORCH_METADATA,
    order: Callable[[str], int] = lambda name: 0,
) -> ShardInfo:
    """Writes one safetensors file; the same tensors give the same bytes.

    tensors: name -> tensor of any device and layout, or an entry of another checkpoint, whose bytes
    are copied unread. Widest dtype first, as the format asks for alignment, then by `order` of the
    name, then by name.
    Holds one tensor at a time beyond what the caller holds.

    Raises CompressionError for NaN or infinity, a dtype the format lacks or a full disk: the file
    then does not exist, or is still the old one.
    """
    names = sorted(tensors, key=lambda name: (-_torch_dtype(tensors[name]).itemsize, order(name), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    tensor_bytes = 0
    for name in names:
        dtype, shape = _torch_dtype(tensors[name]), list(tensors[name].shape)
        if dtype not in _DTYPE_CODES:
            raise CompressionError(
                f"tensor {name}: dtype {dtype} has no place in {path.name}; the format knows "
                f"{', '.join(TORCH_DTYPES)}; cast it to one of them"
            )
        end = tensor_bytes + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_CODES[dtype],
            "shape": shape,
            "data_offsets": [tensor_bytes, end],
        }
        tensor_bytes = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file_bytes = 8 + len(text) + tensor_bytes
    digest = hashlib.sha256()
    with _replacing(path, file_bytes) as file:
        for block in _stream(len(text).to_bytes(8, "little") + text, names, tensors):
            digest.update(block)
            file.write(block)
    return ShardInfo(path.name, file_bytes, tensor_bytes, digest.hexdigest(), tuple(names))


def describe_shard(path: Path) -> ShardInfo:
    """The ShardInfo of a shard that is already there, linked or left by an earlier run.

    If it has a record, that is read instead: what was written, whatever a disk has made of it since.
    """
    record = record_path(path)
    if record.exists():
        found = json.loads(record.read_bytes())
        return ShardInfo(**found | {"tensor_names": tuple(found["tensor_names"])})
    entries = read_shard(path)
    tensor_bytes = sum(entry.num_bytes for entry in entries.values())
    sha256 = sha256_files([path])[path]
    return ShardInfo(path.name, path.stat().st_size, tensor_bytes, sha256, tuple(entries))


def record_path(shard: Path) -> Path:
    """Where what is known of a shard is kept: reading it again would cost as much as writing it."""
    return shard.with_suffix(".json")


def record_shard(path: Path, info: ShardInfo) -> None:
    """Leaves a record of a shard beside it."""
    atomic_write(record_path(path), json.dumps(asdict(info)) + "\n")


def save_index(folder: Path, shards: Iterable[ShardInfo]) -> None:
    """Writes the index: which shard holds which tensor, and the bytes of all tensors."""
    shards = list(shards)
    weight_map = {name: shard.file_name for shard in shards for name in shard.tensor_names}
    total_bytes = sum(shard.tensor_bytes for shard in shards)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    atomic_write(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def fresh_staging(output: Path) -> Path:
    """Makes the empty staging folder of `output`, beside it; what a killed run left is removed.

    That of an output in an object store lies in the node's cache.
    """
    here = output.parent / f".{output.name}{PARTIAL_SUFFIX}"
    staging = node_staging(output) if isinstance(output, StoredPath) else here
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(staging: Path, output: Path, elsewhere: Sequence[Path] = ()) -> None:
    """Makes the staged checkpoint appear as `output` with one rename.

    An object store renames nothing: there the shards come first, those of the folder and those that lie `elsewhere`,
    then all else, at last what makes a folder loadable (index, config.json), and the manifest after everything.

    Raises CompressionError if `output` is anything but absent or an empty folder; the staging
    folder is then still there.
    """
    if isinstance(output, StoredPath):
        _publish_stored(staging, output, elsewhere)
        return
    for leftover in staging.glob(f".*{PARTIAL_SUFFIX}"):  # of a worker killed while writing
        leftover.unlink()
    _fsync_folder(staging)
    try:
        os.rename(staging, output)
    except OSError as error:
        raise CompressionError(
            f"output {output}: cannot be published ({error.strerror}); it must not exist or be an "
            "empty folder; remove it or choose another output"
        ) from error
    _fsync_folder(output.parent)


def _publish_stored(staging: Path, output: StoredPath, elsewhere: Sequence[Path]) -> None:
    mark = output / UNFINISHED_NAME
    atomic_write(mark, "")
    left = sorted(files_in(output) - {UNFINISHED_NAME}, key=lambda name: name not in _LOADABLE)
    for name in left:  # of a run that was killed here
        (output / name).unlink(missing_ok=True)
    staged = {path.name: path for path in staging.iterdir()}
    last = [name for name in _LOADABLE if name in staged]
    shards = [*elsewhere, *(path for name, path in staged.items() if name.endswith(".safetensors"))]
    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        list(pool.map(lambda shard: copy(shard, output / shard.name), shards))
    for name in [*sorted(staged.keys() - {shard.name for shard in shards} - {*last}), *last]:
        upload(staged[name], output / name)
    mark.unlink(missing_ok=True)
    shutil.rmtree(staging)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same bytes as `source`, replacing it: a hard link where the disk allows.

    What lies in an object store is copied. Raises CompressionError if it cannot be copied either.
    """
    if isinstance(source, StoredPath):
        with local(source) as here, here.open("rb") as reading, _replacing(target, here.stat().st_size) as writing:
            shutil.copyfileobj(reading, writing, BLOCK_BYTES)
        return
    real = source.resolve()  # a link to a symlink would point nowhere once published
    try:
        target.unlink(missing_ok=True)
        os.link(real, target)
    except OSError:
        with real.open("rb") as reading, _replacing(target, real.stat().st_size) as writing:
            shutil.copyfileobj(reading, writing, BLOCK_BYTES)


def copy_side_files(source_folder: Path, staging: Path) -> list[str]:
    """Copies what a checkpoint needs beside weights and config; returns the names, sorted.

    Tokenizer, generation and processor settings, chat templates, licence. Never weights, code,
    config.json or the README.
    """
    names = sorted(
        name
        for name in files_in(source_folder)
        if any(fnmatchcase(name, pattern) for pattern in _SIDE_FILES)
        and not any(fnmatchcase(name, pattern) for pattern in _NEVER_COPIED)
    )
    for name in names:
        atomic_write(staging / name, (source_folder / name).read_bytes())
    return names


def _torch_dtype(tensor: torch.Tensor | TensorEntry) -> torch.dtype:
    return tensor.dtype if isinstance(tensor, torch.Tensor) else tensor.torch_dtype


def _stream(
    header: bytes, names: list[str], tensors: Mapping[str, torch.Tensor | TensorEntry]
) -> Iterator[bytes | memoryview]:
    yield header
    for name in names:
        tensor = tensors[name]
        if isinstance(tensor, torch.Tensor):
            yield from _tensor_blocks(name, tensor)
        else:
            yield from tensor.blocks()


def _tensor_blocks(name: str, tensor: torch.Tensor) -> Iterator[memoryview]:
    # Not reshape(-1): torch calls any stride contiguous for one element, but then refuses the view.
    flat = tensor.cpu().contiguous().as_strided((tensor.numel(),), (1,))
    block_elements = BLOCK_BYTES // flat.dtype.itemsize
    for begin in range(0, flat.numel(), block_elements):
        block = flat[begin : begin + block_elements]
        if block.is_floating_point() and not all_finite(block):
            raise CompressionError(
                f"tensor {name}: holds NaN or infinity; only finite weights are written; check the "
                "calibration statistics and the dtype of its layer"
            )
        yield block.view(torch.uint8).numpy().data


def all_finite(block: torch.Tensor) -> bool:
    """True where a floating-point tensor with elements holds neither NaN nor infinity."""
    if block.dtype.itemsize == 1:  # torch reduces no 8-bit floats
        block = block.float()
    # NaN wins both reductions: this is isfinite().all() without its temporaries, 10 times faster.
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(block))


@contextmanager
def _replacing(path: Path, num_bytes: int) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well, and else leaves no trace."""
    if isinstance(path, StoredPath):
        try:
            with writing(path, num_bytes) as file:
                yield file
        except OSError as error:
            raise CompressionError(str(error.strerror or error)) from error
        return
    # A name of its own: a retried worker may write beside one that is thought dead.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)
    except OSError as error:
        free_bytes = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise CompressionError(
            f"{path}: cannot be written ({error.strerror}); it needs {num_bytes} bytes and "
            f"{free_bytes} are free in {path.parent}; free space or choose another folder"
        ) from error


def _fsync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut, as fsync does a file's bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
