"""Checkpoints with fewer experts load through the plugin and compute what a stock model would."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compress.errors import CheckpointError
from moe_compress.model.discovery import MoELayer, find_moe_layers
from moe_compress.model.merged import MAP_NAME, map_experts
from moe_compress.model.skeleton import Skeleton
from tests.conftest import Checkpoint
from tests.model.handmade import Handmade, load, logits_of
from tests.tiny_models import Unbuildable, build_tiny, contract_types, token_ids

MODEL_TYPES = ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"]


def grouping_of(layer: MoELayer, index: int) -> tuple[list[int], list[int]]:
    """Stored experts and map: another number of experts in every layer, in an order of their own."""
    stored = list(range(layer.num_experts))[:: index % 3 + 1]
    return stored, [(e + index) % len(stored) for e in range(layer.num_experts)]


def make_mapped(source: Path) -> Handmade:
    made = Handmade(source)
    for index, layer in enumerate(made.moe):
        made.keep_router(layer, *grouping_of(layer, index))
    return made


@torch.no_grad()
def set_experts(experts: Any, rows: Tensor) -> None:
    """Gives a stock module's experts the parameters of others."""
    for parameter in experts.parameters(recurse=False):
        if len(parameter) == experts.num_experts:
            parameter.copy_(parameter[rows].clone())


