"""A trained checkpoint: the student's, in its form, its dtypes and its shards, but for what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_compress.checkpoint.manifest import MANIFEST_NAME, Manifest, verify
from moe_compress.checkpoint.reader import CheckpointReader
from moe_compress.checkpoint.writer import write_shard
from moe_compress.distillation.parameters import choose_trained
from moe_compress.distillation.snapshots import BEST_NAME, LAYERS_NAME
from moe_compress.distillation.sparsity import ColumnPruner
from moe_compress.distillation.student import load_model
from moe_compress.distillation_options import Sparsity
from moe_compress.errors import RecipeError
from moe_compress.progress import Reporter
from moe_compress.stages.publish_trained import count_parameters, publish_trained
from tests.conftest import Checkpoint, Compress
from tests.switch_models import cipher_pairs, compress_switch, random_switch, save_switch, write_pairs
from tests.tiny_models import build_tiny, token_ids

OUTCOME = {"steps": 3, "best_step": 2, "validation": []}
PROVENANCE = {"student_digest": "0" * 16, "seed": 0}


def train(student: Path, folder: Path, chosen: str | list[str] = "all") -> tuple[PreTrainedModel, Path]:
    """A model as training would leave it, every trained parameter moved, and the folder of its best weights."""
    model = load_model(student, torch.float32)
    names = choose_trained(model, chosen)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    weights = {name: model.get_parameter(name).detach().clone() for name in names}
    keep(folder, weights, None)
    return model, folder


def keep(folder: Path, weights: dict[str, Tensor], layers: dict[str, Any] | None) -> None:
    folder.mkdir()
    write_shard(folder / BEST_NAME, weights)
    (folder / LAYERS_NAME).write_text(json.dumps(layers))


def publish(student: Path, trained: Path, output: Path) -> Path:
    publish_trained(student, trained, output, PROVENANCE, OUTCOME, Reporter(None))
    return output


def logits(model: PreTrainedModel) -> Tensor:
    ids = token_ids() % model.config.get_text_config().vocab_size
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, **more).logits
    return found


def entries(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], str, str]]:
    found = CheckpointReader(checkpoint).entries
    return {name: (entry.shape, entry.dtype, entry.file.name) for name, entry in found.items()}


def assert_published(student: Path, output: Path, model: PreTrainedModel) -> None:
    """The trained model loads from the output, which looks as the student does on disk."""
    torch.testing.assert_close(logits(load_model(output, torch.float32)), logits(model), rtol=1e-5, atol=1e-5)
    assert entries(output) == entries(student)
    assert verify(output) == []
    assert (output / "config.json").read_bytes() == (student / "config.json").read_bytes()
    assert {path.name for path in output.iterdir()} == {path.name for path in student.iterdir()} | {MANIFEST_NAME}


METHODS: dict[str, dict[str, Any]] = {
    "factorised": {"ratio": 0.5},
    "with a base": {"ratio": 0.5, "base": "mean"},
    "mapped": {"name": "msmoe", "ratio": 0.5, "router": "keep"},
    "sliced router": {"name": "prune", "ratio": 0.25, "router": "slice"},
    "shrunk": {"name": "prune", "ratio": 0.5, "router": "shrink"},
    "low-rank and sparse": {"name": "mcsmoe", "ratio": 0.6},
}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", METHODS)
def test_every_form(form: str, model_type: str, compressed: Compress, tmp_path: Path) -> None:
    student = compressed(model_type, **METHODS[form])
    model, trained = train(student, tmp_path / "trained")
    output = publish(student, trained, tmp_path / "output")
    assert_published(student, output, model)
    before, after = Manifest.load(student), Manifest.load(output)
    assert after.training == PROVENANCE | {"steps": 3, "best_step": 2}
    kept = {"training", "files"}
    assert after.model_dump(exclude=kept) == before.model_dump(exclude=kept)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "ernie4_5_moe", "granitemoe", "qwen3_vl_moe"])
def test_an_original(model_type: str, tiny: Checkpoint, tmp_path: Path) -> None:
    student = tiny(model_type)
    model, trained = train(student, tmp_path / "trained")
    output = publish(student, trained, tmp_path / "output")
    assert_published(student, output, model)
    found = Manifest.load(output)
    assert found.parameters == count_parameters(CheckpointReader(output)) == count_parameters(CheckpointReader(student))
    assert found.parameters["original"] == sum(tensor.numel() for tensor in everything(student).values())
    assert 0 < found.parameters["experts_original"] < found.parameters["original"]


@pytest.mark.parametrize("chosen", ["all", ["*shared_experts.gate_proj"], ["*shared_experts.up_proj"]])
def test_one_tensor_on_disk_that_is_two_in_memory(chosen: str | list[str], tiny: Checkpoint, tmp_path: Path) -> None:
    student = tiny("inkling_mm_model")
    model, trained = train(student, tmp_path / "trained", chosen)
    assert_published(student, publish(student, trained, tmp_path / "output"), model)


def everything(checkpoint: Path) -> dict[str, Tensor]:
    return {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("method", [None, {"name": "msmoe", "ratio": 0.5}, {"name": "d2moe", "ratio": 0.4}])
def test_switch(method: dict[str, Any] | None, tmp_path: Path) -> None:
    student = save_switch(random_switch(tie_word_embeddings=True), tmp_path / "switch")
    if method is not None:
        pairs = write_pairs(tmp_path / "pairs.jsonl", cipher_pairs(40, 0))
        compress_switch(student, tmp_path / "student", pairs, method=method)
        student = tmp_path / "student"
    model, trained = train(student, tmp_path / "trained")
    assert_published(student, publish(student, trained, tmp_path / "output"), model)


@pytest.mark.parametrize("on_disk", ["embedding", "both", "both, not tied"])
def test_tied_embeddings(on_disk: str, tmp_path: Path) -> None:
    student = tmp_path / "student"
    model = build_tiny("mixtral")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(student)
    tensors = load_file(student / "model.safetensors")
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone()
    if on_disk != "embedding":
        tensors["lm_head.weight"] = head + (0.1 if "not" in on_disk else 0)
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    chosen = ["*embed_tokens.weight"] if "not" in on_disk else "all"
    trained_model, trained = train(student, tmp_path / "trained", chosen)
    assert_published(student, publish(student, trained, tmp_path / "output"), trained_model)
    if "not" in on_disk:
        after = everything(tmp_path / "output")
        assert torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])
        assert not torch.equal(after["model.embed_tokens.weight"], head)


def test_shards_dtypes_and_what_nobody_loads_stay(tmp_path: Path) -> None:
    """Shards of an expert's own size, so that a fused parameter comes from several, of several dtypes."""
    student = tmp_path / "student"
    build_tiny("mixtral").to(torch.bfloat16).save_pretrained(student, max_shard_size="4KB")
    index = json.loads((student / "model.safetensors.index.json").read_text())
    shard = student / index["weight_map"]["model.norm.weight"]
    foreign = {"model.mtp.0.weight": torch.arange(3.0)}
    kept = load_file(shard)
    save_file(foreign | kept | {"model.norm.weight": kept["model.norm.weight"].float() + 1e-6}, shard, {"format": "pt"})
    index["weight_map"]["model.mtp.0.weight"] = shard.name
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    model, trained = train(student, tmp_path / "trained", "experts")
    output = publish(student, trained, tmp_path / "output")
    assert entries(output) == entries(student)
    before, after = everything(student), everything(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".experts." in name}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.bfloat16())
    assert torch.equal(logits(load_model(output, torch.float32)), logits(model))


