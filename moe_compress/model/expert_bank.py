"""One canonical view of a layer's experts over every layout: strides only, no copies (interleaved rows apart).

Shapes: E experts, D hidden_size, F intermediate_size, M rows of the first projection: 2F `[gate; up]`, or F where
there is no gate. Canonical is output features first: up (E, M, D), down (E, D, F).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .discovery import MoELayer

Group = Literal["up", "down"]
"""The projections of a layer by what they read: gate and up together, or down."""

GROUPS: tuple[Group, ...] = ("up", "down")


def matrix_shape(layer: MoELayer, group: Group) -> tuple[int, int]:
    """(rows, columns) of one expert's matrix of the group, canonical."""
    return layer.up_shape if group == "up" else layer.down_shape


def stock_name(layer: MoELayer, group: Group) -> str:
    """Name of the group's parameter in the stock experts module."""
    return layer.up_name if group == "up" else "down_proj"


def bias_name(layer: MoELayer, group: Group) -> str:
    """Name of the group's bias in the stock experts module, where it has one."""
    return f"{stock_name(layer, group)}_bias"


def to_canonical(layer: MoELayer, group: Group, stock: Tensor) -> Tensor:
    """The stock parameter of a group as (E, M, D) or (E, D, F); its bias as (E, M) or (E, D)."""
    weight_EMN = stock.mT if layer.is_transposed and stock.dim() == 3 else stock
    if group == "up" and layer.has_gate and not layer.is_concatenated:
        weight_EMN = torch.cat([weight_EMN[:, 0::2], weight_EMN[:, 1::2]], dim=1)
    return weight_EMN


def to_stock(layer: MoELayer, group: Group, weight_EMN: Tensor) -> Tensor:
    """The inverse of `to_canonical`, contiguous."""
    if group == "up" and layer.has_gate and not layer.is_concatenated:
        weight_EMN = torch.stack(weight_EMN.chunk(2, dim=1), dim=2).flatten(1, 2)
    return (weight_EMN.mT if layer.is_transposed and weight_EMN.dim() == 3 else weight_EMN).contiguous()


def channel_axis(group: Group) -> int:
    """The axis of a group's canonical weights that counts hidden channels; of its bias only `up` has one."""
    return 1 if group == "up" else 2


def channel_index(layer: MoELayer, group: Group, order_F: Tensor) -> Tensor:
    """Index along `channel_axis` that takes channel f from channel order[f]; gate and up rows move together.

    `order_F` may have leading axes.
    """
    if group == "down":
        return order_F
    num_rows, inner = layer.up_shape[0], layer.intermediate_size
    return torch.cat([order_F + start for start in range(0, num_rows, inner)], dim=-1)


@torch.no_grad()
def hidden_activations(layer: MoELayer, experts: Any, expert: int, x_TD: Tensor) -> Tensor:
    """(T, F) input of the down projection of one expert of a loaded experts module."""
    weight = getattr(experts, layer.up_name)[expert]
    up_TM = x_TD @ (weight if layer.is_transposed else weight.mT)
    if layer.has_bias:
        up_TM = up_TM + getattr(experts, bias_name(layer, "up"))[expert]
    hidden: Tensor = experts._apply_gate(up_TM) if layer.has_gate else experts.act_fn(up_TM)
    return hidden
