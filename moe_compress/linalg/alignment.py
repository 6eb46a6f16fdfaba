"""Permutation alignment of the hidden channels of one expert to those of another.

An expert W_down (act(W_gate x) * W_up x) stays the same function when the rows of W_gate and W_up
and the columns of W_down are permuted alike. Sought is the permutation P that maximises

    <W_gate_ref, P W_gate> + <W_up_ref, P W_up> + <W_down_ref, W_down P^T>  =  sum_f cost[f, P(f)]

    cost = W_gate_ref W_gate^T + W_up_ref W_up^T + W_down_ref^T W_down

one linear sum assignment. The cost of a pair of channels is the inner product of their features,
the concatenation [gate row | up row | down column | gate bias | up bias]: one GEMM makes the whole
cost.

Source: arXiv 2310.01334 section 3.1 (weight matching of arXiv 2209.04836), there for two matrices;
the gate is ours, and the assignment is solved exactly. `match_channels` takes any features: centred
and normalised hidden activations on shared tokens give activation matching.

Cost: 2 F^2 K flop for K = 3 D features, then the assignment on the CPU in float64, 8 F^2 bytes and
between F^2 and F^3 steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Shape suffixes: F hidden channels, D input and output size, K features of a channel.


@dataclass(frozen=True)
class ExpertWeights:
    """One expert, (out, in) oriented, any floating dtype. Switch-style experts have no gate."""

    up_FD: Tensor
    down_DF: Tensor
    gate_FD: Tensor | None = None
    up_bias_F: Tensor | None = None
    gate_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None


def align(reference: ExpertWeights, expert: ExpertWeights) -> Tensor:
    """Permutation (F,) int64 on the CPU: `apply_permutation(expert, p)` is closest to reference.

    Both experts have the same parts and shapes.
    """
    return match_channels(channel_features(reference), channel_features(expert))


def apply_permutation(expert: ExpertWeights, permutation_F: Tensor) -> ExpertWeights:
    """The same function with channel f taken from channel permutation[f]."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[permutation_F]

    return ExpertWeights(
        up_FD=expert.up_FD[permutation_F],
        down_DF=expert.down_DF[:, permutation_F],
        gate_FD=rows(expert.gate_FD),
        up_bias_F=rows(expert.up_bias_F),
        gate_bias_F=rows(expert.gate_bias_F),
        down_bias_D=expert.down_bias_D,
    )


def channel_features(expert: ExpertWeights) -> Tensor:
    """Everything that makes a hidden channel, (F, K) float32. The down bias belongs to none."""
    parts = [expert.gate_FD, expert.up_FD, expert.down_DF.mT]
    parts += [b if b is None else b[:, None] for b in (expert.gate_bias_F, expert.up_bias_F)]
    return torch.cat([part for part in parts if part is not None], dim=1).float()


def match_channels(reference_FK: Tensor, candidate_FK: Tensor) -> Tensor:
    """Permutation p (F,) int64 on the CPU maximising sum_f <reference[f], candidate[p[f]]>."""
    cost_FF = reference_FK @ candidate_FK.mT
    return torch.from_numpy(linear_sum_assignment(cost_FF.cpu().numpy(), maximize=True)[1])
