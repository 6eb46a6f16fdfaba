"""A shorter router for merged experts: rows that say how much the whole group was wanted.

After E experts were merged into G groups, a router of G rows must choose a group when the old one would have chosen
any of its members. Under a softmax the logit that has the members' joint probability is

    l_g(x) = log sum_{e in g} exp(h_e . x)

which no row gives exactly. The row fitted to it on calibration tokens X (n, D), starting from the leader's:

    w_g = h_leader + argmin_delta ||X delta - (l_g(X) - X h_leader)||^2 + ridge ||X||^2/n ||delta||^2
        = h_leader + X^T (X X^T + ridge ||X||^2/n I)^{-1} (l_g(X) - X h_leader)

Source: METHODS, M-SMoE step 5 (ours; the paper keeps the leaders' rows). Cost: one n x n solve a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .merge import Grouping

_RIDGE = 0.1
_SAME_INPUT = 0.999
"""Correlation of X W^T with the router's logits above which the router reads what the experts read."""


def fit_rows(weight_ED: Tensor, hidden_TD: Tensor, logits_TE: Tensor, grouping: Grouping) -> Tensor | None:
    """(G, D) rows of the groups in fp32, or None where the router does not read the experts' input as it is.

    Args:
        weight_ED: the router's weight.
        hidden_TD: input of the experts at some calibration tokens.
        logits_TE: what the router gave there.
        grouping: who was merged with whom.
    """
    weight, hidden, logits = weight_ED.double(), hidden_TD.double(), logits_TE.double()
    offset_E = (logits - hidden @ weight.mT).mean(0)  # a bias, where there is one
    given, wanted = (hidden @ weight.mT + offset_E).flatten(), logits.flatten()
    if float(torch.corrcoef(torch.stack([given, wanted]))[0, 1]) < _SAME_INPUT:
        return None
    leaders = grouping.leaders
    targets = [logits[:, grouping.members(leader)].logsumexp(1) - logits[:, leader] for leader in leaders]
    kernel = hidden @ hidden.mT
    kernel.diagonal().add_(_RIDGE * float(kernel.diagonal().mean()))
    change_DG = hidden.mT @ torch.linalg.solve(kernel, torch.stack(targets, 1))
    return (weight[leaders] + change_DG.mT).float()
