"""Assemble after training: the student's checkpoint with the trained weights in it, in the same form.

Shard by shard, tensor by tensor: what was not trained is copied byte for byte, also what transformers does not load
(heads for speculative decoding, for instance); what was trained is led back to the names, the layout and the dtypes
that it has on the student's disk. Two forms change:

* columns that were pruned are left out, and config.json says how many there are;
* of a student with levels the level that was trained, its largest, becomes an ordinary checkpoint: factors that were
  trained as a whole are no longer good from their first directions on.
"""

from __future__ import annotations

import json
from collections import defaultdict
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..checkpoint.manifest import MANIFEST_NAME, Manifest, Source, file_records, publish_once
from ..checkpoint.reader import CONFIG_NAME, CheckpointReader
from ..checkpoint.shard import TensorEntry, open_tensors
from ..checkpoint.writer import (
    INDEX_NAME,
    ShardInfo,
    atomic_write,
    copy_side_files,
    fresh_staging,
    save_index,
    write_shard,
)
from ..distillation.snapshots import BEST_NAME, LAYERS_NAME
from ..errors import RecipeError
from ..model.discovery import find_moe_layers
from ..model.levels import level_names, piece_position, spec_at
from ..model.plugin import TRIM_NAME
from ..model.skeleton import Skeleton
from ..model.slots import INDEX_SUFFIX
from ..progress import Reporter

Layers = dict[str, dict[str, Any]]
"""`quantization_config.layers` of a config.json."""


def publish_trained(
    student: Path, trained: Path, output: Path, provenance: dict[str, Any], outcome: dict[str, Any], reporter: Reporter
) -> None:
    """Publishes the trained checkpoint under its name, all of it at once.

    Args:
        student: the checkpoint that was trained.
        trained: folder of the best weights.
        output: where the trained checkpoint appears.
        provenance: what decided the weights.
        outcome: what the training says of itself.
        reporter: told of the stage.

    Raises:
        RecipeError: another checkpoint of ours stands there already.
    """
    reader = CheckpointReader(student)
    layers = _layers_after(reader, trained)
    if level_names(reader.config):
        reporter.say(f"assemble: of the student's levels {level_names(reader.config)[0]} was trained and is written")
    staging = fresh_staging(output)
    tensors = _TrainedTensors(Skeleton(reader), trained / BEST_NAME, layers)
    shards = []
    with reporter.stage("assemble", len(reader.files)) as stage:
        for path in reader.files:
            shards.append(write_shard(staging / path.name, tensors.of_shard(path)))
            stage.advance()
        if (student / INDEX_NAME).exists():
            save_index(staging, shards)
        atomic_write(staging / CONFIG_NAME, _config_after(reader, layers))
        copy_side_files(student, staging)
        training = provenance | {key: outcome[key] for key in ("steps", "best_step")}
        manifest = _manifest(reader, layers, training, staging, shards)
        if not publish_once(staging, output, manifest):
            raise RecipeError(f"output: {output} holds a checkpoint of another job; choose another folder or remove it")


def count_parameters(reader: CheckpointReader) -> dict[str, int]:
    """What a manifest says of a checkpoint's parameters; of one without a manifest, which is its own original."""
    if (reader.folder / MANIFEST_NAME).exists():
        return Manifest.load(reader.folder).parameters
    total = _count(reader)
    experts = sum(layer.num_parameters for layer in find_moe_layers(Skeleton(reader).model))
    return {"original": total, "compressed": total, "experts_original": experts, "experts_compressed": experts}


def _count(reader: CheckpointReader) -> int:
    return sum(prod(entry.shape) for entry in reader.entries.values())


def _layers_after(reader: CheckpointReader, trained: Path) -> Layers:
    """The specification of every compressed layer once it is trained; none of a stock checkpoint."""
    pruned: Layers | None = json.loads((trained / LAYERS_NAME).read_text())
    layers: Layers = (reader.config.get("quantization_config") or {}).get("layers", {})
    levels = level_names(reader.config)
    if levels:
        return {path: spec_at(spec, levels[0]) for path, spec in layers.items()}
    return layers if pruned is None else pruned


