"""Writes a dense stock checkpoint out of a factorised one: it loads anywhere, and is as large as the original.

Every expert becomes W_e = base + U_e V_e again, in the stock layout under its name in memory, which every loader of
transformers takes. All else is copied byte for byte. One layer is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import (
    CheckpointReader,
    ShardInfo,
    TensorEntry,
    atomic_write,
    copy_side_files,
    fresh_staging,
    publish,
    resolve_checkpoint,
    save_index,
    write_shard,
)
from .checkpoint.reader import CONFIG_NAME
from .errors import CheckpointError, RecipeError
from .model.discovery import MoELayer
from .model.expert_bank import GROUPS, stock_name, to_stock
from .model.experts import FactorisedExperts
from .model.plugin import METHOD
from .model.skeleton import Skeleton


def materialize_checkpoint(checkpoint: str | Path, output: Path) -> None:
    """Writes the dense form of a factorised checkpoint, in its own dtype, and publishes it at once.

    Args:
        checkpoint: a folder or hub id.
        output: the new folder.

    Raises:
        CheckpointError: the checkpoint is not a factorised one, or cannot be read.
        RecipeError: the output exists or its place cannot be written.
    """
    reader = CheckpointReader(resolve_checkpoint(checkpoint))
    if (reader.config.get("quantization_config") or {}).get("quant_method") != METHOD:
        raise CheckpointError(
            f"checkpoint {checkpoint}: not a factorised one (config.json has no quantization_config of {METHOD});"
            " give the output of moe-compress compress"
        )
    skeleton = Skeleton(reader)
    try:
        if output.exists():
            raise FileExistsError(None, "exists")
        staging = fresh_staging(output)
    except OSError as error:
        raise RecipeError(f"output: {output} cannot be made ({error.strerror}); choose another folder") from error
    try:
        config = {key: value for key, value in reader.config.items() if key != "quantization_config"}
        atomic_write(staging / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        copy_side_files(reader.folder, staging)
        save_index(staging, _write_shards(skeleton, staging))
        publish(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_shards(skeleton: Skeleton, staging: Path) -> list[ShardInfo]:
    """One shard of the untouched tensors of each shard that has any, and one of each factorised layer."""
    found = {path: m for path, m in skeleton.model.named_modules() if isinstance(m, FactorisedExperts)}
    factors = {
        source
        for path, experts in found.items()
        for slot in experts.slots
        for name in slot.shapes()
        for source in skeleton.targets[f"{path}.{name}"]
    }
    rest: dict[Path, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in skeleton.reader.entries.items():
        if name not in factors:
            rest[entry.file][name] = entry
    total = len(rest) + len(found)
    names = iter(f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1))
    shards = [write_shard(staging / next(names), entries) for entries in rest.values()]
    for path in found:
        shards.append(write_shard(staging / next(names), _dense_layer(skeleton, path)))
    return shards


def _dense_layer(skeleton: Skeleton, path: str) -> dict[str, Tensor]:
    """The stock parameters of one experts module by name."""
    experts = skeleton.load(path)
    assert isinstance(experts, FactorisedExperts)
    dense_EMN = experts.dense_weights()
    skeleton.drop(path)
    *first, down = experts.slots
    layer = MoELayer(
        path=path,
        num_experts=experts.num_experts,
        hidden_size=down.num_rows,
        intermediate_size=down.num_columns,
        has_gate=experts.has_gate,
        has_bias=experts.has_bias,
        is_transposed=bool(experts.is_transposed),
        is_concatenated=experts.is_concatenated,
    )
    up_EMD = torch.cat([dense_EMN.pop(slot.name) for slot in first], dim=1)
    weights = {"up": up_EMD, "down": dense_EMN.pop(down.name)}
    return {f"{path}.{stock_name(layer, group)}": to_stock(layer, group, weights[group]) for group in GROUPS}
