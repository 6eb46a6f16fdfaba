"""Truncated factorisation of a matrix under the covariance of its input.

    minimise ||(D - X) A^1/2||_F   over X of rank <= r          D (M, N),  A (N, N) psd

A = sum_t x_t x_t^T over the inputs x_t of the projection: the objective is the squared error of its
output, summed over calibration tokens. By Eckart-Young, with Z = D S, S S^T = A, Z = P Sigma V^T:

    right form (N <= M)   V_r = top eigenvectors of Z^T Z = S^T D^T D S,   X = (D S V_r)(V_r^T S^-1)
    left form  (M <  N)   P_r = top eigenvectors of Z Z^T = D A D^T,       X = P_r (P_r^T D)

Source: arXiv 2502.17298 section 3 (deltas under activation whitening, which is arXiv 2403.07378).
The papers take a Cholesky factor, a full SVD of Z and an explicit inverse. Here only the Gram
matrix of the smaller side is diagonalised, and the left form needs neither root nor inverse: D A
D^T is the covariance of D x_t and can be accumulated at that size, so A (N, N) need never exist.
The optimum is the same. A Gram squares the singular values, so float32 tells no direction under
3e-4 of the largest from rounding; what those add to the objective is under 1e-7 of the whole each.

Cost of a matrix, K = min(M, N): one K x K eigendecomposition (9 K^3 flop) and GEMMs,
    right form  M N^2 + 3 N^3 + 2 M N r,  the root of A once for all projections of one input
    left form   2 M N r                   (+ 2 M N^2 + M^2 N where D A D^T is formed from A)
against about 14 L K^2, L = max(M, N), of a thin SVD on top of a Cholesky factor of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.linalg.symmetric import (
    eigenpairs,
    eigenvalues,
    sqrt_and_inverse_sqrt,
    symmetric_product,
)

# Shape suffixes: E experts, M output size, N input size, K = min(M, N), R rank.

Factors = tuple[Tensor, Tensor]
"""u (M, R) and v (R, N), X = u @ v, strongest direction first: a prefix is the best lower rank."""


@dataclass(frozen=True)
class Spectrum:
    """What each direction of the weighted problem is worth.

    Attributes:
        energy_EK: squared singular values of D A^1/2, descending, >= 0, (E, K) float32. What lies
            behind the first r sums to the squared error of rank r, in units of A.
    """

    energy_EK: Tensor


@dataclass(frozen=True)
class InputRoot:
    """S and S^-1 with S S^T = A, shared by every matrix that reads the same input.

    Attributes:
        root_ENN, inverse_root_ENN: (E, N, N) float32; S is not symmetric.
    """

    root_ENN: Tensor
    inverse_root_ENN: Tensor

    @classmethod
    def from_gram(cls, gram_ENN: Tensor, relative_damping: float) -> InputRoot:
        """Root of A + relative_damping * mean(diag A) * I; raises CompressionError on a NaN."""
        return cls(*sqrt_and_inverse_sqrt(gram_ENN, relative_damping))

    @classmethod
    def of_diagonal(cls, root_EN: Tensor) -> InputRoot:
        """Root of a diagonal A whose entries have these positive square roots."""
        return cls(root_EN.diag_embed(), root_EN.reciprocal().diag_embed())


def shared_right(problem_NN: Tensor, root: InputRoot) -> Tensor:
    """(N, N) rows v that several matrices share as right factor, strongest first; any prefix is the best of its rank.

    They minimise sum_e ||(D_e - U_e V) A^1/2||^2, A = sum_e A_e: every matrix under the covariance of all.

    Args:
        problem_NN: sum_e S^T D_e^T D_e S, see `right_gram`.
        root: S of A, one matrix.
    """
    _, vectors_NN = eigenpairs(problem_NN)
    v_NN = _strongest(vectors_NN, len(vectors_NN)).mT @ root.inverse_root_ENN[0]
    return v_NN / v_NN.norm(dim=1, keepdim=True)  # the scale of the covariance must not overflow a half


def project_right(d_EMN: Tensor, root: InputRoot, v_RN: Tensor) -> tuple[Tensor, Tensor]:
    """What each matrix makes of a given right factor: least squares under its own covariance.

        S^T V^T = Q T,   Z = Q^T S^T D^T,   U = Z^T T^-T,   for any prefix of V and Z and corner of T

    The square of S, whose weak directions rounding may have made negative, is never taken.

    Args:
        d_EMN: (E, M, N) float32.
        root: S of the input covariances, E of them.
        v_RN: (R, N) of full row rank, R <= N.

    Returns:
        (t_ERR, z_ERM), float64, T upper triangular. Row r of Z is what direction r adds: its squared norm is the error
        that it removes.
    """
    s_ENN = root.root_ENN.double().mT
    q_ENR, t_ERR = torch.linalg.qr(s_ENN @ v_RN.double().mT)
    return t_ERR, q_ENR.mT @ (s_ENN @ d_EMN.double().mT)


def right_gram(d_EMN: Tensor, root: InputRoot) -> Tensor:
    """S^T D^T D S, (E, N, N): the Gram matrix of the right form."""
    d_gram_ENN = symmetric_product(d_EMN, d_EMN)
    return symmetric_product(root.root_ENN, d_gram_ENN @ root.root_ENN)


def left_gram(d_EMN: Tensor, gram_ENN: Tensor) -> Tensor:
    """D A D^T, (E, M, M): the covariance of the output, the Gram matrix of the left form."""
    return symmetric_product(d_EMN.mT, gram_ENN @ d_EMN.mT)


def spectrum(gram_EKK: Tensor) -> Spectrum:
    """Spectrum of the weighted problem out of `right_gram`, `left_gram` or an output covariance."""
    return Spectrum(eigenvalues(gram_EKK).flip(-1).clamp_min(0).float())


def factorise_right(
    d_EMN: Tensor, root: InputRoot, ranks: Sequence[int], weighted_EMN: Tensor | None = None
) -> list[Factors]:
    """Best factors of each matrix under the covariance whose root is given. Use where N <= M.

    Args:
        d_EMN: (E, M, N) float32.
        root: of the input covariances, E of them.
        weighted_EMN: T^T D of the two-sided problem ||T^T (D - X) A^1/2||; D itself where it is not given.
        ranks: E integers >= 0. Rank 0 gives empty factors; N or more gives D itself, exact,
            its columns in their own order.

    Returns:
        E pairs u (M, R), v (R, N), R = min(rank, N). Column i of u and row i of v have equal norms:
        singular values carry the square root of the token count, which must not overflow a half.

    Raises:
        CompressionError: the matrices are not finite.
    """
    _, vectors_ENN = eigenpairs(right_gram(d_EMN if weighted_EMN is None else weighted_EMN, root))
    identity_NN = torch.eye(d_EMN.shape[-1], dtype=d_EMN.dtype, device=d_EMN.device)
    factors = []
    for d_MN, root_NN, inverse_NN, vectors_NN, rank in zip(
        d_EMN, root.root_ENN, root.inverse_root_ENN, vectors_ENN, ranks, strict=True
    ):
        if rank < len(vectors_NN):
            top_NR = _strongest(vectors_NN, rank)
            u_MR, v_RN = d_MN @ (root_NN @ top_NR), top_NR.mT @ inverse_NN
        else:
            # V V^T = I only to rounding, and S^-1 would magnify that by the root's condition.
            u_MR, v_RN = d_MN, identity_NN
        balance_R = _balance(u_MR, v_RN) * _signs(u_MR)
        factors.append((u_MR * balance_R, v_RN / balance_R[:, None]))
    return factors


def factorise_left(
    d_EMN: Tensor, output_gram_EMM: Tensor, ranks: Sequence[int], output_root: InputRoot | None = None
) -> list[Factors]:
    """Best factors of each matrix given the covariance of its weighted output. Use where M < N.

    Args:
        d_EMN: (E, M, N) float32.
        output_gram_EMM: (E, M, M) float32, D A D^T, accumulated over tokens or out of `left_gram`; of the two-sided
            problem ||T^T (D - X) A^1/2|| it is T^T D A D^T T.
        ranks: E integers >= 0. Rank 0 gives empty factors; M or more is exact.
        output_root: T and its inverse, where the problem is two-sided.

    Returns:
        E pairs u (M, R) and v (R, N), R = min(rank, M). P the eigenvectors: u = P, v = P^T D; two-sided u = T^-T P and
        v = P^T T^T D, norms balanced.

    Raises:
        CompressionError: the covariance is not finite.
    """
    _, vectors_EMM = eigenpairs(output_gram_EMM)
    factors = []
    for e, (d_MN, vectors_MM, rank) in enumerate(zip(d_EMN, vectors_EMM, ranks, strict=True)):
        top_MR = _strongest(vectors_MM, rank)
        u_MR = top_MR * _signs(top_MR)
        if output_root is None:
            factors.append((u_MR, u_MR.mT @ d_MN))
            continue
        v_RN = (output_root.root_ENN[e] @ u_MR).mT @ d_MN
        left_MR = output_root.inverse_root_ENN[e].mT @ u_MR
        balance_R = _balance(left_MR, v_RN)
        factors.append((left_MR * balance_R, v_RN / balance_R[:, None]))
    return factors


def _strongest(vectors_KK: Tensor, rank: int) -> Tensor:
    """The last `rank` columns, last first."""
    return vectors_KK[:, max(len(vectors_KK) - rank, 0) :].flip(-1)


def _signs(u_MR: Tensor) -> Tensor:
    """-1 where the largest entry of a column is negative: an eigenvector has no sign of its own."""
    return torch.where(-u_MR.amin(0) > u_MR.amax(0), -1.0, 1.0).to(u_MR)


def _balance(u_MR: Tensor, v_RN: Tensor) -> Tensor:
    """What multiplies u and divides v to make their norms equal; 1 where either is zero."""
    u_norm_R, v_norm_R = u_MR.norm(dim=0), v_RN.norm(dim=1)
    return torch.where((u_norm_R > 0) & (v_norm_R > 0), (v_norm_R / u_norm_R).sqrt(), 1)