def _config_after(reader: CheckpointReader, layers: Layers) -> bytes | str:
    """config.json: as it was, but for specifications that changed."""
    config = deepcopy(reader.config)
    levels = level_names(config)
    if layers:
        config["quantization_config"]["layers"] = layers
    if levels:
        del config["quantization_config"]["levels"]
        config.pop(TRIM_NAME, None)
    if config == reader.config:
        return (reader.folder / CONFIG_NAME).read_bytes()
    return json.dumps(config, indent=2) + "\n"


class _TrainedTensors:
    """What each shard of a trained checkpoint holds.

    Args:
        skeleton: the student.
        weights: file of the trained tensors by their names in the model.
        layers: specifications of the layers as they are now.
    """

    def __init__(self, skeleton: Skeleton, weights: Path, layers: Layers) -> None:
        self._skeleton, self._entries = skeleton, skeleton.reader.entries
        self._weights = weights
        with open_tensors(weights) as file:
            self._trained = set(file.keys())
        targets = skeleton.targets
        in_pieces = {name for name, sources in targets.items() if any(map(piece_position, sources))}
        self._value_of = {place: name for name in self._trained for place in self._places(name)}
        changed = self._value_of.keys() | in_pieces
        self._emptied = _emptied(layers) & targets.keys()
        self._groups: dict[Path, set[tuple[str, ...]]] = defaultdict(set)
        self._replaced = {source for name in self._emptied for source in targets[name]}
        for name in changed:
            group = skeleton.made_together(name)
            sources = targets[group[0]]
            self._replaced |= {*sources}
            for source in sources:
                self._groups[self._entries[source].file].add(group)

    def _places(self, name: str) -> list[str]:
        """Where a trained tensor lies in the checkpoint: under its own name, and that of every tensor tied to it."""
        ties: dict[str, str] = self._skeleton.model.all_tied_weights_keys
        root, known = ties.get(name, name), self._skeleton.targets
        tied = (other for other in (root, *ties) if ties.get(other, other) == root and other in known)
        free = (other for other in tied if other != name and other not in self._trained)
        return [name, *(other for other in free if self._is_same(name, other))]

    def _is_same(self, name: str, other: str) -> bool:
        """Whether two tensors were the same before the training: else the checkpoint did not tie them."""
        before = [self._entries[self._skeleton.targets[each][0]].read().float() for each in (name, other)]
        return torch.equal(*before)

    def of_shard(self, path: Path) -> dict[str, Tensor | TensorEntry]:
        """The tensors of one shard by their names on disk; only those that were trained are in memory."""
        found: dict[str, Tensor | TensorEntry] = {
            name: entry for name, entry in self._entries.items() if entry.file == path and name not in self._replaced
        }
        for group in sorted(self._groups[path]):
            first = self._entries[self._skeleton.targets[group[0]][0]]
            for name, tensor in self._skeleton.on_disk({name: self._value(name) for name in group}).items():
                entry = self._entries.get(name, first)
                if entry.file == path:
                    found[name] = tensor.to(entry.torch_dtype)
        return found

    def _value(self, name: str) -> Tensor:
        if name not in self._value_of:
            return self._skeleton.take(name)
        with open_tensors(self._weights) as file:
            tensor: Tensor = file.get_tensor(self._value_of[name])
        return tensor


def _emptied(layers: Layers) -> set[str]:
    """Names in the model of the sparse columns of slots that have none left."""
    return {
        f"{path}.{name}{suffix}"
        for path, spec in layers.items()
        for name, slot in spec.items()
        if isinstance(slot, dict) and not any(slot.get("num_sparse", [0]))
        for suffix in ("_s", INDEX_SUFFIX)
    }


def _manifest(
    student: CheckpointReader, layers: Layers, training: dict[str, Any], staging: Path, shards: list[ShardInfo]
) -> Manifest:
    """That of the student, with what the training changed; or one for a checkpoint that had none."""
    gone = _count(student) - _count(CheckpointReader(staging))
    parameters = count_parameters(student)
    changed = {
        "parameters": parameters | {key: parameters[key] - gone for key in ("compressed", "experts_compressed")},
        "files": file_records(staging, shards),
        "training": training,
    }
    if (student.folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(student.folder)
        own = {path: spec | layers.get(path, {}) for path, spec in manifest.layers.items()}
        return manifest.model_copy(update=changed | {"layers": own, "levels": {}})
    source = Source(name=student.folder.resolve().name, digest=training["student_digest"])
    return Manifest(tool_version=__version__, source=source, recipe={}, layers={}, **changed)
