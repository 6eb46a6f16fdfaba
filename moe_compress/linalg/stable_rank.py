"""Stable rank: how many directions a matrix really uses.

    sum_i sigma_i^2 / max_i sigma_i^2  =  ||W||_F^2 / ||W||_2^2        between 1 and the rank

Source: arXiv 2310.01334 section 3.2. The largest singular value is found by power iteration on W^T W, whose error
after k steps falls as (sigma_2 / sigma_1)^(4k): an underestimate, so never more than a little too high a rank.
Cost: 4 K M N operations a matrix for K steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 96


def stable_rank(weight_EMN: Tensor) -> Tensor:
    """(E,) fp32 stable ranks of a stack of matrices; 0 for a matrix of zeros."""
    weight = weight_EMN.float()
    norm_E11 = torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True)
    norm_E11 = norm_E11.clamp_min(torch.finfo(norm_E11.dtype).tiny)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(weight.shape[-1], 1, generator=generator).to(weight.device).expand(len(weight), -1, 1)
    for _ in range(_STEPS):
        v = torch.nn.functional.normalize(weight.mT @ (weight @ v / norm_E11) / norm_E11, dim=1)
    largest_E = (weight @ v / norm_E11).square().sum((1, 2))
    return torch.where(largest_E > 0, 1 / largest_E, 0)
