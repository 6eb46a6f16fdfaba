"""Tiled experts give what the stock experts give, to the rounding of the dtype, and gradients alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_compress.model.grouped import RowLayout, is_tiled, run_experts, use_tiled_products
from tests.tiny_models import build_tiny, expert_modules

NUM_TOKENS, TOP_K = 150, 2


def called_with(experts: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Most tokens go to expert 0, so that its rows fill more than one step; some expert may get none."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(NUM_TOKENS, experts.num_experts, generator=generator)
    scores[:, 0] += 0.5
    hidden = torch.randn(NUM_TOKENS, experts.down_proj.shape[2 if experts.is_transposed else 1], generator=generator)
    weights = torch.rand(NUM_TOKENS, TOP_K, generator=generator)
    return hidden.to(dtype).requires_grad_(), scores.argsort(-1, descending=True)[:, :TOP_K], weights.requires_grad_()


def differentiated(experts: Any, dtype: torch.dtype, weights_dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, and gradients of the input, of the router weights and of the parameters."""
    hidden, index, weights = called_with(experts, dtype)
    parameters = [p.requires_grad_() for p in experts.parameters()]
    out = experts(hidden, index, weights.to(weights_dtype))
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, [hidden, weights, *parameters], toward)]


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark"])
def test_half_precision_equals_the_stock_experts_to_rounding(model_type: str, weights_dtype: torch.dtype) -> None:
    model = build_tiny(model_type)
    stock = differentiated(expert_modules(model)[0], torch.float32, torch.float32)
    model.to(torch.bfloat16)
    use_tiled_products(model)
    tiled = differentiated(expert_modules(model)[0], torch.bfloat16, weights_dtype)
    for ours, theirs in zip(tiled, stock, strict=True):
        assert (ours - theirs).norm() <= 4 * torch.finfo(torch.bfloat16).eps * theirs.norm()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark"])
def test_fp32_is_bit_equal_to_the_stock_experts(model_type: str) -> None:
    model = build_tiny(model_type)
    experts = expert_modules(model)[0]
    stock = differentiated(experts, torch.float32, torch.float32)
    use_tiled_products(model)
    assert all(map(torch.equal, differentiated(experts, torch.float32, torch.float32), stock))


def test_products_have_few_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = expert_modules(build_tiny("mixtral").to(torch.bfloat16))[0]
    seen, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **into: (seen.add(len(a)), mm(a, b, **into))[1])
    run_experts(experts, *called_with(experts, torch.bfloat16))
    assert seen
    assert all(rows % 64 == 0 for rows in seen)


@given(st.lists(st.integers(0, 4), max_size=300), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_of_a_layout(ids: list[int], dtype: torch.dtype) -> None:
    ids_P = torch.tensor(sorted(ids), dtype=torch.int64)
    layout = RowLayout.of(ids_P, 5, is_tiled(torch.empty(0, dtype=dtype)))
    assert layout.counts == [ids.count(e) for e in range(5)]
    assert len(layout.source_S) == sum(layout.sizes) == len(ids) + len(layout.filler)
    assert torch.equal(layout.source_S[layout.row_P], torch.arange(len(ids)))
    for expert, (start, size) in enumerate(zip(torch.tensor([0, *layout.sizes]).cumsum(0), layout.sizes, strict=False)):
        rows = layout.row_P[ids_P == expert]
        assert torch.equal(rows, start + torch.arange(len(rows)))
        assert size - len(rows) < 64
