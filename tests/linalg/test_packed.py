"""Packed symmetric matrices."""

from __future__ import annotations

import pytest
import torch

from moe_compress.linalg.packed import STRIP, pack, packed_size, strips, unpack

SIZES = [1, STRIP - 1, STRIP, STRIP + 1, 3 * STRIP + 5]


@pytest.mark.parametrize("size", SIZES)
def test_unpacking_gives_the_matrix_back(size: int) -> None:
    rows_ESN = torch.randn(2, 7, size, generator=torch.Generator().manual_seed(0))
    whole_ENN = rows_ESN.mT @ rows_ESN
    whole_ENN = whole_ENN.tril() + whole_ENN.tril(-1).mT
    packed_EP = pack(whole_ENN)
    assert packed_EP.shape == (2, packed_size(size))
    assert torch.equal(unpack(packed_EP, size), whole_ENN)


@pytest.mark.parametrize("size", SIZES)
def test_sums_of_products_grow_in_the_strips(size: int) -> None:
    packed_P = torch.zeros(packed_size(size), dtype=torch.float64)
    rows_SN = torch.randn(9, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for part in rows_SN.split(4):
        for rows, strip in strips(packed_P, size):
            strip.addmm_(part[:, rows].T, part[:, : rows.stop])
    found = unpack(packed_P, size)
    torch.testing.assert_close(found, rows_SN.T @ rows_SN)
    assert torch.equal(found, found.T)


def test_wide_matrices_take_a_little_over_half() -> None:
    assert packed_size(4096) == 4096 * (4096 + STRIP) // 2
