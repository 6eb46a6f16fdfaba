"""The dense form of a factorised checkpoint is the same model, for a process that has never heard of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_compress.checkpoint import CheckpointReader
from moe_compress.errors import CheckpointError, CompressionError, RecipeError
from moe_compress.materialize import materialize_checkpoint
from tests.conftest import Checkpoint, Compress
from tests.tiny_models import auto_class, token_ids

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "factorised": ("mixtral", {"ratio": 0.5}),
    "based": ("qwen3_moe", {"ratio": 0.4, "base": "mean", "gate_up": "separate"}),
    "biased": ("gpt_oss", {"ratio": 0.3, "base": "closed_form"}),
    "ungated": ("nemotron_h", {"ratio": 0.5}),
    "merged": ("olmoe", {"name": "msmoe", "ratio": 0.5}),
    "merged biased": ("gpt_oss", {"name": "msmoe", "ratio": 0.5}),
    "sparse": ("qwen3_moe", {"name": "mcsmoe", "ratio": 0.6}),
}

STOCK_LOADER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids, folders = torch.tensor(json.loads(sys.argv[1])), sys.argv[2:]
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        save_file({"logits": model(input_ids=ids).logits.contiguous()}, folder + ".logits")
assert not any(name.startswith("moe_compress") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def small(compressed: Compress) -> Callable[[str], Path]:
    """The compressed checkpoint of one of METHODS."""
    return lambda name: compressed(METHODS[name][0], **METHODS[name][1])


@pytest.fixture(scope="module")
def dense(small: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense form of each of METHODS, by name, and the logits that stock transformers gets from them."""
    root = tmp_path_factory.mktemp("dense")
    for name in METHODS:
        materialize_checkpoint(small(name), root / name)
    assert {path.name for path in root.iterdir()} == METHODS.keys()
    arguments = [json.dumps(token_ids().tolist()), *(str(root / name) for name in METHODS)]
    done = subprocess.run([sys.executable, "-c", STOCK_LOADER, *arguments], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", METHODS)
def test_stock_transformers_computes_the_same_logits(name: str, dense: Path, small: Callable[[str], Path]) -> None:
    model = auto_class(METHODS[name][0]).from_pretrained(small(name), dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=token_ids()).logits
    found = load_file(dense / f"{name}.logits")["logits"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_experts_change(name: str, dense: Path, small: Callable[[str], Path], tiny: Checkpoint) -> None:
    source, model_type = small(name), METHODS[name][0]
    before, after, original = (CheckpointReader(folder) for folder in (source, dense / name, tiny(model_type)))
    layers = before.config["quantization_config"]["layers"]
    made = {key for key in after.entries if key.rpartition(".")[0] in layers}
    assert {key.rpartition(".")[0] for key in made} == layers.keys()
    assert after.total_bytes == original.total_bytes
    for key in after.entries.keys() - made:
        assert torch.equal(after.entries[key].read(), original.entries[key].read()), key
    assert after.config == {key: value for key, value in before.config.items() if key != "quantization_config"}
    assert (after.folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (after.folder / "moe_compress.json").exists()


def test_a_shorter_router_is_refused(compressed: Compress, tmp_path: Path) -> None:
    source = compressed("mixtral", name="prune", ratio=0.5, router="slice")
    with pytest.raises(CheckpointError, match=r"the router of model\.layers\.0\.mlp\.experts is shorter"):
        materialize_checkpoint(source, tmp_path / "dense")
    assert not any(tmp_path.iterdir())


def test_an_ordinary_checkpoint_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a stock checkpoint already"):
        materialize_checkpoint(tiny("mixtral"), tmp_path / "dense")
    assert not any(tmp_path.iterdir())


def test_the_output_must_be_free(small: Callable[[str], Path], tmp_path: Path) -> None:
    source = small("factorised")
    (tmp_path / "file").write_text("")
    for output, reason in ((tmp_path, "exists"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(RecipeError, match=reason):
            materialize_checkpoint(source, output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_half_way_leaves_nothing(small: Callable[[str], Path], tmp_path: Path) -> None:
    source = small("factorised")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).symlink_to(path)
    shard = (
        broken
        / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][
            "model.layers.2.mlp.experts.gate_up_u"
        ]
    )
    tensors = load_file(shard)
    tensors["model.layers.2.mlp.experts.gate_up_u"].fill_(torch.inf)
    shard.unlink()
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CompressionError, match="NaN or infinity"):
        materialize_checkpoint(broken, tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
