"""Factorised experts compute what the dense matrices they stand for do, on every route, forward and backward."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_compress.materialize import materialize_checkpoint
from moe_compress.model import routes, tiles
from moe_compress.model.discovery import describe_experts
from moe_compress.model.expert_bank import GROUPS, Group, stock_name, to_stock
from moe_compress.model.experts import FactorisedExperts, skip_base_columns
from moe_compress.model.merged import shorten
from moe_compress.model.routes import RouteName
from moe_compress.model.slots import DENSE, INDEX_SUFFIX, slots_of
from tests.conftest import Checkpoint
from tests.model.handmade import Handmade, load, logits_of
from tests.tiny_models import build_tiny, expert_modules, token_ids

ROUTES: tuple[RouteName, ...] = get_args(RouteName)
MODEL_TYPES = ["mixtral", "gpt_oss", "nemotron_h", "muse_spark"]  # plain; biased, interleaved; ungated; with a norm

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one rank": {"ranks": [4, 4, 4, 4]},
    "wide": {"ranks": [40, 3, DENSE, 37]},
    "whole": {"ranks": [DENSE, DENSE, DENSE, DENSE]},
    "nothing": {"ranks": [0, 0, 0, 0]},
    "base": {"bases": [0, 0, 0, 0]},
    "some bases": {"bases": [1, -1, 0, 1]},
    "more bases than choices": {"bases": [2, 0, 1, 2]},
    "columns": {"bases": [0, 0, 0, 0], "base_columns": 7},
    "share": {"share": [0, 0, 2, 0]},
    "share one": {"ranks": [3, 5, 2, 5], "share": [1, 1, 1, 1]},
    "sparse": {"num_sparse": [2, 0, 0, 3]},
    "all": {"bases": [0, 1, -1, 1], "share": [0, 0, 2, 0], "num_sparse": [2, 0, 0, 3], "base_columns": 7},
}


def specification(stock: Any, **fields: Any) -> dict[str, dict[str, Any]]:
    """One slot for gate and up; of four experts one is whole and one has no factors, unless said otherwise."""
    first = "gate_up" if stock.has_gate else "up"
    return {name: {"ranks": [5, 3, DENSE, 0], **fields} for name in (first, "down")}


def randomised(experts: nn.Module, seed: int = 0) -> Any:
    """Random factors; column numbers apart and ascending in each expert."""
    generator = torch.Generator().manual_seed(seed)
    for slot in getattr(experts, "slots"):  # noqa: B009
        for name, shape in slot.shapes().items():
            tensor = getattr(experts, name)
            if not name.endswith(INDEX_SUFFIX):
                tensor.data.copy_(torch.randn(*shape, generator=generator) * 0.2)
                continue
            counts = slot.sparse.lengths if name == slot.name + INDEX_SUFFIX else shape
            numbers = [torch.randperm(slot.num_columns, generator=generator)[:n].sort().values for n in counts]
            tensor.copy_(torch.cat(numbers))
    return experts


def factorised(model_type: str = "mixtral", **fields: Any) -> tuple[Any, Any]:
    """A stock module of four experts and a factorised one of the same shapes."""
    stock: Any = expert_modules(build_tiny(model_type))[0]
    if stock.num_experts > 4:
        shorten(stock, 4)
        stock.num_experts = 4
    return stock, randomised(FactorisedExperts(stock, specification(stock, **fields)))


def routed(experts: Any, num_tokens: int, top_k: int = 2, num_busy: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of which most go to one expert and none to the last; both choices of a token may be one expert."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, experts.slots[-1].num_rows, generator=generator)
    index = torch.randint(num_busy, (num_tokens, top_k), generator=generator)
    index[torch.rand(num_tokens, generator=generator) < 0.5, 0] = 1
    weights = torch.rand(num_tokens, top_k, generator=generator)
    return hidden.requires_grad_(), index, weights.requires_grad_()


def as_dense(stock: Any, experts: Any, *call: Tensor) -> Tensor:
    """What the stock module puts out with the dense matrices, differentiable with respect to the factors."""
    layer, dense = describe_experts("", stock), experts.dense_weights()
    down = dense.pop("down")
    canonical: dict[Group, Tensor] = {"up": torch.cat(list(dense.values()), dim=1), "down": down}
    own = {name: parameter for name, parameter in experts.named_parameters() if name.endswith("_bias")}
    found: Tensor = functional_call(
        stock, own | {stock_name(layer, g): to_stock(layer, g, canonical[g]) for g in GROUPS}, call
    )
    return found


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs).norm() <= tolerance * theirs.norm() + 1e-7


def differentiated(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output and its gradients along a fixed direction; zero where it does not depend on an input."""
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, toward, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True))]


