"""Watches the experts of a layer while it runs: what every routed token brings to each projection, and the gradients.

Stands in for the experts module's forward with the same arithmetic (tokens sorted by expert, one grouped product a
projection), so that nothing that is measured has to be computed twice. Indices and weights are those the module
receives: recomputing them from router logits is wrong for sigmoid, bias-corrected, grouped and sparsemixer routers.

Shapes: T tokens, S = T * top_k routed pairs sorted by expert, E experts, D hidden_size, F intermediate_size, M rows
of the first projection (2F with a gate, F without).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from .discovery import MoELayer


@dataclass(slots=True)
class RoutedTokens:
    """One call of an experts module. Rows are sorted by expert; padding and pairs of no weight are already left out.

    Attributes:
        counts: routed tokens of each expert, E entries that sum to S.
        token_S: index of each row's token in the micro-batch, flattened (B * S,).
        weight_S: router weight of each row.
        x_SD: input of gate and up.
        up_SM: output `[gate; up]` before bias and activation.
        h_SF: input of down.
        y_SD: output of down, before bias and router weight.
        d_up_SM, d_y_SD: gradient of the summed loss w.r.t. `up_SM` and `y_SD`.
        output_norm_S: norm of each expert's whole output, bias and post-expert norm included, fp32.
        router_logits_TE: what the router gave for each real token, where one was seen.

    Tensors keep the dtype the model computes in; whoever sums them casts.
    """

    counts: list[int]
    token_S: Tensor
    weight_S: Tensor
    x_SD: Tensor
    up_SM: Tensor
    h_SF: Tensor
    y_SD: Tensor
    d_up_SM: Tensor
    d_y_SD: Tensor
    output_norm_S: Tensor
    router_logits_TE: Tensor | None


@dataclass(slots=True)
class _Capture:
    ids_S: Tensor
    token_S: Tensor
    weight_S: Tensor
    x_SD: Tensor
    up_SM: Tensor
    h_SF: Tensor
    y_SD: Tensor
    output_norm_S: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)


class ExpertObserver:
    """Observes one experts module during one forward and backward of its layer.

    Args:
        layer: its description.
        experts: the module, loaded.
        block: the module around it, where the router is a child.
    """

    def __init__(self, layer: MoELayer, experts: nn.Module, block: nn.Module) -> None:
        self.layer, self.experts, self.block = layer, experts, block
        self._capture: _Capture | None = None
        self._logits: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[ExpertObserver]:
        """Watches while the context is open; the layer must be run and differentiated once inside."""
        self.experts.forward = self._forward
        handles = [
            child.register_forward_hook(self._see_router)
            for child in self.block.children()
            if child is not self.experts
        ]
        try:
            yield self
        finally:
            del self.experts.forward
            for handle in handles:
                handle.remove()

    def take(self, token_mask: Tensor | None) -> RoutedTokens | None:
        """What was seen, or None if the layer was not run or its output reaches no loss.

        Args:
            token_mask: (T,) True for real tokens; None where there is no padding.
        """
        seen, logits = self._capture, self._logits
        self._capture = self._logits = None
        if seen is None or len(seen.grads) < 2:
            return None
        ids, token, weight, norm = seen.ids_S, seen.token_S, seen.weight_S, seen.output_norm_S
        tensors = [seen.x_SD, seen.up_SM, seen.h_SF, seen.y_SD, seen.grads["up"], seen.grads["y"]]
        if self.layer.has_gate and not self.layer.is_concatenated:
            for i in (1, 4):
                tensors[i] = torch.cat([tensors[i][:, 0::2], tensors[i][:, 1::2]], dim=1)
        keep = weight != 0  # a router skips a token by sending it anywhere with no weight
        if token_mask is not None:
            token_mask = token_mask.to(token.device)
            keep &= token_mask[token]
            logits = None if logits is None else logits[token_mask]
        if not bool(keep.all()):
            ids, token, weight, norm = ids[keep], token[keep], weight[keep], norm[keep]
            tensors = [t[keep] for t in tensors]
        counts = torch.bincount(ids, minlength=self.layer.num_experts).tolist()
        x_SD, up_SM, h_SF, y_SD, d_up_SM, d_y_SD = tensors
        return RoutedTokens(
            counts=counts,
            token_S=token,
            weight_S=weight.float(),
            x_SD=x_SD,
            up_SM=up_SM,
            h_SF=h_SF,
            y_SD=y_SD,
            d_up_SM=d_up_SM,
            d_y_SD=d_y_SD,
            output_norm_S=norm,
            router_logits_TE=logits,
        )

    def _see_router(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keeps the first (T, E) floating output of a sibling of the experts: the router's logits."""
        if self._logits is not None:
            return
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1] == self.layer.num_experts:
                self._logits = tensor.detach().reshape(-1, self.layer.num_experts).float()
                return

    def _forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts: Any = self.experts
        num_tokens, top_k = top_k_index.shape
        ids_S, order_S = torch.sort(top_k_index.reshape(-1), stable=True)
        token_S, weight_S = order_S // top_k, top_k_weights.reshape(-1)[order_S]
        ends_E = torch.bincount(ids_S, minlength=self.layer.num_experts).cumsum(0).to(torch.int32)

        def project(x: Tensor, name: str) -> Tensor:
            weight = getattr(experts, name)
            return _grouped_linear(x, weight, ends_E, is_transposed=self.layer.is_transposed)

        def biased(x: Tensor, name: str) -> Tensor:
            return x + getattr(experts, f"{name}_bias")[ids_S] if self.layer.has_bias else x

        x_SD = hidden_states[token_S]
        up_SM = project(x_SD, self.layer.up_name)
        biased_SM = biased(up_SM, self.layer.up_name)
        h_SF = experts._apply_gate(biased_SM) if self.layer.has_gate else experts.act_fn(biased_SM)
        y_SD = project(h_SF, "down_proj")
        out_SD = biased(y_SD, "down_proj")
        if experts.has_post_expert_norm:
            out_SD = experts.post_expert_norm(out_SD)
        weighted_SD = out_SD * weight_S[:, None]
        place_S = torch.empty_like(order_S)
        place_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
        mixed = weighted_SD[place_S].view(num_tokens, top_k, -1).sum(dim=1)
        if up_SM.requires_grad:
            capture = _Capture(
                ids_S=ids_S,
                token_S=token_S,
                weight_S=weight_S.detach(),
                x_SD=x_SD.detach(),
                up_SM=up_SM.detach(),
                h_SF=h_SF.detach(),
                y_SD=y_SD.detach(),
                output_norm_S=torch.linalg.vector_norm(out_SD.detach(), dim=-1, dtype=torch.float32),
            )
            up_SM.register_hook(lambda grad: capture.grads.__setitem__("up", grad))
            y_SD.register_hook(lambda grad: capture.grads.__setitem__("y", grad))
            self._capture = capture
        return mixed.to(hidden_states.dtype)
