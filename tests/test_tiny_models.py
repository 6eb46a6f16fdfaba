"""The tiny models are what they claim: complete, seeded, and ordinary checkpoints once saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import (
    UNBUILDABLE,
    Unbuildable,
    auto_class,
    build_tiny,
    contract_types,
    expert_modules,
    save_tiny,
    token_ids,
)


@pytest.mark.parametrize("model_type", contract_types())
def test_every_type_builds_small_or_says_why(model_type: str) -> None:
    if model_type in UNBUILDABLE:
        with pytest.raises(Unbuildable, match=model_type):
            build_tiny(model_type)
        return
    model = build_tiny(model_type)
    assert len(expert_modules(model)) >= 2
    assert model.num_parameters() < 200_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_5_moe"])
def test_saved_model_loads_equal_and_generates(model_type: str, tmp_path: Path) -> None:
    model = build_tiny(model_type)
    loaded = auto_class(model_type).from_pretrained(save_tiny(model_type, tmp_path))
    assert type(loaded) is type(model)
    ids = token_ids()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, logits, atol=1e-5, rtol=0)
    assert 0.1 < logits.std() < 10
    longer = loaded.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert longer.shape == (2, 12)


def test_seed_decides_the_weights_and_leaves_the_callers_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_tiny("deepseek_v3", seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
