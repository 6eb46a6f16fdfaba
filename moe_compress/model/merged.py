"""Stock experts, fewer of them: behind the router that the model has, or behind a shorter one.

*Mapped*: the router keeps its E rows, and `expert_map` (E,) leads each of its choices to one of the stored experts.
Choices that meet in one expert add their weights. *Resized*: the router is as short as the list of experts, and the
layer is what the model's own class makes of a config with that number.

Both keep the stock tensor names; a layer that stores fewer experts than config.json says stops stock loaders.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

MAP_NAME = "expert_map"


class MappedExperts(nn.Module):
    """Mixed into a model's own experts class, whose every implementation then works on the stored experts."""

    expert_map: Tensor

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the stock experts; `top_k_index` (T, top_k) holds the router's ids."""
        mixed: Tensor = super().forward(hidden_states, self.expert_map[top_k_index], top_k_weights)
        return mixed


@cache
def _mapped_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Mapped{stock.__name__}", (MappedExperts, stock), {})


def register_map(experts: nn.Module, num_experts: int, device: torch.device) -> None:
    """Gives an experts module the buffer from router id to stored expert."""
    experts.register_buffer(MAP_NAME, torch.empty(num_experts, dtype=torch.int64, device=device))


def shorten(experts: Any, count: int) -> None:
    """Leaves `count` experts' room in the parameters of a stock experts module."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.shape[0] == experts.num_experts:
            shape = (count, *parameter.shape[1:])
            experts.register_parameter(name, nn.Parameter(parameter.new_empty(shape), parameter.requires_grad))


def map_experts(experts: Any, count: int) -> nn.Module:
    """Turns a stock experts module without weights into a mapped one that stores `count` experts."""
    register_map(experts, experts.num_experts, experts.down_proj.device)
    shorten(experts, count)
    experts.num_experts = count
    experts.__class__ = _mapped_class(experts.__class__)
    module: nn.Module = experts
    return module
