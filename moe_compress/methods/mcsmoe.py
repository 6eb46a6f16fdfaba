"""MC-SMoE: merged experts, each matrix low rank plus a few whole columns.

    W ~ U V + S        U V the truncated factorisation of W (methods/d2moe.py), S whole columns of the residual W - U V

One-shot: the columns kept are those of highest importance, on one threshold for all experts, projections and layers:

    gradient   sqrt(sum_i s_ij^2) sqrt(sum_i E[(dL/dw_ij)^2])      an upper bound of sum_i |s_ij dL/dw_ij|
    energy     sqrt(sum_i s_ij^2)

squared and taken a parameter, so that a column stands where it removes most for its bytes. The gradients are those of
the calibration sweep, sequence by sequence (`*_fisher_columns`); no gradient of the size of the weights exists.

Source: arXiv 2310.01334 section 3.2, which scores entries by |s dL/ds| while it trains and prunes columns by their
mean (as distillation/sparsity.py does, from a student that `start` leaves more columns); there the decomposition is a
plain SVD and every matrix has the same rank. Here ranks come from one budget over all matrices in units of the loss,
and columns from another (`sparse_share` of the parameters).
Cost: one factorisation a matrix; scores cost one pass over the residual.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model.slots import FactorisedSlot


def residual(weight_MN: Tensor, factors: dict[str, Tensor], slot: FactorisedSlot, expert: int) -> Tensor:
    """(M, N) fp32 what the stored factors of one expert leave of its matrix."""
    u = factors[f"{slot.name}_u"][slot.factor_rows(expert)].float()
    v = factors[f"{slot.name}_v"][slot.right_rows(expert)].float()
    return torch.addmm(weight_MN.float(), u.mT, v, alpha=-1)


def column_scores(residual_MN: Tensor, gradient_N: Tensor | None) -> Tensor:
    """(N,) fp64 squared importance of the residual's columns, a parameter.

    Args:
        residual_MN: W - U V.
        gradient_N: mean squared norm of each column of the gradient; None to score by energy alone.
    """
    energy_N = residual_MN.double().square().sum(0)
    return energy_N * (1 if gradient_N is None else gradient_N.double()) / (len(residual_MN) + 1)


def choose_columns(scores: list[NDArray[np.floating]], costs: list[int], budget: int) -> list[NDArray[np.intp]]:
    """The columns of highest score of all matrices within a budget; of equal ones the first.

    Args:
        scores: (N,) of each matrix, a parameter; 0 where none may be taken.
        costs: parameters of one column of each matrix, its number included.
        budget: parameters for all columns together.

    Returns:
        the columns of each matrix, ascending.
    """
    owner = np.concatenate([np.full(len(score), i) for i, score in enumerate(scores)])
    column = np.concatenate([np.arange(len(score)) for score in scores])
    score = np.concatenate(scores)
    order = np.argsort(-score, kind="stable")
    order = order[score[order] > 0]
    taken = order[np.asarray(costs)[owner[order]].cumsum() <= budget]
    return [np.sort(column[taken[owner[taken] == i]]) for i in range(len(scores))]
