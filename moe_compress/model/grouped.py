"""The forward of a stock experts module: routed pairs sorted by expert, one product an expert and projection.

In fp32, and on a GPU, every operation is the one of transformers' `grouped_mm` experts: the same bits. In half
precision on a CPU oneDNN compiles a product (milliseconds, and a megabyte of its cache) for every number of tokens
an expert ever sees. There each expert's rows are filled up to a multiple of a step and multiplied tile by tile, so
that a handful of products serves every batch; and rows move between tokens and experts by gathering alone, forward
and backward, where autograd would scatter: faster, and the k gradients of a token are added in fp32.

Shapes: T tokens, P = T * top_k routed pairs, S rows: the pairs sorted by expert and the filler, E experts,
D hidden_size, F intermediate_size, M rows of the first projection (2F with a gate, F without).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear, grouped_mm_experts_forward

_NAME = "tiled_mm"

_STEP_ROWS, TILE_ROWS = 64, 512
"""A row of filler costs as much as a token, a multiple of the step up to a tile one compiled product."""

_CACHED_ROWS = 256
"""Rows at a time of what is done in fp32 between two products."""


def is_tiled(tensor: Tensor) -> bool:
    """Whether products of `tensor` are compiled for their exact shape: half precision on a CPU."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class RowLayout:
    """Rows sorted by expert; after the routed ones of an expert comes its filler.

    Attributes:
        counts: routed rows of each expert.
        sizes: rows of each expert, filler included; they sum to S.
        source_S: which of the sorted pairs a row holds; 0 for filler.
        filler: (number of filler rows,) their indices.
        row_P: the row of each sorted pair.
    """

    counts: list[int]
    sizes: list[int]
    source_S: Tensor
    filler: Tensor
    row_P: Tensor

    @classmethod
    def of(cls, ids_P: Tensor, num_experts: int, tiled: bool) -> RowLayout:
        """Lays out pairs sorted by expert, `ids_P`; without filler unless tiled."""
        counts_E = torch.bincount(ids_P, minlength=num_experts)
        step = _STEP_ROWS if tiled else 1
        sizes_E = (counts_E + step - 1) // step * step
        shift_E = (sizes_E - counts_E).cumsum(0) - (sizes_E - counts_E)
        counts, sizes = counts_E.tolist(), sizes_E.tolist()
        row_P = torch.arange(len(ids_P), device=ids_P.device) + shift_E[ids_P]
        source_S = torch.zeros(sum(sizes), dtype=torch.int64, device=ids_P.device)
        source_S[row_P] = torch.arange(len(ids_P), device=ids_P.device)
        is_filler_S = torch.ones_like(source_S, dtype=torch.bool)
        is_filler_S[row_P] = False
        return cls(counts, sizes, source_S, is_filler_S.nonzero().flatten(), row_P)


@dataclass(slots=True)
class ExpertsPass:
    """One call of an experts module: its result and what led there.

    Attributes:
        layout: the rows of all that follows.
        ids_P: expert of each sorted pair.
        token_S: token of each row.
        weight_S: router weight of each row; anything for filler.
        x_SD, up_SM, h_SF, y_SD: input and output of the first projection, input and output of down; no bias.
        out_SD: whole output of each row's expert: with bias and post-expert norm, before the router weight.
        mixed_TD: what the module returns.
    """

    layout: RowLayout
    ids_P: Tensor
    token_S: Tensor
    weight_S: Tensor
    x_SD: Tensor
    up_SM: Tensor
    h_SF: Tensor
    y_SD: Tensor
    out_SD: Tensor
    mixed_TD: Tensor


