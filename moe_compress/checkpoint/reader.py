"""A checkpoint folder, opened without reading a tensor.

Opening reads config.json, the index and each shard's header, and refuses whatever is missing,
malformed or contradictory in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, StorageError
from ..storage import StoredPath, as_path, files_in, prefetch
from .shard import TensorEntry, read_shard
from .writer import INDEX_NAME, all_finite, atomic_write

CONFIG_NAME = "config.json"
SINGLE_SHARD_NAME = "model.safetensors"

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_LAYOUT = [CONFIG_NAME, INDEX_NAME, SINGLE_SHARD_NAME]
_HEADERS_AT_ONCE = 16
_HUB_FILES = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"),
    *("LICEN[CS]E*", "NOTICE*"),
]


class CheckpointReader:
    """A checkpoint folder: its config, and where each of its tensors lies.

    Construction reads config.json, the index and each shard's header, no tensor.

    folder: the checkpoint.
    config: config.json.
    weight_map: tensor name -> shard file name, sorted by tensor name.
    entries: tensor name -> TensorEntry, sorted by name; tensors of missing shards are left out.
    files: the shards that are there, sorted by name.
    total_bytes: bytes of all tensors; where shards are missing, what the index declares.

    With `allow_missing_shards`, a folder of only config.json and the index can be opened, to plan.
    Raises CheckpointError for anything missing, malformed or contradictory.
    """

    def __init__(self, path: str | Path, *, allow_missing_shards: bool = False) -> None:
        self.folder = as_path(path)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"checkpoint {self.folder}: no such folder; give the folder that holds "
                f"{CONFIG_NAME} and the *.safetensors files"
            )
        self.config = _read_object(self.folder / CONFIG_NAME)
        present = files_in(self.folder)
        if SINGLE_SHARD_NAME in present:  # goes first, as in from_pretrained
            self.entries = dict(sorted(read_shard(self.folder / SINGLE_SHARD_NAME).items()))
            self.weight_map = dict.fromkeys(self.entries, SINGLE_SHARD_NAME)
            self.files = [self.folder / SINGLE_SHARD_NAME]
            self.total_bytes = _sum_bytes(self.entries)
            self._check_seal()
            return
        index = self._read_index()
        self.weight_map = dict(sorted(index["weight_map"].items()))
        shards = [self.folder / name for name in sorted(set(self.weight_map.values()))]
        self.files = [shard for shard in shards if shard.name in present]
        missing = [shard.name for shard in shards if shard not in self.files]
        if missing and not allow_missing_shards:
            raise CheckpointError(
                f"checkpoint {self.folder}: {len(missing)} of {len(shards)} shards in {INDEX_NAME} "
                f"are missing, the first is {missing[0]}; download them"
            )
        self.entries = self._merge_shards()
        self.total_bytes = _declared_bytes(index) if missing else _sum_bytes(self.entries)
        self._check_seal()

    def prefetch(self, names: Iterable[str]) -> None:
        """Asks the kernel to read these tensors ahead into its page cache, and does not wait.

        What lies in an object store begins to come into the node's cache. A hint: where the platform has no
        posix_fadvise, nothing happens.
        """
        by_file: dict[Path, list[TensorEntry]] = defaultdict(list)
        for name in names:
            by_file[self.entries[name].file].append(self.entries[name])
        for path, entries in by_file.items():
            spans = _merged((e.offset, e.offset + e.num_bytes) for e in entries)
            if isinstance(path, StoredPath):
                prefetch(path, spans)
                continue
            if not hasattr(os, "posix_fadvise"):
                return
            with path.open("rb", buffering=0) as file:
                for begin, end in spans:
                    os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX_NAME
        if not path.is_file():
            pickles = sorted(f.name for f in self.folder.iterdir() if f.suffix in _PICKLE_SUFFIXES)
            raise CheckpointError(
                f"checkpoint {self.folder}: neither {SINGLE_SHARD_NAME} nor {INDEX_NAME}; "
                + (
                    f"{pickles[0]} is pickled and pickled weights are refused, as they can run "
                    "code; convert them to safetensors"
                    if pickles
                    else "the weights must be safetensors; download them or save them as such"
                )
            )
        index = _read_object(path)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"index {path}: no weight_map; it must map each tensor name to its shard; download or save it again"
            )
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\]+\.safetensors", shard):
                raise CheckpointError(
                    f"index {path}: tensor {name} is in {shard!r}; a shard is a *.safetensors file "
                    "name without path separators; correct the index"
                )
        return index

    def _check_seal(self) -> None:
        """What a job began with must be there as it was, in each of its processes."""
        if isinstance(self.folder, StoredPath):
            try:
                self.folder.check_seal()
            except StorageError as error:
                raise CheckpointError(f"checkpoint {error}") from error

    def _merge_shards(self) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        for shard, found in zip(self.files, _read_shards(self.files), strict=True):
            for name, entry in found.items():
                if name in entries:
                    raise CheckpointError(
                        f"tensor {name}: is in both {entries[name].file.name} and {shard.name} of "
                        f"{self.folder}; each tensor has one shard; save the checkpoint again"
                    )
                if name not in self.weight_map:
                    raise CheckpointError(
                        f"tensor {name}: is in {shard} but not in {INDEX_NAME}; the index lists "
                        "every tensor; download or save both again"
                    )
                entries[name] = entry
        present = {shard.name for shard in self.files}
        for name, shard_name in self.weight_map.items():
            if shard_name in present and (name not in entries or entries[name].file.name != shard_name):
                raise CheckpointError(
                    f"tensor {name}: {INDEX_NAME} puts it in {self.folder / shard_name}, which "
                    "lacks it; download or save both again"
                )
        return dict(sorted(entries.items()))


def _read_shards(files: list[Path]) -> Iterable[dict[str, TensorEntry]]:
    """The headers of shards; a store is asked for several at a time."""
    if not any(isinstance(file, StoredPath) for file in files):
        return map(read_shard, files)
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        return list(pool.map(read_shard, files))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); a checkpoint needs it; download it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is a JSON {type(value).__name__}; it must be an object; download it again")
    return value


def _declared_bytes(index: dict[str, Any]) -> int:
    match index.get("metadata"):
        case {"total_size": int(total_bytes) | float(total_bytes)}:
            return int(total_bytes)
    raise CheckpointError(
        f"index {INDEX_NAME}: no metadata.total_size; without the shards nothing else tells the "
        "size; download the shards"
    )


def _sum_bytes(entries: dict[str, TensorEntry]) -> int:
    return sum(entry.num_bytes for entry in entries.values())


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins spans that touch: [(0, 4), (8, 9), (4, 8)] -> [(0, 9)]."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def resolve_checkpoint(model: str | Path, *, layout_only: bool = False) -> Path:
    """Finds the folder of a checkpoint: a local folder, one of an object store, or a hub id (`owner/name`).

    A folder of a store is sealed: whoever opens it later finds it as it is now, or an error.
    A hub id is served from the local Hugging Face cache if it is complete there, else downloaded.
    With `layout_only` just config.json and the index are fetched, enough to open the folder with
    `CheckpointReader(..., allow_missing_shards=True)`.
    Raises CheckpointError if there is no such folder and the hub does not give it.
    """
    folder = as_path(model)
    if isinstance(folder, StoredPath):
        return _sealed(folder)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"model {str(model)!r}: no such folder, and not a hub id (owner/name); correct the path")
    from huggingface_hub import snapshot_download

    for local_files_only in (True, False):
        try:
            snapshot = snapshot_download(
                str(model),
                local_files_only=local_files_only,
                allow_patterns=_HUB_LAYOUT if layout_only else _HUB_FILES,
                ignore_patterns=["*/*", "consolidated*"],  # second copies in the makers' formats
            )
            # A download that stopped halfway leaves a snapshot with holes.
            return CheckpointReader(snapshot, allow_missing_shards=layout_only).folder
        except Exception as error:  # name, licence gate, network, proxy: the client has many roots
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise CheckpointError(
        f"model {str(model)!r}: neither a local folder nor available from the hub ({reason}); "
        "correct the name or download it first"
    )


def _sealed(folder: StoredPath) -> Path:
    try:
        if folder.is_dir():
            return folder.sealed()
    except OSError as error:
        raise CheckpointError(f"model {error.strerror}") from error
    raise CheckpointError(f"model {folder}: no such folder in the store; correct the address")


def content_digest(reader: CheckpointReader, cache: Path | None = None) -> str:
    """Digest of everything the checkpoint says: sha256 over config.json and each shard's sha256.

    The pass that hashes a shard looks for NaN and infinity on the way, so that finding them costs no read.

    cache: JSON file of shard name -> [size in bytes, mtime in ns, sha256]; a shard whose size and
    time are unchanged is not read again.
    Cost: one read of every shard, about a second and a half per GB and core.
    Raises CheckpointError for a tensor that holds NaN or infinity.
    """
    known = json.loads(cache.read_bytes()) if cache is not None and cache.is_file() else {}
    stats = {path: path.stat() for path in reader.files}
    stamps = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    stale = [path for path in reader.files if known.get(path.name, [])[:2] != stamps[path]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = pool.map(partial(_sha256_of_finite, reader), stale)
        try:
            known |= {path.name: [*stamps[path], sha256] for path, sha256 in zip(stale, hashes, strict=True)}
        finally:
            pool.shutdown(cancel_futures=True)
    if cache is not None and stale:
        atomic_write(cache, json.dumps(known, indent=2, sort_keys=True) + "\n")
    digest = hashlib.sha256((reader.folder / CONFIG_NAME).read_bytes())
    for path in reader.files:
        digest.update(known[path.name][2].encode())
    return digest.hexdigest()


def _sha256_of_finite(reader: CheckpointReader, path: Path) -> str:
    """sha256 of a shard whose tensors are all finite."""
    entries = sorted((entry for entry in reader.entries.values() if entry.file == path), key=lambda e: e.offset)
    with path.open("rb", buffering=0) as file:
        digest = hashlib.sha256(file.read(entries[0].offset if entries else -1))
    for entry in entries:
        dtype = entry.torch_dtype
        for block in entry.blocks():
            digest.update(block)
            if dtype.is_floating_point and not all_finite(torch.frombuffer(block, dtype=dtype)):
                raise CheckpointError(
                    f"tensor {entry.name}: holds NaN or infinity ({path}); only finite weights can be compressed;"
                    " download the shard again or repair the checkpoint"
                )
    return digest.hexdigest()
