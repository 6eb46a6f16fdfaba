"""Products with the bases that factorised experts share, some of whose columns may be left out of a call.

Of the C stored columns those are skipped that matter least for the inputs X of the call, over all its rows:

    C_j = ||W[:, j]|| * ||X[:, j]||        W: all bases of the slot on top of each other

Source: arXiv 2502.17298, section 3.3 (semi-dynamic pruning of the base). How many are skipped is fixed, so nothing
waits for the host. Skipping pays where the columns that stay lie together: a base that skips is laid out by column at
its first call. Then a row or two are sums of weighted columns (embedding_bag, which reads no other column and copies
none), and more rows a product with the columns copied out.

Shapes: B bases of M rows and C stored columns, R rows of inputs with all N columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .slots import FactorisedSlot
from .tiles import product_of_all

_CACHED_ROWS = 128
"""Rows of fp32 at a time, so that they stay in the cache."""


class ColumnNorms:
    """The norms of a parameter's columns, kept until it changes; forget them when the parameter is replaced."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, Tensor]] = {}

    def of(self, name: str, base_BMC: Tensor) -> Tensor:
        """(C,) fp32."""
        if torch.compiler.is_compiling():
            return self._known[name][1] if name in self._known else _norms(base_BMC)
        if torch.is_grad_enabled():  # an optimiser may be at work, which changes parameters unseen
            self._known.pop(name, None)
            return _norms(base_BMC.detach())
        version = (base_BMC.data_ptr(), None if base_BMC.is_inference() else base_BMC._version, base_BMC.dtype)
        if name not in self._known or self._known[name][0] != version:
            self._known[name] = (version, _norms(base_BMC))
        return self._known[name][1]

    def forget(self) -> None:
        """The parameters are others now."""
        self._known.clear()


def _norms(x: Tensor) -> Tensor:
    """Of the last axis, over all others, in fp32; torch's own vector_norm takes ten times as long across rows."""
    rows = x.flatten(0, -2)
    parts = rows.split(_CACHED_ROWS) if x.device.type == "cpu" else (rows,)
    return torch.stack([part.float().square().sum(0) for part in parts]).sum(0).sqrt()


class Bases:
    """The bases of a slot in one call.

    Args:
        slot: the slot.
        base_BMC: its bases.
        columns_C: numbers of the stored columns; None for all N.
        norms_C: norms of the stored columns; None to skip none.
    """

    def __init__(
        self, slot: FactorisedSlot, base_BMC: Tensor, columns_C: Tensor | None, norms_C: Tensor | None
    ) -> None:
        self.slot, self.base_BMC, self.columns_C, self.norms_C = slot, base_BMC, columns_C, norms_C

    def stored(self, x_RN: Tensor) -> Tensor:
        """(R, C) the inputs at the stored columns."""
        return x_RN if self.columns_C is None else x_RN.index_select(-1, self.columns_C)

    def kept(self, x_RC: Tensor) -> Tensor | None:
        """The columns, ascending, that a product with these rows reads; None for all."""
        if self.norms_C is None:
            return None
        score_C = self.norms_C * _norms(x_RC.detach())
        return score_C.topk(self.slot.num_kept_columns).indices.sort().values

    def narrowed(self, x_RC: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs and (B, M, .) bases whose product is that of the columns kept."""
        if kept is None:
            return x_RC, self.base_BMC
        base_KBM = self.base_BMC.permute(2, 0, 1).index_select(0, kept)
        return x_RC.index_select(1, kept), base_KBM.permute(1, 2, 0)

    def product(self, x_RC: Tensor) -> Tensor:
        """(R, B M) every row by every base."""
        kept = self.kept(x_RC)
        if kept is None:
            return product_of_all(x_RC, self.base_BMC.flatten(0, 1))
        table_CX = self.base_BMC.permute(2, 0, 1).flatten(1)
        is_few = len(x_RC) * len(kept) <= len(table_CX)
        if is_few and table_CX.is_contiguous() and not torch.is_grad_enabled():
            weights_RK = x_RC.index_select(1, kept)
            return F.embedding_bag(kept.expand(weights_RK.shape), table_CX, mode="sum", per_sample_weights=weights_RK)
        x, base = self.narrowed(x_RC, kept)
        return F.linear(x, base.flatten(0, 1))

    def product_of_sums(self, x_TBC: Tensor) -> Tensor:
        """(T, M) the sum over the bases, each by its own inputs."""
        if self.slot.num_bases == 1:
            return self.product(x_TBC[:, 0])
        x_RC = x_TBC.flatten(0, 1)
        x, base = self.narrowed(x_RC, self.kept(x_RC))
        return torch.einsum("tbc,bmc->tm", x.unflatten(0, x_TBC.shape[:2]), base)


@torch.inference_mode(False)
def lay_out_by_column(base: nn.Parameter) -> None:
    """Changes the order of a parameter (B, M, C) in memory, not what it holds, so that each column lies together."""
    if base.stride(2) == 1:
        base.data = base.data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
