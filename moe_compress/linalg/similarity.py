"""How alike the experts of a layer are: cosines of any features, and linear CKA of their outputs.

    cosine  <a, b> / (|a| |b|)                           rows of any feature matrix, or a Gram of them
    CKA     <H K_i H, H K_j H> / (|H K_i H| |H K_j H|)   K_i = Y_i Y_i^T, Y_i (T, D) outputs on shared tokens

with H = I - 11^T/T: the centred Grams' cosine, after arXiv 1905.00414 (linear kernel). It does not change when an
expert's outputs are rotated or scaled, so it needs no alignment. Costs E T^2 D + E^2 T^2; the Grams hold E T^2 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Shape suffixes: E experts, K features, T shared tokens, D output features.

_COLUMNS = 2**18


def cosine(features_EK: Tensor) -> Tensor:
    """(E, E) fp64 cosines of the rows; a row of zeros has cosine 0 with all but itself."""
    rows = features_EK.double()
    return gram_cosine(rows @ rows.mT)


def gram_cosine(gram_EE: Tensor) -> Tensor:
    """(E, E) fp64 cosines of the rows whose inner products are `gram_EE`."""
    gram = gram_EE.double()
    norm_E = gram.diagonal().clamp_min(0).sqrt()
    inverse_E = torch.where(norm_E > 0, 1 / norm_E, 0)
    cosines = (gram * inverse_E[:, None] * inverse_E).clamp(-1, 1)
    return cosines.fill_diagonal_(1.0)


def linear_cka(outputs_ETD: Tensor) -> Tensor:
    """(E, E) fp64 linear CKA, from 0 to 1, of experts' outputs on the same tokens."""
    centred = outputs_ETD.float() - outputs_ETD.float().mean(1, keepdim=True)
    # rows centred: the Gram is H K H already
    grams = (centred @ centred.mT).flatten(1)
    return cosine(grams)


def sum_of_grams(parts_EK: Sequence[Tensor]) -> Tensor:
    """(E, E) fp32 inner products of rows that lie in several matrices; only some columns are cast at a time."""
    num_experts = len(parts_EK[0])
    gram_EE = torch.zeros(num_experts, num_experts, device=parts_EK[0].device)
    for part in parts_EK:
        for columns in part.split(_COLUMNS, dim=1):
            rows = columns.float()
            gram_EE.addmm_(rows, rows.mT)
    return gram_EE
