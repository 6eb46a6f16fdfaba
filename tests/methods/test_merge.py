"""Merging on experts of every layout, and on whole tiny models."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_compress.calibration.statistics import LayerStatistics, gram_shapes, is_gram
from moe_compress.linalg.packed import pack
from moe_compress.methods.merge import (
    LEFT_OUT,
    Grouping,
    align_activations,
    align_expert,
    expert_weights,
    merge_statistics,
    merge_weights,
    shares,
)
from moe_compress.model.discovery import MoELayer, find_moe_layers
from moe_compress.model.expert_bank import (
    GROUPS,
    Group,
    bias_name,
    channel_axis,
    channel_index,
    hidden_activations,
    stock_name,
    to_canonical,
    to_stock,
)
from moe_compress.model.merged import MAP_NAME, map_experts
from tests.methods.d2moe_cases import SHAPES, Shape
from tests.tiny_models import build_tiny, token_ids

MODEL_TYPES = ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"]
SEEDS = st.integers(0, 10**6)
built = cache(build_tiny)


@st.composite
def layers(draw: st.DrawFn) -> MoELayer:
    """Experts of any layout."""
    flag = st.booleans()
    sizes = (draw(st.integers(2, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 7)))
    return MoELayer("experts", *sizes, draw(flag), draw(flag), draw(flag), draw(flag))


def random_stock(layer: MoELayer, seed: int) -> dict[str, Tensor]:
    """Parameters of a stock experts module by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for group, (rows, columns) in (("up", layer.up_shape), ("down", layer.down_shape)):
        shape = (columns, rows) if layer.is_transposed else (rows, columns)
        tensors[stock_name(layer, group)] = torch.randn(layer.num_experts, *shape, generator=generator)
        if layer.has_bias:
            tensors[bias_name(layer, group)] = torch.randn(layer.num_experts, rows, generator=generator)
    return tensors


def canonical(layer: MoELayer, stock: dict[str, Tensor]) -> dict[str, Tensor]:
    """`up`, `down`, `up_bias` and `down_bias` of stock parameters."""
    names = {group: stock_name(layer, group) for group in GROUPS}
    if layer.has_bias:
        names |= {f"{group}_bias": bias_name(layer, group) for group in GROUPS}
    return {key: to_canonical(layer, group_of(key), stock[name]) for key, name in names.items()}


