"""Checkpoints with fewer experts load through the plugin and compute what a stock model would."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_compress.checkpoint import write_shard
from moe_compress.errors import CheckpointError
from moe_compress.model.discovery import MoELayer, find_moe_layers
from moe_compress.model.merged import MAP_NAME, map_experts
from moe_compress.model.routing import resize_experts
from tests.conftest import Checkpoint
from tests.model.handmade import Handmade, load, logits_of
from tests.tiny_models import Unbuildable, build_tiny, contract_types, token_ids

MODEL_TYPES = ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark", "gemma4_text"]


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


def test_a_mapped_checkpoint_is_read_layer_by_layer(model_type: str, mapped: Path) -> None:
    model, skeleton = load(model_type, mapped), Handmade(mapped).skeleton
    for layer in skeleton.moe_layers():
        state, found = model.get_submodule(layer.path).state_dict(), skeleton.load(layer.path).state_dict()
        assert MAP_NAME in found
        assert state.keys() == found.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in found.items())
        skeleton.drop(layer.path)


@pytest.mark.parametrize("any_type", ["mixtral", "gpt_oss", "nemotron_h", "muse_spark", "qwen3_5_moe_text"])
def test_tensors_go_back_under_the_names_and_with_the_bytes_they_came_with(any_type: str, tiny: Checkpoint) -> None:
    made = Handmade(tiny(any_type))
    skeleton, layer = made.skeleton, made.moe[-1]
    tensors = made.rows(layer, range(layer.num_experts))
    tensors |= {name: skeleton.take(name) for name in resize_experts(skeleton.model, layer.num_experts // 2).axes}
    found = skeleton.on_disk(tensors)
    stored = load_file(tiny(any_type) / "model.safetensors")
    assert found.keys() == {source for name in tensors for source in skeleton.targets[name]}
    assert all(torch.equal(stored[name], tensor) for name, tensor in found.items())


def test_a_checkpoint_under_the_names_in_memory_keeps_them(tmp_path: Path, tiny: Checkpoint) -> None:
    stock = load("mixtral", tiny("mixtral"))
    source = tmp_path / "fused"
    source.mkdir()
    write_shard(source / "model.safetensors", stock.state_dict())
    (source / "config.json").write_bytes((tiny("mixtral") / "config.json").read_bytes())
    made = Handmade(source)
    tensors = made.rows(made.moe[0], [1, 3])
    assert made.skeleton.on_disk(tensors).keys() == tensors.keys()
    ours, fused = (make_mapped(folder).save(tmp_path / f"{folder.name}-mapped") for folder in (tiny("mixtral"), source))
    assert torch.equal(logits_of(load("mixtral", ours)), logits_of(load("mixtral", fused)))


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
    for index, layer in enumerate(find_moe_layers(stock)):
        # the stock model with a cut router whose choices are led back to the experts by their old numbers
        kept = torch.tensor(kept_of(layer, index))
        block = stock.get_submodule(layer.path.rpartition(".")[0])
        router = getattr(block, "gate", None) or block.router
        for module in router.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None and len(tensor) == layer.num_experts:
                        cut = tensor.detach()[kept]
                        store[name] = nn.Parameter(cut) if store is module._parameters else cut
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


def test_a_sliced_model_behaves_like_any_other(model_type: str, sliced: Path, tiny: Checkpoint, tmp_path: Path) -> None:
    model = load(model_type, sliced)
    longer = model.generate(input_ids=token_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert longer.shape == (2, 11)
    model.save_pretrained(tmp_path)
    again = load(model_type, tmp_path)
    state, state_again = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    dtypes = {
        name: tensor.dtype for name, tensor in load(model_type, sliced, dtype=torch.bfloat16).state_dict().items()
    }
    stock = load(model_type, tiny(model_type), dtype=torch.bfloat16)
    assert dtypes == {name: tensor.dtype for name, tensor in stock.state_dict().items()}
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
    with pytest.raises(CheckpointError, match=r"lacks .*down_proj"):
        load("mixtral", folder)


def test_without_the_plugin_loading_fails(tiny: Checkpoint, tmp_path: Path) -> None:
    folders = []
    for model_type in ("mixtral", "qwen3_moe", "gpt_oss", "nemotron_h"):
        shorter = Handmade(tiny(model_type))
        shorter.slice_router(shorter.moe[0], kept_of(shorter.moe[0], 0))
        folders.append(shorter.save(tmp_path / f"{model_type}-sliced"))
        folders.append(make_mapped(tiny(model_type)).save(tmp_path / f"{model_type}-mapped"))
    script = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded")
    except RuntimeError as error:
        print("refused" if "ignore_mismatched_sizes" in str(error) else error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["refused"] * len(folders)
