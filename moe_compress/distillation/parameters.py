"""Which parameters train."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..distillation_options import Trained
from ..errors import RecipeError
from ..model.discovery import follows_contract
from ..model.experts import FactorisedExperts


def choose_trained(model: PreTrainedModel, train: Trained | list[str]) -> list[str]:
    """Lets just these parameters require gradients.

    Args:
        model: the student.
        train: as of the recipe (`Distillation.train`).

    Returns:
        their names.

    Raises:
        RecipeError: there are none.
    """
    everything = [name for name, _ in model.named_parameters()]
    if isinstance(train, list):
        unmatched = [pattern for pattern in train if not any(fnmatchcase(name, pattern) for name in everything)]
        if unmatched:
            raise RecipeError(
                f"distillation.train: '{unmatched[0]}' matches no parameter; a name is like '{everything[-1]}', and *"
                " stands for anything"
            )
        chosen = {name for name in everything if any(fnmatchcase(name, pattern) for pattern in train)}
    else:
        chosen = _chosen(model, train, everything)
    if not chosen:
        raise RecipeError(f"distillation.train: '{train}' is none of the parameters of this model; choose another")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in everything if name in chosen]


def _chosen(model: PreTrainedModel, train: Trained, everything: list[str]) -> set[str]:
    routers = router_parameters(model)
    if train == "all":
        return set(everything) - routers
    if train == "routers":
        return routers
    found = set()
    for path, module in _experts(model):
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        factors = {f"{path}.{name}" for name in _factor_names(module)}
        found |= {"experts": own, "factors": factors, "wholes": own - factors}[train]
    return found


def _experts(model: PreTrainedModel) -> list[tuple[str, Any]]:
    modules = model.named_modules()
    return [(path, m) for path, m in modules if isinstance(m, FactorisedExperts) or follows_contract(m)]


def _factor_names(experts: nn.Module) -> list[str]:
    """Low-rank and sparse factors; bases and whole matrices are none."""
    slots = experts.slots if isinstance(experts, FactorisedExperts) else []
    return [name for slot in slots for name in (f"{slot.name}_u", f"{slot.name}_v", f"{slot.name}_s")]


def router_parameters(model: PreTrainedModel) -> set[str]:
    """Names of all parameters that decide where tokens go.

    Those are found by their shape: of what stands beside experts, the first dimension counts the experts there are
    to choose from.
    """
    return {name for name, _ in _routing(model)}


def router_modules(model: PreTrainedModel) -> dict[str, tuple[nn.Module, int]]:
    """The modules that hold the parameters of routers by their paths, and the number of experts each chooses from."""
    found: dict[str, tuple[nn.Module, int]] = {}
    for name, count in _routing(model):
        path = name.rpartition(".")[0]
        found[path] = model.get_submodule(path), count
    return found


def _routing(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    for path, experts in _experts(model):
        block_path = path.rpartition(".")[0]
        count = len(experts.expert_map) if hasattr(experts, "expert_map") else experts.num_experts
        for name, parameter in model.get_submodule(block_path).named_parameters(block_path):
            shape = whole_shape(parameter)
            if not name.startswith(path + ".") and len(shape) <= 2 and shape[0] == count:
                yield name, count


def whole_shape(parameter: Any) -> torch.Size:
    """Of a parameter that ZeRO 3 may have spread, which leaves its own shape empty."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