def compare(stock: Any, experts: Any, num_tokens: int) -> None:
    """Forward and backward against the dense matrices, on every route."""
    hidden, index, weights = call = routed(experts, num_tokens)
    inputs = [hidden, weights, *experts.parameters()]
    expected = differentiated(as_dense(stock, experts, *call), inputs)
    for experts.route in ROUTES:
        assert_same(differentiated(experts(hidden, index, weights), inputs), expected, 1e-5)


@pytest.mark.parametrize("features", FEATURES)
def test_every_feature_on_every_route(features: str) -> None:
    stock, experts = factorised(**FEATURES[features])
    compare(stock, experts, num_tokens=23)


@pytest.mark.parametrize("features", ["plain", "more bases than choices", "all"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_kind_of_experts_on_every_route(model_type: str, features: str) -> None:
    stock, experts = factorised(model_type, **FEATURES[features])
    compare(stock, experts, num_tokens=1)
    compare(stock, experts, num_tokens=40)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of a few rows goes part by part."""
    monkeypatch.setattr(routes, "_PART_ROWS", 8)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("features", ["plain", "nothing", "base", "more bases than choices", "all"])
def test_parts_of_a_batch_are_the_batch(model_type: str, features: str) -> None:
    stock, experts = factorised(model_type, **FEATURES[features])
    call = routed(experts, 40)
    with torch.no_grad():
        assert_same([experts(*call)], [as_dense(stock, experts, *call)], 1e-5)


@pytest.mark.parametrize("bag", [tiles._BAG_PRODUCTS, -1], ids=["summed", "multiplied"])
@pytest.mark.parametrize("num_tokens", [1, 3, 30, 700])
@pytest.mark.parametrize("features", ["plain", "wide", "some bases", "share one", "all"])
def test_half_precision_equals_the_dense_matrices_to_rounding(
    features: str, num_tokens: int, bag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_BAG_PRODUCTS", bag)
    stock, experts = factorised(**FEATURES[features])
    call = routed(experts, num_tokens)
    inputs = [call[0], call[2], *experts.parameters()]
    expected = differentiated(as_dense(stock, experts, *call), inputs)
    experts.bfloat16()
    half = [call[0].detach().bfloat16().requires_grad_(), call[2].detach().bfloat16().requires_grad_()]
    for experts.route in ("loop", "every"):
        found = differentiated(experts(half[0], call[1], half[1]), [*half, *experts.parameters()])
        assert_same(found, expected, 12 * torch.finfo(torch.bfloat16).eps)
        with torch.no_grad():
            assert_same([experts(half[0], call[1], half[1])], expected[:1], 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.usefixtures("small_parts")
def test_products_in_half_precision_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the numbers of tokens and the ranks."""
    monkeypatch.setattr(tiles, "_BAG_PRODUCTS", -1)
    stock: Any = expert_modules(build_tiny("mixtral"))[0]
    seen, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **into: (seen.add((*a.shape, b.shape[1])), mm(a, b, **into))[1])
    with torch.no_grad():
        for ranks in ([40, 41, 50, 33], [64, 38, 35, 36]):
            experts = randomised(FactorisedExperts(stock, specification(stock, ranks=ranks))).bfloat16()
            for num_tokens in range(65, 90):
                hidden, index, weights = routed(experts, num_tokens)
                experts(hidden.bfloat16(), index, weights.bfloat16())
    assert 4 <= len(seen) <= 40


@pytest.mark.parametrize("route", [None, *ROUTES])
def test_no_token_is_no_problem(route: RouteName | None) -> None:
    _, experts = factorised(**FEATURES["all"])
    experts.route = route
    width = experts.slots[-1].num_rows
    for dtype in (torch.float32, torch.bfloat16):
        out = experts.to(dtype)(
            torch.empty(0, width, dtype=dtype), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
        )
        assert out.shape == (0, width)
        assert out.dtype == dtype


def without_skipped(experts: Any, call: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, list[Tensor]]:
    """The experts with the columns zeroed that skipping leaves out, found by the definition; and what was zeroed."""
    hidden, index, weights = call
    zeroed = []
    with torch.no_grad():
        for slot in experts.slots:
            base, own = getattr(experts, f"{slot.name}_base"), torch.tensor(slot.bases)[index]
            if slot.name != "down":
                x = hidden[(own >= 0).any(1)]
            else:
                dense = experts.dense_weights()
                h = experts._apply_gate(torch.einsum("td,tkmd->tkm", hidden, dense["gate_up"][index]))
                x = torch.cat([(h * (weights * (own == b))[..., None]).sum(1) for b in range(slot.num_bases)])
            x = x[:, getattr(experts, f"{slot.name}_base_columns")] if slot.has_base_columns else x
            score = base.square().sum((0, 1)).sqrt() * x.square().sum(0).sqrt()
            least = score.argsort()[: int(slot.skip * slot.num_base_columns)]
            base[:, :, least] = 0
            zeroed.append(least)
    return experts, zeroed


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 60])
@pytest.mark.parametrize("fields", [{"bases": [0, 0, 0, 0]}, {"bases": [0, 1, -1, 1], "base_columns": 11}])
def test_skipping_equals_zero_columns(fields: dict[str, Any], num_tokens: int) -> None:
    _, experts = factorised(**fields, skip=0.6, ranks=[2, 1, DENSE, 0])
    _, all_columns = factorised(**fields, skip=0.6, ranks=[2, 1, DENSE, 0])
    all_columns.skip_base_columns = False
    call = routed(experts, num_tokens)
    all_columns, zeroed = without_skipped(all_columns, call)
    assert all(len(columns) > 5 for columns in zeroed)
    expected = all_columns(*call).detach()
    for experts.route in ROUTES:
        for is_differentiated in (False, True):
            with torch.set_grad_enabled(is_differentiated):
                assert_same([experts(*call).detach()], [expected], 1e-5)
    skip_base_columns(nn.ModuleList([experts]), False)
    _, full = factorised(**fields, ranks=[2, 1, DENSE, 0])
    with torch.no_grad():
        assert_same([experts(*call)], [full(*call)], 1e-5)
        assert_same([experts.dense_weights()["down"]], [full.dense_weights()["down"]], 1e-7)


