"""Compressed checkpoints written by hand, for tests of how they load."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.checkpoint import CheckpointReader, write_shard
from moe_compress.model.discovery import MoELayer
from moe_compress.model.merged import MAP_NAME
from moe_compress.model.plugin import MoECompressConfig
from moe_compress.model.routing import apply_to_json, resize_experts
from moe_compress.model.skeleton import Skeleton
from tests.tiny_models import auto_class, token_ids


class Handmade:
    """What becomes of a checkpoint, layer by layer.

    Attributes:
        skeleton: of the original.
        moe: its MoE layers.
    """

    def __init__(self, source: Path) -> None:
        self.skeleton = Skeleton(CheckpointReader(source))
        self.moe = self.skeleton.moe_layers()
        self._layers: dict[str, dict[str, Any]] = {}
        self._config: dict[str, int] = {}
        self._replaced: set[str] = set()
        self._tensors: dict[str, Tensor] = {}

    def rows(self, layer: MoELayer, experts: Iterable[int]) -> dict[str, Tensor]:
        """Every parameter of the experts module that counts experts, by name in memory, of these experts."""
        index = torch.tensor(list(experts))
        names = [name for name, _ in self.skeleton.model.get_submodule(layer.path).named_parameters(recurse=False)]
        taken = {f"{layer.path}.{name}": self.skeleton.take(f"{layer.path}.{name}") for name in names}
        return {name: t.index_select(0, index) for name, t in taken.items() if len(t) == layer.num_experts}

    def keep_router(self, layer: MoELayer, stored: list[int], expert_map: list[int]) -> None:
        """Stores some experts, and where the router's choices lead."""
        self._layers[layer.path] = {"num_experts": len(stored), "router": "keep"}
        self._put(self.rows(layer, stored))
        name = self.skeleton.disk_names(layer, [MAP_NAME])[MAP_NAME]
        self._tensors[name] = torch.tensor(expert_map)

    def slice_router(self, layer: MoELayer, kept: list[int], *, is_stock: bool = False) -> None:
        """Stores some experts and their part of the router."""
        resized = resize_experts(self.skeleton.model, len(kept))
        if is_stock:
            self._config = resized.config
        else:
            self._layers[layer.path] = {"num_experts": len(kept), "router": "slice"}
        self._put(self.rows(layer, kept))
        block = layer.path.rpartition(".")[0] + "."
        axes = {name: axis for name, axis in resized.axes.items() if name.startswith(block)}
        index = torch.tensor(kept)
        self._put({name: self.skeleton.take(name).index_select(axis, index) for name, axis in axes.items()})

    def factorise(self, layer: MoELayer, slots: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Stores factors in place of both projections; what else was said of the layer stays."""
        self._layers[layer.path] = self._layers.get(layer.path, {}) | slots
        self._replaced.update(layer.owned)
        for name in layer.owned:
            for source in self.skeleton.targets[name]:
                self._tensors.pop(source, None)
        names = self.skeleton.disk_names(layer, list(tensors))
        self._tensors |= {names[name]: tensor for name, tensor in tensors.items()}

    def save(self, folder: Path, without: str = "") -> Path:
        """Writes the checkpoint, but for the tensors whose name ends with `without`."""
        reader = self.skeleton.reader
        gone = {source for name in self._replaced for source in self.skeleton.targets[name]}
        copied = {name: entry for name, entry in reader.entries.items() if name not in gone}
        tensors = {k: t for k, t in (copied | self._tensors).items() if not without or not k.endswith(without)}
        folder.mkdir(parents=True)
        write_shard(folder / "model.safetensors", tensors)
        config = apply_to_json(reader.config, self.skeleton.model.config, self._config)
        if self._layers:
            config["quantization_config"] = MoECompressConfig(self._layers).to_dict()
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _put(self, tensors: dict[str, Tensor]) -> None:
        self._replaced |= tensors.keys()
        self._tensors |= self.skeleton.on_disk(tensors)


def load(model_type: str, folder: Path, **options: Any) -> Any:
    """The model; nothing in the checkpoint may be left over or missing."""
    model, info = auto_class(model_type).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=token_ids()).logits
    return logits