@pytest.fixture(scope="module", params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def mapped(model_type: str, tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer experts behind the whole router, another number of them in each layer."""
    return make_mapped(tiny(model_type)).save(tmp_path_factory.mktemp(model_type) / "mapped")


def test_one_group_an_expert_is_the_model_itself(model_type: str, tiny: Checkpoint, tmp_path: Path) -> None:
    made = Handmade(tiny(model_type))
    for layer in made.moe:
        made.keep_router(layer, list(range(layer.num_experts)), list(range(layer.num_experts)))
    model = load(model_type, made.save(tmp_path / "mapped"))
    stock = load(model_type, tiny(model_type))
    assert torch.equal(logits_of(model), logits_of(stock))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stock.state_dict().items())


def test_merged_experts_compute_what_a_stock_model_with_copies_of_them_does(
    model_type: str, mapped: Path, tiny: Checkpoint
) -> None:
    model, stock = load(model_type, mapped), load(model_type, tiny(model_type))
    sizes = set()
    for index, layer in enumerate(find_moe_layers(stock)):
        stored, expert_map = grouping_of(layer, index)
        set_experts(stock.get_submodule(layer.path), torch.tensor(stored)[expert_map])
        sizes.add(len(stored))
        assert len(model.get_submodule(layer.path).down_proj) == len(stored)
    assert len(sizes) > 1
    torch.testing.assert_close(logits_of(model), logits_of(stock), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits_of(stock), logits_of(load(model_type, tiny(model_type))), atol=1e-2)


def test_a_mapped_model_is_saved_and_loaded_again_bit_for_bit(model_type: str, mapped: Path, tmp_path: Path) -> None:
    model = load(model_type, mapped)
    model.save_pretrained(tmp_path)
    again = load(model_type, tmp_path)
    state, state_again = model.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_mapped_model_behaves_like_any_other(model_type: str, mapped: Path) -> None:
    model = load(model_type, mapped)
    longer = model.generate(input_ids=token_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert longer.shape == (2, 11)
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))
    half = load(model_type, mapped, dtype=torch.bfloat16)
    for layer in find_moe_layers(half):
        experts = half.get_submodule(layer.path)
        assert getattr(experts, MAP_NAME).dtype == torch.int64
        assert experts.down_proj.dtype == torch.bfloat16
    model.train()
    model(input_ids=token_ids(4, 32), labels=token_ids(4, 32)).loss.backward()
    for layer in find_moe_layers(model):
        assert model.get_submodule(layer.path).down_proj.grad.count_nonzero() > 0


def test_a_mapped_checkpoint_opens_layer_by_layer(model_type: str, mapped: Path) -> None:
    made = Handmade(mapped)
    model = load(model_type, mapped)
    for layer in find_moe_layers(model):
        loaded: Any = made.skeleton.load(layer.path)
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                loaded.state_dict().values(), model.get_submodule(layer.path).state_dict().values(), strict=True
            )
        )
    assert isinstance(made.skeleton, Skeleton)


@torch.no_grad()
@pytest.mark.parametrize("any_type", contract_types())
def test_every_type_runs_behind_a_map(any_type: str) -> None:
    try:
        model = build_tiny(any_type)
    except Unbuildable as error:
        pytest.skip(error.reason)
    mapped = copy.deepcopy(model)
    for layer in find_moe_layers(model):
        expert_map = torch.arange(layer.num_experts) // 2
        set_experts(model.get_submodule(layer.path), expert_map)
        experts: Any = mapped.get_submodule(layer.path)
        full = {name: p.clone() for name, p in experts.named_parameters(recurse=False)}
        map_experts(experts, layer.num_experts // 2)
        for name, parameter in experts.named_parameters(recurse=False):
            parameter.copy_(full[name][: len(parameter)])
        getattr(experts, MAP_NAME).copy_(expert_map)
    torch.testing.assert_close(logits_of(mapped), logits_of(model), atol=1e-5, rtol=1e-5)


# --- a shorter router ------------------------------------------------------------------------------------------


def kept_of(layer: MoELayer, index: int) -> list[int]:
    """Experts that stay, another number in every layer, always the same number in each half."""
    return [e for e in range(layer.num_experts) if index % 2 == 1 or e % (layer.num_experts // 2)]


@pytest.fixture(scope="module")
def sliced(model_type: str, tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router as short as the list of experts in every other layer, the others as they were."""
    made = Handmade(tiny(model_type))
    for index, layer in enumerate(made.moe):
        if len(kept_of(layer, index)) < layer.num_experts:
            made.slice_router(layer, kept_of(layer, index))
    return made.save(tmp_path_factory.mktemp(model_type) / "sliced")


def test_each_layer_has_a_router_as_short_as_its_list_of_experts(
    model_type: str, sliced: Path, tiny: Checkpoint
) -> None:
    model, stock = load(model_type, sliced), load(model_type, tiny(model_type))
    axes = {"weight": 0, "bias": 0, "e_score_correction_bias": 0}
    for index, layer in enumerate(find_moe_layers(stock)):
        # the stock model with a cut router whose choices are led back to the experts by their old numbers
        kept = torch.tensor(kept_of(layer, index))
        block = stock.get_submodule(layer.path.rpartition(".")[0])
        router = getattr(block, "gate", None) or block.router
        for name, tensor in {**dict(router.named_parameters()), **dict(router.named_buffers())}.items():
            owner = router.get_submodule(name.rpartition(".")[0])
            cut = tensor.detach().index_select(axes[name.rpartition(".")[2]], kept)
            setattr(owner, name.rpartition(".")[2], nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut)
        for holder in (block, router):
            for count in ("num_experts", "n_routed_experts"):
                if getattr(holder, count, None) == layer.num_experts:
                    setattr(holder, count, len(kept))
        block.experts.register_forward_pre_hook(lambda _, args, kept=kept: (args[0], kept[args[1]], args[2]))
        assert len(model.get_submodule(layer.path).down_proj) == len(kept)
    torch.testing.assert_close(logits_of(model), logits_of(stock), atol=1e-5, rtol=1e-5)


def test_equal_counts_are_a_stock_checkpoint(model_type: str, tiny: Checkpoint, tmp_path: Path) -> None:
    ours, stock = Handmade(tiny(model_type)), Handmade(tiny(model_type))
    for layer in ours.moe:
        kept = kept_of(layer, 0)
        ours.slice_router(layer, kept)
        stock.slice_router(layer, kept, is_stock=True)
    through_plugin = load(model_type, ours.save(tmp_path / "ours"))
    as_stock = load(model_type, stock.save(tmp_path / "stock"))
    assert not hasattr(as_stock.config, "quantization_config")
    state, state_stock = through_plugin.state_dict(), as_stock.state_dict()
    assert state.keys() == state_stock.keys()
    assert all(torch.equal(state[name], state_stock[name]) for name in state)
    assert torch.equal(logits_of(through_plugin), logits_of(as_stock))
    assert find_moe_layers(as_stock)[0].num_experts == len(kept)


def test_a_sliced_model_behaves_like_any_other(model_type: str, sliced: Path, tmp_path: Path) -> None:
    model = load(model_type, sliced)
    longer = model.generate(input_ids=token_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert longer.shape == (2, 11)
    model.save_pretrained(tmp_path)
    again = load(model_type, tmp_path)
    state, state_again = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    half = load(model_type, sliced, dtype=torch.bfloat16)
    stock_dtypes = {n: t.dtype for n, t in build_tiny(model_type).to(torch.bfloat16).state_dict().items()}
    kept_in_fp32 = {n for n, t in half.state_dict().items() if t.dtype == torch.float32}
    assert all("bias" in name for name in kept_in_fp32), kept_in_fp32
    assert half.state_dict().keys() == stock_dtypes.keys()
    model.set_attn_implementation("eager")
    modules = [m for m in model.modules() if "Attention" in type(m).__name__ and hasattr(m, "config")]
    assert {m.config._attn_implementation for m in modules} == {"eager"}


# --- what is not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MAP_NAME, "down_proj"])
def test_a_mapped_checkpoint_that_lacks_a_tensor_is_refused(name: str, tiny: Checkpoint, tmp_path: Path) -> None:
    folder = make_mapped(tiny("gpt_oss")).save(tmp_path / "broken", without=name)
    with pytest.raises(CheckpointError, match=f"lacks .*{name}; it is incomplete"):
        load("gpt_oss", folder)


def test_an_unfused_checkpoint_without_experts_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    folder = make_mapped(tiny("mixtral")).save(tmp_path / "broken", without="w2.weight")
    with pytest.raises(CheckpointError, match="lacks .*down_proj"):
        load("mixtral", folder)


def test_without_the_plugin_loading_fails(mapped: Path, sliced: Path) -> None:
    script = """
import sys
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
for folder in sys.argv[1:]:
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        try:
            auto.from_pretrained(folder)
            print("loaded")
        except RuntimeError as error:
            print("refused" if "ignore_mismatched_sizes" in str(error) else error)
        except ValueError as error:
            assert "Unrecognized configuration class" in str(error), error
"""
    command = [sys.executable, "-c", script, str(mapped), str(sliced)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"refused"}, done.stdout
    assert len(done.stdout.split()) >= 2
