"""Watches the experts of a layer while it runs: what every routed token brings to each projection, and the gradients.

Stands in for the experts module's forward with the same arithmetic (grouped.py), so that nothing that is measured has
to be computed twice. Indices and weights are those the module receives: recomputing them from router logits is wrong
for sigmoid, bias-corrected, grouped and sparsemixer routers.

Shapes: T tokens, S routed pairs sorted by expert and filler, E experts, D hidden_size, F intermediate_size, M rows of
the first projection (2F with a gate, F without).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .discovery import MoELayer
from .grouped import ExpertsPass, RowLayout, is_tiled, run_experts


@dataclass(slots=True)
class RoutedTokens:
    """One call of an experts module. Rows are sorted by expert; padding and pairs of no weight are already left out.

    After an expert's routed tokens may come rows of zeros in every tensor (see grouped.py).

    Attributes:
        counts: routed tokens of each expert, E entries.
        sizes: rows of each expert, E entries that sum to S.
        token_S: index of each row's token in the micro-batch, flattened (B * S,).
        weight_S: router weight of each row.
        x_SD: input of gate and up.
        up_SM: output `[gate; up]` before bias and activation.
        h_SF: input of down.
        y_SD: output of down, before bias and router weight.
        d_up_SM, d_y_SD: gradient of the summed loss w.r.t. `up_SM` and `y_SD`.
        output_norm_S: norm of each expert's whole output, bias and post-expert norm included, fp32.
        hidden_TD, index_TK, weights_TK: what the module was called with, real tokens only.
        router_logits_TE: what the router gave for each real token, where one was seen.

    Tensors keep the dtype the model computes in; whoever sums them casts.
    """

    counts: list[int]
    sizes: list[int]
    token_S: Tensor
    weight_S: Tensor
    output_norm_S: Tensor
    x_SD: Tensor
    up_SM: Tensor
    h_SF: Tensor
    y_SD: Tensor
    d_up_SM: Tensor
    d_y_SD: Tensor
    hidden_TD: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    router_logits_TE: Tensor | None = None


class ExpertObserver:
    """Observes one experts module during one forward and backward of its layer.

    Args:
        layer: its description.
        experts: the module, loaded.
        block: the module around it, where the router is a child.
    """

    def __init__(self, layer: MoELayer, experts: nn.Module, block: nn.Module) -> None:
        self.layer, self.experts, self.block = layer, experts, block
        self._seen: ExpertsPass | None = None
        self._called_with: tuple[Tensor, ...] = ()
        self._grads: dict[str, Tensor] = {}
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
        seen, grads, logits = self._seen, self._grads, self._logits
        self._seen, self._grads, self._logits = None, {}, None
        if seen is None or len(grads) < 2:
            return None
        norm_S = torch.linalg.vector_norm(seen.out_SD.detach(), dim=-1, dtype=torch.float32)
        tensors = [seen.token_S, seen.weight_S.detach().float(), norm_S]
        tensors += [t.detach() for t in (seen.x_SD, seen.up_SM, seen.h_SF, seen.y_SD)] + [grads["up"], grads["y"]]
        if self.layer.has_gate and not self.layer.is_concatenated:
            for i in (4, 7):
                tensors[i] = torch.cat([tensors[i][:, 0::2], tensors[i][:, 1::2]], dim=1)
        layout, called_with = seen.layout, self._called_with
        self._called_with = ()
        keep_P = seen.weight_S[layout.row_P] != 0  # a router skips a token by sending it anywhere with no weight
        if token_mask is not None:
            token_mask = token_mask.to(keep_P.device)
            keep_P &= token_mask[seen.token_S[layout.row_P]]
            called_with = tuple(tensor[token_mask] for tensor in called_with)
            logits = None if logits is None else logits[token_mask]
        if not bool(keep_P.all()):
            kept_S = layout.row_P[keep_P]
            layout = RowLayout.of(seen.ids_P[keep_P], self.layer.num_experts, is_tiled(seen.x_SD))
            tensors = [t[kept_S][layout.source_S] for t in tensors]
        for tensor in tensors:
            tensor.index_fill_(0, layout.filler, 0)
        (token_S, weight_S, norm_S, *routed), (hidden_TD, index_TK, weights_TK) = tensors, called_with
        x_SD, up_SM, h_SF, y_SD, d_up_SM, d_y_SD = routed
        return RoutedTokens(
            counts=layout.counts,
            sizes=layout.sizes,
            token_S=token_S,
            weight_S=weight_S,
            output_norm_S=norm_S,
            x_SD=x_SD,
            up_SM=up_SM,
            h_SF=h_SF,
            y_SD=y_SD,
            d_up_SM=d_up_SM,
            d_y_SD=d_y_SD,
            hidden_TD=hidden_TD,
            index_TK=index_TK,
            weights_TK=weights_TK,
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
        seen = run_experts(self.experts, hidden_states, top_k_index, top_k_weights)
        if seen.up_SM.requires_grad:
            grads: dict[str, Tensor] = {}
            seen.up_SM.register_hook(lambda grad: grads.__setitem__("up", grad))
            seen.y_SD.register_hook(lambda grad: grads.__setitem__("y", grad))
            self._seen, self._grads = seen, grads
            self._called_with = (hidden_states.detach(), top_k_index, top_k_weights.detach())
        return seen.mixed_TD
