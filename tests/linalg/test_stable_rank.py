from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compress.linalg.stable_rank import stable_rank


def exact(weight_EMN: Tensor) -> Tensor:
    values = torch.linalg.svdvals(weight_EMN.double())
    return (values.square().sum(-1) / values[..., 0].square()).float()


def with_spectrum(values: list[float], num_rows: int, num_columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(num_rows, len(values), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(num_columns, len(values), generator=generator))[0]
    return left * torch.tensor(values) @ right.T


@pytest.mark.parametrize(
    ("values", "expected"), [([5.0], 1), ([2.0, 2.0, 2.0], 3), ([2.0, 1.0, 1.0], 1.5), ([1.0, 0.5], 1.25)]
)
def test_known_spectra(values: list[float], expected: float) -> None:
    stack = torch.stack([with_spectrum(values, 7, 5, seed) for seed in range(4)])
    torch.testing.assert_close(stable_rank(stack), torch.full((4,), expected, dtype=torch.float32), atol=1e-3, rtol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6))
def test_never_below_the_truth_and_little_above(num_experts: int, rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(num_experts, rows, columns, generator=torch.Generator().manual_seed(seed))
    found, truth = stable_rank(weight), exact(weight)
    assert bool((found >= truth * (1 - 1e-5)).all())
    assert bool((found <= truth * 1.1).all())
    assert bool((found <= min(rows, columns) * 1.1).all())


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_scale_does_not_matter(scale: float) -> None:
    weight = torch.randn(3, 12, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stable_rank(weight * scale), stable_rank(weight), rtol=1e-4, atol=0)


def test_zeros_have_none_and_half_precision_is_summed_in_fp32() -> None:
    weight = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0))
    assert stable_rank(torch.stack([weight[0], torch.zeros(40, 30)]))[1] == 0
    half = stable_rank(weight.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, stable_rank(weight.bfloat16().float()), atol=0, rtol=0)
