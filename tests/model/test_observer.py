"""The observer computes what the stock experts compute, and tells what it saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_compress.model.discovery import describe_experts
from moe_compress.model.observer import ExpertObserver, RoutedTokens
from tests.tiny_models import build_tiny, expert_modules

NUM_TOKENS, TOP_K = 7, 2


def routed(experts: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = describe_experts("experts", experts)
    hidden = torch.randn(NUM_TOKENS, layer.hidden_size, generator=generator)
    index = torch.rand(NUM_TOKENS, layer.num_experts, generator=generator).argsort(-1)[:, :TOP_K]
    return hidden.requires_grad_(), index, torch.rand(NUM_TOKENS, TOP_K, generator=generator)


def observe(experts: Any, *call: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, RoutedTokens]:
    observer = ExpertObserver(describe_experts("experts", experts), experts, torch.nn.Module())
    with observer.watching():
        out = experts(*call)
        out.square().sum().backward()
    seen = observer.take(mask)
    assert seen is not None
    return out, seen


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark"])
def test_output_and_gradients_of_weights(model_type: str) -> None:
    experts: Any = expert_modules(build_tiny(model_type))[0]
    layer = describe_experts("experts", experts)
    hidden, index, weights = routed(experts)
    expected = experts(hidden, index, weights)
    stock_grad = torch.autograd.grad(expected.square().sum(), experts.down_proj)[0]
    out, seen = observe(experts, hidden, index, weights)
    torch.testing.assert_close(out, expected)
    assert sum(seen.counts) == NUM_TOKENS * TOP_K
    parts = zip(seen.d_y_SD.split(seen.counts), seen.h_SF.split(seen.counts), strict=True)
    grad = torch.stack([d.T @ h for d, h in parts])
    torch.testing.assert_close(grad.mT if layer.is_transposed else grad, stock_grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_and_pairs_of_no_weight_are_not_seen(dtype: torch.dtype, masked: bool) -> None:
    experts: Any = expert_modules(build_tiny("mixtral").to(dtype))[0]
    hidden, index, weights = (t.detach().to(dtype) if t.is_floating_point() else t for t in routed(experts))
    mask = torch.ones(NUM_TOKENS, dtype=torch.bool)
    if masked:
        weights[2, 1] = 0
        mask[5:] = False
    _, seen = observe(experts, hidden.requires_grad_(), index, weights, mask=mask)
    kept = (weights != 0) & mask[:, None]
    assert seen.counts == torch.bincount(index[kept], minlength=experts.num_experts).tolist()
    assert all(size % (64 if dtype == torch.bfloat16 else 1) == 0 for size in seen.sizes)
    is_routed_S = torch.cat([torch.arange(size) < n for n, size in zip(seen.counts, seen.sizes, strict=True)])
    torch.testing.assert_close(seen.x_SD[is_routed_S], hidden.detach()[seen.token_S[is_routed_S]])
    assert set(seen.token_S[is_routed_S].tolist()) == set(mask.nonzero().flatten().tolist())
    by_row = (seen.weight_S, seen.output_norm_S, seen.x_SD, seen.up_SM, seen.h_SF, seen.y_SD, seen.d_up_SM, seen.d_y_SD)
    for rows in by_row:
        assert rows[is_routed_S].any()
        assert not rows[~is_routed_S].any()
