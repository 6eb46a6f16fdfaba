"""Assemble: publishes the checkpoint, all of it at once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.manifest import MANIFEST_NAME, Manifest, Source, file_records
from ..checkpoint.reader import CONFIG_NAME
from ..checkpoint.writer import (
    atomic_write,
    copy_side_files,
    describe_shard,
    fresh_staging,
    link_or_copy,
    publish,
    save_index,
)
from ..errors import RecipeError
from ..model.expert_bank import GROUPS
from ..model.experts import slots_of
from ..model.plugin import FORMAT_VERSION, METHOD
from ..progress import Reporter
from .allocate import Ranks
from .prepare import Prepared


def assemble(prepared: Prepared, targets: list[Path], ranks: Ranks, reporter: Reporter) -> None:
    """Publishes the checkpoint under its name, with config, index, tokenizer and manifest.

    Raises:
        RecipeError: another checkpoint of ours stands there already.
    """
    output, reader = prepared.recipe.output_path, prepared.reader
    based = prepared.recipe.method.base != "none"
    layers: dict[str, dict[str, Any]] = {
        layer.path: {
            slot: {"ranks": r, "base": based} for group in GROUPS for slot, r in ranks[layer.path, group].items()
        }
        for layer in prepared.layers
    }
    config = dict(reader.config)
    config["quantization_config"] = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "layers": layers}
    with reporter.stage("assemble", len(targets)) as stage:
        staging = fresh_staging(output)
        shards = []
        for target in targets:
            link_or_copy(target, staging / target.name)
            shards.append(describe_shard(staging / target.name))
            stage.advance()
        copy_side_files(reader.folder, staging)
        atomic_write(staging / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        save_index(staging, shards)
        Manifest(
            tool_version=__version__,
            source=Source(name=_source_name(prepared), digest=prepared.source_digest),
            recipe=_provenance(prepared),
            layers=layers,
            parameters=_count_parameters(prepared, layers),
            files=file_records(staging, shards),
        ).save(staging)
        if (output / MANIFEST_NAME).exists():
            if (output / MANIFEST_NAME).read_bytes() != (staging / MANIFEST_NAME).read_bytes():
                raise RecipeError(
                    f"output: {output} holds a compressed checkpoint of another job; choose another folder or remove it"
                )
            shutil.rmtree(staging)  # this very checkpoint is there already
            return
        publish(staging, output)


def _count_parameters(prepared: Prepared, specs: dict[str, dict[str, Any]]) -> dict[str, int]:
    original = sum(math.prod(entry.shape) for entry in prepared.reader.entries.values())
    experts = sum(layer.num_parameters for layer in prepared.layers)
    kept = sum(
        math.prod(shape)
        for layer in prepared.layers
        for slot in slots_of(specs[layer.path], layer.up_shape[0], *layer.down_shape)
        for shape in slot.shapes().values()
    )
    return {
        "original": original,
        "compressed": original - experts + kept,
        "experts_original": experts,
        "experts_compressed": kept,
    }


def _provenance(prepared: Prepared) -> dict[str, Any]:
    """The part of the recipe that decided the bytes, without a path of this machine."""
    calibration = prepared.recipe.calibration.model_dump(exclude={"text", "activation_memory_gb"})
    calibration["tokens"] = prepared.calibration_tokens.stem
    return {
        "method": prepared.recipe.method.model_dump(exclude={"preset"}),
        "calibration": calibration,
        "threads": prepared.recipe.cluster.threads,
    }


def _source_name(prepared: Prepared) -> str:
    path = Path(prepared.recipe.model)
    return path.resolve().name if path.exists() else prepared.recipe.model
