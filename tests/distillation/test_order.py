"""Which sequences a step sees: each once an epoch, whatever the processes and micro-batches."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_compress.distillation.order import NOTHING, Order, micro_batches, num_micro_batches

SMALL = st.integers(1, 9)


@given(num_sequences=SMALL, batch_size=SMALL, epochs=st.integers(1, 3), seed=SMALL)
def test_every_epoch_sees_every_sequence_once(num_sequences: int, batch_size: int, epochs: int, seed: int) -> None:
    order = Order(num_sequences, batch_size, epochs, None, seed)
    batches = [order.batch(step) for step in range(order.num_steps)]
    seen = torch.cat(batches).view(epochs, num_sequences)
    assert all(epoch.sort().values.equal(torch.arange(num_sequences)) for epoch in seen)
    assert order.num_steps == epochs * order.steps_an_epoch
    assert Order(num_sequences, batch_size, epochs, 1, seed).num_steps == 1


@given(batch=st.integers(0, 12), world=st.integers(1, 4), size=st.integers(1, 4), more=st.integers(0, 2))
def test_processes_share_a_batch(batch: int, world: int, size: int, more: int) -> None:
    """All have as many micro-batches of one size, also of a batch that is smaller than others."""
    count = num_micro_batches(batch, world, size) + more
    shares = [micro_batches(torch.arange(batch), rank, world, size, count) for rank in range(world)]
    assert all([index_B.shape for index_B in share] == [(size,)] * count for share in shares)
    found = torch.cat([index_B for share in shares for index_B in share]) if count else torch.empty(0)
    assert found[found != NOTHING].sort().values.tolist() == list(range(batch))
