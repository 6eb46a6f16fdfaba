"""M-SMoE: the experts of a group become one, the mean of its members in the channel order of the leader.

    W = sum_e s_e P_e W_e / sum_e s_e        over the members e of a group, for each projection and bias

s_e: activation frequency (the paper), Fisher information, saliency, or the same for all; where they sum to nothing
all members count alike. P_e permutes the F hidden channels towards the leader's and leaves the expert the same
function. Means are taken in fp32; an expert alone in its group keeps its bytes.

Source: arXiv 2310.01334 section 3.1. Cost: one pass over the weights; one expert exists in fp32 at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..calibration.statistics import LayerStatistics, gram_shapes, group_of, is_gram, is_of_channels
from ..linalg.alignment import ExpertWeights, match_channels
from ..linalg.alignment import align as align_weights
from ..linalg.packed import pack
from ..model.discovery import MoELayer
from ..model.expert_bank import Group, channel_axis, channel_index

LEFT_OUT = -1
"""Leader of an expert that is in no group."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """What becomes of the experts of one layer.

    Attributes:
        leader_of: (E,) for each expert the one that leads its group; a leader leads itself. LEFT_OUT where it is in
            none: the router must not choose it any more.
    """

    leader_of: tuple[int, ...]

    @property
    def leaders(self) -> list[int]:
        """Ids of the experts that stay, ascending: the order in which they are stored."""
        return sorted(set(self.leader_of) - {LEFT_OUT})

    @property
    def expert_map(self) -> list[int]:
        """(E,) place of each expert's group among the stored ones."""
        place = {leader: i for i, leader in enumerate(self.leaders)}
        return [place[leader] for leader in self.leader_of]

    @property
    def merged(self) -> list[int]:
        """Experts that are not leaders."""
        return [expert for expert, leader in enumerate(self.leader_of) if expert != leader]

    def members(self, leader: int) -> list[int]:
        """Experts of one group, the leader first."""
        return [leader, *(e for e, other in enumerate(self.leader_of) if other == leader != e)]


def shares(statistics: LayerStatistics, kind: str, group: Group) -> Tensor:
    """(E,) fp64 weight of each expert in a mean."""
    if kind == "uniform":
        return torch.ones(statistics.layer.num_experts, dtype=torch.float64)
    name = {"frequency": "num_tokens", "fisher": f"{group}_fisher", "saliency": "saliency_sum"}[kind]
    return statistics[name].double()


def merge_weights(
    layer: MoELayer,
    group: Group,
    weight: Tensor,
    grouping: Grouping,
    share_E: Tensor,
    orders: dict[int, Tensor],
) -> Tensor:
    """The groups' means of one projection, or of its bias.

    Args:
        layer: the layer.
        group: the projections.
        weight: canonical (E, M, N), or (E, M) for a bias; any floating dtype.
        grouping: who joins whom.
        share_E: weights of the experts in the mean.
        orders: expert -> (F,) order that aligns its channels with its leader's; none for those not in it.

    Returns:
        (G, M, N) or (G, M), dtype of `weight`, groups in the order of their leaders.
    """
    axis = channel_axis(group) - 1
    out = []
    for leader in grouping.leaders:
        members = grouping.members(leader)
        if len(members) == 1:
            out.append(weight[leader])
            continue
        parts = share_E[members] / share_E[members].sum()
        if not bool(parts.isfinite().all()):
            parts = torch.full_like(parts, 1 / len(members))
        first = weight[leader].float()
        total = first.clone()
        for expert, part in zip(members[1:], parts[1:].tolist(), strict=True):
            own = weight[expert].float()
            if expert in orders and axis < own.dim():
                own = own.index_select(axis, channel_index(layer, group, orders[expert]).to(own.device))
            total.add_(own - first, alpha=part)  # so that equal members merge without a rounding
        out.append(total.to(weight.dtype))
    return torch.stack(out)


def merge_statistics(
    statistics: LayerStatistics, grouping: Grouping, orders: dict[int, Tensor]
) -> tuple[MoELayer, LayerStatistics]:
    """What the merged experts would have seen: the sums of their members', channels in the leaders' order.

    Exact for inputs of gate and up; of hidden channels and outputs it is what the members gave. Sums that were not
    loaded are left out.
    """
    layer = statistics.layer
    leaders = grouping.leaders
    merged_layer = replace(layer, num_experts=len(leaders))
    shapes = gram_shapes(layer, statistics.full)
    member_GE = torch.zeros(len(leaders), layer.num_experts, dtype=torch.float64)
    member_GE[grouping.expert_map, range(layer.num_experts)] = 1
    tensors: dict[str, Tensor] = {}
    scalars = ("num_tokens", "up_fisher", "down_fisher", "weight_sum", "saliency_sum")
    for name in filter(statistics.__contains__, scalars):
        tensors[name] = (member_GE @ statistics[name].double()).to(statistics[name].dtype)
    for name in filter(statistics.__contains__, (*shapes, "up_fisher_columns", "down_fisher_columns")):
        total = torch.zeros(len(leaders), *statistics[name].shape[1:])
        for expert, place in enumerate(grouping.expert_map):
            own = statistics[name][expert]
            if expert in orders and is_of_channels(name):
                index = channel_index(layer, group_of(name), orders[expert])
                if is_gram(name):
                    own = pack(statistics.gram(name, slice(expert, expert + 1))[0, index[:, None], index])
                else:
                    own = own[index]
            total[place] += own
        tensors[name] = total
    return merged_layer, LayerStatistics.of(merged_layer, tensors, statistics.full)


def expert_weights(layer: MoELayer, expert: int, tensors: dict[str, Tensor]) -> ExpertWeights:
    """One expert out of a layer's canonical tensors `up`, `down`, and `up_bias`, `down_bias` where it has them."""
    inner = layer.intermediate_size
    up = tensors["up"][expert].float()
    bias = tensors["up_bias"][expert].float() if "up_bias" in tensors else None
    return ExpertWeights(
        up_FD=up[-inner:],
        down_DF=tensors["down"][expert].float(),
        gate_FD=up[:inner] if layer.has_gate else None,
        up_bias_F=None if bias is None else bias[-inner:],
        gate_bias_F=bias[:inner] if bias is not None and layer.has_gate else None,
    )


def align_expert(layer: MoELayer, tensors: dict[str, Tensor], expert: int, leader: int) -> Tensor:
    """(F,) order of an expert's channels that brings its weights closest to the leader's."""
    return align_weights(expert_weights(layer, leader, tensors), expert_weights(layer, expert, tensors))


def align_activations(hidden_TF: Tensor, leader_TF: Tensor) -> Tensor:
    """(F,) order of channels by the correlation of their activations on shared tokens."""

    def standard(rows: Tensor) -> Tensor:
        centred = rows.float() - rows.float().mean(0)
        return torch.nn.functional.normalize(centred, dim=0).mT

    return match_channels(standard(leader_TF), standard(hidden_TF))


def as_array(tensor: Tensor) -> NDArray[np.floating]:
    """fp64 numpy."""
    array: NDArray[np.floating] = tensor.double().numpy()
    return array
