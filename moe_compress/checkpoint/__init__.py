"""Safetensors in and out: lazy reader, streaming writer, atomic publish, provenance manifest."""

from .manifest import FileRecord, LevelRecord, Manifest, Source, file_records, verify
from .reader import CheckpointReader, content_digest, resolve_checkpoint
from .shard import TensorEntry, read_shard
from .writer import (
    ShardInfo,
    atomic_write,
    copy_side_files,
    describe_shard,
    fresh_staging,
    link_or_copy,
    publish,
    save_index,
    write_shard,
)

__all__ = [
    "CheckpointReader",
    "FileRecord",
    "LevelRecord",
    "Manifest",
    "ShardInfo",
    "Source",
    "TensorEntry",
    "atomic_write",
    "content_digest",
    "copy_side_files",
    "describe_shard",
    "file_records",
    "fresh_staging",
    "link_or_copy",
    "publish",
    "read_shard",
    "resolve_checkpoint",
    "save_index",
    "verify",
    "write_shard",
]
