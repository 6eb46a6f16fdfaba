"""Layer by layer from the checkpoint equals autograd through the whole loaded model, bit for bit in fp32.

Both sides are loaded by the same route: where tensors lie in memory decides the last bit of a CPU product.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compress.checkpoint.reader import CheckpointReader
from moe_compress.model.driven import Inputs
from moe_compress.model.skeleton import ROOT, Skeleton
from moe_compress.model.streamer import LayerStreamer, model_inputs, summed_nll
from tests.conftest import Checkpoint
from tests.tiny_models import auto_class, build_tiny, token_ids

CHAINED = [
    "deepseek_v3",
    "ernie4_5_moe",
    "gemma4",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "jamba",
    "lfm2_moe",
    "minimax",
    "mixtral",
    "nemotron_h",
    "phimoe",
    "qwen3_5_moe",
    "qwen3_moe",
]
DRIVEN = ["glm5_next", "glm_moe_dsa", "hy_v4", "mistral_large4", "zaya"]

Grads = dict[str, Tensor]


def inputs_with_padding() -> Inputs:
    ids = token_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, -4:] = False
    return model_inputs(ids, mask)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("model_type", CHAINED)
def test_chained_layers_equal_the_whole_model(model_type: str, padded: bool, tiny: Checkpoint) -> None:
    inputs = inputs_with_padding() if padded else {"input_ids": token_ids()}
    streamer = open_streamer(tiny(model_type), inputs)
    assert streamer.chained
    logits, grads = sweep(streamer, inputs)
    assert_equals_whole_model(model_type, tiny(model_type), inputs, logits, grads)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("model_type", DRIVEN)
def test_driven_layers_equal_the_whole_model(model_type: str, padded: bool, tiny: Checkpoint) -> None:
    inputs = inputs_with_padding() if padded else {"input_ids": token_ids()}
    streamer = open_streamer(tiny(model_type), inputs)
    assert not streamer.chained
    logits, grads = drive(streamer, inputs)
    assert_equals_whole_model(model_type, tiny(model_type), inputs, logits, grads)


def test_a_chained_model_may_also_be_driven(tiny: Checkpoint) -> None:
    inputs = inputs_with_padding()
    logits, grads = drive(open_streamer(tiny("mixtral"), inputs), inputs)
    assert_equals_whole_model("mixtral", tiny("mixtral"), inputs, logits, grads)


def test_sharded_checkpoint_streams_equal(tmp_path: Path) -> None:
    build_tiny("mixtral").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    inputs = {"input_ids": token_ids()}
    logits, grads = sweep(open_streamer(tmp_path, inputs), inputs)
    assert_equals_whole_model("mixtral", tmp_path, inputs, logits, grads)


def test_only_the_root_stays_in_memory(tiny: Checkpoint) -> None:
    inputs = {"input_ids": token_ids()}
    streamer = open_streamer(tiny("mixtral"), inputs)
    drive(streamer, inputs)
    skeleton = streamer.skeleton
    resident = {skeleton.owner(name) for name, p in skeleton.model.named_parameters() if not p.is_meta}
    assert resident == {ROOT}


def open_streamer(folder: Path, inputs: Inputs) -> LayerStreamer:
    return LayerStreamer(Skeleton(CheckpointReader(folder)), inputs)


def experts_of(skeleton: Skeleton, layer: str) -> dict[str, nn.Parameter]:
    """The parameters of the experts inside one loaded layer, by their names in the model."""
    names = [name for moe in skeleton.moe_layers() for name in moe.owned if skeleton.owner(name) == layer]
    return {name: skeleton.model.get_parameter(name) for name in names}


def sweep(streamer: LayerStreamer, inputs: Inputs) -> tuple[Tensor, Grads]:
    """Logits, and gradients of all experts, each layer loaded once forward and once backward."""
    skeleton, trace = streamer.skeleton, streamer.trace(inputs)
    hidden, saved = trace.hidden, []
    for call in trace.calls:
        saved.append(hidden)
        skeleton.load(call.name)
        with torch.no_grad():
            hidden = streamer.run(call, hidden)
        skeleton.drop(call.name)
    leaf = hidden.detach().requires_grad_()
    logits = streamer.head(inputs, leaf)
    (grad,) = torch.autograd.grad(summed_nll(logits, inputs), leaf)
    grads: Grads = {}
    for call, hidden in zip(reversed(trace.calls), reversed(saved), strict=True):
        skeleton.load(call.name)
        experts = experts_of(skeleton, call.name)
        grad, *found = streamer.vjp(call, hidden, grad, list(experts.values()))
        grads.update(zip(experts, found, strict=True))
        skeleton.drop(call.name)
    return logits.detach(), grads


def drive(streamer: LayerStreamer, inputs: Inputs) -> tuple[Tensor, Grads]:
    """The same by the model's own forward."""
    grads: Grads = {}
    skeleton = streamer.skeleton

    def keep(layer: str, found: list[Any]) -> None:
        grads.update(zip(experts_of(skeleton, layer), found, strict=True))

    streamer.drive_backward(
        inputs, summed_nll, lambda name: nullcontext(), lambda name: list(experts_of(skeleton, name).values()), keep
    )
    return streamer.drive_forward(inputs), grads


def assert_equals_whole_model(model_type: str, folder: Path, inputs: Inputs, logits: Tensor, grads: Grads) -> None:
    model: Any = auto_class(model_type).from_pretrained(folder)
    whole = model(use_cache=False, **inputs).logits
    summed_nll(whole, inputs).backward()
    assert torch.equal(logits, whole)
    assert len(grads) >= 4
    for name, grad in grads.items():
        assert grad.count_nonzero() > 0
        assert torch.equal(grad, model.get_parameter(name).grad), name
