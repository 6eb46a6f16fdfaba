"""The provenance manifest: what a compressed checkpoint was made from, how, and its files' hashes.

It holds no time and no absolute path, so the same job writes the same bytes anywhere. The perplexity of its levels is
added once it is measured.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import CheckpointError
from ..storage import files_in
from .shard import sha256_files
from .writer import UNFINISHED_NAME, ShardInfo, atomic_write, publish

MANIFEST_NAME = "moe_compress.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Record):
    """The original checkpoint."""

    name: str
    digest: str


class FileRecord(_Record):
    """One file as it was published."""

    bytes: int
    sha256: str


class LevelRecord(_Record):
    """One of the levels that a checkpoint can be loaded at.

    parameters, bytes: of the tensors that are read.
    perplexity: on the recipe's evaluation text, once it is measured.
    """

    parameters: int
    bytes: int
    perplexity: float | None = None


class Manifest(_Record):
    """moe_compress.json.

    tool_version: version of this package.
    recipe: the resolved recipe.
    layers: layer name -> what was done to it: kept and merged ids, ranks.
    parameters: parameter counts, such as {"original": ..., "compressed": ...}.
    files: every other file of the checkpoint, by name.
    levels: the levels that it can be loaded at, by name, if it has several.
    training: how it was trained after it was compressed, if it was.
    """

    format_version: Literal[1] = 1
    tool_version: str
    source: Source
    recipe: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    files: dict[str, FileRecord]
    levels: dict[str, LevelRecord] = {}
    training: dict[str, Any] | None = None

    def measured(self, perplexity: dict[str, float]) -> Manifest:
        """With the measured perplexity of each level."""
        levels = {n: l.model_copy(update={"perplexity": perplexity.get(n)}) for n, l in self.levels.items()}
        return self.model_copy(update={"levels": levels})

    def unmeasured(self) -> Manifest:
        """As it was when the checkpoint was published."""
        return self.measured({})

    def text(self) -> str:
        """JSON, sorted keys: the same manifest, the same text."""
        data = self.model_dump(mode="json", exclude={"training"} if self.training is None else None)
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    def save(self, folder: Path) -> None:
        """Writes the manifest into a checkpoint folder: the same bytes every time."""
        atomic_write(folder / MANIFEST_NAME, self.text())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads the manifest of a checkpoint folder.

        Raises CheckpointError if there is none or it is not one this version understands.
        """
        path = folder / MANIFEST_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"manifest {path}: cannot be read ({error.strerror}); every compressed checkpoint "
                "carries one; copy the whole folder"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise CheckpointError(
                f"manifest {path}: {field}: {first['msg']}; it must be as it was written; copy the "
                "folder again, or update moe-compress if a newer version made it"
            ) from error


def publish_once(staging: Path, output: Path, manifest: Manifest, elsewhere: Sequence[Path] = ()) -> bool:
    """Publishes a staged checkpoint under its manifest, unless this very checkpoint is there already.

    Args:
        staging, output, elsewhere: as of `publish`.
        manifest: of the checkpoint; it is saved first.

    Returns:
        False where another checkpoint of ours stands there.
    """
    manifest.save(staging)
    if not (output / MANIFEST_NAME).exists():
        publish(staging, output, elsewhere)
        return True
    shutil.rmtree(staging)
    if Manifest.load(output).unmeasured().text() != manifest.unmeasured().text():
        return False
    (output / UNFINISHED_NAME).unlink(missing_ok=True)  # of a publication that was killed after the manifest
    return True


def file_records(folder: Path, shards: Iterable[ShardInfo] = ()) -> dict[str, FileRecord]:
    """Records every file in a folder but the manifest; `shards` are known and not read again."""
    records = {shard.file_name: FileRecord(bytes=shard.file_bytes, sha256=shard.sha256) for shard in shards}
    others = [folder / name for name in files_in(folder) - records.keys() - {MANIFEST_NAME}]
    for path, sha256 in sha256_files(others).items():
        records[path.name] = FileRecord(bytes=path.stat().st_size, sha256=sha256)
    return dict(sorted(records.items()))


def verify(folder: Path) -> list[str]:
    """Checks each file of a compressed checkpoint against its manifest; returns the problems.

    Raises CheckpointError if the manifest itself cannot be read.
    """
    problems: dict[str, str] = {}
    to_hash: list[Path] = []
    files = Manifest.load(folder).files
    for name, record in files.items():
        path = folder / name
        if re.search(r"[/\\]", name) or name == "..":
            problems[name] = "is not a plain file name"
        elif not path.is_file():
            problems[name] = "is missing"
        elif path.stat().st_size != record.bytes:
            problems[name] = f"has {path.stat().st_size} bytes, not {record.bytes}"
        else:
            to_hash.append(path)
    for path, sha256 in sha256_files(to_hash).items():
        if sha256 != files[path.name].sha256:
            problems[path.name] = f"has sha256 {sha256}, not {files[path.name].sha256}"
    return [f"{name}: {problem}" for name, problem in sorted(problems.items())]
