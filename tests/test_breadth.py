"""Every model type of the installed transformers whose experts follow the contract is compressed and reloaded.

The table of all types is printed when the session ends.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compress.checkpoint.reader import CheckpointReader
from moe_compress.errors import CheckpointError
from moe_compress.model.discovery import describe_experts
from moe_compress.model.experts import FactorisedExperts
from tests.conftest import Checkpoint, Compress
from tests.tiny_models import Unbuildable, auto_class, contract_types, token_ids

REFUSED = {
    "ernie4_5_vl_moe": "also hold",  # text and vision experts of a layer lie in one list on disk
}
"""Types that are refused before any tensor is read, and a part of what is said."""

FEWEST_PASSING = 50
PASSED = "passed"


@pytest.mark.parametrize("model_type", contract_types())
def test_compressed_and_reloaded(
    model_type: str, tiny: Checkpoint, compressed: Compress, breadth: dict[str, str], tmp_path: Path
) -> None:
    try:
        original = tiny(model_type)
    except Unbuildable as error:
        breadth[model_type] = f"not built: {error.reason}"
        pytest.skip(error.reason)
    breadth[model_type] = "FAILED"
    if model_type in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[model_type]) as refusal:
            compressed(model_type, ranks="full")
        breadth[model_type] = f"refused: {refusal.value}"
        return

    model, logits = load(model_type, original)
    _, logits_full = load(model_type, compressed(model_type, ranks="full"))
    error_full = relative_error(logits_full, logits)
    assert error_full < 1e-4

    folder = compressed(model_type, ratio=0.5)
    half, logits_half = load(model_type, folder)
    assert bool(logits_half.isfinite().all())
    error_half = relative_error(logits_half, logits)
    assert error_half > 1e-2

    removed = owned = 0
    for path in half.config.quantization_config.layers:
        stock, kept = model.get_submodule(path), half.get_submodule(path)
        assert isinstance(kept, FactorisedExperts)
        saved = num_parameters(stock) - num_parameters(kept)
        assert saved > 0
        removed += saved
        owned += describe_experts(path, stock).num_parameters
    assert removed >= owned / 2
    assert stored_bytes(original) - stored_bytes(folder) == removed * torch.float32.itemsize

    longer = half.generate(input_ids=token_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert longer.shape == (2, 11)

    half.save_pretrained(tmp_path)
    again, logits_again = load(model_type, tmp_path)
    state, state_again = half.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    torch.testing.assert_close(logits_again, logits_half, atol=1e-5, rtol=0)
    breadth[model_type] = f"{PASSED}  full {error_full:.0e}  half {error_half:.2f}"


def test_enough_types_pass(breadth: dict[str, str]) -> None:
    if breadth.keys() != set(contract_types()):
        pytest.skip("needs the whole file to run")
    assert sum(row.startswith(PASSED) for row in breadth.values()) >= FEWEST_PASSING


def test_without_the_plugin_loading_fails(compressed: Compress) -> None:
    folders = [str(compressed(model_type, ratio=0.5)) for model_type in ("mixtral", "gpt_oss", "qwen3_moe")]
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
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * 3


@torch.no_grad()
def load(model_type: str, folder: Path) -> tuple[Any, Tensor]:
    """The model and its logits; nothing in the checkpoint may be left over or missing."""
    model, info = auto_class(model_type).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model, model(input_ids=token_ids()).logits


def relative_error(logits: Tensor, reference: Tensor) -> float:
    return ((logits - reference).norm() / reference.norm()).item()


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def stored_bytes(folder: Path) -> int:
    return sum(entry.num_bytes for entry in CheckpointReader(folder).entries.values())
