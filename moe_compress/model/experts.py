"""The nn.Module of factorised experts, and of low-rank + sparse ones.

Shapes: E stored experts, T tokens, S = T * top_k routed pairs, M and N rows and columns of a projection, R the sum of
the ranks of all experts, C the sum of their sparse columns. A *slot* is one factorised projection:

    W_e = base + U_e V_e + S_e rank_e >= 0: rows of the packed `u` (R, M) and `v` (R, N), U_e = u[rows].T
    W_e = dense[k]             rank_e = DENSE: cheaper than factors beyond the break-even rank M N / (M + N)

S_e is zero but for some columns: those lie packed in `s` (C, M), their numbers in `columns` (C,).

Slots are `gate_up` (rows [gate; up], one factorisation), or `gate` and `up` apart, or `up` where there is no gate,
and `down`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .discovery import always_mapped
from .merged import MAP_NAME, register_map, shorten

DENSE: Final = -1
"""In a list of ranks: this expert keeps its whole matrix."""

INDEX_SUFFIX: Final = "_columns"
"""Ends the name of a slot's tensor of column numbers, int32; all other tensors are parameters."""

GUARD_NAME: Final = "down_v"
GUARD_DISK_NAME: Final = "down_proj"
"""`down_v` lies on disk under the stock name, so that stock code stops at its shape (see plugin.py)."""


