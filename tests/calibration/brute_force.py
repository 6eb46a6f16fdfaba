"""The slowest way to have the statistics: one token, one expert at a time, through the whole model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.calibration.statistics import SAMPLED
from moe_compress.calibration.text import TokenBatch
from moe_compress.model.discovery import MoELayer, find_moe_layers
from tests.tiny_models import auto_class

Sums = dict[str, dict[str, Tensor]]
"""Experts path -> name -> sum."""


@dataclass
class Pair:
    """One token at one expert: router weight, then the vectors of the statistics' formulas, stock row order."""

    expert: int
    g: Tensor
    x: Tensor
    up: Tensor
    h: Tensor
    y: Tensor
    norm: Tensor


def plain_experts(experts: Any, layer: MoELayer, pairs: list[Pair], calls: list[tuple[Tensor, ...]]) -> Any:
    """A forward of the experts module that knows nothing but loops; `calls` gets what it was called with."""

    def apply(e: int, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = getattr(experts, name)[e]
        out = weight.T @ x if layer.is_transposed else weight @ x
        out.retain_grad()
        return out, out + getattr(experts, f"{name}_bias")[e] if layer.has_bias else out

    def forward(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        calls.append((hidden.detach(), index, weight.detach()))
        rows = []
        for t in range(len(hidden)):
            row = torch.zeros_like(hidden[t])
            for e, g in zip(index[t].tolist(), weight[t], strict=True):
                up, biased = apply(e, layer.up_name, hidden[t])
                h = experts._apply_gate(biased[None])[0] if layer.has_gate else experts.act_fn(biased)
                y, out = apply(e, "down_proj", h)
                pairs.append(Pair(e, g.detach(), hidden[t].detach(), up, h.detach(), y, out.detach().norm()))
                row = row + g * out
            rows.append(row)
        return torch.stack(rows)

    return forward


def canonical(layer: MoELayer, up: Tensor) -> Tensor:
    """Rows `[gate; up]` along the first axis."""
    return up if layer.is_concatenated or not layer.has_gate else torch.cat([up[0::2], up[1::2]])


def brute_force(checkpoint: Path, model_type: str, tokens: TokenBatch) -> tuple[float, Sums]:
    """Every statistic from whole-model runs of one unpadded sequence, one outer product a token."""
    model: nn.Module = auto_class(model_type).from_pretrained(checkpoint, dtype=torch.float32).eval()
    layers = {layer.path: layer for layer in find_moe_layers(model)}
    pairs: dict[str, list[Pair]] = {}
    calls: dict[str, list[tuple[Tensor, ...]]] = {}
    routers: dict[str, nn.Module] = {}
    router_logits: dict[str, list[Tensor]] = defaultdict(list)
    parameters: dict[str, list[nn.Parameter]] = {}
    for path, layer in layers.items():
        experts: Any = model.get_submodule(path)
        pairs[path], calls[path] = [], []
        experts.forward = plain_experts(experts, layer, pairs[path], calls[path])
        parameters[path] = [getattr(experts, layer.up_name), experts.down_proj]
        shape = (layer.num_experts, layer.hidden_size)
        block = model.get_submodule(path.rpartition(".")[0])
        (routers[path],) = (m for m in block.children() if getattr(m, "weight", torch.empty(0)).shape == shape)
    sums: dict[str, dict[str, Any]] = {path: defaultdict(float) for path in layers}
    total = 0.0

    def add(into: dict[str, Any], name: str, value: Tensor) -> None:
        into[name] = into[name] + value.double()

    for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
        for seen in pairs.values():
            seen.clear()
        ids = ids[mask][None]
        log_p = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        nll = -log_p.gather(-1, ids[:, 1:, None]).sum()
        model.zero_grad()
        nll.backward()
        total += float(nll)
        for path, layer in layers.items():
            into, E = sums[path], layer.num_experts
            up_grad, down_grad = (p.grad.mT if layer.is_transposed else p.grad for p in parameters[path])
            for name, grad_EMN in (("up", up_grad), ("down", down_grad)):
                add(into, f"{name}_fisher", grad_EMN.double().square().sum((1, 2)))
                add(into, f"{name}_fisher_columns", grad_EMN.double().square().sum(1))
            add(into, "num_sequences", torch.ones(1))
            router: Any = routers[path]
            for t in range(ids.shape[1]):
                x = pairs[path][t * len(pairs[path]) // ids.shape[1]].x
                logits = router.weight @ x
                logits = logits + router.bias if getattr(router, "bias", None) is not None else logits
                add(into, "router_gram", torch.outer(logits.detach(), logits.detach()))
                router_logits[path].append(logits.detach())
            for p in pairs[path]:
                assert p.up.grad is not None
                assert p.y.grad is not None
                at = torch.nn.functional.one_hot(torch.tensor(p.expert), E).double()
                add(into, "num_tokens", at)
                add(into, "weight_sum", at * p.g)
                add(into, "saliency_sum", at * p.g * p.norm)
                add(into, "taylor_sum", at * (p.y.grad @ p.y.detach()).square())
                add(into, "input_sum", at[:, None] * p.x)
                into["output_norm_max"] = torch.maximum(at * p.norm, torch.as_tensor(into["output_norm_max"]))
                for name, z, out, d in (
                    ("up", p.x, canonical(layer, p.up.detach()), canonical(layer, p.up.grad)),
                    ("down", p.h, p.y.detach(), p.y.grad),
                ):
                    z, out, d = z.double(), out.double(), d.double()
                    for side, row in (("input", z), ("output", out)):
                        add(into, f"{name}_{side}_gram", at[:, None, None] * torch.outer(row, row))
                        add(
                            into,
                            f"{name}_{side}_loss_gram",
                            at[:, None, None] * torch.outer(row, row) * d.square().sum(),
                        )
                    add(into, f"{name}_grad_gram", at[:, None, None] * torch.outer(d, d))
                    add(into, f"{name}_grad_diagonal", at[:, None] * d.square())
    for path, called in calls.items():
        *called_with, logits = SAMPLED
        sums[path] |= {name: torch.cat(rows) for name, rows in zip(called_with, zip(*called, strict=True), strict=True)}
        sums[path][logits] = torch.stack(router_logits[path])
    return total, sums
