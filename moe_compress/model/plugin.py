"""Makes compressed checkpoints load with the stock `from_pretrained` after `import moe_compress`.

A compressed checkpoint names itself in `config.json` through `quantization_config.quant_method`, the door that
transformers leaves open for third parties: our quantizer swaps the experts modules while the model is still on the
meta device, and the stock loader fills them.

Without this plugin the same files must not load with random experts. So the packed right factors of the
down projection lie on disk under the stock name `down_proj`, in a shape that no stock module has: transformers
stops with a size mismatch. `update_weight_conversions` gives them their own name in memory, and back on saving.

Where a checkpoint has levels (levels.py), one is chosen by `from_pretrained(..., trim="0.5")`, which transformers takes
because config.json has a field of that name, or by `quantization_config=MoECompressConfig(trim="0.5")`. What is saved
afterwards is an ordinary checkpoint of that level alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import transformers.quantizers.auto
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError
from .experts import GUARD_DISK_NAME, GUARD_NAME, FactorisedExperts
from .levels import JoinPieces, Pieces, factor_names, later_pieces, levels_read, piece_names, pieces_of, spec_at
from .merged import map_experts
from .routing import resize_experts
from .switch import contract_conversions, put_on_contract

METHOD = "moe_compress"
FORMAT_VERSION = 1

TRIM_NAME = "trim"
"""Field of config.json that says which level is loaded; `from_pretrained` takes its name as a keyword."""


def guard_of(experts: nn.Module) -> tuple[str, str]:
    """The tensor of a compressed experts module that stops stock code, and its name on disk."""
    return getattr(experts, "guard", (GUARD_NAME, GUARD_DISK_NAME))


def guard_renaming(path: str, experts: nn.Module) -> WeightRenaming:
    """Leads the guard tensor of the experts module at `path` from its name on disk to its own."""
    name, on_disk = guard_of(experts)
    return WeightRenaming(re.escape(f"{path}.{on_disk}"), re.escape(f"{path}.{name}"))


def is_factorised(spec: dict[str, Any]) -> bool:
    """Whether a layer's specification has factors; otherwise it has fewer experts of the stock kind."""
    return "down" in spec


def _fewer(experts: nn.Module, spec: dict[str, Any]) -> nn.Module:
    return map_experts(experts, spec["num_experts"]) if spec["router"] == "keep" else experts


def _adopt_block(model: PreTrainedModel, other: PreTrainedModel, path: str) -> None:
    """Takes the module around the experts at `path`, router and all, from a model with fewer experts."""
    block = path.rpartition(".")[0]
    parent, _, name = block.rpartition(".")
    before, after = model.get_submodule(block), other.get_submodule(block)
    for inner, module in after.named_modules():
        if hasattr(module, "config"):  # the model's own says which implementation runs, also when set later
            module.config = before.get_submodule(inner).config
    setattr(model.get_submodule(parent), name, after)


