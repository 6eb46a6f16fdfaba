from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compress.errors import CompressionError
from moe_compress.linalg.symmetric import (
    damp,
    eigenpairs,
    eigenvalues,
    shrink_rare,
    sqrt_and_inverse_sqrt,
    symmetric_product,
)


def covariances(num_experts: int, size: int, num_tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_ETN = torch.randn(num_experts, num_tokens, size, generator=generator)
    return x_ETN.mT @ x_ETN


def test_damp_adds_a_share_of_each_mean_diagonal() -> None:
    gram_ENN = torch.stack([torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2, 2)])
    damped_ENN = damp(gram_ENN, 0.5)
    assert torch.equal(damped_ENN[0], torch.diag(torch.tensor([2.0, 4.0])))
    assert torch.equal(damped_ENN[1], 0.5 * torch.eye(2))
    assert torch.equal(damp(gram_ENN[0], 0.5), damped_ENN[0])


def test_shrink_rare_is_the_posterior_mean_under_the_floor_only() -> None:
    gram_ENN = covariances(3, 4, 10, seed=0)
    num_tokens_E = torch.tensor([100, 10, 0])
    gram_ENN[2] = 0
    mean_NN = gram_ENN.sum(0) / 110
    shrunk_ENN = shrink_rare(gram_ENN, num_tokens_E, 30, mean_NN)
    assert torch.equal(shrunk_ENN[0], gram_ENN[0])
    torch.testing.assert_close(shrunk_ENN[1], (gram_ENN[1] + 30 * mean_NN) * 10 / 40)
    torch.testing.assert_close(shrunk_ENN[2], mean_NN)


def test_shrink_rare_towards_a_prior_of_each() -> None:
    gram_ENN, prior_ENN = covariances(2, 4, 10, seed=0), covariances(2, 4, 10, seed=1)
    shrunk_ENN = shrink_rare(gram_ENN, torch.tensor([10, 10]), 30, prior_ENN)
    torch.testing.assert_close(shrunk_ENN, (gram_ENN + 30 * prior_ENN) * 10 / 40)


@pytest.mark.parametrize("size", [1, 256, 600])
def test_symmetric_product_is_the_whole_product(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a_EKN = torch.randn(2, 30, size, generator=generator, dtype=torch.float64)
    gram_EKK = a_EKN @ a_EKN.mT
    product_ENN = symmetric_product(a_EKN, gram_EKK @ a_EKN)
    torch.testing.assert_close(product_ENN, a_EKN.mT @ gram_EKK @ a_EKN)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 24), st.integers(0, 10**6))
def test_root_and_inverse(num_experts: int, size: int, num_tokens: int, seed: int) -> None:
    gram_ENN = covariances(num_experts, size, num_tokens, seed)
    root_ENN, inverse_ENN = sqrt_and_inverse_sqrt(gram_ENN, 1e-3)
    damped_ENN = damp(gram_ENN, 1e-3)
    torch.testing.assert_close(root_ENN @ root_ENN.mT, damped_ENN, rtol=0, atol=3e-6 * damped_ENN.abs().max().item())
    torch.testing.assert_close(inverse_ENN @ root_ENN, torch.eye(size).expand_as(gram_ENN), rtol=0, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("gram_ENN", [torch.zeros(1, 5, 5), torch.ones(1, 5, 5), 1e-20 * torch.ones(1, 5, 5)])
def test_singular_matrices_have_finite_roots(gram_ENN: Tensor, damping: float) -> None:
    root_ENN, inverse_ENN = sqrt_and_inverse_sqrt(gram_ENN, damping)
    assert root_ENN.isfinite().all()
    torch.testing.assert_close(inverse_ENN @ root_ENN, torch.eye(5)[None], rtol=0, atol=3e-3)


def test_only_the_matrix_that_fails_is_solved_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    gram_ENN = covariances(3, 6, 12, seed=1)
    expected = eigenpairs(gram_ENN)
    solve, solved_in_fp64 = torch.linalg.eigh, []

    def fails_on_the_second(matrix: Tensor, UPLO: str) -> tuple[Tensor, ...]:
        if matrix.dtype == torch.float64:
            solved_in_fp64.append(matrix)
        elif matrix.ndim == 3 or torch.equal(matrix, gram_ENN[1]):
            raise torch.linalg.LinAlgError("did not converge")
        return solve(matrix, UPLO)

    monkeypatch.setattr(torch.linalg, "eigh", fails_on_the_second)
    values_EN, vectors_ENN = eigenpairs(gram_ENN)
    assert len(solved_in_fp64) == 1
    assert torch.equal(vectors_ENN[[0, 2]], expected[1][[0, 2]])
    torch.testing.assert_close(values_EN, expected[0])
    assert vectors_ENN.dtype == torch.float32


def test_not_finite_is_refused() -> None:
    gram_ENN = covariances(2, 3, 9, seed=2)
    gram_ENN[1, 0, 2] = torch.nan
    with pytest.raises(CompressionError, match="size 3 is not finite"):
        eigenvalues(gram_ENN)
