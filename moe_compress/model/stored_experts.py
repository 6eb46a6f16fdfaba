"""The experts of one group of a layer as they lie in the checkpoint, read when they are needed."""

from __future__ import annotations

import torch
from torch import Tensor

from .discovery import MoELayer
from .expert_bank import Group, matrix_shape, stock_name, to_canonical
from .skeleton import Skeleton

BLOCK_BYTES = 16 * 2**20
"""Experts read at a time, about: enough that the way through transformers costs nothing beside the read."""


class StoredExperts:
    """Stands in for an (E, M, N) tensor in canonical layout of which a block of experts is in memory at a time.

    Blocks are best read in order. What is read a second time comes from the page cache, where there is room.

    Attributes:
        shape: (E, M, N).
        dtype: the checkpoint's.
    """

    def __init__(self, skeleton: Skeleton, layer: MoELayer, group: Group) -> None:
        self._skeleton, self._layer, self._group = skeleton, layer, group
        self.shape = torch.Size([layer.num_experts, *matrix_shape(layer, group)])
        self._name = f"{layer.path}.{stock_name(layer, group)}"
        self.dtype = skeleton.model.get_parameter(self._name).dtype
        expert_bytes = self.shape[1] * self.shape[2] * self.dtype.itemsize
        self._size = max(1, BLOCK_BYTES // expert_bytes) if skeleton.keeps_apart(self._name) else len(self)
        self._block, self._held = range(0), torch.empty(0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, experts: slice) -> Tensor:
        """(n, M, N) of a slice of the experts; valid until the next is asked for."""
        wanted = range(len(self))[experts]
        if wanted.start not in self._block or wanted.stop > self._block.stop:
            start = wanted.start if len(wanted) > self._size else wanted.start // self._size * self._size
            self._block = range(start, min(max(wanted.stop, start + self._size), len(self)))
            self._held = torch.empty(0)  # before the next is there
            stock = self._skeleton.take(self._name, self._block)
            self._held = to_canonical(self._layer, self._group, stock)
        return self._held[wanted.start - self._block.start : wanted.stop - self._block.start]
