"""A trained checkpoint: the student's, in its form, its dtypes and its shards, but for what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.checkpoint.manifest import MANIFEST_NAME, Manifest, verify
from moe_compress.checkpoint.reader import CheckpointReader
from moe_compress.checkpoint.writer import write_shard
from moe_compress.distillation.parameters import choose_trained
from moe_compress.distillation.snapshots import BEST_NAME, LAYERS_NAME
from moe_compress.distillation.student import load_model
from moe_compress.progress import Reporter
from moe_compress.stages.publish_trained import count_parameters, publish_trained
from tests.conftest import Checkpoint, Compress
from tests.tiny_models import token_ids

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
    ids = token_ids()
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


def everything(checkpoint: Path) -> dict[str, Tensor]:
    return {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
