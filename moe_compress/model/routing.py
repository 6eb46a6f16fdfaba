"""The router of a model, found without knowing its class: what shrinks when the config names fewer experts.

The model class is built a second time on the meta device from a config with another number of experts. Every tensor
outside the experts whose shape follows is the router's, and the axis that differs counts the experts. So a router of
any kind (weight, bias, correction bias, scales) is sliced by the same line of code.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import RecipeError
from .discovery import MoELayer, find_moe_layers
from .switch import put_on_contract

TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
"""What configs call the number of experts a token."""

_REMEDY = "merge with router: keep"
"""What works with any router."""


@dataclass(frozen=True, slots=True)
class ResizedModel:
    """A model class with another number of routed experts.

    Attributes:
        model: on the meta device.
        config: the fields of config.json that changed, by path ("text_config.num_experts").
        axes: the router's tensors by name, and the axis of each that counts experts.
    """

    model: PreTrainedModel
    config: dict[str, int]
    axes: dict[str, int]


def resize_experts(model: PreTrainedModel, count: int) -> ResizedModel:
    """Builds the class of `model` with `count` routed experts in every MoE layer.

    Raises:
        RecipeError: the config has no one number for them, the router cannot choose among so few, or it chooses by
            a table of expert ids.
    """
    layers = find_moe_layers(model)
    sizes = {layer.num_experts for layer in layers}
    if len(sizes) > 1:
        raise RecipeError(
            f"method.router: layers have {sorted(sizes)} experts and their routers cannot shrink alike; {_REMEDY}"
        )
    for path in _candidates(model.config, sizes.pop()):
        resized = _try(model, layers, path, count)
        if resized is not None:
            _check_router(model, layers, resized, count)
            return resized
    raise RecipeError(
        f"method.router: model type '{model.config.model_type}' has no field in config.json that all its routers and"
        f" experts follow; {_REMEDY}"
    )


def _candidates(config: PreTrainedConfig, num_experts: int) -> Iterator[str]:
    """Config fields that may be the number of routed experts, by path."""

    def walk(fields: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, value in fields.items():
            if isinstance(value, dict) and name != "quantization_config":
                yield from walk(value, f"{prefix}{name}.")
            elif "expert" in str(name) and value == num_experts and not isinstance(value, bool):
                yield prefix + name

    yield from walk(config.to_dict(), "")


def _try(model: PreTrainedModel, layers: list[MoELayer], path: str, count: int) -> ResizedModel | None:
    """The model with one field of the config changed, if only the number of experts followed."""
    config = deepcopy(model.config)
    *parents, name = path.split(".")
    part: Any = config
    for parent in parents:
        part = getattr(part, parent)
    setattr(part, name, count)
    try:
        with torch.device("meta"):
            other = type(model)(config)
        put_on_contract(other)
    except (ValueError, RuntimeError, TypeError, AssertionError):
        return None
    before, after = model.state_dict(), other.state_dict()
    if before.keys() != after.keys():
        return None
    experts = tuple(f"{layer.path}." for layer in layers)
    axes: dict[str, int] = {}
    for key, tensor in before.items():
        axis = _counting_axis(tensor, after[key], layers[0].num_experts, count)
        if axis is None:
            return None
        if axis >= 0 and not key.startswith(experts):
            axes[key] = axis
    found = find_moe_layers(other)
    if not axes or [layer.num_experts for layer in found] != [count] * len(layers):
        return None
    return ResizedModel(other, {path: count}, axes)


def _counting_axis(before: Tensor, after: Tensor, num_experts: int, count: int) -> int | None:
    """The one axis on which `num_experts` became `count`; -1 where nothing changed, None for any other change."""
    changed = [i for i, (a, b) in enumerate(zip(before.shape, after.shape, strict=False)) if a != b]
    if before.dim() != after.dim() or len(changed) > 1:
        return None
    if not changed:
        return -1
    axis = changed[0]
    return axis if (before.shape[axis], after.shape[axis]) == (num_experts, count) else None


def _check_router(model: PreTrainedModel, layers: list[MoELayer], resized: ResizedModel, count: int) -> None:
    blocks = tuple(layer.path.rpartition(".")[0] + "." for layer in layers)
    tables = [n for n, t in model.state_dict().items() if n.startswith(blocks) and not t.is_floating_point()]
    if tables:
        raise RecipeError(f"method.router: {tables[0]} is a table of expert ids, which cannot shrink; {_REMEDY}")
    groups, chosen_groups = router_groups(model.config)
    top_k = experts_per_token(model.config)
    if count % groups or (groups > 1 and count // groups < 2):
        raise RecipeError(
            f"method.router: {count} experts a layer are not {groups} groups of at least 2, among which the router"
            f" chooses; keep a multiple of {groups}, or {_REMEDY}"
        )
    if top_k is not None and count // groups * chosen_groups < top_k:
        of_groups = f" in {chosen_groups} of {groups} groups" if groups > 1 else ""
        raise RecipeError(
            f"method.router: {count} experts a layer are too few for a router that picks {top_k}{of_groups};"
            f" keep more, or {_REMEDY}"
        )


def router_weight(model: nn.Module, layer: MoELayer) -> str:
    """Name of the (E, D) weight beside the experts: the router's, of whatever class.

    Raises:
        RecipeError: there is none, or more than one.
    """
    block, shape = layer.path.rpartition(".")[0], (layer.num_experts, layer.hidden_size)
    found = [
        f"{block}.{name}"
        for name, tensor in model.get_submodule(block).named_parameters()
        if tuple(tensor.shape) == shape and not f"{block}.{name}".startswith(layer.path + ".")
    ]
    if len(found) != 1:
        raise RecipeError(
            f"method.similarity: the router beside {layer.path} is not one {shape[0]} x {shape[1]} matrix; leave"
            " similarity: router_weights and repair: logsumexp out"
        )
    return found[0]


def router_groups(config: PreTrainedConfig) -> tuple[int, int]:
    """(groups of consecutive experts, groups that a token may choose from); (1, 1) for most routers."""
    text = config.get_text_config()
    groups = getattr(text, "n_group", None) or 1
    return groups, getattr(text, "topk_group", None) or groups


def experts_per_token(config: PreTrainedConfig) -> int | None:
    """top_k, or None where the config names none."""
    text = config.get_text_config()
    return next((getattr(text, n) for n in TOP_K_NAMES if isinstance(getattr(text, n, None), int)), None)


def apply_to_json(raw: dict[str, Any], config: PreTrainedConfig, changed: dict[str, Any]) -> dict[str, Any]:
    """A copy of config.json with the changed fields, under the names that the file uses for them."""
    raw = deepcopy(raw)
    for path, value in changed.items():
        *parents, name = path.split(".")
        part, described = raw, config
        for parent in parents:
            part, described = part.setdefault(parent, {}), getattr(described, parent)
        aliases = [alias for alias, target in described.attribute_map.items() if target == name]
        for used in [key for key in (name, *aliases) if key in part] or [name]:
            part[used] = value
    return raw
