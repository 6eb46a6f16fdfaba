"""Low rank + sparse columns compute what the dense matrices they stand for do, alone and behind a map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compress.errors import CheckpointError
from moe_compress.model.discovery import MoELayer, find_moe_layers
from moe_compress.model.expert_bank import GROUPS, Group, stock_name, to_canonical, to_stock
from moe_compress.model.merged import MAP_NAME
from moe_compress.model.slots import DENSE, INDEX_SUFFIX, FactorisedSlot, slots_of
from tests.conftest import Checkpoint
from tests.model.handmade import Handmade, load, logits_of
from tests.tiny_models import token_ids

MODEL_TYPES = ["mixtral", "gpt_oss", "nemotron_h", "muse_spark"]


def slots_for(layer: MoELayer, num_experts: int, joint: bool) -> dict[str, dict[str, Any]]:
    """Every kind of expert: of some rank, of none, whole; with some sparse columns, all of them, none."""
    ranks = [5, 0, DENSE, 3, 5, 0, 1, 2]
    first = ("gate_up",) if joint else ("gate", "up")
    widths = dict.fromkeys(first if layer.has_gate else ("up",), layer.hidden_size) | {"down": layer.intermediate_size}
    return {
        name: {"ranks": ranks[:num_experts], "num_sparse": [2, width, 0, 1, 0, 3, 1, 2][:num_experts]}
        for name, width in widths.items()
    }


def random_tensors(slots: list[FactorisedSlot], seed: int) -> dict[str, Tensor]:
    """Factors and columns of the slots; each expert's columns are apart and ascending."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for slot in slots:
        for name, shape in slot.shapes().items():
            tensors[name] = torch.randn(*shape, generator=generator) * 0.2
        counts = slot.sparse.lengths
        columns = [torch.randperm(slot.num_columns, generator=generator)[:n].sort().values for n in counts]
        tensors[f"{slot.name}{INDEX_SUFFIX}"] = torch.cat(columns).int()
    return tensors


def dense_of(slot: FactorisedSlot, tensors: dict[str, Tensor]) -> Tensor:
    """(E, M, N), written entry by entry of the description."""
    weights = []
    for expert, rank in enumerate(slot.ranks):
        if rank == DENSE:
            weights.append(tensors[f"{slot.name}_dense"][slot.ranks[:expert].count(DENSE)])
            continue
        start = sum(r for r in slot.ranks[:expert] if r > 0)
        weight = tensors[f"{slot.name}_u"][start : start + rank].T @ tensors[f"{slot.name}_v"][start : start + rank]
        sparse = slot.sparse_rows(expert)
        for place in range(sparse.start, sparse.stop):
            weight[:, int(tensors[f"{slot.name}{INDEX_SUFFIX}"][place])] += tensors[f"{slot.name}_s"][place]
        weights.append(weight)
    return torch.stack(weights)


class Case:
    """A checkpoint with sparse columns in every layer, and the stock parameters that it stands for."""

    def __init__(self, source: Path, is_mapped: bool) -> None:
        self.made = Handmade(source)
        self.stock: dict[str, dict[str, Tensor]] = {}
        self.expert_map: dict[str, Tensor] = {}
        for index, layer in enumerate(self.made.moe):
            count = layer.num_experts - index % 2 - 1 if is_mapped else layer.num_experts
            expert_map = [(expert + index * is_mapped) % count for expert in range(layer.num_experts)]
            self.expert_map[layer.path] = torch.tensor(expert_map)
            if is_mapped:
                self.made.keep_router(layer, list(range(count)), expert_map)
            spec = slots_for(layer, count, joint=index % 2 == 0)
            slots = slots_of(spec, layer.up_shape[0], *layer.down_shape)
            tensors = random_tensors(slots, seed=index)
            dense = {slot.name: dense_of(slot, tensors) for slot in slots}
            down = dense.pop("down")
            canonical: dict[Group, Tensor] = {"up": torch.cat(list(dense.values()), dim=1), "down": down}
            self.stock[layer.path] = {stock_name(layer, g): to_stock(layer, g, canonical[g]) for g in GROUPS}
            self.made.factorise(layer, spec, tensors)

    def stock_model(self, model_type: str, source: Path) -> Any:
        """The original with the dense matrices, one for each of the router's choices."""
        model = load(model_type, source)
        for layer in find_moe_layers(model):
            experts, expert_map = model.get_submodule(layer.path), self.expert_map[layer.path]
            own = {n: p.detach() for n, p in experts.named_parameters(recurse=False) if len(p) == layer.num_experts}
            for name, tensor in (own | self.stock[layer.path]).items():
                setattr(experts, name, nn.Parameter(tensor[expert_map].clone()))
        return model


