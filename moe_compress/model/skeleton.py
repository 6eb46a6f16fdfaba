"""A model of transformers on the meta device, and the way from its tensors to the bytes of its checkpoint.

Every private part of transformers that we depend on for reading is used in this file: the key conversions, and the
function that turns checkpoint tensors into parameters. Both are what `from_pretrained` itself runs, so that a layer
loaded here holds exactly what `from_pretrained` would have put there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig, local_torch_dtype
from transformers.quantizers.auto import get_hf_quantizer

from ..checkpoint.reader import CheckpointReader
from ..checkpoint.shard import TensorEntry
from ..errors import CheckpointError, CompressionError
from .architecture import load_config, majority_dtype, model_class_of
from .discovery import MoELayer, find_moe_layers
from .levels import level_names, levels_read, piece_position
from .plugin import guard_of, guard_renaming
from .quiet import quiet
from .switch import contract_conversions, put_on_contract

ROOT = ""
"""Owner of every tensor that belongs to no decoder layer: embeddings, final norm, head."""


class Skeleton:
    """The model of a checkpoint with no weights in it; `load` and `drop` bring single layers in and out.

    Args:
        reader: the checkpoint.
        dtype: dtype to compute in; None for the checkpoint's own.
        device: where loaded layers are put.
        level: the level to read of a checkpoint that has several; None for the largest.

    Attributes:
        model: the stock model class on the meta device, in eval mode, nothing requires grad.
        layers: outermost decoder (or encoder) layers by name, in module order.
        targets: in-memory tensor name -> the names of the checkpoint tensors it is made of.
        extra: checkpoint tensors the model class has no place for (multi-token-prediction heads ...); they are
            copied through.

    Raises:
        CheckpointError: the architecture is unknown, a tensor is missing or has the wrong size, or there is no such
            level.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        level: str | None = None,
    ) -> None:
        self.reader = reader
        self.device = torch.device(device)
        config = load_config(reader)
        if level is not None:
            levels_read(level_names(reader.config), level)
            config.quantization_config["trim"] = level
        source_dtype = config.dtype if isinstance(config.dtype, torch.dtype) else None
        self.dtype = dtype or source_dtype or majority_dtype(reader)
        self.quantizer = None
        if getattr(config, "quantization_config", None) is not None:
            self.quantizer, config, _ = get_hf_quantizer(config, None, None, True, {})
        model_class = model_class_of(config)
        with torch.device("meta"), local_torch_dtype(self.dtype, model_class.__name__):
            self.model: PreTrainedModel = model_class(config)
        put_on_contract(self.model)
        if self.quantizer is not None:
            self.quantizer.preprocess_model(model=self.model, dtype=self.dtype, device_map=None)
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            if getattr(getattr(module, "config", None), "output_router_logits", False):
                module.config.output_router_logits = False  # a training loss; it needs every layer's logits
        self.layers = dict(_outermost_layers(self.model))
        self._siblings: dict[str, list[str]] = {}
        self._renamed: set[str] = set()
        self.targets, self.extra = self._map_tensors()
        self._dtype_plan = self.model._get_dtype_plan(self.dtype)

    # --- what is where -------------------------------------------------------------------------------------

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers inside decoder layers, in module order.

        Raises:
            CheckpointError: there is none, or the experts of one cannot be replaced alone.
        """
        layers = [layer for layer in find_moe_layers(self.model) if self.owner(layer.path) != ROOT]
        for name in (name for layer in layers for name in layer.owned):
            if name in self._siblings:
                raise CheckpointError(
                    f"model type '{self.model.config.model_type}': the checkpoint tensors of {name} also hold"
                    f" {self._siblings[name][0]}, so neither can be replaced alone; give a checkpoint of another type"
                )
        return layers

    def owner(self, name: str) -> str:
        """The decoder layer that the in-memory tensor or module `name` belongs to, or ROOT."""
        for layer in self.layers:
            if name.startswith(layer + "."):
                return layer
        return ROOT

    def is_in_decoder(self, name: str) -> bool:
        """Whether the layer `name` reads targets, not sources; all layers of a decoder-only model do."""
        config = self.model.config
        decoder: Any = self.model.get_decoder() if config.is_encoder_decoder else self.model
        return any(module is self.layers[name] for module in decoder.modules())

    def source_names(self, module_path: str) -> list[str]:
        """Checkpoint tensors that make up the parameters of one module."""
        prefix = module_path + "."
        return [source for target, sources in self.targets.items() if target.startswith(prefix) for source in sources]

    def made_together(self, name: str) -> tuple[str, ...]:
        """All in-memory tensors made of the checkpoint tensors that `name` is made of; `targets` knows the first."""
        first = next((first for first, others in self._siblings.items() if name in others), name)
        return first, *self._siblings.get(first, [])

    def disk_names(self, layer: MoELayer, parameters: list[str]) -> dict[str, str]:
        """Names on disk that `from_pretrained` will lead to new parameters of an experts module.

        Args:
            layer: the layer whose experts are replaced.
            parameters: names inside the module that replaces them.

        Raises:
            CompressionError: the model's key conversions would catch every name we could give.
        """
        renamings, converters = self._conversions()
        experts = self.model.get_submodule(layer.path)
        guard, guard_on_disk = guard_of(experts)
        renamings = [*renamings, guard_renaming(layer.path, experts)]
        ours = {f"{layer.path}.{name}": name for name in parameters}
        state = dict.fromkeys(self.model.state_dict(), True) | dict.fromkeys(ours, True)
        leaf = layer.path.rpartition(".")[2]
        stem = self.targets[layer.owned[1]][0].partition(f".{leaf}.")[0]
        found = {}
        for target, name in ours.items():
            written = guard_on_disk if name == guard else name
            candidates = [f"{layer.path}.{written}", f"{stem}.{leaf}.{written}"]
            for candidate in candidates:
                prefix = self.model.base_model_prefix
                if rename_source_key(candidate, renamings, converters, prefix, state)[0] == target:
                    found[name] = candidate
                    break
            else:
                raise CompressionError(f"{target}: transformers' key conversions leave no name on disk for it")
        return found

    def on_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters as the tensors a checkpoint holds: what loading undoes. Views where that is possible.

        Args:
            tensors: by name in memory, those that are made together with each other; experts may be fewer than the
                model's.

        Returns:
            by name on disk: the names of this checkpoint's own layout, or those in memory, which `from_pretrained`
            takes too, where transformers cannot go back to it.
        """
        known = {on_disk: tensors[name] for name in tensors if (on_disk := self._own_name(name)) is not None}
        tensors = {name: tensor for name, tensor in tensors.items() if self._own_name(name) is None}
        if not tensors:
            return known
        own = {source for name in tensors for source in self.targets.get(name, [])}
        conversions = self._mapping(add_legacy=False)
        # text checkpoints of multimodal types come with the prefix of the whole model and without
        for mapping in (conversions, [entry for entry in conversions if not isinstance(entry, PrefixChange)]):
            try:
                self.model._weight_conversions = mapping
                found: dict[str, torch.Tensor] = revert_weight_conversion(self.model, tensors)
            finally:
                del self.model._weight_conversions
            if found.keys() <= own:
                return known | found
        return known | tensors

    def _own_name(self, name: str) -> str | None:
        """The name on disk of a parameter that lies there as it is, or in pieces, of which that is the first."""
        first = [source for source in self.targets.get(name, []) if not piece_position(source)]
        return first[0] if name in self._renamed or len(first) < len(self.targets.get(name, [])) else None

    def _mapping(self, add_legacy: bool = True) -> list[WeightTransform]:
        mapping = get_model_conversion_mapping(self.model, None, self.quantizer, add_legacy)
        return mapping if self.quantizer is not None else mapping + contract_conversions(self.model)

    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        mapping = self._mapping()
        return (
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
        )

    def _map_tensors(self) -> tuple[dict[str, list[str]], list[str]]:
        state = self.model.state_dict()
        renamings, converters = self._conversions()
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        prefix = self.model.base_model_prefix
        targets: dict[str, list[str]] = defaultdict(list)
        extra: list[str] = []
        shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for source in self.reader.weight_map:
            target, pattern = rename_source_key(source, renamings, converters, prefix, state)
            if target not in state and source in state:
                target, pattern = rename_source_key(source, [], [], prefix, state)
            if target not in state:
                extra.append(source)
                continue
            targets[target].append(source)
            entry = self.reader.entries.get(source)  # none where only config and index are there, to plan
            if pattern is None:
                self._renamed.add(target)
                if entry is not None:
                    self._check_shape(entry, tuple(state[target].shape), "config.json calls for")
                continue
            first, *others = by_pattern[pattern].target_patterns
            if others:
                self._siblings[target] = [target.replace(first, other) for other in others]
            elif entry is not None:  # one of many that make up a parameter, those of one pattern alike
                self._check_shape(entry, shapes.setdefault((target, pattern), entry.shape), "its like have")
        self._check_sizes(targets, state)
        return dict(targets), extra

    def _check_shape(self, entry: TensorEntry, expected: tuple[int, ...], who: str) -> None:
        if entry.shape != expected:
            raise CheckpointError(
                f"{self.reader.folder}: {entry.name} has the shape {entry.shape} where {who} {expected};"
                " the checkpoint is damaged or belongs to another config"
            )

    def _check_sizes(self, targets: dict[str, list[str]], state: dict[str, torch.Tensor]) -> None:
        """Every tensor of the model is there and made of as many elements as the config says."""
        tied = set(self.model.all_tied_weights_keys)
        by_sibling = {name for names in self._siblings.values() for name in names}
        optional = [re.compile(p) for p in (getattr(self.model, "_keys_to_ignore_on_load_missing", None) or [])]
        for name, tensor in state.items():
            sources = targets.get(name)
            if sources is None:
                if name in by_sibling or name in tied or any(p.search(name) for p in optional):
                    continue
                raise CheckpointError(
                    f"{self.reader.folder}: no tensor for '{name}', which config.json calls for;"
                    " the checkpoint is incomplete or belongs to another config"
                )
            if any(source not in self.reader.entries for source in sources):
                continue  # opened to plan, from config and index alone
            found = sum(prod(self.reader.entries[source].shape) for source in sources)
            called_for = tensor.numel() + sum(state[sibling].numel() for sibling in self._siblings.get(name, []))
            if found != called_for:
                raise CheckpointError(
                    f"{self.reader.folder}: {sources[0]} (and {len(sources) - 1} more) hold {found}"
                    f" elements where config.json calls for {called_for} ({name},"
                    f" {tuple(tensor.shape)}); wrong shape, or an expert is missing"
                )

    # --- in and out ----------------------------------------------------------------------------------------

    def load_root(self) -> None:
        """Loads everything outside the decoder layers."""
        self._load(name for name in self.targets if self.owner(name) == ROOT)
        self.model.tie_weights()
        self._fill_buffers(self.model, skip=tuple(self.layers))

    def load(self, module_path: str) -> nn.Module:
        """Loads the parameters below one module (a decoder layer, or its experts) and returns the module."""
        module = self.model.get_submodule(module_path)
        self._load(name for name in self.targets if name.startswith(module_path + "."))
        self._fill_buffers(module)
        return module

    def take(self, name: str, experts: range | None = None) -> torch.Tensor:
        """Loads one parameter and hands it over: the skeleton keeps nothing of it.

        Args:
            name: the parameter.
            experts: which of its experts, one after the other, if it is one of an experts module; None for all.
        """
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        whole: torch.Tensor = getattr(module, leaf)
        some = None if experts is None else self._rows_on_disk(name, experts)
        try:
            if experts is not None and some:
                shape = len(experts), *whole.shape[1:]
                setattr(module, leaf, nn.Parameter(whole.new_empty(shape), requires_grad=False))
            self._load_group([name], some)
            tensor: torch.Tensor = getattr(module, leaf).detach()
        finally:
            setattr(module, leaf, nn.Parameter(torch.empty_like(whole, device="meta"), requires_grad=False))
        return tensor if experts is None or some else tensor[experts.start : experts.stop]

    def keeps_apart(self, name: str) -> bool:
        """Whether some experts of a fused parameter can be read without the rest."""
        return bool(self._rows_on_disk(name, range(1)))

    def _rows_on_disk(self, name: str, rows: range) -> dict[str, TensorEntry]:
        """What some experts of a fused parameter are made of; nothing where they cannot be told apart."""
        entries = [self.reader.entries[source] for source in self.targets[name]]
        num_experts = self.model.get_parameter(name).shape[0]
        if len(entries) == 1:
            return {entries[0].name: entries[0].rows(rows)} if entries[0].shape[0] == num_experts else {}
        numbers = [re.findall(r"\d+", entry.name) for entry in entries]
        if len(set(map(len, numbers))) > 1:
            return {}
        by_expert = [column for column in zip(*numbers, strict=True) if {*map(int, column)} == {*range(num_experts)}]
        if len(by_expert) != 1 or name in self._siblings:
            return {}
        return {entry.name: entry for entry, expert in zip(entries, by_expert[0], strict=True) if int(expert) in rows}

    def drop(self, module_path: str) -> None:
        """Gives the memory of a loaded module back."""
        self.model.get_submodule(module_path).to("meta")

    def prefetch(self, module_path: str) -> None:
        """Asks the kernel to read a module's bytes ahead; costs no memory of this process."""
        self.reader.prefetch(self.source_names(module_path))

    def _load(self, names: Iterable[str]) -> None:
        state = dict(self.model.state_dict())
        small: list[str] = []
        groups: list[list[str]] = [small]
        for name in names:
            # A fused experts tensor is assembled alone, so that only one of them exists twice at a time.
            if state[name].dim() >= 3:
                groups.append([name])
            else:
                small.append(name)
        for group in groups:
            if group:
                self._load_group(group)

    def _load_group(self, names: list[str], some: dict[str, TensorEntry] | None = None) -> None:
        sources = some or {
            s: self.reader.entries[s] for name in names for s in self.targets[self.made_together(name)[0]]
        }
        settings = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self._dtype_plan,
            device_map={"": self.device},
            hf_quantizer=self.quantizer,
            weight_mapping=self._mapping(),
        )
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, sources, settings)
        problems = [
            *(f"{k}: {e}" for k, e in info.conversion_errors.items()),
            *(f"{m[0]}: {tuple(m[1])} instead of {tuple(m[2])}" for m in info.mismatched_keys),
            *(f"{name}: not loaded" for name in names if name in info.missing_keys),
        ]
        if problems:
            raise CheckpointError(f"{self.reader.folder}: {problems[0]}".replace("\n", " "))
        for name in names:
            parent, _, leaf = name.rpartition(".")
            tensor = getattr(self.model.get_submodule(parent), leaf)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(False)

    def _fill_buffers(self, root: nn.Module, skip: tuple[str, ...] = ()) -> None:
        """Rebuilds what no checkpoint holds (rotary frequencies ...) with the model's own initialisation."""
        names = {module: name for name, module in self.model.named_modules()}
        for module in root.modules():
            name = names[module]
            if any(name == s or name.startswith(s + ".") for s in skip):
                continue
            missing = [
                key
                for store in (module._buffers, module._parameters)
                for key, tensor in store.items()
                if tensor is not None and tensor.is_meta and f"{name}.{key}".lstrip(".") not in self.targets
            ]
            for key in missing:
                store = module._buffers if key in module._buffers else module._parameters
                fresh = torch.zeros_like(store[key], device=self.device)  # type: ignore[arg-type]
                store[key] = nn.Parameter(fresh, False) if store is module._parameters else fresh  # type: ignore[assignment]
            if missing:
                self._nearest_model(name)._init_weights(module)

    def _nearest_model(self, name: str) -> PreTrainedModel:
        """The innermost PreTrainedModel around a module: it knows how to initialise it."""
        while name:
            name = name.rpartition(".")[0]
            module = self.model.get_submodule(name)
            if isinstance(module, PreTrainedModel):
                return module
        return self.model


def _outermost_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    last = None
    for name, module in model.named_modules():
        if last is not None and name.startswith(last + "."):
            continue
        if isinstance(module, GradientCheckpointingLayer):
            last = name
            yield name, module
