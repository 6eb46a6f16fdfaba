"""Switch Transformers on the experts contract: the same function, the same tensors on disk, the same statistics."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
    SwitchTransformersSparseMLP,
)

from moe_compress.calibration.pairs import calibration_pairs
from moe_compress.calibration.schedule import Step
from moe_compress.calibration.statistics import LayerStatistics, is_gram
from moe_compress.calibration.text import TokenBatch
from moe_compress.calibration.worker import CalibrationSetup, LayerWorker, statistics_path
from moe_compress.checkpoint.manifest import Manifest
from moe_compress.checkpoint.reader import CheckpointReader
from moe_compress.materialize import materialize_checkpoint
from moe_compress.model.skeleton import Skeleton
from moe_compress.model.streamer import LayerStreamer, model_inputs, summed_nll
from moe_compress.model.switch import put_on_contract
from moe_compress.plan import make_plan
from moe_compress.recipe import parse_recipe
from tests.switch_models import (
    cipher_pairs,
    compress_switch,
    letter_tokenizer,
    random_switch,
    save_switch,
    write_pairs,
)

CAPACITY = 2
"""Tokens of a sequence that an expert takes: so few that most sequences overflow."""

METHODS: dict[str, dict[str, Any]] = {
    "mapped": {"name": "msmoe", "ratio": 0.5},
    "mapped, another number in each layer": {"name": "msmoe", "ratio": 0.5, "counts": [3, 5]},
    "mapped, a shorter router": {"name": "msmoe", "ratio": 0.5, "router": "slice", "counts": [3, 8]},
    "low rank + sparse": {"name": "mcsmoe", "ratio": 0.6},
    "low rank + sparse, nothing merged": {"name": "mcsmoe", "ratio": 0.4, "merge_ratio": 0},
    "factorised": {"name": "d2moe", "ratio": 0.4, "base": "mean"},
    "stock, merged": {"name": "msmoe", "ratio": 0.5, "router": "shrink", "counts": "uniform"},
    "stock, pruned": {"name": "prune", "ratio": 0.5},
}


@pytest.fixture(scope="module")
def stock() -> Any:
    return random_switch(num_experts=8, expert_capacity=CAPACITY, initializer_factor=1.0)


@pytest.fixture(scope="module")
def folder(stock: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_switch(stock, tmp_path_factory.mktemp("switch") / "original")


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    """Sources and targets of several lengths."""
    return calibration_pairs(cipher_pairs(10, seed=3, shortest=2), letter_tokenizer(), 10, 16, seed=0)


@pytest.fixture(scope="module")
def compressed(folder: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        output = folder.parent / kind.replace(" ", "-")
        if not output.exists():
            pairs = write_pairs(folder.parent / "pairs.jsonl", cipher_pairs(32, seed=1, shortest=2))
            compress_switch(folder, output, pairs, method=METHODS[kind])
        return output

    return make


def inputs_of(batch: TokenBatch) -> dict[str, Tensor]:
    return model_inputs(batch.input_ids, batch.attention_mask, batch.labels)


@torch.no_grad()
def logits_of(model: Any, batch: TokenBatch) -> Tensor:
    return model(**inputs_of(batch)).logits


def stock_blocks(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SwitchTransformersSparseMLP)}


def test_contract_experts_are_the_stock_experts_on_disk(tmp_path: Path) -> None:
    model = random_switch(num_experts=12)  # 10 sorts before 2
    skeleton = Skeleton(CheckpointReader(save_switch(model, tmp_path / "model")))
    layers = skeleton.moe_layers()
    assert [layer.path for layer in layers] == [f"{name}.experts" for name in stock_blocks(model)]
    for layer in layers:
        assert (layer.num_experts, layer.up_shape, layer.down_shape) == (12, (64, 48), (48, 64))
        single: Any = model.get_submodule(layer.path)
        for name, own in zip(layer.owned, ("wi", "wo"), strict=True):
            expected = torch.stack([getattr(single[f"expert_{e}"], own).weight for e in range(12)])
            tensor = skeleton.take(name)
            assert torch.equal(tensor, expected)
            written = skeleton.on_disk({name: tensor})
            assert written.keys() == {f"{layer.path}.expert_{e}.{own}.weight" for e in range(12)}
            assert all(torch.equal(model.state_dict()[key], value) for key, value in written.items())


def test_contract_block_is_the_stock_block_also_beyond_capacity(stock: Any) -> None:
    own = deepcopy(stock)
    put_on_contract(own)
    hidden = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(0))
    for name, block in stock_blocks(stock).items():
        here = hidden.clone().requires_grad_()
        there = hidden.clone().requires_grad_()
        expected, found = block(here), own.get_submodule(name)(there)
        torch.testing.assert_close(found, expected)
        overflowed = block.router(hidden)[0].sum(-1) == 0
        assert overflowed.any()
        assert not overflowed.all()
        assert not found[overflowed].any()
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(there.grad, here.grad)


def test_streamed_logits_and_gradients_are_the_whole_models(stock: Any, folder: Path, batch: TokenBatch) -> None:
    skeleton = Skeleton(CheckpointReader(folder))
    streamer = LayerStreamer(skeleton, inputs_of(batch))
    assert not streamer.chained
    torch.testing.assert_close(streamer.drive_forward(inputs_of(batch)), logits_of(stock, batch), atol=2e-5, rtol=1e-5)
    names = {layer: [n for n, _ in skeleton.layers[layer].named_parameters()] for layer in skeleton.layers}
    found: dict[str, Tensor | None] = {}

    def only_loaded(name: str) -> Any:
        in_memory = [n for n, layer in skeleton.layers.items() if not all(p.is_meta for p in layer.parameters())]
        assert in_memory == [name]
        return nullcontext()

    loss = streamer.drive_backward(
        inputs_of(batch),
        summed_nll,
        only_loaded,
        lambda name: [p for _, p in skeleton.layers[name].named_parameters()],
        lambda name, grads: found.update(zip((f"{name}.{n}" for n in names[name]), grads, strict=True)),
    )
    own = deepcopy(stock)
    expected_loss = own(**inputs_of(batch)).loss * (batch.labels != -100).sum()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss.detach())
    assert found.keys() == {name for layer in names for name in (f"{layer}.{n}" for n in names[layer])}
    for name, grad in found.items():
        path, _, leaf = name.rpartition(".")
        if path.endswith(".experts"):
            single = {"up_proj": "wi", "down_proj": "wo"}[leaf]
            parameters = [getattr(expert, single).weight for expert in own.get_submodule(path).values()]
            expected = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        else:
            expected = own.get_parameter(name).grad
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-4, msg=name)


def watch_whole_model(model: Any, batch: TokenBatch) -> dict[str, dict[str, Any]]:
    """What single experts saw in a forward and backward of the whole stock model, routed real tokens only.

    For each MoE layer: counts, and for each expert the rows of input, hidden and output gradients.
    """
    seen: dict[str, dict[str, Any]] = {}
    handles = []
    for name, block in stock_blocks(model).items():
        real = (batch.target_mask if name.startswith("decoder") else batch.attention_mask).flatten()
        record: dict[str, Any] = {"real": real, "num_dropped": 0, "rows": defaultdict(dict), "logits": None}
        seen[f"{name}.experts"] = record

        def routed(module: Any, args: Any, output: Any, record: Any = record) -> None:
            mask = output[0].flatten(0, 1)
            record["mask"], record["weight"] = mask, output[1].detach().flatten()
            record["num_dropped"] = int((mask.sum(-1) == 0)[record["real"]].sum())
            record["logits"] = output[2].detach().flatten(0, 1)[record["real"]]

        handles.append(block.router.register_forward_hook(routed))
        for e, expert in enumerate(block.experts.values()):

            def called(module: Any, args: Any, output: Any, record: Any = record, e: int = e) -> None:
                tokens = record["mask"][:, e].nonzero().flatten()
                keep = record["real"][tokens]
                row = record["rows"][e]
                row["x"], row["weight"] = args[0].detach()[keep], record["weight"][tokens[keep]]
                row["y"] = output.detach()[keep]
                output.register_hook(lambda grad: row.__setitem__("d_y", grad[keep]))

            def first(module: Any, args: Any, output: Any, record: Any = record, e: int = e) -> None:
                tokens = record["mask"][:, e].nonzero().flatten()
                keep = record["real"][tokens]
                output.register_hook(lambda grad: record["rows"][e].__setitem__("d_up", grad[keep]))

            def second(module: Any, args: Any, output: Any, record: Any = record, e: int = e) -> None:
                tokens = record["mask"][:, e].nonzero().flatten()
                record["rows"][e]["h"] = args[0].detach()[record["real"][tokens]]

            handles.append(expert.register_forward_hook(called))
            handles.append(expert.wi.register_forward_hook(first))
            handles.append(expert.wo.register_forward_hook(second))
    loss = model(**inputs_of(batch)).loss * (batch.labels != -100).sum()
    loss.backward()
    for handle in handles:
        handle.remove()
    return seen


def test_statistics_are_those_of_whole_model_hooks(stock: Any, folder: Path, batch: TokenBatch, tmp_path: Path) -> None:
    batch.save(tmp_path / "tokens.safetensors")
    setup = CalibrationSetup(
        checkpoint=folder,
        tokens=tmp_path / "tokens.safetensors",
        statistics=tmp_path / "statistics",
        scratch=tmp_path / "scratch",
        batch_size=4,
        dtype=None,
        device="cpu",
        activation_bytes=2**20,
        full_grams=True,
        sampled_seed=None,
        chunk_layers=1,
        num_workers=1,
    )
    setup.statistics.mkdir()
    worker = LayerWorker(setup)
    assert not worker.describe().chained
    for index in range(len(worker.batches)):
        worker.run(Step("backward", 0, index), [])
    assert set(worker.run(Step("finish", 0, 0), [])[1]) == set(worker.moe)
    expected = watch_whole_model(deepcopy(stock), batch)  # the whole text as one micro-batch, all columns there
    for path, layer in worker.moe.items():
        found, record = LayerStatistics.load(layer, statistics_path(setup.statistics, path)), expected[path]
        rows = record["rows"]
        counts = [len(rows[e]["x"]) if e in rows else 0 for e in range(8)]
        assert found["num_tokens"].tolist() == counts
        assert sum(counts) + record["num_dropped"] == int(record["real"].sum())
        assert record["num_dropped"] > 0
        assert int((~record["real"]).sum()) > 0
        gram = record["logits"].double().mT @ record["logits"].double()
        torch.testing.assert_close(found["router_gram"], gram, rtol=1e-4, atol=1e-2)
        for e in range(8):
            if not counts[e]:
                assert not found["saliency_sum"][e]
                continue
            row = {name: tensor.double() for name, tensor in rows[e].items()}
            d_y = row["d_y"]
            weight = row["weight"]
            sums = {
                "weight_sum": weight.sum(),
                "saliency_sum": (weight * row["y"].norm(dim=1)).sum(),
                "taylor_sum": (d_y * row["y"]).sum(1).square().sum(),
                "input_sum": row["x"].sum(0),
                "up_input_gram": row["x"].mT @ row["x"],
                "up_input_loss_gram": (row["x"] * row["d_up"].square().sum(1, keepdim=True)).mT @ row["x"],
                "down_input_gram": row["h"].mT @ row["h"],
                "down_grad_gram": d_y.mT @ d_y,
            }
            for name, value in sums.items():
                summed = found.gram(name) if is_gram(name) else found[name]
                torch.testing.assert_close(summed[e].double(), value, rtol=2e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", METHODS)
@torch.no_grad()
def test_compressed_checkpoint_loads_generates_and_saves_again(
    kind: str, compressed: Callable[[str], Path], batch: TokenBatch, tmp_path: Path
) -> None:
    output = compressed(kind)
    model = AutoModelForSeq2SeqLM.from_pretrained(output).eval()
    logits = logits_of(model, batch)
    skeleton = Skeleton(CheckpointReader(output))
    streamed = LayerStreamer(skeleton, inputs_of(batch)).drive_forward(inputs_of(batch))
    torch.testing.assert_close(streamed, logits, atol=1e-4, rtol=1e-5)
    ids = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=3)
    assert ids.shape[0] == len(batch.input_ids)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").eval()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())
    torch.testing.assert_close(logits_of(again, batch), logits, atol=1e-5, rtol=1e-5)
    assert tensors_of(tmp_path / "again") == tensors_of(output)


def tensors_of(folder: Path) -> dict[str, list[int]]:
    """Names and shapes on disk."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("kind", ["mapped", "low rank + sparse", "factorised"])
