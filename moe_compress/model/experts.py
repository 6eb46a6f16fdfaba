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
from torch import Tensor, nn

from .bases import Bases, ColumnNorms, lay_out_by_column
from .discovery import always_mapped
from .merged import MAP_NAME, register_map, shorten
from .products import Term
from .routes import Route, RouteName, choose, constant, is_static, make_route
from .slots import INDEX_SUFFIX, FactorisedSlot, slots_of
from .tiles import product_of_all

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
        column_filters: slot name -> what is used in place of its packed sparse columns, as a function of them; empty
            but in training that prunes them.
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
        self.column_filters: dict[str, Callable[[Tensor], Tensor]] = {}
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
        once = [self._once(slot, hidden_states, route) for slot in first]
        is_summed = 0 < down.num_bases <= route.top_k and not self.has_post_expert_norm
        is_based = down.num_bases > 0 and not is_summed
        # which columns of down's bases rows skip one by one depends on all of them
        parts = [route] if is_based and self._skips(down) else list(route.parts())
        num_rows, is_one = len(route.token_S), len(parts) == 1
        out_SD = hidden_states.new_empty(0 if is_one else num_rows, down.num_rows)
        inner_SF = hidden_states.new_empty(0 if is_one or not is_summed else num_rows, down.num_columns)
        for part in parts:
            x_SD = part.spread(hidden_states)
            up = [self._rows(s, x_SD, right, base(part), part) for s, (base, right) in zip(first, once, strict=True)]
            h_SF = self._activate(up[0] if len(up) == 1 else torch.cat(up, dim=-1), part)
            terms = self._based(down, h_SF, part) if is_based else []
            y_SD = self._rows(down, h_SF, None, terms, part, out=None if is_one else part.among(out_SD))
            if self.has_post_expert_norm:
                bias = self.down_proj_bias[part.expert_of_rows()] if self.has_bias else 0
                y_SD = self.post_expert_norm(y_SD + bias)
            if is_one:
                out_SD, inner_SF = y_SD, h_SF
                continue
            if self.has_post_expert_norm:
                part.among(out_SD).copy_(y_SD)
            if is_summed:
                part.among(inner_SF).copy_(h_SF)
        mixed_TD = route.mix(out_SD, top_k_weights)
        if is_summed:
            bases, base_TK = self._bases(down), self._base_of(down, route)
            sums = [route.mix(inner_SF, top_k_weights * (base_TK == base)) for base in range(down.num_bases)]
            sums_TBF = torch.stack(sums, dim=1) if len(sums) > 1 else sums[0][:, None]
            mixed_TD = mixed_TD + bases.product_of_sums(bases.stored(sums_TBF))
        if self.has_bias and not self.has_post_expert_norm:
            weights_TE = top_k_weights.new_zeros(len(top_k_weights), self.num_experts, dtype=torch.float32)
            weights_TE = weights_TE.scatter_add(1, top_k_index, top_k_weights.float())
            mixed_TD = mixed_TD + weights_TE @ self.down_proj_bias.float()
        return mixed_TD.to(hidden_states.dtype)

    def _once(
        self, slot: FactorisedSlot, hidden_TD: Tensor, route: Route
    ) -> tuple[Callable[[Route], list[Term]], Tensor | None]:
        """What a first projection computes once a token.

        Returns:
            the bases' term for the rows of any part of the route; (T, R') the products with the right factors, where
            so many share them that this is less work than once a row.
        """
        right_TR = None
        if slot.left.width and route.is_once(slot.right, slot.num_right):
            right_TR = product_of_all(hidden_TD, getattr(self, f"{slot.name}_v"))
        if not slot.num_bases:
            return lambda part: [], right_TR
        bases = self._bases(slot)
        x_TC = bases.stored(hidden_TD)
        if -1 in slot.bases:
            x_TC = x_TC * (self._base_of(slot, route) >= 0).any(1, keepdim=True)
        if slot.num_bases <= route.top_k:
            based_TX = bases.product(x_TC)
            return lambda part: [Term("pick", based_TX, None, slot.based)], right_TR
        kept_TC, base_BMC = bases.narrowed(x_TC, bases.kept(x_TC))
        table = base_BMC.flatten(0, 1)
        return lambda part: [Term("contract", part.spread(kept_TC), table, slot.based)], right_TR

    def _based(self, slot: FactorisedSlot, inner_SF: Tensor, part: Route) -> list[Term]:
        """The bases of down, row by row."""
        bases = self._bases(slot)
        x_SC = bases.stored(inner_SF)
        kept = None
        if self._skips(slot):
            is_based_P1 = (self._base_of(slot, part) >= 0).view(-1, 1)
            kept = bases.kept(x_SC.index_select(0, part.row_TK.flatten()) * is_based_P1)
        x_SC, base_BMC = bases.narrowed(x_SC, kept)
        return [Term("contract", x_SC, base_BMC.flatten(0, 1), slot.based)]

    def _rows(
        self,
        slot: FactorisedSlot,
        x_SN: Tensor,
        right_TR: Tensor | None,
        based: list[Term],
        part: Route,
        out: Tensor | None = None,
    ) -> Tensor:
        """(S, M) the sum of what experts have of their own, and of the bases' terms; in `out`, if that can be."""
        terms = []
        if slot.left.width:
            u, v = getattr(self, f"{slot.name}_u"), getattr(self, f"{slot.name}_v")
            if right_TR is None:
                right = Term("contract", x_SN, v, slot.right)
            else:
                right = Term("pick", right_TR, None, slot.right)
            terms.append(Term("expand", part.product([right], part.width(slot.right)), u, slot.left))
        if slot.dense_index:
            terms.append(Term("contract", x_SN, getattr(self, f"{slot.name}_dense").flatten(0, 1), slot.dense))
        if slot.sparse.width:
            columns = getattr(self, f"{slot.name}{INDEX_SUFFIX}")
            chosen = part.product([Term("select", x_SN, columns, slot.sparse)], part.width(slot.sparse))
            terms.append(Term("expand", chosen, self._sparse_columns(slot), slot.sparse))
        if terms or based:
            return part.product(terms + based, slot.num_rows, out)
        return x_SN.new_zeros(len(x_SN), slot.num_rows) if out is None else out.zero_()

    def _activate(self, up_SM: Tensor, route: Route) -> Tensor:
        """Bias, gate and activation, in the layout that the stock module's `_apply_gate` reads."""
        if self.has_gate and not self.is_concatenated:
            up_SM = torch.stack(up_SM.chunk(2, dim=-1), dim=-1).flatten(-2)
        if self.has_bias:
            bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
            up_SM = up_SM + bias[route.expert_of_rows()]
        return self._apply_gate(up_SM) if self.has_gate else self.act_fn(up_SM)

    def _skips(self, slot: FactorisedSlot) -> bool:
        return self.skip_base_columns and slot.num_kept_columns < slot.num_base_columns

    def _sparse_columns(self, slot: FactorisedSlot) -> Tensor:
        """(R, M) the packed sparse columns."""
        s_RM: Tensor = getattr(self, f"{slot.name}_s")
        return self.column_filters[slot.name](s_RM) if slot.name in self.column_filters else s_RM

    def _bases(self, slot: FactorisedSlot) -> Bases:
        name = f"{slot.name}_base"
        base = getattr(self, name)
        columns = getattr(self, name + INDEX_SUFFIX) if slot.has_base_columns else None
        if not self._skips(slot):
            return Bases(slot, base, columns, None)
        if not is_static(base.device):
            lay_out_by_column(base)
        return Bases(slot, base, columns, self._norms.of(name, base))

    def _base_of(self, slot: FactorisedSlot, route: Route) -> Tensor:
        """(T, K) base of each routed pair's expert."""
        return constant(tuple(slot.bases), route.index_TK.device)[route.index_TK]

    def dense_weights(self) -> dict[str, Tensor]:
        """Every slot's experts as whole matrices, (E, M, N) in the slot's order of rows; no column is skipped."""
        weights = {}
        for slot in self.slots:
            tensors = {name: getattr(self, name) for name in slot.shapes()}
            if slot.sparse.width:
                tensors[f"{slot.name}_s"] = self._sparse_columns(slot)
            weights[slot.name] = slot.dense_weights(tensors)
        return weights


def skip_base_columns(model: nn.Module, is_on: bool) -> None:
    """Lets every layer of `model` that was written to skip base columns at run time do so, or not."""
    for module in model.modules():
        if isinstance(module, FactorisedExperts):
            module.skip_base_columns = is_on
