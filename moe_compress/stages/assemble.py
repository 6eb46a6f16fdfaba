"""Assemble: publishes the checkpoint, all of it at once."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import __version__
from ..checkpoint.manifest import LevelRecord, Manifest, Source, file_records, publish_once
from ..checkpoint.reader import CONFIG_NAME
from ..checkpoint.shard import read_shard
from ..checkpoint.writer import (
    ShardInfo,
    atomic_write,
    copy_side_files,
    describe_shard,
    fresh_staging,
    link_or_copy,
    save_index,
)
from ..errors import RecipeError
from ..model.levels import entries_read
from ..model.plugin import TRIM_NAME, MoECompressConfig
from ..model.routing import apply_to_json
from ..progress import Reporter
from ..storage import StoredPath, as_path
from .prepare import Prepared
from .scheme import Decision


def assemble(prepared: Prepared, targets: list[Path], decision: Decision, reporter: Reporter) -> None:
    """Publishes the checkpoint under its name, with config, index, tokenizer and manifest.

    Raises:
        RecipeError: another checkpoint of ours stands there already.
    """
    output, reader = prepared.recipe.output_path, prepared.reader
    config = apply_to_json(reader.config, prepared.skeleton.model.config, decision.config)
    if decision.layers:
        config["quantization_config"] = MoECompressConfig(decision.layers, levels=decision.levels).to_dict()
    if decision.levels:
        config[TRIM_NAME] = decision.levels[0]
    with reporter.stage("assemble", len(targets)) as stage:
        staging = fresh_staging(output)
        stored = isinstance(output, StoredPath)  # then they go from the job folder straight to the output

        def stage_shard(target: Path) -> ShardInfo:
            if not stored:
                link_or_copy(target, staging / target.name)
            return describe_shard(target)

        shards = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for shard in pool.map(stage_shard, targets):
                shards.append(shard)
                stage.advance()
        copy_side_files(reader.folder, staging)
        atomic_write(staging / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        save_index(staging, shards)
        manifest = Manifest(
            tool_version=__version__,
            source=Source(name=_source_name(prepared), digest=prepared.source_digest),
            recipe=prepared.provenance(),
            layers=decision.provenance,
            parameters=_count_parameters(prepared, decision),
            files=file_records(staging, shards),
            levels=_levels(targets, decision.levels),
        )
        if not publish_once(staging, output, manifest, targets if stored else ()):
            raise RecipeError(
                f"output: {output} holds a compressed checkpoint of another job; choose another folder or remove it"
            )


def _count_parameters(prepared: Prepared, decision: Decision) -> dict[str, int]:
    original = sum(math.prod(entry.shape) for entry in prepared.reader.entries.values())
    experts = sum(layer.num_parameters for layer in prepared.layers)
    kept = decision.expert_parameters
    return {
        "original": original,
        "compressed": original - experts + kept,
        "experts_original": experts,
        "experts_compressed": kept,
    }


def _levels(shards: list[Path], names: list[str]) -> dict[str, LevelRecord]:
    """What each level reads of a checkpoint."""
    entries = [entry for shard in shards for entry in read_shard(shard).values()] if names else []
    read = {name: entries_read(entries, len(names) - place) for place, name in enumerate(names)}
    return {
        name: LevelRecord(parameters=sum(math.prod(e.shape) for e in own), bytes=sum(e.num_bytes for e in own))
        for name, own in read.items()
    }


def _source_name(prepared: Prepared) -> str:
    path = as_path(prepared.recipe.model)
    return path.resolve().name if isinstance(path, StoredPath) or path.exists() else prepared.recipe.model