def test_materialised_it_is_a_stock_checkpoint_of_the_same_function(
    kind: str, compressed: Callable[[str], Path], batch: TokenBatch, tmp_path: Path
) -> None:
    output = compressed(kind)
    materialize_checkpoint(output, tmp_path / "dense")
    dense, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert any(isinstance(module, SwitchTransformersExperts) for module in dense.modules())
    expected = logits_of(AutoModelForSeq2SeqLM.from_pretrained(output).eval(), batch)
    torch.testing.assert_close(logits_of(dense.eval(), batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [{"name": "msmoe", "ratio": 0.5}, {"name": "mcsmoe", "ratio": 0.6}])
def test_plan_knows_the_sizes(method: dict[str, Any], folder: Path, stock: Any) -> None:
    plan = make_plan(
        parse_recipe({"model": str(folder), "output": "out", "calibration": {"text": "t"}, "method": method})
    )
    assert (plan.num_layers, plan.num_moe_layers, plan.num_experts, plan.top_k) == (4, 2, 8, 1)
    parts = {part.name: part for part in plan.parts}
    experts = [p for name, p in stock.named_parameters() if ".experts." in name]
    assert parts["routed experts"].parameters == sum(p.numel() for p in experts)
    assert parts["routed experts"].parameters_after == int((1 - method["ratio"]) * parts["routed experts"].parameters)
    assert sum(part.parameters for part in plan.parts) == sum(p.numel() for p in stock.parameters())


def test_mapped_experts_are_duplicated_stock_experts(
    stock: Any, compressed: Callable[[str], Path], batch: TokenBatch
) -> None:
    output = compressed("mapped, another number in each layer")
    own = deepcopy(stock)
    leaders = {path: entry["leader_of"] for path, entry in Manifest.load(output).layers.items()}
    assert {len(set(leader_of)) for leader_of in leaders.values()} == {3, 5}
    for path, leader_of in leaders.items():
        experts: Any = own.get_submodule(path)
        assert isinstance(experts, SwitchTransformersExperts)
        place = {leader: i for i, leader in enumerate(sorted(set(leader_of)))}
        with safe_open(next(f for f in output.glob("*.safetensors") if in_file(f, path)), "pt") as file:
            for e, leader in enumerate(leader_of):
                for name in ("wi", "wo"):
                    stored = file.get_tensor(f"{path}.expert_{place[leader]}.{name}.weight")
                    getattr(experts[f"expert_{e}"], name).weight.data = stored
    model = AutoModelForSeq2SeqLM.from_pretrained(output).eval()
    torch.testing.assert_close(logits_of(model, batch), logits_of(own, batch), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits_of(model, batch), logits_of(stock, batch), atol=1e-3)


def in_file(path: Path, prefix: str) -> bool:
    with safe_open(path, "pt") as file:
        return any(name.startswith(prefix) for name in file.keys())  # noqa: SIM118


WITHOUT_PLUGIN = """
import json, sys
from transformers import AutoModelForSeq2SeqLM

def load(folder):
    try:
        _, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    except RuntimeError as error:
        return str(error)
    return [*info["missing_keys"], *info["unexpected_keys"]]

print(json.dumps([load(folder) for folder in sys.argv[1:]]))
"""


def test_without_the_plugin_it_loads_whole_or_not_at_all(compressed: Callable[[str], Path]) -> None:
    folders = [str(compressed(kind)) for kind in METHODS]
    done = subprocess.run([sys.executable, "-c", WITHOUT_PLUGIN, *folders], capture_output=True, text=True, check=True)
    for kind, answer in zip(METHODS, json.loads(done.stdout), strict=True):
        if kind.startswith("stock"):
            assert answer == []
        else:
            assert "ignore_mismatched_sizes" in answer, kind