def stocked(layer: MoELayer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `canonical`."""
    name_of = {group: stock_name(layer, group) for group in GROUPS}
    name_of |= {f"{group}_bias": bias_name(layer, group) for group in GROUPS}
    return {name_of[key]: to_stock(layer, group_of(key), tensor) for key, tensor in tensors.items()}


def group_of(key: str) -> Group:
    return "up" if key.startswith("up") else "down"


def reorder(layer: MoELayer, key: str, own: Tensor, order_F: Tensor) -> Tensor:
    """One expert's canonical tensor with channel f taken from channel order[f]; written without the library's own."""
    if key == "down_bias":
        return own
    if key == "down":
        return own[:, order_F]
    return torch.cat([rows[order_F] for rows in own.split(layer.intermediate_size)])


def merge(
    layer: MoELayer, tensors: dict[str, Tensor], grouping: Grouping, share_E: Tensor, orders: dict[int, Tensor]
) -> dict[str, Tensor]:
    return {k: merge_weights(layer, group_of(k), t, grouping, share_E, orders) for k, t in tensors.items()}


def random_grouping(num_experts: int, seed: int) -> Grouping:
    rng = np.random.default_rng(seed)
    leaders = rng.choice(num_experts, rng.integers(1, num_experts + 1), replace=False)
    return Grouping(tuple(int(e if e in leaders else rng.choice(leaders)) for e in range(num_experts)))


def random_shares(num_experts: int, seed: int) -> Tensor:
    return torch.rand(num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffle(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def test_a_grouping_says_who_stays_and_who_leads() -> None:
    grouping = Grouping((4, 1, 1, 4, 4, LEFT_OUT))
    assert grouping.leaders == [1, 4]
    assert grouping.members(4) == [4, 0, 3]
    assert grouping.members(1) == [1, 2]
    assert grouping.merged == [0, 2, 3, 5]
    assert Grouping((4, 1, 1, 4, 4)).expert_map == [1, 0, 0, 1, 1]


@settings(deadline=None, max_examples=100)
@given(layers(), SEEDS)
def test_every_layout_has_a_canonical_view_and_the_way_back(layer: MoELayer, seed: int) -> None:
    stock = random_stock(layer, seed)
    tensors = canonical(layer, stock)
    assert tensors["up"].shape == (layer.num_experts, *layer.up_shape)
    assert tensors["down"].shape == (layer.num_experts, *layer.down_shape)
    back = stocked(layer, tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in stock.items())


@settings(deadline=None, max_examples=50)
@given(layers(), SEEDS)
def test_groups_of_one_keep_their_bytes(layer: MoELayer, seed: int) -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in canonical(layer, random_stock(layer, seed)).items()}
    merged = merge(
        layer, tensors, Grouping(tuple(range(layer.num_experts))), random_shares(layer.num_experts, seed), {}
    )
    assert all(torch.equal(merged[key], tensor) for key, tensor in tensors.items())


@settings(deadline=None, max_examples=50)
@given(layers(), SEEDS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_equal_experts_merge_without_losing_a_bit(layer: MoELayer, seed: int, dtype: torch.dtype) -> None:
    tensors = {
        key: tensor[:1].expand_as(tensor).to(dtype)
        for key, tensor in canonical(layer, random_stock(layer, seed)).items()
    }
    grouping, share_E = random_grouping(layer.num_experts, seed), random_shares(layer.num_experts, seed)
    for key, merged in merge(layer, tensors, grouping, share_E, {}).items():
        assert merged.dtype == dtype
        assert torch.equal(merged, tensors[key][: len(grouping.leaders)])


@settings(deadline=None, max_examples=200)
@given(layers(), SEEDS)
def test_permuted_copies_merge_without_losing_a_bit_once_aligned(layer: MoELayer, seed: int) -> None:
    tensors = canonical(layer, random_stock(layer, seed))
    for expert in range(1, layer.num_experts):
        order_F = shuffle(layer.intermediate_size, seed + expert)
        for key, tensor in tensors.items():
            tensor[expert] = reorder(layer, key, tensor[0], order_F)
    stock = stocked(layer, tensors)
    grouping = Grouping((0,) * layer.num_experts)
    orders = {e: align_expert(layer, canonical(layer, stock), e, 0) for e in grouping.merged}
    merged = merge(layer, canonical(layer, stock), grouping, random_shares(layer.num_experts, seed), orders)
    for name, tensor in stocked(layer, merged).items():
        assert torch.equal(tensor[0], stock[name][0]), name


@settings(deadline=None, max_examples=30)
@given(layers(), SEEDS)
def test_one_expert_is_taken_apart_into_gate_up_and_down(layer: MoELayer, seed: int) -> None:
    tensors = canonical(layer, random_stock(layer, seed))
    own = expert_weights(layer, 1, {key: tensor.bfloat16() for key, tensor in tensors.items()})
    *gate, up = tensors["up"][1].bfloat16().float().split(layer.intermediate_size)
    *gate_bias, up_bias = tensors.get("up_bias", tensors["up"])[1].bfloat16().float().split(layer.intermediate_size)
    assert torch.equal(own.up_FD, up)
    assert torch.equal(own.down_DF, tensors["down"][1].bfloat16().float())
    assert own.gate_FD is None if not gate else torch.equal(own.gate_FD, gate[0])
    assert own.up_bias_F is None if not layer.has_bias else torch.equal(own.up_bias_F, up_bias)
    no_gate_bias = not (gate and layer.has_bias)
    assert own.gate_bias_F is None if no_gate_bias else torch.equal(own.gate_bias_F, gate_bias[0])


def test_activations_are_matched_by_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    scale_F, shift_F = torch.rand(2, 12, generator=generator) * 20
    leader_TF = torch.randn(15, 12, generator=generator) * scale_F.flip(0) + shift_F
    hidden_TF = torch.randn(15, 12, generator=generator) * scale_F + shift_F.flip(0)
    correlation = np.corrcoef(leader_TF.T, hidden_TF.T)[:12, 12:]
    expected = linear_sum_assignment(correlation, maximize=True)[1]
    assert align_activations(hidden_TF, leader_TF).tolist() == expected.tolist()


@settings(deadline=None, max_examples=100)
@given(layers(), SEEDS)
def test_the_mean_is_the_plain_formula(layer: MoELayer, seed: int) -> None:
    tensors = canonical(layer, random_stock(layer, seed))
    grouping, share_E = random_grouping(layer.num_experts, seed), random_shares(layer.num_experts, seed)
    orders = {e: shuffle(layer.intermediate_size, seed + e) for e in grouping.merged}
    identity = torch.arange(layer.intermediate_size)
    for key, merged in merge(layer, tensors, grouping, share_E, orders).items():
        for leader, found in zip(grouping.leaders, merged, strict=True):
            members = grouping.members(leader)
            rows = [reorder(layer, key, tensors[key][e].double(), orders.get(e, identity)) for e in members]
            total = sum((share_E[e] * row for e, row in zip(members, rows, strict=True)), torch.zeros(()))
            torch.testing.assert_close(found.double(), total / share_E[members].sum(), atol=1e-5, rtol=0)


def test_a_group_that_no_token_reached_merges_with_equal_weights() -> None:
    layer = MoELayer("experts", 4, 3, 2, True, False, False, True)
    up = canonical(layer, random_stock(layer, 0))["up"]
    share_E = torch.tensor([0.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    merged = merge_weights(layer, "up", up, Grouping((0, 1, 0, 1)), share_E, {})
    torch.testing.assert_close(merged[0], (up[0] + up[2]) / 2)
    torch.testing.assert_close(merged[1], 0.75 * up[1] + 0.25 * up[3])


def test_one_unrouted_member_adds_nothing() -> None:
    layer = MoELayer("experts", 2, 3, 2, True, False, False, True)
    down = canonical(layer, random_stock(layer, 0))["down"]
    merged = merge_weights(layer, "down", down, Grouping((0, 0)), torch.tensor([5.0, 0.0], dtype=torch.float64), {})
    assert torch.equal(merged[0], down[0])


# --- statistics ------------------------------------------------------------------------------------------------


def rows_of(layer: MoELayer, expert: int) -> dict[str, list[Tensor]]:
    """What two sequences bring to one expert: inputs, outputs and gradients of both projections."""
    generator = torch.Generator().manual_seed(expert)
    (M, D), F = layer.up_shape, layer.intermediate_size
    widths = {"x": D, "u": M, "d_u": M, "h": F, "y": D, "d_y": D}
    counts = (2 + expert, 3)
    return {n: [torch.randn(c, width, generator=generator) for c in counts] for n, width in widths.items()}


def summed(layer: MoELayer, seen: list[dict[str, list[Tensor]]], full: bool) -> LayerStatistics:
    """The sums by their definitions; `seen` holds one entry an expert."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, values: list[Tensor]) -> None:
        tensors[name] = pack(torch.stack(values)) if is_gram(name) else torch.stack(values)

    put("num_tokens", [torch.tensor(sum(map(len, own["x"]))) for own in seen])
    for name, key in (("weight_sum", "x"), ("saliency_sum", "y")):
        put(name, [torch.cat(own[key]).double().abs().sum() for own in seen])
    for group, z, out, d in (("up", "x", "u", "d_u"), ("down", "h", "y", "d_y")):
        power = [torch.cat(own[d]).square().sum(1, keepdim=True) for own in seen]
        for side, key in (("input", z), ("output", out), ("grad", d)):
            rows = [torch.cat(own[key]) for own in seen]
            put(f"{group}_{side}_gram", [r.T @ r for r in rows])
            put(f"{group}_{side}_loss_gram", [(r * p).T @ r for r, p in zip(rows, power, strict=True)])
        put(f"{group}_grad_diagonal", [torch.cat(own[d]).square().sum(0) for own in seen])
        columns = [sum((b.T @ a).square().sum(0) for a, b in zip(own[z], own[d], strict=True)) for own in seen]
        put(f"{group}_fisher_columns", [c for c in columns if isinstance(c, Tensor)])
        tensors[f"{group}_fisher"] = tensors[f"{group}_fisher_columns"].double().sum(1)
    kept = {*gram_shapes(layer, full), "num_tokens", "weight_sum", "saliency_sum"}
    kept |= {f"{group}_{name}" for group in GROUPS for name in ("fisher", "fisher_columns")}
    return LayerStatistics.of(layer, {name: tensors[name] for name in kept}, full)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merged_statistics_are_those_of_the_members_tokens_in_the_leaders_channels(shape: Shape, full: bool) -> None:
    hidden, inner, gated = shape
    layer = MoELayer("experts", 5, hidden, inner, gated, False, False, True)
    seen = [rows_of(layer, expert) for expert in range(5)]
    grouping = Grouping((2, 4, 2, 2, 4))
    orders = {e: shuffle(inner, e) for e in grouping.merged}
    as_led: list[dict[str, list[Tensor]]] = []
    for leader in grouping.leaders:
        led: dict[str, list[Tensor]] = {name: [] for name in seen[0]}
        for expert in grouping.members(leader):
            order = orders.get(expert, torch.arange(inner))
            both = torch.cat([order, order + inner]) if gated else order
            index = {"h": order, "u": both, "d_u": both}
            for name, sequences in seen[expert].items():
                led[name] += [rows[:, index[name]] if name in index else rows for rows in sequences]
        as_led.append(led)
    merged_layer, merged = merge_statistics(summed(layer, seen, full), grouping, orders)
    expected = summed(merged_layer, as_led, full)
    assert merged_layer.num_experts == 2
    assert merged.full == full
    assert merged.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert merged[name].dtype == tensor.dtype
        torch.testing.assert_close(merged[name], tensor, atol=1e-3, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_what_experts_weigh_in_a_mean() -> None:
    layer = MoELayer("experts", 2, 4, 3, True, False, False, True)
    statistics = summed(layer, [rows_of(layer, 0), rows_of(layer, 1)], full=False)
    assert shares(statistics, "uniform", "up").tolist() == [1, 1]
    assert shares(statistics, "frequency", "up").tolist() == [5, 6]
    assert shares(statistics, "saliency", "down").tolist() == statistics["saliency_sum"].tolist()
    for group in GROUPS:
        assert shares(statistics, "fisher", group).tolist() == statistics[f"{group}_fisher"].tolist()


# --- whole models ----------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=token_ids()).logits
    return logits


def parameters_of(layer: MoELayer, experts: Any) -> dict[str, Tensor]:
    """Copies of a module's parameters, canonical."""
    named = {name: p.detach().clone() for name, p in experts.named_parameters(recurse=False)}
    return {key: tensor.clone() for key, tensor in canonical(layer, named).items()}


def set_parameters(layer: MoELayer, experts: Any, tensors: dict[str, Tensor]) -> None:
    for name, tensor in stocked(layer, tensors).items():
        setattr(experts, name, nn.Parameter(tensor))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_any_order_of_any_experts_channels_leaves_the_model_as_it_was(model_type: str) -> None:
    model = build_tiny(model_type)
    logits = logits_of(model)
    for index, layer in enumerate(find_moe_layers(model)):
        experts = model.get_submodule(layer.path)
        tensors = parameters_of(layer, experts)
        for expert in range(layer.num_experts):
            order_F = shuffle(layer.intermediate_size, 10 * index + expert)
            for key, tensor in tensors.items():
                axis = channel_axis(group_of(key)) - 1
                if axis < tensor[expert].dim():
                    index_F = channel_index(layer, group_of(key), order_F)
                    tensor[expert] = tensor[expert].index_select(axis, index_F)
        before = parameters_of(layer, experts)
        set_parameters(layer, experts, tensors)
        assert not torch.equal(before["up"], tensors["up"])
    torch.testing.assert_close(logits_of(model), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merging_aligned_copies_leaves_the_model_as_it_was(model_type: str, by: str) -> None:
    model = build_tiny(model_type)
    found = find_moe_layers(model)
    groupings = {}
    for index, layer in enumerate(found):
        experts = model.get_submodule(layer.path)
        tensors = parameters_of(layer, experts)
        leaders = [e // 2 * 2 + (index + 1) % 2 for e in range(layer.num_experts)]
        groupings[layer.path] = Grouping(tuple(leaders))
        for expert in groupings[layer.path].merged:
            for key, tensor in tensors.items():
                order_F = shuffle(layer.intermediate_size, expert)
                tensor[expert] = reorder(layer, key, tensor[leaders[expert]], order_F)
        set_parameters(layer, experts, tensors)
    logits = logits_of(model)
    for layer in found:
        experts, grouping = model.get_submodule(layer.path), groupings[layer.path]
        tensors = parameters_of(layer, experts)
        x_TD = torch.randn(50, layer.hidden_size, generator=torch.Generator().manual_seed(0))
        hidden = [hidden_activations(layer, experts, e, x_TD) for e in range(layer.num_experts)]
        orders = {
            e: align_expert(layer, tensors, e, grouping.leader_of[e])
            if by == "weights"
            else align_activations(hidden[e], hidden[grouping.leader_of[e]])
            for e in grouping.merged
        }
        merged = merge(layer, tensors, grouping, random_shares(layer.num_experts, 0), orders)
        map_experts(experts, len(grouping.leaders))
        set_parameters(layer, experts, merged)
        getattr(experts, MAP_NAME).copy_(torch.tensor(grouping.expert_map))
        assert experts.down_proj.shape[0] == layer.num_experts // 2
    torch.testing.assert_close(logits_of(model), logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_hidden_activations_are_the_input_of_down(model_type: str) -> None:
    model = built(model_type)
    for layer in find_moe_layers(model):
        experts: Any = model.get_submodule(layer.path)
        x_TD = torch.randn(6, layer.hidden_size, generator=torch.Generator().manual_seed(0))
        for expert in range(layer.num_experts):
            tensors = parameters_of(layer, experts)
            out_TD = hidden_activations(layer, experts, expert, x_TD) @ tensors["down"][expert].T
            if layer.has_bias:
                out_TD = out_TD + tensors["down_bias"][expert]
            if experts.has_post_expert_norm:
                out_TD = experts.post_expert_norm(out_TD)
            one = torch.ones(6, 1)
            torch.testing.assert_close(out_TD, experts(x_TD, one.long() * expert, one), atol=1e-5, rtol=1e-5)