class FactorisedSlot:
    """Names and shapes of the tensors of one slot; the tensors themselves are parameters of the experts module.

    Args:
        name: slot name.
        num_rows: M, output features.
        num_columns: N, input features.
        ranks: one an expert, DENSE for a whole matrix.
        base: the experts of the slot share a base matrix.
        num_sparse: sparse columns of each expert; None for none.
    """

    def __init__(
        self,
        name: str,
        num_rows: int,
        num_columns: int,
        ranks: list[int],
        bases: list[int] | None = None,
        share: list[int] | None = None,
        num_sparse: list[int] | None = None,
    ) -> None:
        self.name, self.num_rows, self.num_columns = name, num_rows, num_columns
        self.ranks, self.bases = list(ranks), bases
        self.share = share or list(range(len(ranks)))
        self.offsets = list(accumulate((max(rank, 0) for rank in ranks), initial=0))
        own = (max(rank, 0) if self.share[e] == e else 0 for e, rank in enumerate(ranks))
        self.right_offsets = list(accumulate(own, initial=0))
        self.sparse_offsets = list(accumulate(num_sparse or [0] * len(ranks), initial=0))
        dense = [e for e, rank in enumerate(self.ranks) if rank == DENSE]
        self.dense_index = {e: k for k, e in enumerate(dense)}

    def factor_rows(self, expert: int) -> slice:
        """Where an expert's factors lie in the packed `u` and `v`."""
        return slice(self.offsets[expert], self.offsets[expert + 1])

    def right_rows(self, expert: int) -> slice:
        """Where the right factor that an expert uses lies in the packed `v`."""
        start = self.right_offsets[self.share[expert]]
        return slice(start, start + max(self.ranks[expert], 0))

    def sparse_rows(self, expert: int) -> slice:
        """Where an expert's sparse columns lie in the packed `s` and `columns`."""
        return slice(self.sparse_offsets[expert], self.sparse_offsets[expert + 1])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the slot, by its parameter name."""
        total, rows, columns = self.offsets[-1], self.num_rows, self.num_columns
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.name}_u": (total, rows),
            f"{self.name}_v": (self.right_offsets[-1], columns),
        }
        if self.dense_index:
            shapes[f"{self.name}_dense"] = (len(self.dense_index), rows, columns)
        if self.bases is not None:
            shapes[f"{self.name}_base"] = (max(self.bases) + 1, rows, columns)
        if num_sparse := self.sparse_offsets[-1]:
            shapes[f"{self.name}_s"] = (num_sparse, rows)
            shapes[f"{self.name}{INDEX_SUFFIX}"] = (num_sparse,)
        return shapes


def slots_of(spec: dict[str, Any], num_rows_up: int, hidden_size: int, inner: int) -> list[FactorisedSlot]:
    """The slots of a layer's specification `{slot: {"ranks": [...], "base": bool, "num_sparse": [...]}}`.

    First projections come first; keys of the specification that name no slot are others' business.
    """
    shapes = {
        "gate_up": (num_rows_up, hidden_size),
        "gate": (inner, hidden_size),
        "up": (inner, hidden_size),
        "down": (hidden_size, inner),
    }
    return [FactorisedSlot(name, *shapes[name], **spec[name]) for name in shapes if name in spec]


class FactorisedExperts(nn.Module):
    """Experts of a layer, factorised; called by the model's own MoE block like the stock module.

    Everything that is not one of the two projections (activation, clamps, biases, post-expert norm) is the stock
    module's own, taken over from `template`.

    Args:
        template: the model's own experts module, on any device; its projections are not used.
        spec: the layer's entry of `quantization_config.layers`.
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
        num_tokens, top_k = top_k_index.shape
        ids_S, order_S = torch.sort(top_k_index.reshape(-1), stable=True)
        token_S = order_S // top_k
        counts = torch.bincount(ids_S, minlength=self.num_experts).tolist()
        inner_SF = self._activate(self._first(hidden_states, token_S, counts), ids_S)
        out_SD = self._slot(self.slots[-1], inner_SF, inner_SF, None, counts)
        if self.has_bias:
            out_SD = out_SD + self.down_proj_bias[ids_S]
        if self.has_post_expert_norm:
            out_SD = self.post_expert_norm(out_SD)
        out_SD = out_SD * top_k_weights.reshape(-1)[order_S, None]
        place_S = torch.empty_like(order_S)
        place_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
        mixed = out_SD[place_S].view(num_tokens, top_k, -1).sum(dim=1)
        return mixed.to(hidden_states.dtype)

    def _first(self, hidden_TD: Tensor, token_S: Tensor, counts: list[int]) -> Tensor:
        """(S, M) outputs of gate and up, rows sorted by expert."""
        routed_SD = hidden_TD[token_S]
        return torch.cat(
            [self._slot(slot, routed_SD, hidden_TD, token_S, counts) for slot in self.slots[:-1]],
            dim=-1,
        )

    def _activate(self, up_SM: Tensor, ids_S: Tensor) -> Tensor:
        """Bias, gate and activation, in the layout that the stock module's `_apply_gate` reads."""
        if self.has_gate and not self.is_concatenated:
            up_SM = torch.stack(up_SM.chunk(2, dim=-1), dim=-1).flatten(-2)
        if self.has_bias:
            up_SM = up_SM + (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[ids_S]
        return self._apply_gate(up_SM) if self.has_gate else self.act_fn(up_SM)

    def _slot(
        self,
        slot: FactorisedSlot,
        routed_SN: Tensor,
        shared_TN: Tensor,
        token_S: Tensor | None,
        counts: list[int],
    ) -> Tensor:
        """(S, M): one projection of every routed token by its expert.

        The base of the first projections is applied once a token (`shared_TN`), not once a routed pair.
        """
        u, v = getattr(self, f"{slot.name}_u"), getattr(self, f"{slot.name}_v")
        dense = getattr(self, f"{slot.name}_dense", None)
        base = getattr(self, f"{slot.name}_base", None)
        parts, start = [], 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            x, stop = routed_SN[start : start + count], start + count
            if expert in slot.dense_index:
                assert dense is not None
                y = F.linear(x, dense[slot.dense_index[expert]])
            else:
                rows = slot.factor_rows(expert)
                y = F.linear(x, v[slot.right_rows(expert)]) @ u[rows]
                sparse = slot.sparse_rows(expert)
                if sparse.stop > sparse.start:
                    columns = getattr(self, f"{slot.name}{INDEX_SUFFIX}")[sparse]
                    y = y + x.index_select(1, columns) @ getattr(self, f"{slot.name}_s")[sparse]
                if base is not None and slot.bases is not None:
                    y = y + F.linear(x, base[slot.bases[expert]])
            parts.append(y)
            start = stop
        return torch.cat(parts) if parts else routed_SN.new_zeros(0, slot.num_rows)

    def dense_weights(self) -> dict[str, Tensor]:
        """Every slot's experts as whole matrices, (E, M, N) in the slot's order of rows."""
        out = {}
        for slot in self.slots:
            u, v = getattr(self, f"{slot.name}_u"), getattr(self, f"{slot.name}_v")
            base = getattr(self, f"{slot.name}_base", None)
            dense = getattr(self, f"{slot.name}_dense", None)
            weights = []
            for expert, rank in enumerate(slot.ranks):
                if rank == DENSE:
                    assert dense is not None
                    weights.append(dense[slot.dense_index[expert]])
                    continue
                rows = slot.factor_rows(expert)
                weight = u[rows].T @ v[slot.right_rows(expert)]
                weight = weight if base is None or slot.bases is None else weight + base[slot.bases[expert]]
                sparse = slot.sparse_rows(expert)
                if sparse.stop > sparse.start:
                    columns = getattr(self, f"{slot.name}{INDEX_SUFFIX}")[sparse]
                    weight = weight.index_add(1, columns, getattr(self, f"{slot.name}_s")[sparse].T)
                weights.append(weight)
            out[slot.name] = torch.stack(weights)
        return out
