"""Every model type of the installed transformers gets a shorter router, or is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe_compress.errors import RecipeError
from moe_compress.model.discovery import find_moe_layers
from moe_compress.model.routing import (
    ResizedModel,
    apply_to_json,
    experts_per_token,
    resize_experts,
    router_groups,
)
from tests.tiny_configs import tiny_config
from tests.tiny_models import Unbuildable, build_tiny, contract_types, token_ids

REFUSED = {
    "deepseek_v4": "is a table of expert ids",
    "dots3_note": r"layers have \[4, 8\] experts",
    "inkling_mm_model": "has no field",  # its routers count shared experts too
    "inkling_text": "has no field",
    "zaya": "has no field",  # its routers have one choice more: none
}
"""Types whose router cannot shrink, and a part of what is said."""


@torch.no_grad()
@pytest.mark.parametrize("model_type", contract_types())
def test_experts_and_routers_shrink_and_nothing_else(model_type: str) -> None:
    try:
        model = build_tiny(model_type)
    except Unbuildable as error:
        pytest.skip(error.reason)
    layers = find_moe_layers(model)
    count = layers[0].num_experts // 2
    if model_type in REFUSED:
        with pytest.raises(RecipeError, match=REFUSED[model_type]) as refusal:
            resize_experts(model, count)
        assert "\n" not in str(refusal.value)
        return
    config = model.config.to_dict()
    resized = resize_experts(model, count)
    assert model.config.to_dict() == config
    assert all(tensor.is_meta for tensor in resized.model.parameters())
    assert [layer.num_experts for layer in find_moe_layers(resized.model)] == [count] * len(layers)

    experts = tuple(f"{layer.path}." for layer in layers)
    state, shorter = model.state_dict(), resized.model.state_dict()
    changed = {name for name, tensor in state.items() if tensor.shape != shorter[name].shape}
    assert state.keys() == shorter.keys()
    assert not any(name.startswith(experts) for name in resized.axes)
    assert changed == resized.axes.keys() | {name for name in changed if name.startswith(experts)}
    blocks = [layer.path.rpartition(".")[0] + "." for layer in layers]  # a router stands beside its experts
    assert all(any(name.startswith(block) for name in resized.axes) for block in blocks)
    assert all(name.startswith(tuple(blocks)) for name in resized.axes)

    assert_written_config_says_it(resized, model.config, count)
    assert_works(resized, {name: cut(tensor, resized, name, count) for name, tensor in state.items()})


def cut(tensor: torch.Tensor, resized: ResizedModel, name: str, count: int) -> torch.Tensor:
    """The first `count` experts' part of a tensor of the whole model."""
    if tensor.shape == resized.model.state_dict()[name].shape:
        return tensor
    return tensor.narrow(resized.axes.get(name, 0), 0, count)


def assert_written_config_says_it(resized: ResizedModel, config: PreTrainedConfig, count: int) -> None:
    written = apply_to_json(config.to_dict(), config, resized.config)
    part: Any = type(config).from_dict(written)
    (path, found), *others = resized.config.items()
    assert (found, others) == (count, [])
    for name in path.split("."):
        part = getattr(part, name)
    assert part == count


def assert_works(resized: ResizedModel, state: dict[str, torch.Tensor]) -> None:
    model: PreTrainedModel = type(resized.model)(resized.model.config).eval()
    model.load_state_dict(state)
    assert bool(model(input_ids=token_ids()).logits.isfinite().all())


def changed_model(model_type: str, **fields: int) -> PreTrainedModel:
    """A model without weights whose config differs from the tiny one."""
    config = tiny_config(model_type)
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_any_count_the_router_can_choose_among(model_type: str) -> None:
    model = build_tiny(model_type)
    groups, chosen = router_groups(model.config)
    top_k = experts_per_token(model.config)
    assert top_k is not None
    num_experts = find_moe_layers(model)[0].num_experts
    for count in range(1, num_experts):
        is_possible = count % groups == 0 and count // groups * chosen >= top_k
        if is_possible:
            axes = resize_experts(model, count).axes
            assert axes
        else:
            with pytest.raises(RecipeError, match=r"method\.router"):
                resize_experts(model, count)


@pytest.mark.parametrize(
    ("model_type", "fields", "count", "message"),
    [
        ("mixtral", {}, 1, "1 experts a layer are too few for a router that picks 2;"),
        ("gpt_oss", {"num_experts_per_tok": 3}, 2, "2 experts a layer are too few for a router that picks 3;"),
        ("deepseek_v3", {}, 5, "5 experts a layer are not 2 groups of at least 2"),
        ("deepseek_v3", {}, 2, "2 experts a layer are not 2 groups of at least 2"),
        ("deepseek_v3", {"num_experts_per_tok": 3}, 4, "4 .* picks 3 in 1 of 2 groups"),
    ],
)
def test_a_router_that_could_not_choose_is_refused(
    model_type: str, fields: dict[str, int], count: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as refusal:
        resize_experts(changed_model(model_type, **fields), count)
    assert "\n" not in str(refusal.value)


def test_a_field_of_equal_value_is_not_taken_for_the_number_of_experts() -> None:
    model = changed_model("mixtral", num_experts_per_tok=4)
    with pytest.raises(RecipeError, match="picks 4"):
        resize_experts(model, 2)
    shared = changed_model("deepseek_v3", n_shared_experts=8)
    assert resize_experts(shared, 4).config == {"n_routed_experts": 4}


@pytest.mark.parametrize(
    ("model_type", "raw", "expected"),
    [
        ("qwen3_moe", {"num_experts": 4, "x": 4}, {"num_experts": 2, "x": 4}),  # as published, an alias
        ("qwen3_moe", {"num_local_experts": 4}, {"num_local_experts": 2}),  # as saved again
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 4}, {"num_experts": 2, "num_local_experts": 2}),
        ("qwen3_moe", {}, {"num_local_experts": 2}),
        (
            "qwen3_vl_moe",
            {"num_experts": 9, "text_config": {"num_experts": 4, "y": [1]}},
            {"num_experts": 9, "text_config": {"num_experts": 2, "y": [1]}},
        ),
        ("qwen3_vl_moe", {}, {"text_config": {"num_local_experts": 2}}),
    ],
)
def test_config_json_changes_under_the_names_it_uses(
    model_type: str, raw: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = build_tiny(model_type)
    before = repr(raw)
    assert apply_to_json(raw, model.config, resize_experts(model, 2).config) == expected
    assert repr(raw) == before


def test_nothing_changed_leaves_config_json_as_it_is() -> None:
    raw = {"a": {"b": 1}}
    assert apply_to_json(raw, tiny_config("mixtral"), {}) == raw
