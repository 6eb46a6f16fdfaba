"""Writes a dense stock checkpoint out of a compressed one: it loads anywhere, and is as large as the original.

Every factorised expert becomes W_e = base + U_e V_e again, and an expert that was merged away a copy of the one it
leads to, in the stock layout under its name in memory, which every loader of transformers takes. All else is copied
byte for byte. One layer is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

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
from .model.levels import piece_position
from .model.merged import MAP_NAME
from .model.plugin import METHOD, TRIM_NAME
from .model.skeleton import Skeleton
from .model.switch import stock_tensors
from .storage import as_path


def materialize_checkpoint(checkpoint: str | Path, output: str | Path, level: str | None = None) -> None:
    """Writes the dense form of a compressed checkpoint, in its own dtype, and publishes it at once.

    Args:
        checkpoint: a folder or hub id.
        output: the new folder, of a disk or an object store.
        level: which of its levels, if it has several; None for the largest.

    Raises:
        CheckpointError: the checkpoint is not of our format, its routers are shorter, it has no such level, or it
            cannot be read.
        RecipeError: the output exists or its place cannot be written.
    """
    reader = CheckpointReader(resolve_checkpoint(checkpoint))
    quantization = reader.config.get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        raise CheckpointError(
            f"checkpoint {checkpoint}: a stock checkpoint already (config.json has no quantization_config of {METHOD});"
            " give the output of moe-compress compress"
        )
    layers: dict[str, dict[str, Any]] = quantization["layers"]
    sliced = next((path for path, spec in layers.items() if spec.get("router") == "slice"), None)
    if sliced is not None:
        raise CheckpointError(
            f"checkpoint {checkpoint}: the router of {sliced} is shorter than that of the original, which no stock"
            " checkpoint can say; compress with method.router: shrink, or keep"
        )
    skeleton = Skeleton(reader, level=level)
    output = as_path(output)
    try:
        if output.exists():
            raise FileExistsError(None, "exists")
        staging = fresh_staging(output)
    except OSError as error:
        raise RecipeError(f"output: {output} cannot be made ({error.strerror}); choose another folder") from error
    try:
        config = {key: value for key, value in reader.config.items() if key not in ("quantization_config", TRIM_NAME)}
        atomic_write(staging / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        copy_side_files(reader.folder, staging)
        save_index(staging, _write_shards(skeleton, list(layers), staging))
        publish(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_shards(skeleton: Skeleton, paths: list[str], staging: Path) -> list[ShardInfo]:
    """One shard of the untouched tensors of each shard that has any, and one of each compressed layer."""
    replaced = {source for path in paths for name in _own(skeleton, path) for source in skeleton.targets[name]}
    rest: dict[Path, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in skeleton.reader.entries.items():
        if name not in replaced and not piece_position(name):
            rest[entry.file][name] = entry
    total = len(rest) + len(paths)
    names = iter(f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1))
    shards = [write_shard(staging / next(names), entries) for entries in rest.values()]
    return shards + [write_shard(staging / next(names), _dense_layer(skeleton, path)) for path in paths]


def _own(skeleton: Skeleton, path: str) -> list[str]:
    """Names in memory of the stored tensors of an experts module, those of modules inside it left out."""
    module = skeleton.model.get_submodule(path)
    tensors = chain(module.named_parameters(path, recurse=False), module.named_buffers(path, recurse=False))
    return [name for name, _ in tensors if name in skeleton.targets]


def _dense_layer(skeleton: Skeleton, path: str) -> dict[str, Tensor]:
    """The stock parameters of one experts module by name."""
    experts: Any = skeleton.load(path)
    dense = {name: parameter.detach() for name, parameter in experts.named_parameters(recurse=False)}
    if isinstance(experts, FactorisedExperts):
        factors = {name for slot in experts.slots for name in slot.shapes()}
        dense = {name: tensor for name, tensor in dense.items() if name not in factors} | _products(path, experts)
    if hasattr(experts, MAP_NAME):
        dense = {name: tensor[experts.expert_map] for name, tensor in dense.items()}
    skeleton.drop(path)
    return {f"{path}.{name}": tensor for name, tensor in stock_tensors(experts, dense).items()}


def _products(path: str, experts: FactorisedExperts) -> dict[str, Tensor]:
    """The projections of factorised experts as stock parameters."""
    weights = experts.dense_weights()
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
    groups = {"up": torch.cat([weights.pop(slot.name) for slot in first], dim=1), "down": weights.pop(down.name)}
    return {stock_name(layer, group): to_stock(layer, group, groups[group]) for group in GROUPS}