@pytest.mark.parametrize("chosen", ["all", "routers"])
def test_of_levels_the_largest_is_written(chosen: str, compressed: Compress, tmp_path: Path) -> None:
    student = compressed("mixtral", ratio=0.3, levels=[0.5, 0.6])
    model, trained = train(student, tmp_path / "trained", chosen)
    output = publish(student, trained, tmp_path / "output")
    torch.testing.assert_close(logits(load_model(output, torch.float32)), logits(model), rtol=1e-5, atol=1e-5)
    config = CheckpointReader(output).config
    assert "trim" not in config
    assert "levels" not in json.dumps(config)
    assert not any("_level" in name for name in entries(output))
    found = Manifest.load(output)
    assert found.levels == {}
    assert "levels" not in json.dumps(found.layers)
    assert found.parameters == Manifest.load(student).parameters
    stock = {key: value for key, value in config.items() if key != "quantization_config"}
    (output / "config.json").write_text(json.dumps(stock))
    with pytest.raises(RuntimeError, match="mismatch"):  # without the plugin it must not load
        AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("ratio", [0.75, 0.88])
def test_pruned_columns_leave_the_file(ratio: float, compressed: Compress, tmp_path: Path) -> None:
    student = compressed("mixtral", name="mcsmoe", ratio=0.6, merge_ratio=0.25, sparse_share=0.7)
    before = Manifest.load(student)
    model, trained = train(student, tmp_path / "trained")
    pruner = ColumnPruner(model, Sparsity(ratio=ratio), 1, before.parameters["experts_original"])
    pruner.step(1)
    assert pruner.is_done
    weights, layers = pruner.compact(load_file(trained / BEST_NAME))
    shutil.rmtree(trained)
    keep(trained, weights, layers)
    output = publish(student, trained, tmp_path / "output")
    torch.testing.assert_close(logits(load_model(output, torch.float32)), logits(model), rtol=1e-5, atol=1e-5)
    after = Manifest.load(output)
    sizes = {folder: sum(tensor.numel() for tensor in everything(folder).values()) for folder in (student, output)}
    gone = sizes[student] - sizes[output]
    assert gone > 0
    for name in ("compressed", "experts_compressed"):
        assert after.parameters[name] == before.parameters[name] - gone
    assert after.parameters["experts_original"] == before.parameters["experts_original"]
    assert after.parameters["experts_compressed"] <= (1 - ratio) * after.parameters["experts_original"]
    on_disk = CheckpointReader(output).config["quantization_config"]["layers"]
    columns = 0
    for path, layer in on_disk.items():
        for name in ("gate_up", "down"):
            assert after.layers[path][name]["num_sparse"] == layer[name]["num_sparse"]
            columns += sum(layer[name]["num_sparse"])
        assert after.layers[path]["leader_of"] == before.layers[path]["leader_of"]
    assert columns == sum(shape[0] for name, (shape, _, _) in entries(output).items() if name.endswith("_s"))
    assert verify(output) == []


def test_publishing_again_gives_the_same_bytes(compressed: Compress, tmp_path: Path) -> None:
    student = compressed("mixtral", ratio=0.5)
    _, trained = train(student, tmp_path / "trained", "factors")
    output = publish(student, trained, tmp_path / "output")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    publish(student, trained, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    _, other = train(student, tmp_path / "other", "wholes")
    with pytest.raises(RecipeError, match="checkpoint of another job"):
        publish(student, other, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
