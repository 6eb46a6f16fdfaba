from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moe_compress.linalg.alignment import (
    ExpertWeights,
    align,
    apply_permutation,
    channel_features,
    match_channels,
)


def expert(num_channels: int, hidden_size: int, seed: int, gate: bool, bias: bool) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return ExpertWeights(
        up_FD=draw(num_channels, hidden_size),
        down_DF=draw(hidden_size, num_channels),
        gate_FD=draw(num_channels, hidden_size) if gate else None,
        up_bias_F=draw(num_channels) if bias else None,
        gate_bias_F=draw(num_channels) if gate and bias else None,
        down_bias_D=draw(hidden_size) if bias else None,
    )


def forward(weights: ExpertWeights, x_TD: Tensor) -> Tensor:
    up_TF = F.linear(x_TD, weights.up_FD, weights.up_bias_F)
    if weights.gate_FD is None:
        hidden_TF = F.relu(up_TF)
    else:
        hidden_TF = F.silu(F.linear(x_TD, weights.gate_FD, weights.gate_bias_F)) * up_TF
    return F.linear(hidden_TF, weights.down_DF, weights.down_bias_D)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(2, 8), st.integers(0, 10**6))
def test_a_permuted_copy_is_realigned_exactly(
    gate: bool, bias: bool, num_channels: int, hidden_size: int, seed: int
) -> None:
    reference = expert(num_channels, hidden_size, seed, gate, bias)
    shuffle_F = torch.randperm(num_channels, generator=torch.Generator().manual_seed(seed))
    shuffled = apply_permutation(reference, shuffle_F)
    realigned = apply_permutation(shuffled, align(reference, shuffled))
    for field in dataclasses.fields(ExpertWeights):
        before, after = getattr(reference, field.name), getattr(realigned, field.name)
        assert (before is None and after is None) or torch.equal(before, after), field.name


@pytest.mark.parametrize("gate", [True, False])
def test_permutation_preserves_the_function(gate: bool) -> None:
    weights = expert(32, 8, seed=0, gate=gate, bias=True)
    permuted = apply_permutation(weights, torch.randperm(32))
    x_TD = torch.randn(5, 8)
    assert not torch.equal(permuted.up_FD, weights.up_FD)
    torch.testing.assert_close(forward(permuted, x_TD), forward(weights, x_TD))


def test_the_assignment_is_the_optimum_of_the_published_objective() -> None:
    reference, other = (expert(5, 3, seed, gate=True, bias=False) for seed in (1, 2))

    def gain(permutation_F: Tensor) -> float:
        moved = apply_permutation(other, permutation_F)
        pairs = zip(dataclasses.astuple(reference)[:3], dataclasses.astuple(moved)[:3], strict=True)
        return sum((a * b).sum().item() for a, b in pairs)

    best = max(gain(torch.tensor(p)) for p in permutations(range(5)))
    assert gain(align(reference, other)) == pytest.approx(best, rel=1e-6)


def test_half_precision_weights_are_matched_in_fp32() -> None:
    reference = expert(16, 4, seed=3, gate=False, bias=False)
    half = ExpertWeights(reference.up_FD.bfloat16(), reference.down_DF.bfloat16())
    assert channel_features(half).dtype == torch.float32
    assert torch.equal(align(reference, half), torch.arange(16))


def test_match_channels_takes_activations() -> None:
    hidden_FT = F.normalize(torch.randn(20, 50), dim=1)
    shuffle_F = torch.randperm(20)
    assert torch.equal(match_channels(hidden_FT, hidden_FT[shuffle_F]), shuffle_F.argsort())