@torch.no_grad()
def test_skipping_row_by_row() -> None:
    """Of more bases than a token has experts every row is multiplied, the columns are still those of the call."""
    _, experts = factorised(bases=[2, 0, 1, 2], skip=0.5)
    call = routed(experts, 30)
    found = []
    for experts.route in ROUTES:
        found.append(experts(*call))
        assert_same(found[-1:], found[:1], 1e-5)
    experts.skip_base_columns = False
    assert (experts(*call) - found[0]).norm() > 1e-3 * found[0].norm()


@torch.no_grad()
def test_skipping_follows_the_parameter() -> None:
    """Norms of columns are kept between calls, but not beyond a change of the base."""
    _, experts = factorised(bases=[0, 0, 0, 0], skip=0.5)
    call = routed(experts, 20)
    experts(*call)
    experts.gate_up_base[..., ::2] *= 100
    _, fresh = factorised(bases=[0, 0, 0, 0], skip=0.5)
    fresh.load_state_dict(experts.state_dict())
    assert torch.equal(experts(*call), fresh(*call))


class Case:
    """A checkpoint with every feature in every layer."""

    def __init__(self, source: Path, skip: float = 0.0) -> None:
        self.made = Handmade(source)
        for index, layer in enumerate(self.made.moe):
            first = "gate_up" if layer.has_gate else "up"
            fields = {"ranks": [5, 3, DENSE, 0], **FEATURES["all"], "skip": skip}
            spec = {name: dict(fields) for name in (first, "down")}
            holder: Any = nn.Module()
            holder.slots = slots_of(spec, layer.up_shape[0], *layer.down_shape)
            for slot in holder.slots:
                for name, shape in slot.shapes().items():
                    dtype = torch.int32 if name.endswith(INDEX_SUFFIX) else torch.float32
                    holder.register_buffer(name, torch.empty(shape, dtype=dtype))
            self.made.factorise(layer, spec, dict(randomised(holder, seed=index).named_buffers()))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_a_checkpoint_with_every_feature(model_type: str, tiny: Checkpoint, tmp_path: Path) -> None:
    """Loads, generates, is saved and loaded again, and has a dense form of the same logits."""
    model = load(model_type, Case(tiny(model_type)).made.save(tmp_path / "made"))
    logits = logits_of(model)
    longer = model.generate(input_ids=token_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert longer.shape == (2, 11)
    model.save_pretrained(tmp_path / "again")
    again = load(model_type, tmp_path / "again")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    shutil.copy(tiny(model_type) / "tokenizer.json", tmp_path / "made")
    materialize_checkpoint(tmp_path / "made", tmp_path / "dense")
    torch.testing.assert_close(logits_of(load(model_type, tmp_path / "dense")), logits, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_that_skips_is_saved_as_it_was(tiny: Checkpoint, tmp_path: Path) -> None:
    """Though its bases lie by column in memory once it has run."""
    model = load("mixtral", Case(tiny("mixtral"), skip=0.5).made.save(tmp_path / "made"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = logits_of(model)
    model.save_pretrained(tmp_path / "again")
    again = load("mixtral", tmp_path / "again")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(logits_of(again), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 5], ids=["gathered", "every"])
def test_decoding_is_one_graph(num_tokens: int) -> None:
    """No part of it waits for a result; the compiler of kernels itself is not called."""
    _, experts = factorised(**FEATURES["all"], skip=0.4)
    call = routed(experts, num_tokens)
    with torch.no_grad():
        expected = experts(*call)
        found = torch.compile(experts, fullgraph=True, backend="aot_eager")(*call)
    torch.compiler.reset()
    assert_same([found], [expected], 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_decoding_compiles() -> None:
    _, experts = factorised()
    call = routed(experts, 1)
    with torch.no_grad():
        expected = experts(*call)
        found = torch.compile(experts, fullgraph=True)(*call)
    torch.compiler.reset()
    assert_same([found], [expected], 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("features", FEATURES)
def test_every_route_on_a_gpu(features: str) -> None:
    stock, experts = factorised(**FEATURES[features])
    for num_tokens in (1, 40):
        call = routed(experts.cpu(), num_tokens)
        expected = as_dense(stock, experts, *call).detach()
        on_gpu = [tensor.detach().cuda() for tensor in call]
        for experts.cuda().route in (None, *ROUTES):
            assert_same([experts(*on_gpu).detach().cpu()], [expected], 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_decoding_is_captured_as_a_cuda_graph() -> None:
    _, experts = factorised(**FEATURES["all"])
    experts.cuda().route = "gathered"
    call = [tensor.detach().cuda() for tensor in routed(experts.cpu(), 2)]
    experts.cuda()
    expected = experts(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = experts(*call)
    graph.replay()
    assert_same([found], [expected], 1e-5)