def run_experts(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> ExpertsPass:
    """Runs a stock experts module.

    Args:
        experts: the module, loaded.
        hidden_TD: its input.
        index_TK: expert ids.
        weights_TK: router weights.
    """
    num_tokens, top_k = index_TK.shape
    tiled = is_tiled(hidden_TD) and experts.down_proj.dtype == hidden_TD.dtype
    ids_P, order_P = torch.sort(index_TK.reshape(-1), stable=True)
    layout = RowLayout.of(ids_P, experts.num_experts, tiled)
    pair_S = order_P[layout.source_S]
    token_S, ids_S = pair_S // top_k, ids_P[layout.source_S]
    row_TK = torch.empty_like(order_P).index_put_((order_P,), layout.row_P).view(num_tokens, top_k)
    ends_E = torch.tensor(layout.sizes, device=ids_P.device).cumsum(0).to(torch.int32)

    def project(x: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        if not tiled:
            return _grouped_linear(x, weight, ends_E, is_transposed=experts.is_transposed)
        return _TiledProduct.apply(x, weight if experts.is_transposed else weight.mT, layout.sizes)

    def biased(x: Tensor, name: str) -> Tensor:
        return x + getattr(experts, f"{name}_bias")[ids_S] if experts.has_bias else x

    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    x_SD = Spread.apply(hidden_TD, token_S, row_TK) if tiled else hidden_TD[token_S]
    up_SM = project(x_SD, up_name)
    biased_SM = biased(up_SM, up_name)
    h_SF = experts._apply_gate(biased_SM) if experts.has_gate else experts.act_fn(biased_SM)
    y_SD = project(h_SF, "down_proj")
    out_SD = biased(y_SD, "down_proj")
    if experts.has_post_expert_norm:
        out_SD = experts.post_expert_norm(out_SD)
    weight_S = weights_TK.reshape(-1)[pair_S]
    if tiled:
        mixed_TD = Mix.apply(out_SD, weights_TK, token_S, row_TK)
    else:
        mixed_TD = (out_SD * weight_S[:, None])[row_TK.flatten()].view(num_tokens, top_k, -1).sum(dim=1)
    return ExpertsPass(layout, ids_P, token_S, weight_S, x_SD, up_SM, h_SF, y_SD, out_SD, mixed_TD.to(hidden_TD.dtype))


def use_tiled_products(model: PreTrainedModel) -> None:
    """Lets every experts module of `model` that runs `grouped_mm` run as this file describes."""
    chosen = model.get_experts_implementation()
    model.set_experts_implementation({part: _NAME if name == "grouped_mm" else name for part, name in chosen.items()})


def _tiled_experts_forward(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    if not is_tiled(hidden_TD):
        return grouped_mm_experts_forward(experts, hidden_TD, index_TK, weights_TK)
    return run_experts(experts, hidden_TD, index_TK, weights_TK).mixed_TD


ALL_EXPERTS_FUNCTIONS.register(_NAME, _tiled_experts_forward)


class _TiledProduct(torch.autograd.Function):
    """(S, N) rows by the (N, M) matrix of their expert, at most TILE_ROWS at a time."""

    @staticmethod
    def forward(ctx: Any, x_SN: Tensor, weight_ENM: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x_SN, weight_ENM)
        ctx.sizes = sizes
        return _tiled_product(x_SN, weight_ENM, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SM: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_SN, weight_ENM = ctx.saved_tensors
        grad_SM = grad_SM.contiguous()
        grad_x = _tiled_product(grad_SM, weight_ENM.mT, ctx.sizes) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:  # filler has no gradient, so it adds nothing
            parts = zip(x_SN.split(ctx.sizes), grad_SM.split(ctx.sizes), strict=True)
            grad_weight = torch.stack([x.T @ grad for x, grad in parts])
        return grad_x, grad_weight, None


def _tiled_product(x_SN: Tensor, weight_ENM: Tensor, sizes: list[int]) -> Tensor:
    out_SM = x_SN.new_empty(len(x_SN), weight_ENM.shape[2])
    for x, out, weight_NM in zip(x_SN.split(sizes), out_SM.split(sizes), weight_ENM, strict=True):
        for x_tile, out_tile in zip(x.split(TILE_ROWS), out.split(TILE_ROWS), strict=True):
            if len(x_tile):
                torch.mm(x_tile, weight_NM, out=out_tile)
    return out_SM


class Spread(torch.autograd.Function):
    """Hidden states of the tokens to the rows of their experts."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, token_S: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return hidden_TD.index_select(0, token_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return grad_SD.index_select(0, row_TK.flatten()).unflatten(0, row_TK.shape).sum(1), None, None


class Mix(torch.autograd.Function):
    """Weighted sum of the outputs of each token's experts, in fp32, a few rows at a time to stay in the cache."""

    @staticmethod
    def forward(ctx: Any, out_SD: Tensor, weights_TK: Tensor, token_S: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(out_SD, weights_TK, token_S, row_TK)
        mixed_TD = out_SD.new_empty(len(row_TK), out_SD.shape[1])
        tokens = max(1, _CACHED_ROWS // row_TK.shape[1])
        tiles = zip(row_TK.split(tokens), weights_TK.float().split(tokens), mixed_TD.split(tokens), strict=True)
        for rows, weights, mixed in tiles:
            chosen = out_SD.index_select(0, rows.flatten()).float().unflatten(0, rows.shape)
            mixed.copy_(torch.bmm(weights[:, None], chosen)[:, 0])
        return mixed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        out_SD, weights_TK, token_S, row_TK = ctx.saved_tensors
        weight_S1 = weights_TK.new_zeros(len(out_SD), 1, dtype=torch.float32)  # filler weighs nothing
        weight_S1[row_TK, 0] = weights_TK.float()
        grad_SD, dots = torch.empty_like(out_SD), []
        tiles = zip(*(t.split(_CACHED_ROWS) for t in (token_S, weight_S1, out_SD, grad_SD)), strict=True)
        for token, weight, out, grad_out in tiles:
            grad = grad_TD.index_select(0, token).float()
            if ctx.needs_input_grad[1]:
                dots.append((grad * out).sum(1))
            grad_out.copy_(grad.mul_(weight))
        grad_weights = torch.cat(dots)[row_TK].to(weights_TK.dtype) if dots else None
        return grad_SD, grad_weights, None, None
