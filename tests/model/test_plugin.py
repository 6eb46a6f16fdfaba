"""A compressed checkpoint behaves like any other model of transformers once the package is imported."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from moe_compress.errors import CheckpointError
from moe_compress.model.experts import FactorisedExperts
from tests.conftest import Compress
from tests.tiny_models import token_ids


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def folder(request: pytest.FixtureRequest, compressed: Compress) -> Path:
    return compressed(request.param, ratio=0.5)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=token_ids()).logits.float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def factors(model: Any) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, FactorisedExperts)
        for name, parameter in module.named_parameters()
        if name.endswith(("_u", "_v", "_base", "_dense"))
    }


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [
        (torch.bfloat16, lambda folder: load(folder, dtype=torch.bfloat16)),
        (torch.float16, lambda folder: load(folder).half()),
        (torch.float32, lambda folder: load(folder, dtype=torch.bfloat16).float()),
    ],
    ids=["bfloat16", "half", "float"],
)
def test_dtype_changes_like_that_of_any_model(folder: Path, dtype: torch.dtype, cast: Callable[[Path], Any]) -> None:
    model = cast(folder)
    assert {factor.dtype for factor in factors(model).values()} == {dtype}
    assert relative_error(logits_of(model), logits_of(load(folder))) < 0.1


def test_device_map_and_deepcopy_change_no_bit(folder: Path) -> None:
    model = load(folder)
    for other in (load(folder, device_map="auto"), copy.deepcopy(model)):
        state = other.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert relative_error(logits_of(other), logits_of(model)) < 1e-6


@torch.no_grad()
def test_base_model_without_its_head_loads(folder: Path) -> None:
    base = AutoModel.from_pretrained(folder)
    whole = load(folder)
    assert factors(base)
    hidden = base(input_ids=token_ids()).last_hidden_state
    torch.testing.assert_close(whole.lm_head(hidden), whole(input_ids=token_ids()).logits, atol=1e-5, rtol=0)


def test_every_factor_is_reached_by_gradients(folder: Path) -> None:
    model = load(folder).train()
    model(input_ids=token_ids(4, 32), labels=token_ids(4, 32)).loss.backward()
    # A slot of whole matrices alone has empty factors.
    grads = {name: factor.grad for name, factor in factors(model).items() if factor.numel()}
    assert grads
    assert all(grad is not None and grad.count_nonzero() > 0 for grad in grads.values())


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


@pytest.mark.parametrize("name", ["up_u", "down_proj"])
def test_a_missing_tensor_is_refused(broken: Path, name: str) -> None:
    files = {file: load_file(file) for file in broken.glob("*.safetensors")}
    file, key = next((file, key) for file, tensors in files.items() for key in tensors if key.endswith(name))
    save_file({k: v for k, v in files[file].items() if k != key}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks"):
        load(broken)


def test_a_newer_format_is_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format_version 2 is newer than 1"):
        load(broken)


def test_a_layer_the_model_lacks_is_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["model.layers.99.mlp.experts"] = next(iter(layers.values()))
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.99"):
        load(broken)
