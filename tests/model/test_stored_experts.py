"""Experts read a block at a time are those read at once, whatever way the checkpoint stores them."""

from __future__ import annotations

import pytest
import torch

from moe_compress.checkpoint.reader import CheckpointReader
from moe_compress.errors import CheckpointError
from moe_compress.model import stored_experts
from moe_compress.model.expert_bank import GROUPS, stock_name, to_canonical
from moe_compress.model.skeleton import Skeleton
from moe_compress.model.stored_experts import StoredExperts
from tests.conftest import Checkpoint
from tests.tiny_models import Unbuildable, contract_types


@pytest.mark.parametrize("experts_a_block", [1, 3])
@pytest.mark.parametrize("model_type", contract_types())
def test_blocks_equal_the_whole(
    model_type: str, experts_a_block: int, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        skeleton = Skeleton(CheckpointReader(tiny(model_type)))
        layer = skeleton.moe_layers()[-1]
    except (Unbuildable, CheckpointError) as error:
        pytest.skip(str(error))
    for group in GROUPS:
        name = f"{layer.path}.{stock_name(layer, group)}"
        whole = to_canonical(layer, group, skeleton.take(name))
        monkeypatch.setattr(stored_experts, "BLOCK_BYTES", experts_a_block * whole[0].numel() * whole.itemsize)
        stored = StoredExperts(skeleton, layer, group)
        assert (stored.shape, stored.dtype) == (whole.shape, whole.dtype)
        assert skeleton.keeps_apart(name)
        for start in (*range(len(stored)), 0):
            experts = slice(start, min(start + 2, len(stored)))
            assert torch.equal(stored[experts], whole[experts])
        assert skeleton.model.get_parameter(name).is_meta
