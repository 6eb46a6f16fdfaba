from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compress.linalg.factorisation import (
    Factors,
    InputRoot,
    factorise_left,
    factorise_right,
    left_gram,
    right_gram,
    spectrum,
)
from moe_compress.linalg.symmetric import damp

DAMPING = 1e-4
FORMS = ["right", "left"]


def problem(
    num_experts: int, rows: int, columns: int, num_tokens: int, seed: int, decay: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Matrices and covariances of tokens whose features fall off over `decay` decades."""
    generator = torch.Generator().manual_seed(seed)
    d_EMN = torch.randn(num_experts, rows, columns, generator=generator)
    x_ETN = torch.randn(num_experts, num_tokens, columns, generator=generator)
    x_ETN *= torch.logspace(0, -decay, columns)
    return d_EMN, x_ETN.mT @ x_ETN


def solve(form: str, d_EMN: Tensor, gram_ENN: Tensor, ranks: list[int]) -> list[Factors]:
    if form == "right":
        return factorise_right(d_EMN, InputRoot.from_gram(gram_ENN, DAMPING), ranks)
    return factorise_left(d_EMN, left_gram(d_EMN, gram_ENN), ranks)


def metric(form: str, gram_ENN: Tensor) -> Tensor:
    """The covariance each form is optimal for: the right one needs an invertible root."""
    return damp(gram_ENN.double(), DAMPING) if form == "right" else gram_ENN.double()


def dense_singular_values(d_EMN: Tensor, gram_ENN: Tensor) -> Tensor:
    values_EN, vectors_ENN = torch.linalg.eigh(gram_ENN.double())
    root_ENN = vectors_ENN * values_EN.clamp_min(0).sqrt()[:, None, :]
    return torch.linalg.svdvals(d_EMN.double() @ root_ENN)


def weighted_error(difference_MN: Tensor, gram_NN: Tensor) -> float:
    difference_MN = difference_MN.double()
    return ((difference_MN @ gram_NN.double()) * difference_MN).sum().clamp_min(0).sqrt().item()


def relative_error(difference: Tensor, reference: Tensor) -> float:
    return (difference.norm() / reference.norm()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)])
def test_error_is_the_eckart_young_optimum(form: str, shape: tuple[int, int]) -> None:
    d_EMN, gram_ENN = problem(3, *shape, num_tokens=300, seed=0)
    gram_of_form = metric(form, gram_ENN)
    singular_EK = dense_singular_values(d_EMN, gram_of_form)
    ranks = [1, 13, 30]
    for e, (u_MR, v_RN) in enumerate(solve(form, d_EMN, gram_ENN, ranks)):
        assert (u_MR.shape, v_RN.shape) == ((shape[0], ranks[e]), (ranks[e], shape[1]))
        optimum = singular_EK[e, ranks[e] :].norm().item()
        error = weighted_error(d_EMN[e] - u_MR @ v_RN, gram_of_form[e])
        assert error == pytest.approx(optimum, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    num_tokens=st.integers(0, 20),
    rank=st.integers(0, 16),
    seed=st.integers(0, 10**6),
)
def test_optimum_for_any_shape_rank_and_number_of_tokens(
    form: str, rows: int, columns: int, num_tokens: int, rank: int, seed: int
) -> None:
    d_EMN, gram_ENN = problem(1, rows, columns, num_tokens, seed)
    gram_of_form = metric(form, gram_ENN)
    singular_K = dense_singular_values(d_EMN, gram_of_form)[0]
    ((u_MR, v_RN),) = solve(form, d_EMN, gram_ENN, [rank])
    energy = weighted_error(d_EMN[0] - u_MR @ v_RN, gram_of_form[0]) ** 2
    optimum, whole = singular_K[rank:].square().sum().item(), singular_K.square().sum().item()
    assert energy == pytest.approx(optimum, rel=2e-5, abs=1e-6 * whole)


@pytest.mark.parametrize("form", FORMS)
def test_singular_covariance_reaches_the_undamped_optimum(form: str) -> None:
    d_EMN, gram_ENN = problem(1, 24, 24, num_tokens=10, seed=4)
    singular_K = dense_singular_values(d_EMN, gram_ENN)[0]
    for rank in (4, 8):
        ((u_MR, v_RN),) = solve(form, d_EMN, gram_ENN, [rank])
        error = weighted_error(d_EMN[0] - u_MR @ v_RN, gram_ENN[0])
        assert error == pytest.approx(singular_K[rank:].norm().item(), rel=3e-3)


@pytest.mark.parametrize("form", FORMS)
def test_ill_conditioned_covariance(form: str) -> None:
    d_EMN, gram_ENN = problem(1, 64, 48, num_tokens=400, seed=5, decay=5.0)
    gram_of_form = metric(form, gram_ENN)
    singular_K = dense_singular_values(d_EMN, gram_of_form)[0]
    for rank in (2, 8, 16):
        ((u_MR, v_RN),) = solve(form, d_EMN, gram_ENN, [rank])
        error = weighted_error(d_EMN[0] - u_MR @ v_RN, gram_of_form[0])
        assert error == pytest.approx(singular_K[rank:].norm().item(), rel=1e-5, abs=1e-6 * singular_K.norm().item())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_full_rank_is_exact_however_bad_the_covariance(form: str, shape: tuple[int, int]) -> None:
    d_EMN, gram_ENN = problem(2, *shape, num_tokens=8, seed=6, decay=6.0)
    for d_MN, (u_MR, v_RN) in zip(d_EMN, solve(form, d_EMN, gram_ENN, [max(shape), 99]), strict=True):
        assert relative_error(d_MN - u_MR @ v_RN, d_MN) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_rank_zero_is_empty(form: str) -> None:
    d_EMN, gram_ENN = problem(1, 6, 5, num_tokens=9, seed=7)
    ((u_MR, v_RN),) = solve(form, d_EMN, gram_ENN, [0])
    assert (u_MR.shape, v_RN.shape) == ((6, 0), (0, 5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zero", ["covariance", "matrix"])
@pytest.mark.parametrize("rank", [3, 7])
def test_zeros_give_finite_factors(form: str, zero: str, rank: int) -> None:
    d_EMN, gram_ENN = problem(1, 7, 7, num_tokens=20, seed=8)
    (gram_ENN if zero == "covariance" else d_EMN).zero_()
    ((u_MR, v_RN),) = solve(form, d_EMN, gram_ENN, [rank])
    assert u_MR.isfinite().all()
    assert v_RN.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_spectrum_is_the_squared_singular_values(form: str) -> None:
    shape = (30, 18) if form == "right" else (18, 30)
    d_EMN, gram_ENN = problem(2, *shape, num_tokens=60, seed=9)
    if form == "right":
        small_EKK = right_gram(d_EMN, InputRoot.from_gram(gram_ENN, DAMPING))
    else:
        small_EKK = left_gram(d_EMN, gram_ENN)
    energy_EK = spectrum(small_EKK).energy_EK
    expected_EK = dense_singular_values(d_EMN, metric(form, gram_ENN)).square()
    assert energy_EK.dtype == torch.float32
    torch.testing.assert_close(energy_EK.double(), expected_EK, rtol=1e-5, atol=1e-6 * expected_EK.max().item())


def test_spectrum_of_a_singular_problem_is_not_negative() -> None:
    d_EMN, gram_ENN = problem(1, 20, 30, num_tokens=5, seed=10)
    energy_K = spectrum(left_gram(d_EMN, gram_ENN)).energy_EK[0]
    assert (energy_K >= 0).all()
    assert (energy_K.diff() <= 0).all()


def test_root_of_a_diagonal_is_that_of_the_whole_matrix() -> None:
    values_EN = torch.tensor([[4.0, 0.25, 1e-6], [2.0, 2.0, 2.0]])
    root, whole = InputRoot.of_diagonal(values_EN.sqrt()), InputRoot.from_gram(values_EN.diag_embed(), 0)
    for s_ENN, inverse_ENN in ((root.root_ENN, root.inverse_root_ENN), (whole.root_ENN, whole.inverse_root_ENN)):
        torch.testing.assert_close(s_ENN @ s_ENN.mT, values_EN.diag_embed())
        torch.testing.assert_close(inverse_ENN @ s_ENN, torch.eye(3).expand(2, -1, -1))


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_of_the_factors_is_the_best_lower_rank(form: str) -> None:
    d_EMN, gram_ENN = problem(1, 20, 16, num_tokens=60, seed=11)
    ((u_MR, v_RN),) = solve(form, d_EMN, gram_ENN, [9])
    ((low_u_MR, low_v_RN),) = solve(form, d_EMN, gram_ENN, [4])
    torch.testing.assert_close(u_MR[:, :4] @ v_RN[:4], low_u_MR @ low_v_RN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_signs_are_fixed_and_repeats_are_identical(form: str) -> None:
    d_EMN, gram_ENN = problem(2, 20, 16, num_tokens=60, seed=12)
    first = solve(form, d_EMN, gram_ENN, [5, 16])
    alone = solve(form, d_EMN[1:], gram_ENN[1:], [16])
    for (u_MR, v_RN), (again_u_MR, again_v_RN) in zip(
        [*first, first[1]], [*solve(form, d_EMN, gram_ENN, [5, 16]), *alone], strict=True
    ):
        assert torch.equal(u_MR, again_u_MR)
        assert torch.equal(v_RN, again_v_RN)
        assert (u_MR.amax(0) >= -u_MR.amin(0)).all()


def test_right_factors_are_balanced_and_left_ones_orthonormal() -> None:
    d_EMN, gram_ENN = problem(1, 20, 16, num_tokens=60, seed=13)
    for rank in (6, 16):
        ((u_MR, v_RN),) = solve("right", d_EMN, gram_ENN, [rank])
        torch.testing.assert_close(u_MR.norm(dim=0), v_RN.norm(dim=1))
    ((u_MR, v_RN),) = solve("left", d_EMN, gram_ENN, [6])
    torch.testing.assert_close(u_MR.mT @ u_MR, torch.eye(6), rtol=0, atol=1e-5)
    assert torch.equal(v_RN, u_MR.mT @ d_EMN[0])
