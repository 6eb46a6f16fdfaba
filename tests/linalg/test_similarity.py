from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compress.linalg.similarity import cosine, gram_cosine, linear_cka

SEEDS = st.integers(0, 10**6)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 20), SEEDS)
def test_cosine_is_that_of_each_pair(num_experts: int, num_features: int, seed: int) -> None:
    rows = draw(num_experts, num_features, seed=seed)
    found = cosine(rows)
    assert found.dtype == torch.float64
    expected = torch.nn.functional.cosine_similarity(rows.double()[:, None], rows.double(), dim=2)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(gram_cosine(rows.double() @ rows.double().T), found, atol=0, rtol=0)
    assert bool((found.abs() <= 1).all())
    assert torch.equal(found.diagonal(), torch.ones(num_experts, dtype=torch.float64))


def test_cosine_ignores_the_scale_of_a_row_and_survives_zeros() -> None:
    rows = draw(4, 7)
    scaled = rows * torch.tensor([1e-12, 1.0, 1e9, 0.0])[:, None]
    found = cosine(scaled)
    torch.testing.assert_close(found[:3, :3], cosine(rows)[:3, :3], atol=1e-6, rtol=0)
    assert found[3].tolist() == [0, 0, 0, 1]


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 5), st.integers(3, 12), st.integers(1, 6), SEEDS)
def test_cka_equals_its_definition(num_experts: int, num_tokens: int, width: int, seed: int) -> None:
    outputs = draw(num_experts, num_tokens, width, seed=seed)
    centring = torch.eye(num_tokens, dtype=torch.float64) - 1 / num_tokens
    grams = [centring @ y.double() @ y.double().T @ centring for y in outputs]
    expected = torch.stack([torch.stack([(a * b).sum() / (a.norm() * b.norm()) for b in grams]) for a in grams])
    torch.testing.assert_close(linear_cka(outputs), expected, atol=1e-5, rtol=0)


def test_cka_ignores_rotation_scale_and_shift_of_an_experts_outputs() -> None:
    outputs = draw(2, 30, 6)
    rotation = torch.linalg.qr(draw(6, 6, seed=1))[0]
    moved = 3 * outputs[0] @ rotation + draw(6, seed=2)
    found = linear_cka(torch.stack([outputs[0], moved, outputs[1]]))
    assert abs(found[0, 1] - 1) < 1e-5
    assert found[0, 2] < 0.9
    assert bool((found >= 0).all())


def test_an_expert_without_any_output_resembles_none() -> None:
    outputs = draw(3, 10, 4)
    outputs[1] = 0.5  # the same for all tokens: nothing is left once centred
    found = linear_cka(outputs)
    assert found[1].tolist() == [0, 1, 0]
    assert bool(found.isfinite().all())
