"""What experts have in common: bases of all experts of a group of projections, or of clusters of them.

For the experts e of one cluster, f_e activation frequency, F_e Fisher information, A_e covariance of the error metric:

    mean 1/n sum W_e;  frequency, fisher, fisher_frequency: weighted means;  fisher_columns: column by column
    closed_form argmin sum_e ||(W_e - W_b) A_e^1/2||^2 = (sum W_e A_e)(sum A_e)^-1, damped

Source: arXiv 2502.17298 section 3.1 (Fisher) and its ablation (mean, frequency). The closed form is damped towards the
mean, sum_e W_e / n, not towards zero: where no token went all experts' weights count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..linalg.symmetric import damp
from .metric import ErrorMetric

# Shape suffixes: E experts, B bases, M and N rows and columns, n experts of a block.

_LEAST_DAMPING = 1e-6


def weighted_bases(kind: str, metric: ErrorMetric, weight: Callable[[slice], Tensor], base_of: Sequence[int]) -> Tensor:
    """(B, M, N) fp32 means of the experts of each cluster, all weighing alike in one that the text never reached.

    Args:
        kind: `mean`, `frequency`, `fisher`, `fisher_frequency` or `fisher_columns`.
        metric: of the group.
        weight: the experts' weights.
        base_of: the cluster of each expert.
    """
    frequency, fisher = metric.statistics["num_tokens"].double(), metric.statistics[f"{metric.group}_fisher"]
    share_EX = {
        "mean": torch.ones_like(frequency),
        "frequency": frequency,
        "fisher": fisher,
        "fisher_frequency": fisher * frequency,
        "fisher_columns": metric.vectors(f"{metric.group}_fisher_columns").double().cpu(),
    }[kind]
    share_EX = share_EX.view(len(base_of), -1)
    member_BE = _members(base_of).double()
    total_BX = member_BE @ share_EX
    unreached_BX = (total_BX == 0).double()
    share_EX = share_EX + member_BE.mT @ unreached_BX
    share_EX = (share_EX / (member_BE.mT @ (member_BE @ share_EX))).to(metric.device, torch.float32)
    return _sum_by_base(metric, base_of, lambda block: weight(block) * share_EX[block, None])


def closed_form_bases(metric: ErrorMetric, weight: Callable[[slice], Tensor], base_of: Sequence[int]) -> Tensor:
    """(B, M, N) fp32 bases that leave the least weighted error of `weight`."""
    gram_BNN = _sum_by_base(metric, base_of, metric.gram)
    moment_BMN = _sum_by_base(metric, base_of, lambda block: weight(block) @ metric.gram(block))
    mean_BMN = _sum_by_base(metric, base_of, weight) / _members(base_of).sum(1).to(metric.device)[:, None, None]
    return mean_BMN + solve_bases(gram_BNN, moment_BMN - mean_BMN @ gram_BNN, metric.options.damping)


def solve_bases(gram_BNN: Tensor, moment_BMN: Tensor, relative_damping: float) -> Tensor:
    """(B, M, N) least squares out of sums over the experts of each base: sum_e R_e A_e (sum_e A_e)^-1, damped.

    Args:
        gram_BNN: sum_e A_e.
        moment_BMN: sum_e R_e A_e, R_e what is to be explained.
        relative_damping: of `gram_BNN`.
    """
    return torch.linalg.solve(_damped(gram_BNN, relative_damping), moment_BMN, left=False)


def prune_bases(bases_BMN: Tensor, metric: ErrorMetric) -> tuple[Tensor, Tensor]:
    """The bases with the columns that are stored, by the covariance of what goes through all of them together.

    Returns:
        As `prune_columns`.
    """
    options = metric.options
    gram_NN = _sum_by_base(metric, (0,) * metric.layer.num_experts, metric.gram)[0]
    num_kept = options.num_base_columns(metric.num_columns)
    return prune_columns(bases_BMN, _damped(gram_NN, options.damping), options.base_metric, num_kept)


def prune_columns(bases_BMN: Tensor, gram_NN: Tensor, kind: str, num_kept: int) -> tuple[Tensor, Tensor]:
    """The bases with only some of their columns, the same for all.

        norm    C_j = ||W_b[:, j]|| ||X[j, :]||, as arXiv 2502.17298; the others stay as they are
        error   C_j = ||W_b[:, j]||^2 / (A^-1)_jj, what it costs to do without j once the others make up for it; those
                that stay become the least-squares fit to what all put out, W_b A[:, K] (A[K, K])^-1

    Args:
        bases_BMN: the bases.
        gram_NN: damped covariance A of what goes through them; its diagonal is ||X[j, :]||^2.
        kind: `norm` or `error`.
        num_kept: columns that stay.

    Returns:
        (C,) int64 their numbers, ascending, and (B, M, N) the bases with zeros elsewhere.
    """
    norm_N = bases_BMN.square().sum((0, 1))
    score_N = norm_N * gram_NN.diagonal() if kind == "norm" else norm_N / torch.linalg.inv(gram_NN).diagonal()
    columns_C = score_N.argsort(descending=True, stable=True)[:num_kept].sort().values
    kept_BMC = bases_BMN[:, :, columns_C]
    if kind == "error" and num_kept:
        between_NC = gram_NN[:, columns_C]
        kept_BMC = torch.linalg.solve(between_NC[columns_C], bases_BMN @ between_NC, left=False)
    return columns_C, torch.zeros_like(bases_BMN).index_copy_(2, columns_C, kept_BMC)


def _damped(gram_BNN: Tensor, relative: float) -> Tensor:
    """Enough to be inverted."""
    return damp(gram_BNN, max(relative, _LEAST_DAMPING))


def _members(base_of: Sequence[int]) -> Tensor:
    """(B, E) one where an expert belongs to a cluster."""
    of = torch.tensor(base_of)
    return (torch.arange(int(of.max()) + 1)[:, None] == of).float()


def _sum_by_base(metric: ErrorMetric, base_of: Sequence[int], term: Callable[[slice], Tensor]) -> Tensor:
    """(B, ...) sums of what `term` gives for the experts of each cluster."""
    total: Tensor | None = None
    for block in metric.blocks():
        part = term(block)
        if total is None:
            total = part.new_zeros(max(base_of) + 1, *part.shape[1:])
        for base, own in zip(base_of[block], part, strict=True):  # one after the other: the same sum on every device
            total[base] += own
    assert total is not None
    return total
