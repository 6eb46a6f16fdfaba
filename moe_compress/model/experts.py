"""The nn.Module of factorised experts, and of low-rank + sparse ones.

What its tensors are called, their shapes and whose they are: slots.py. How rows come to experts: routes.py.

The forward of one layer, x a token, g_e its router weights (arXiv 2502.17298, section 3.4):

    h_e = act(base x + U_e V_e x + ...)               the base of the first projections once a token
    y   = base (sum_e g_e h_e) + sum_e g_e U_e V_e h_e     the base of down once a token too, on the weighted sum

A norm between down and the weights forbids the latter: then every routed row goes through the base. So it does where
there are more bases than experts a token; the rows of a base go through it together.

Shapes: T tokens, K choices of each, S rows of a route, M and N rows and columns of a projection, D hidden size,
F intermediate size, B bases, C of their columns stored.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import Bases, ColumnNorms, lay_out_by_column
from .discovery import always_mapped
from .merged import MAP_NAME, register_map, shorten
from .products import Term
from .routes import Route, RouteName, choose, constant, is_static, make_route
from .slots import INDEX_SUFFIX, FactorisedSlot, slots_of

GUARD_NAME: Final = "down_v"
GUARD_DISK_NAME: Final = "down_proj"
"""`down_v` lies on disk under the stock name, so that stock code stops at its shape (see plugin.py)."""


class FactorisedExperts(nn.Module):
    """Experts of a layer, factorised; called by the model's own MoE block like the stock module.

    Everything that is not one of the two projections (activation, clamps, biases, post-expert norm) is the stock
    module's own, taken over from `template`.

    Args:
        template: the model's own experts module, on any device; its projections are not used.
        spec: the layer's entry of `quantization_config.layers`.

    Attributes:
        slots: the factorised projections, down last.
        route: forces one of the routes of routes.py; None chooses at every call.
        skip_base_columns: whether slots with `skip` skip.
    """

    # taken over from the stock module
    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_concatenated: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    gate_up_proj_bias: Tensor
    up_proj_bias: Tensor
    down_proj_bias: Tensor
    expert_map: Tensor

    def __init__(self, template: Any, spec: dict[str, Any]) -> None:
        super().__init__()
        own = set(vars(self))
        self.__dict__.update({k: v for k, v in vars(template).items() if k not in own})
        self._template_class = type(template)
        down: Tensor = template.down_proj
        up_name = "gate_up_proj" if template.has_gate else "up_proj"
        hidden, inner = down.shape[1:] if not template.is_transposed else down.shape[:0:-1]
        for name, child in template.named_children():
            self.add_module(name, child)
        for name, parameter in template.named_parameters(recurse=False):
            if name not in ("down_proj", up_name):
                self.register_parameter(name, parameter)
        count = spec.get("num_experts", self.num_experts)
        if count != self.num_experts or (always_mapped(template) and spec.get("router") != "slice"):
            register_map(self, self.num_experts, down.device)
            shorten(self, count)
            self.num_experts = count
        self.slots = slots_of(spec, inner * (2 if template.has_gate else 1), hidden, inner)
        for slot in self.slots:
            for name, shape in slot.shapes().items():
                if name.endswith(INDEX_SUFFIX):
                    self.register_buffer(name, torch.empty(shape, dtype=torch.int32, device=down.device))
                else:
                    tensor = torch.empty(shape, dtype=down.dtype, device=down.device)
                    self.register_parameter(name, nn.Parameter(tensor))
        self.route: RouteName | None = None
        self.skip_base_columns = True
        self._norms = ColumnNorms()
        based = next((slot for slot in self.slots if slot.num_bases), self.slots[0])
        self._order = sorted(range(count), key=lambda expert: based.bases[expert])
        sizes = sum(prod(s) for slot in self.slots for n, s in slot.shapes().items() if not n.endswith(INDEX_SUFFIX))
        self._bytes_an_expert = sizes * down.element_size() / max(count, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactorisedExperts:
        self._norms.forget()
        return super()._apply(fn, recurse)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._template_class._apply_gate(self, gate_up)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: (T, hidden_size).
            top_k_index: (T, top_k) int64 expert ids.
            top_k_weights: (T, top_k) router weights.

        Returns:
            (T, hidden_size), dtype of `hidden_states`.
        """
        if hasattr(self, MAP_NAME):
            top_k_index = self.expert_map[top_k_index]
        name = self.route or choose(top_k_index, self.num_experts, self._bytes_an_expert)
        route = make_route(name, top_k_index, self._order, hidden_states)
        *first, down = self.slots
        x_SD = route.spread(hidden_states)
        up_SM = [self._first(slot, x_SD, hidden_states, route) for slot in first]
        inner_SF = self._activate(up_SM[0] if len(up_SM) == 1 else torch.cat(up_SM, dim=-1), route)
        return self._down(down, inner_SF, top_k_weights, route).to(hidden_states.dtype)

    def _first(self, slot: FactorisedSlot, x_SD: Tensor, hidden_TD: Tensor, route: Route) -> Tensor:
        """(S, M) outputs of a first projection, without bias."""
        terms = []
        if slot.num_bases:
            bases = self._bases(slot)
            x_TC = bases.stored(hidden_TD)
            if -1 in slot.bases:
                x_TC = x_TC * (self._base_of(slot, route) >= 0).any(1, keepdim=True)
            if slot.num_bases <= route.top_k:
                terms.append(Term("pick", bases.product(x_TC), None, slot.based))
            else:
                x_TC, base_BMC = bases.narrowed(x_TC, bases.kept(x_TC))
                terms.append(Term("contract", route.spread(x_TC), base_BMC.flatten(0, 1), slot.based))
        return self._factors(slot, x_SD, hidden_TD, terms, route)

    def _activate(self, up_SM: Tensor, route: Route) -> Tensor:
        """Bias, gate and activation, in the layout that the stock module's `_apply_gate` reads."""
        if self.has_gate and not self.is_concatenated:
            up_SM = torch.stack(up_SM.chunk(2, dim=-1), dim=-1).flatten(-2)
        if self.has_bias:
            bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
            up_SM = up_SM + bias[route.expert_of_rows()]
        return self._apply_gate(up_SM) if self.has_gate else self.act_fn(up_SM)

    def _down(self, slot: FactorisedSlot, inner_SF: Tensor, weights_TK: Tensor, route: Route) -> Tensor:
        """(T, D) weighted sums of the experts' whole outputs."""
        terms = []
        is_summed = not self.has_post_expert_norm and slot.num_bases <= route.top_k
        if slot.num_bases and not is_summed:
            bases = self._bases(slot)
            x_SC = bases.stored(inner_SF)
            is_based_P1 = (self._base_of(slot, route) >= 0).view(-1, 1)
            kept = bases.kept(x_SC.index_select(0, route.row_TK.flatten()) * is_based_P1)
            x_SC, base_BMC = bases.narrowed(x_SC, kept)
            terms.append(Term("contract", x_SC, base_BMC.flatten(0, 1), slot.based))
        out_SD = self._factors(slot, inner_SF, None, terms, route)
        if self.has_post_expert_norm:
            if self.has_bias:
                out_SD = out_SD + self.down_proj_bias[route.expert_of_rows()]
            return route.mix(self.post_expert_norm(out_SD), weights_TK)
        mixed_TD = route.mix(out_SD, weights_TK)
        if slot.num_bases and is_summed:
            bases, base_TK = self._bases(slot), self._base_of(slot, route)
            sums = [route.mix(inner_SF, weights_TK * (base_TK == base)) for base in range(slot.num_bases)]
            mixed_TD = mixed_TD + bases.product_of_sums(bases.stored(torch.stack(sums, dim=1)))
        if self.has_bias:
            weights_TE = weights_TK.new_zeros(len(weights_TK), self.num_experts, dtype=torch.float32)
            weights_TE = weights_TE.scatter_add(1, route.index_TK, weights_TK.float())
            mixed_TD = mixed_TD + (weights_TE @ self.down_proj_bias.float()).to(mixed_TD.dtype)
        return mixed_TD

    def _factors(
        self, slot: FactorisedSlot, x_SN: Tensor, shared_TN: Tensor | None, terms: list[Term], route: Route
    ) -> Tensor:
        """(S, M) the sum of `terms` and of what experts have of their own.

        Right factors that several experts use are applied once a token, to `shared_TN`, where that is less work.
        """
        if slot.left.width:
            u, v = getattr(self, f"{slot.name}_u"), getattr(self, f"{slot.name}_v")
            if shared_TN is not None and slot.num_right * len(slot.ranks) <= route.top_k * sum(slot.right.lengths):
                right = Term("pick", F.linear(shared_TN, v), None, slot.right)
            else:
                right = Term("contract", x_SN, v, slot.right)
            t_SR = route.product([right], route.width(slot.right))
            terms.append(Term("expand", t_SR, u, slot.left))
        if slot.dense_index:
            terms.append(Term("contract", x_SN, getattr(self, f"{slot.name}_dense").flatten(0, 1), slot.dense))
        if slot.sparse.width:
            columns = getattr(self, f"{slot.name}{INDEX_SUFFIX}")
            chosen = route.product([Term("select", x_SN, columns, slot.sparse)], route.width(slot.sparse))
            terms.append(Term("expand", chosen, getattr(self, f"{slot.name}_s"), slot.sparse))
        return route.product(terms, slot.num_rows) if terms else x_SN.new_zeros(len(x_SN), slot.num_rows)

    def _bases(self, slot: FactorisedSlot) -> Bases:
        name = f"{slot.name}_base"
        base = getattr(self, name)
        columns = getattr(self, name + INDEX_SUFFIX) if slot.has_base_columns else None
        if not self.skip_base_columns or slot.num_kept_columns == slot.num_base_columns:
            return Bases(slot, base, columns, None)
        if not is_static(base.device):
            lay_out_by_column(base)
        return Bases(slot, base, columns, self._norms.of(name, base))

    def _base_of(self, slot: FactorisedSlot, route: Route) -> Tensor:
        """(T, K) base of each routed pair's expert."""
        return constant(tuple(slot.bases), route.index_TK.device)[route.index_TK]

    def dense_weights(self) -> dict[str, Tensor]:
        """Every slot's experts as whole matrices, (E, M, N) in the slot's order of rows; no column is skipped."""
        return {
            slot.name: slot.dense_weights({name: getattr(self, name) for name in slot.shapes()}) for slot in self.slots
        }


def skip_base_columns(model: nn.Module, is_on: bool) -> None:
    """Lets every layer of `model` that was written to skip base columns at run time do so, or not."""
    for module in model.modules():
        if isinstance(module, FactorisedExperts):
            module.skip_base_columns = is_on