@pytest.mark.parametrize("is_mapped", [True, False], ids=["mapped", "alone"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_model_and_its_gradients_are_those_of_the_dense_matrices(
    model_type: str, is_mapped: bool, tiny: Checkpoint, tmp_path: Path
) -> None:
    case = Case(tiny(model_type), is_mapped)
    model, stock = load(model_type, case.made.save(tmp_path / "sparse")), case.stock_model(model_type, tiny(model_type))
    torch.testing.assert_close(logits_of(model), logits_of(stock), atol=1e-5, rtol=1e-5)
    for either in (model, stock):
        logits = either(input_ids=token_ids(4, 32)).logits
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).mean().backward()
    for layer in case.made.moe:
        experts: Any = model.get_submodule(layer.path)
        assert hasattr(experts, MAP_NAME) == is_mapped
        expert_map = case.expert_map[layer.path]
        assert experts.num_experts == int(expert_map.max()) + 1
        grads: dict[Group, Tensor] = {}
        for group in GROUPS:
            grad = to_canonical(layer, group, getattr(stock.get_submodule(layer.path), stock_name(layer, group)).grad)
            grads[group] = torch.zeros(experts.num_experts, *grad.shape[1:]).index_add(0, expert_map, grad)
        dense, row = experts.dense_weights(), 0
        for slot in experts.slots:
            if slot.name == "down":
                grad_EMN = grads["down"]
            else:
                grad_EMN = grads["up"][:, row : row + slot.num_rows]
                row += slot.num_rows
            tensors = {name: getattr(experts, name).detach() for name in slot.shapes()}
            torch.testing.assert_close(dense[slot.name], dense_of(slot, tensors), atol=1e-5, rtol=1e-5)
            for name, expected in expected_gradients(slot, tensors, grad_EMN).items():
                scale = expected.abs().max().clamp_min(1e-12) if expected.numel() else 1.0
                torch.testing.assert_close(getattr(experts, name).grad / scale, expected / scale, atol=1e-4, rtol=0)


def expected_gradients(slot: FactorisedSlot, tensors: dict[str, Tensor], grad_EMN: Tensor) -> dict[str, Tensor]:
    """By the chain rule from the gradients of the dense matrices."""
    found = {name: torch.zeros_like(t) for name, t in tensors.items() if not name.endswith(INDEX_SUFFIX)}
    for expert, rank in enumerate(slot.ranks):
        grad_MN, rows = grad_EMN[expert], slot.factor_rows(expert)
        if rank == DENSE:
            found[f"{slot.name}_dense"][slot.dense_index[expert]] = grad_MN
            continue
        found[f"{slot.name}_u"][rows] = tensors[f"{slot.name}_v"][rows] @ grad_MN.T
        found[f"{slot.name}_v"][rows] = tensors[f"{slot.name}_u"][rows] @ grad_MN
        sparse = slot.sparse_rows(expert)
        found[f"{slot.name}_s"][sparse] = grad_MN[:, tensors[f"{slot.name}{INDEX_SUFFIX}"][sparse].long()].T
    return found


def test_sparse_columns_are_saved_and_loaded_again_bit_for_bit(tiny: Checkpoint, tmp_path: Path) -> None:
    model = load("gpt_oss", Case(tiny("gpt_oss"), is_mapped=True).made.save(tmp_path / "sparse"))
    model.save_pretrained(tmp_path / "again")
    again = load("gpt_oss", tmp_path / "again")
    state, state_again = model.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert torch.equal(logits_of(again), logits_of(model))
    longer = again.generate(input_ids=token_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert longer.shape == (2, 11)


def test_column_numbers_stay_integers_in_half_precision(tiny: Checkpoint, tmp_path: Path) -> None:
    folder = Case(tiny("mixtral"), is_mapped=True).made.save(tmp_path / "sparse")
    whole = logits_of(load("mixtral", folder))
    for half in (load("mixtral", folder, dtype=torch.bfloat16), load("mixtral", folder).bfloat16()):
        experts = half.get_submodule(layers_of(half)[0])
        assert experts.down_columns.dtype == torch.int32
        assert experts.down_s.dtype == torch.bfloat16
        assert ((logits_of(half).float() - whole).norm() / whole.norm()).item() < 0.1


def layers_of(model: nn.Module) -> list[str]:
    """Paths of the experts modules that a compressed model has."""
    return list(model.config.quantization_config.layers)  # type: ignore[union-attr,operator]


def test_a_sliced_router_goes_with_sparse_columns(tiny: Checkpoint, tmp_path: Path) -> None:
    """Both at once, against the same experts whole behind the same router."""
    source, kept = tiny("mixtral"), [0, 2, 3]
    sparse, whole = Handmade(source), Handmade(source)
    layer = sparse.moe[1]
    for made in (sparse, whole):
        made.slice_router(layer, kept)
    rows = {n.rpartition(".")[2]: t for n, t in whole.rows(layer, kept).items()}
    spec: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, group in (("gate_up", "up"), ("down", "down")):
        weight_EMN = rows[stock_name(layer, group)]  # type: ignore[arg-type]
        num_columns = weight_EMN.shape[2]
        spec[name] = {"ranks": [0] * 3, "num_sparse": [num_columns] * 3}
        tensors[f"{name}_u"], tensors[f"{name}_v"] = torch.empty(0, weight_EMN.shape[1]), torch.empty(0, num_columns)
        tensors[f"{name}_s"] = weight_EMN.mT.flatten(0, 1).contiguous()
        tensors[f"{name}{INDEX_SUFFIX}"] = torch.arange(num_columns, dtype=torch.int32).repeat(3)
    sparse.factorise(layer, spec, tensors)
    model = load("mixtral", sparse.save(tmp_path / "sparse"))
    reference = load("mixtral", whole.save(tmp_path / "whole"))
    assert not hasattr(model.get_submodule(layer.path), MAP_NAME)
    torch.testing.assert_close(logits_of(model), logits_of(reference), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["down_s", "up_columns", "gate_up_u", "down_proj", MAP_NAME])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(name: str, tiny: Checkpoint, tmp_path: Path) -> None:
    folder = Case(tiny("gpt_oss"), is_mapped=True).made.save(tmp_path / "broken", without=name)
    with pytest.raises(CheckpointError, match=r"lacks .*; it is incomplete"):
        load("gpt_oss", folder)
