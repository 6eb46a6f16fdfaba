"""Covariances made usable: damping, shrinkage of rare experts, products, roots, eigenpairs.

    damp         A + relative * mean(diag A) * I
    shrink_rare  A_e' = max(n_e, 1) * (A_e + k_e M) / (n_e + k_e),    M the covariance expected of a token,
                 k_e = floor where n_e < floor, else 0
    root         S = Q L^1/2,  S^-1 = L^-1/2 Q^T,    A = Q L Q^T

A_e sums x x^T over the n_e tokens of expert e. `shrink_rare` is the posterior mean of the per-token
covariance under a prior worth `floor` tokens of M, multiplied back by the tokens
really seen: the unit stays, so a rare expert gains the directions it lacked but no weight in a
budget that compares experts. An expert that saw no token gets M.

Any S with S S^T = A whitens as well as the symmetric root Q L^1/2 Q^T does, and saves two products.
Unlike a Cholesky factor it exists for singular A, and its inverse costs nothing.

Cost: one eigendecomposition a matrix, about 9 N^3 flop, in the dtype given; float64 is the retry of
the matrix that did not converge. A batch is one call: LAPACK loops over it at the speed of single
calls and gives the same bytes, a GPU may do better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_compress.errors import CompressionError

# Shape suffixes: E experts, N size of the square matrices, K summed size.

STRIP = 256  # rows of a product at a time: the fastest of 128, 256, 512 at N = 1024 on a CPU


def damp(gram_ENN: Tensor, relative: float) -> Tensor:
    """Add `relative` times the mean diagonal to the diagonal, matrix by matrix.

    Args:
        gram_ENN: symmetric positive semidefinite, (..., N, N), floating.
        relative: no unit, >= 0. A zero matrix is damped as if its mean diagonal were 1.

    Returns:
        A new tensor of the same shape and dtype.
    """
    mean_E = gram_ENN.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped_ENN = gram_ENN.clone()
    damped_ENN.diagonal(dim1=-2, dim2=-1).add_(relative * torch.where(mean_E > 0, mean_E, 1)[..., None])
    return damped_ENN


def shrink_rare(gram_ENN: Tensor, num_tokens_E: Tensor, floor: int, prior_NN: Tensor) -> Tensor:
    """Pull the covariance of experts with under `floor` tokens towards what is expected of a token.

    Args:
        gram_ENN: sum of x x^T over the tokens of each expert, (E, N, N), floating.
        num_tokens_E: tokens summed, (E,), any real dtype.
        floor: tokens; experts with fewer are shrunk, the others come back unchanged.
        prior_NN: covariance of one token, such as the layer's mean, (N, N), or (E, N, N) where each has its own.

    Returns:
        (E, N, N), unit of the input: sums over max(num_tokens, 1) tokens.
    """
    seen_E11 = num_tokens_E.to(gram_ENN)[:, None, None]
    shrunk_ENN = torch.add(gram_ENN, prior_NN, alpha=floor).mul_(seen_E11.clamp_min(1) / (seen_E11 + floor))
    return torch.where(seen_E11 < floor, shrunk_ENN, gram_ENN)


def symmetric_product(a_EKN: Tensor, b_EKN: Tensor) -> Tensor:
    """a^T b where that is known to be symmetric, (..., N, N): for b = a, or b = G a, G symmetric.

    Only the strips left of and on the diagonal are multiplied, (N + 256) / 2N of the work; the rest
    is mirrored.
    """
    size = a_EKN.shape[-1]
    product_ENN = a_EKN.new_empty(*a_EKN.shape[:-2], size, size)
    for start in range(0, size, STRIP):
        stop = min(start + STRIP, size)
        strip = a_EKN[..., start:stop].mT @ b_EKN[..., :stop]
        product_ENN[..., start:stop, :stop] = strip
        product_ENN[..., :start, start:stop] = strip[..., :start].mT
    return product_ENN


def sqrt_and_inverse_sqrt(gram_ENN: Tensor, relative_damping: float) -> tuple[Tensor, Tensor]:
    """Root S and inverse S^-1 of the damped matrix: S S^T = damp(gram), S^-1 S = I.

    S is not symmetric (see the top of the file). Eigenvalues under eps times the largest are
    rounding noise and are raised to it, so both stay finite for singular and for zero matrices.

    Args:
        gram_ENN: symmetric positive semidefinite, (..., N, N), float32 or float64.
        relative_damping: no unit, see `damp`.

    Returns:
        (root, inverse_root), shape and dtype of the input.

    Raises:
        CompressionError: the matrix is not finite.
    """
    values_EN, vectors_ENN = eigenpairs(damp(gram_ENN, relative_damping))
    noise_E1 = torch.finfo(values_EN.dtype).eps * values_EN[..., -1:]
    scale_EN = values_EN.clamp_min(torch.where(noise_E1 > 0, noise_E1, 1)).sqrt()
    return vectors_ENN * scale_EN[..., None, :], (vectors_ENN / scale_EN[..., None, :]).mT


def eigenpairs(gram_ENN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors in columns: (..., N) and (..., N, N).

    Raises:
        CompressionError: the matrix is not finite.
    """
    # The upper triangle: 7 % faster in MKL.
    values_EN, vectors_ENN = _solve(lambda a_ENN: torch.linalg.eigh(a_ENN, UPLO="U"), gram_ENN)
    return values_EN, vectors_ENN


def eigenvalues(gram_ENN: Tensor) -> Tensor:
    """Eigenvalues, ascending, (..., N): half the time of `eigenpairs`.

    Raises:
        CompressionError: the matrix is not finite.
    """
    return _solve(lambda a_ENN: (torch.linalg.eigvalsh(a_ENN, UPLO="U"),), gram_ENN)[0]


def _solve(solver: Callable[[Tensor], tuple[Tensor, ...]], gram_ENN: Tensor) -> tuple[Tensor, ...]:
    # LAPACK answers a NaN with a failure or with silent NaNs, depending on where it stands.
    if not gram_ENN.sum().isfinite():
        raise CompressionError(
            f"a covariance of size {gram_ENN.shape[-1]} is not finite: it must hold no NaN or"
            " infinity; look for overflow in the calibration statistics"
        )
    try:
        return solver(gram_ENN)
    except torch.linalg.LinAlgError:
        if gram_ENN.ndim == 2:
            return tuple(part.to(gram_ENN) for part in solver(gram_ENN.double()))
        parts = [_solve(solver, gram_NN) for gram_NN in gram_ENN]
        return tuple(torch.stack(part) for part in zip(*parts, strict=True))
