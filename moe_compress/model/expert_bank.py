"""One canonical view of a layer's experts over every layout: strides only, no copies (interleaved rows apart).

Shapes: E experts, D hidden_size, F intermediate_size, M rows of the first projection: 2F `[gate; up]`, or F where
there is no gate. Canonical is output features first: up (E, M, D), down (E, D, F).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .discovery import MoELayer

Group = Literal["up", "down"]
"""The projections of a layer by what they read: gate and up together, or down."""

GROUPS: tuple[Group, ...] = ("up", "down")


def stock_name(layer: MoELayer, group: Group) -> str:
    """Name of the group's parameter in the stock experts module."""
    return layer.up_name if group == "up" else "down_proj"


def to_canonical(layer: MoELayer, group: Group, stock: Tensor) -> Tensor:
    """The stock parameter of a group as (E, M, D) or (E, D, F)."""
    weight_EMN = stock.mT if layer.is_transposed else stock
    if group == "up" and layer.has_gate and not layer.is_concatenated:
        weight_EMN = torch.cat([weight_EMN[:, 0::2], weight_EMN[:, 1::2]], dim=1)
    return weight_EMN


def to_stock(layer: MoELayer, group: Group, weight_EMN: Tensor) -> Tensor:
    """The inverse of `to_canonical`, contiguous."""
    if group == "up" and layer.has_gate and not layer.is_concatenated:
        weight_EMN = torch.stack(weight_EMN.chunk(2, dim=1), dim=2).flatten(1, 2)
    return (weight_EMN.mT if layer.is_transposed else weight_EMN).contiguous()