@register_quantization_config(METHOD)
class MoECompressConfig(QuantizationConfigMixin):
    """What `config.json` says of a compressed checkpoint.

    Args:
        layers: path of each compressed experts module -> its specification (see `FactorisedExperts`).
        format_version: of this description; a newer one than ours is refused.
        levels: names of the levels that it can be loaded at, the largest first (see levels.py).
        trim: the level to load; the largest where nothing is said.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        format_version: int = 1,
        levels: Sequence[str] = (),
        trim: float | str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.layers = layers or {}
        self.levels = list(levels)
        self.trim = trim

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `config.json`."""
        return {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "layers": self.layers,
        } | ({"levels": self.levels} if self.levels else {})

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user's config changes of the checkpoint's."""
        return {"trim": self.trim}


# transformers hands the loading attributes of these classes over, and has no function to register another.
transformers.quantizers.auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (MoECompressConfig,)


@register_quantizer(METHOD)
class MoECompressQuantizer(HfQuantizer):
    """Swaps experts modules for compressed ones before the weights are loaded."""

    requires_calibration = True
    quantization_config: MoECompressConfig
    _pieces: dict[str, Pieces]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses a format that a later version of this package wrote."""
        version = self.quantization_config.format_version
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config.format_version {version} is newer than {FORMAT_VERSION}, the newest"
                " this moe-compress reads; upgrade moe-compress"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        put_on_contract(model)
        by_level = self._choose_level(model)
        layers = self._layers(model)
        sliced = {path: spec["num_experts"] for path, spec in layers.items() if spec.get("router") == "slice"}
        resized = {count: resize_experts(model, count).model for count in set(sliced.values())}
        for path, spec in layers.items():
            parent, _, name = path.rpartition(".")
            if path in sliced:
                _adopt_block(model, resized[sliced[path]], path)
            owner = model.get_submodule(parent)
            experts = getattr(owner, name)
            setattr(owner, name, FactorisedExperts(experts, spec) if is_factorised(spec) else _fewer(experts, spec))
            # some blocks initialise their experts, by the stock names; nothing of a checkpoint needs it
            owner._is_hf_initialized = True
        self._pieces = self._find_pieces(model, by_level)

    def _choose_level(self, model: PreTrainedModel) -> list[dict[str, dict[str, Any]]]:
        """Makes the config that of one level, and the tensors of larger ones no surprise to transformers.

        Returns:
            The layers at each level whose pieces are read, the largest first; none where there are no levels.
        """
        config = self.quantization_config
        default = vars(model.config).pop(TRIM_NAME, None) if config.levels else None
        asked = default if config.trim is None else config.trim
        read = config.levels if asked is None else levels_read(config.levels, str(asked))
        by_level = [{path: spec_at(spec, name) for path, spec in config.layers.items()} for name in read]
        if by_level:
            self.quantization_config = MoECompressConfig(by_level[0], config.format_version)
        if len(read) < len(config.levels):
            ignored = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, later_pieces(len(read), len(config.levels))}
        return by_level

    def _find_pieces(self, model: PreTrainedModel, by_level: list[dict[str, dict[str, Any]]]) -> dict[str, Pieces]:
        """The pieces of each packed tensor of the model; nothing where all lie in one."""
        if len(by_level) < 2:
            return {}
        here = [self._layers(model, layers) for layers in by_level]
        return {
            f"{path}.{name}": pieces_of(layers[path][slot.name]["ranks"] for layers in here)
            for path in here[0]
            for slot in model.get_submodule(path).slots
            for name in factor_names(slot.name)
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for path in self._layers(model):
            experts = model.get_submodule(path)
            for name, tensor in chain(experts.named_parameters(recurse=False), experts.named_buffers(recurse=False)):
                # transformers only reports missing tensors and leaves them uninitialised
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(f"compressed checkpoint lacks {path}.{name}; it is incomplete")
        # The experts are ordinary floating point: .half(), .float() and training must keep working.
        model.is_quantized = False

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Adds the renaming of each layer's guard tensor, and what stacks experts that are not stacked on disk."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        compressed = [(path, model.get_submodule(path)) for path in self._layers(model)]
        guards = [guard_renaming(*each) for each in compressed if hasattr(each[1], guard_of(each[1])[0])]
        return conversions + guards + self._joins() + contract_conversions(model)

    def _joins(self) -> list[WeightTransform]:
        """What makes packed tensors of their pieces, one a kind of tensor."""
        join = JoinPieces(self._pieces)
        num_pieces = {re.escape("." + path.rpartition(".")[2]): len(pieces) for path, pieces in self._pieces.items()}
        return [WeightConverter(piece_names(name, count), name, [join]) for name, count in num_pieces.items()]

    def _layers(self, model: nn.Module, layers: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
        """The compressed layers by their paths in `model`, which may be the base model without its head."""
        prefix = getattr(model, "base_model_prefix", "") + "."
        names = {name for name, _ in model.named_modules()}
        found = {}
        for path, spec in (layers or self.quantization_config.layers).items():
            candidates = (path, path.removeprefix(prefix), prefix + path)
            here = next((c for c in candidates if c in names), None)
            if here is None:
                raise CheckpointError(f"config.json compresses '{path}', which this model class lacks")
            found[here] = spec
        return found

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the compressed form."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Lets `Trainer` accept the model without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Nothing here prevents `torch.compile`."""
        return True
